"""Head-level baselines on the frozen backbone: static heads as DuoAttention, routed heads as Elastic Attention.

Both blend each KV head's full and streaming output by a gate and distil the dense model's answers through it, on the
samples that the layer router is trained on. DuoAttention (arXiv 2410.10819) learns one gate per head for every
prompt, with an L1 penalty; heads are then ranked by their gates. Elastic Attention (arXiv 2601.17367) learns a small
MLP per head that reads the head's own pooled queries and decides per prompt.

Shapes: `L` layers, `Hk` KV heads, `S` samples, `D` head dim. Gates: 1 = full attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flux_attention.data.sample import HOLISTIC, RETRIEVAL, TASK_CLASSES, Sample
from flux_attention.models.controller import FluxAttention
from flux_attention.models.step import SoftRouting
from flux_attention.router import LayerRouter, gumbel_noise, straight_through_gate
from flux_attention.training.data import Collator, class_index
from flux_attention.training.objective import AnswerTokens, Multipliers, answer_logits, teacher_logits, token_kl
from flux_attention.training.schedules import temperature, warmup_cosine


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """How head gates are trained.

    Args:
        steps: optimiser steps.
        batch_size: samples of a step, half of each class.
        pass_tokens: most tokens of one forward and backward pass, which keeps every activation.
        gate_lr, penalty: of the static gates (DuoAttention).
        router_lr, multiplier_lr, targets: of the head router (Elastic), Ω wanted of each class.
        seed: of the order of samples and of the gates' noise.
    """

    steps: int = 80
    batch_size: int = 8
    pass_tokens: int = 12288
    gate_lr: float = 0.03
    penalty: float = 0.5
    router_lr: float = 1e-3
    multiplier_lr: float = 2e-2
    targets: Mapping[str, float] = field(default_factory=lambda: {RETRIEVAL: 0.7, HOLISTIC: 0.9})
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "pass_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"HeadTraining.{name} must be positive, got {getattr(self, name)!r}")


Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


class _Distiller:
    """KL of the gated model to the dense one on batches of samples, a few passes a batch."""

    def __init__(self, controller: FluxAttention, samples: Sequence[Sample], options: HeadTraining) -> None:
        by_class = [[s for s in samples if s.task_class == name] for name in TASK_CLASSES]
        self.classes = [some for some in by_class if some]
        if not self.classes:
            raise ValueError("head gates need samples to be trained on")
        self.controller, self.options = controller, options
        self.generator = torch.Generator().manual_seed(options.seed)
        self._collate = Collator(pad_token_id=0)

    def batch(self) -> list[Sample]:
        """Drawn half and half from the classes, longest first so that passes hold little padding."""
        count = self.options.batch_size
        drawn = []
        for i in range(count):
            some = self.classes[i % len(self.classes)]
            drawn.append(some[int(torch.randint(len(some), (), generator=self.generator))])
        return sorted(drawn, key=len, reverse=True)

    def passes(self, batch: Sequence[Sample]) -> Iterator[list[int]]:
        part: list[int] = []
        for i in range(len(batch)):
            if part and (len(part) + 1) * len(batch[part[0]]) > self.options.pass_tokens:
                yield part
                part = []
            part.append(i)
        yield part

    def loss(self, samples: Sequence[Sample], gates: Tensor) -> Tensor:
        """Sum over the samples of the mean KL of their answer tokens; `gates [L, Hk, S]`."""
        controller = self.controller
        batch = {name: x.to(controller.device) for name, x in self._collate(samples).items()}
        answer = AnswerTokens.of(batch["labels"])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        teacher = teacher_logits(controller, ids, mask, answer)
        with controller.soft_routing(SoftRouting(forced=gates)):
            logits = answer_logits(controller, ids, mask, answer)
        return answer.sample_mean(token_kl(teacher, logits), len(samples)).sum()


def _quiet(steps: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    return steps


def train_static_heads(
    controller: FluxAttention, samples: Sequence[Sample], options: HeadTraining, progress: Progress = _quiet
) -> Tensor:
    """Gates of every KV head, float32 `[L, Hk]` on the CPU: the smaller, the less the answers need it in full."""
    shape = _shape(controller)
    gates = nn.Parameter(torch.ones(shape, device=controller.device))
    optimizer = torch.optim.Adam([gates], lr=options.gate_lr)
    distiller = _Distiller(controller, samples, options)
    with torch.enable_grad():
        for step in progress(range(options.steps), options.steps, "static heads (DuoAttention)"):
            _set_rate(optimizer, options.gate_lr, step, options)
            optimizer.zero_grad()
            batch = distiller.batch()
            for part in distiller.passes(batch):
                spread = gates[..., None].expand(*shape, len(part))
                (distiller.loss([batch[i] for i in part], spread) / len(batch)).backward()
            (options.penalty * gates.abs().mean()).backward()
            optimizer.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
    return gates.detach().float().cpu()


def pooled_heads(controller: FluxAttention, samples: Sequence[Sample], batch: int = 64) -> Tensor:
    """Each head's pooled queries, float32 `[L·Hk, S, D]` on the model's device."""
    parts = []
    for start in range(0, len(samples), batch):
        prompts = [torch.tensor(sample.prompt_ids) for sample in samples[start : start + batch]]
        parts.append(controller.probe(prompts, by_head=True).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts, 1)


def head_router(controller: FluxAttention) -> LayerRouter:
    """An untrained router with an MLP per KV head, starting near full."""
    layers, heads = _shape(controller)
    backbone = controller.config.backbone
    assert backbone is not None
    return LayerRouter(layers * heads, backbone.head_dim, 2.0).to(controller.device)


def train_head_router(
    controller: FluxAttention, samples: Sequence[Sample], options: HeadTraining, progress: Progress = _quiet
) -> LayerRouter:
    """A router with an MLP per KV head, trained through sampled hard gates and a Lagrangian on Ω."""
    layers, heads = _shape(controller)
    device = controller.device
    torch.manual_seed(options.seed)
    router = head_router(controller)
    pooled = pooled_heads(controller, samples)
    router.fit_input_scale(pooled)
    place = {id(sample): i for i, sample in enumerate(samples)}
    multipliers = Multipliers(options.targets).to(device)
    optimizer = torch.optim.AdamW(router.parameters(), lr=options.router_lr, betas=(0.9, 0.95))
    ascent = torch.optim.Adam(multipliers.parameters(), lr=options.multiplier_lr, maximize=True)
    noise = torch.Generator(device).manual_seed(options.seed)
    distiller = _Distiller(controller, samples, options)
    with torch.enable_grad():
        for step in progress(range(options.steps), options.steps, "routed heads (Elastic)"):
            _set_rate(optimizer, options.router_lr, step, options)
            tau = temperature(step, options.steps)
            optimizer.zero_grad()
            ascent.zero_grad()
            batch = distiller.batch()
            for part in distiller.passes(batch):
                chosen = [batch[i] for i in part]
                logits = router(pooled[:, [place[id(sample)] for sample in chosen]])
                gates = straight_through_gate(logits, tau, gumbel_noise(logits.shape, device, noise))
                gates = gates.unflatten(0, (layers, heads))
                classes = class_index(chosen).to(device)
                penalty = multipliers(1 - gates.mean((0, 1)), classes) * len(part)
                ((distiller.loss(chosen, gates) + penalty) / len(batch)).backward()
            nn.utils.clip_grad_norm_(router.parameters(), 5.0)
            optimizer.step()
            ascent.step()
            multipliers.project()
    return router.eval().requires_grad_(False)


def _shape(controller: FluxAttention) -> tuple[int, int]:
    backbone = controller.config.backbone
    assert backbone is not None
    return len(controller.layers), backbone.num_key_value_heads


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, options: HeadTraining) -> None:
    for group in optimizer.param_groups:
        group["lr"] = peak * warmup_cosine(step, options.steps, share=0.1)
