"""What a router is trained for: the answer's likelihood, the dense model's answer, or a measured ranking of layers.

Shapes: `B` samples, `T` tokens, `L` routable layers, `D` head dim, `V` vocabulary, `C` task classes, `n` answer tokens
of the whole batch. Gates and `p_full`: 1 = full attention. Ω = share of layers running sparse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_attention.data.sample import TASK_CLASSES
from flux_attention.models.controller import FluxAttention
from flux_attention.models.step import SoftRouting
from flux_attention.route import Dense
from flux_attention.router import LayerRouter
from flux_attention.training.answers import head_logits

IGNORED = -100  # label of positions without a loss, torch's convention

TaskLoss = Literal["lm", "distill"]


@dataclass(frozen=True)
class AnswerTokens:
    """Where the answers of a right-padded batch are.

    Attributes:
        rows, columns: int64 `[n]`: the positions whose *next* token belongs to an answer.
        targets: int64 `[n]`: those next tokens.
    """

    rows: Tensor
    columns: Tensor
    targets: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> AnswerTokens:
        """From `labels [B, T]`, not shifted, −100 outside the answers."""
        rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        if rows.numel() == 0:
            raise ValueError("labels hold no answer token: every position is -100")
        return cls(rows, columns, labels[rows, columns + 1])

    def sample_mean(self, values: Tensor, batch: int) -> Tensor:
        """Mean of per-token `values [n]` over each sample's answer, `[B]`: answers weigh the same, short or long."""
        total = values.new_zeros(batch).index_add(0, self.rows, values)
        count = values.new_zeros(batch).index_add(0, self.rows, torch.ones_like(values))
        return total / count.clamp_min(1)


def answer_logits(controller: FluxAttention, input_ids: Tensor, attention_mask: Tensor, answer: AnswerTokens) -> Tensor:
    """Logits at the answer positions only, `[n, V]` in the model's precision.

    The output layer runs on n rows: logits of a long prompt would take more memory than the model.
    """
    hidden = controller.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return head_logits(controller, hidden[answer.rows, answer.columns])


@torch.no_grad()
def teacher_logits(
    controller: FluxAttention, input_ids: Tensor, attention_mask: Tensor, answer: AnswerTokens
) -> Tensor:
    """`answer_logits` of the dense model: the same backbone with every layer full."""
    with controller.using(Dense()):
        return answer_logits(controller, input_ids, attention_mask, answer)


def token_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats per row of `[n, V]` logits, float32 `[n]`."""
    reference = F.log_softmax(teacher.float(), -1)
    return (reference.exp() * (reference - F.log_softmax(student.float(), -1))).sum(-1)


class Multipliers(nn.Module):
    """Lagrange multipliers λ1, λ2 ≥ 0 of each task class, moved by gradient *ascent* (by the trainer).

    Args:
        targets: Ω wanted of each class.
        start: initial value of all of them.
    """

    targets: Tensor
    values: nn.Parameter

    def __init__(self, targets: Mapping[str, float], start: float = 0.25) -> None:
        super().__init__()
        if set(targets) != set(TASK_CLASSES):
            raise ValueError(f"targets must name the classes {', '.join(TASK_CLASSES)}, got {', '.join(targets)}")
        for name, value in targets.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"targets[{name!r}] must be in [0, 1], got {value!r}")
        if start < 0:
            raise ValueError(f"multipliers start at {start!r}; they must not be negative")
        self.values = nn.Parameter(torch.full((len(TASK_CLASSES), 2), float(start)))
        self.register_buffer("targets", torch.tensor([targets[name] for name in TASK_CLASSES]), persistent=False)

    def forward(self, sparsity: Tensor, class_index: Tensor) -> Tensor:
        """`λ1·|Ω − t| + λ2·(Ω − t)²`, mean over the samples; `sparsity`, `class_index` `[B]`."""
        gap = sparsity - self.targets[class_index]
        linear, square = self.values[class_index].unbind(-1)
        return (linear * gap.abs() + square * gap * gap).mean()

    @torch.no_grad()
    def project(self) -> None:
        """Back to λ ≥ 0 after an ascent step."""
        self.values.clamp_(min=0)


class AnswerObjective(nn.Module):
    """Task loss on the answer tokens + the sparsity Lagrangian, through gates of the whole backbone.

    `lm`: cross entropy (the paper's). `distill`: KL(dense ‖ routed), which needs no true answer. Both are means per
    sample, then over samples. The frozen backbone is kept out of the module tree: an optimiser, a checkpoint or a
    sharding wrapper made from this module sees the router and the multipliers only.

    Args:
        controller: the attached backbone.
        loss: "lm" or "distill".
        targets: Ω wanted of each class.
        noise: draw Gumbel noise (the paper's); False takes the noise-free straight-through gate.
        multiplier_start: initial λ.

    The trainer sets `temperature` and `generator` before each pass.
    """

    def __init__(
        self,
        controller: FluxAttention,
        loss: TaskLoss,
        targets: Mapping[str, float],
        *,
        noise: bool = True,
        multiplier_start: float = 0.25,
    ) -> None:
        super().__init__()
        if loss not in ("lm", "distill"):
            raise ValueError(f"loss must be lm or distill, got {loss!r}")
        # Not an attribute that nn.Module would register as a child.
        self._outside: tuple[FluxAttention, ...] = (controller,)
        self.router = controller.router
        self.multipliers = Multipliers(targets, multiplier_start)
        self.loss, self.noise = loss, noise
        self.temperature = 1.0
        self.generator: torch.Generator | None = None

    @property
    def controller(self) -> FluxAttention:
        return self._outside[0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        prompt_lens: Tensor,
        class_index: Tensor,
    ) -> dict[str, Tensor]:
        """One batch as `training.data.Collator` makes it.

        Returns:
            `loss` (scalar, differentiable); detached `task_loss`, `penalty` (scalars), `sparsity`, `class_index` `[B]`.
        """
        controller, batch = self.controller, input_ids.shape[0]
        answer = AnswerTokens.of(labels)
        teacher = None
        if self.loss == "distill":
            teacher = teacher_logits(controller, input_ids, attention_mask, answer)
        soft = SoftRouting(temperature=self.temperature, noise=self.noise, generator=self.generator)
        with controller.soft_routing(soft), controller.prompt_lengths(prompt_lens.tolist()):
            logits = answer_logits(controller, input_ids, attention_mask, answer)
        if teacher is None:
            per_token = F.cross_entropy(logits.float(), answer.targets, reduction="none")
        else:
            per_token = token_kl(teacher, logits)
        task = answer.sample_mean(per_token, batch).mean()
        assert soft.gates is not None
        sparsity = 1 - soft.gates.float().mean(0)
        penalty = self.multipliers(sparsity, class_index)
        return {
            "loss": task + penalty,
            "task_loss": task.detach(),
            "penalty": penalty.detach(),
            "sparsity": sparsity.detach(),
            "class_index": class_index,
        }


class DamageObjective(nn.Module):
    """Supervised: binary cross entropy of `p_full` against soft targets made from measured layer damage.

    The probe's pooled queries do not depend on the router, so they are computed once and a step costs nothing.

    Args:
        router: trained in place.
        class_weights: class → what its prompts count in the loss; None = all alike.
        input_noise: deviation of Gaussian noise on the whitened features.
        input_dropout: share of the whitened features replaced by their mean, per layer.

    The two keep a router of a few thousand prompts from hanging on single features.
    """

    class_weights: Tensor

    def __init__(
        self,
        router: LayerRouter,
        *,
        class_weights: Mapping[str, float] | None = None,
        input_noise: float = 0.2,
        input_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if input_noise < 0 or not 0 <= input_dropout < 1:
            raise ValueError(
                f"input_noise must be ≥ 0 and input_dropout in [0, 1), got {input_noise!r} and {input_dropout!r}"
            )
        self.router = router
        weights = torch.tensor([1.0 if class_weights is None else class_weights[name] for name in TASK_CLASSES])
        self.register_buffer("class_weights", weights.to(router.biases[-1].device), persistent=False)
        self.input_noise, self.input_dropout = input_noise, input_dropout
        self.generator: torch.Generator | None = None

    def _perturbed(self, pooled: Tensor) -> Tensor:
        mean, scale = (getattr(self.router, name)[:, None] for name in ("input_mean", "input_scale"))
        white = (pooled - mean) * scale
        if self.input_noise:
            noise = torch.empty_like(white).normal_(generator=self.generator)
            white = white + self.input_noise * noise
        if self.input_dropout:
            keep = torch.empty_like(white).uniform_(generator=self.generator) >= self.input_dropout
            white = white * keep
        return white / scale + mean

    def forward(self, pooled: Tensor, target: Tensor, class_index: Tensor) -> dict[str, Tensor]:
        """`pooled [B, L, D]`, `target [B, L]` in [0, 1] → as `AnswerObjective`; the penalty is 0."""
        features = pooled.transpose(0, 1)
        if self.training:
            features = self._perturbed(features)
        logits = self.router(features)
        # Of two logits, the probability of the second is the sigmoid of their difference.
        margin = (logits[..., 1] - logits[..., 0]).T
        weight = self.class_weights[class_index]
        each = F.binary_cross_entropy_with_logits(margin, target, reduction="none").mean(1)
        task = (weight * each).sum() / weight.sum()
        return {
            "loss": task,
            "task_loss": task.detach(),
            "penalty": task.new_zeros(()),
            "sparsity": (margin.detach() <= 0).float().mean(1),
            "class_index": class_index,
        }


@torch.no_grad()
def initialise_bias(router: LayerRouter, p_full: Tensor | Sequence[float]) -> None:
    """Start the router as one static route: every prompt gets `p_full [L]`, whatever its features.

    Raises ValueError when a value is not strictly between 0 and 1, or the length is not `L`.
    """
    wanted = torch.as_tensor(p_full, dtype=torch.float32, device=router.biases[-1].device)
    if tuple(wanted.shape) != (router.num_layers,):
        raise ValueError(f"p_full must be [{router.num_layers}], got {list(wanted.shape)}")
    if not bool(((wanted > 0) & (wanted < 1)).all()):
        raise ValueError(f"p_full must lie strictly between 0 and 1, got {wanted.min():g} … {wanted.max():g}")
    router.weights[-1].zero_()
    router.biases[-1].zero_()
    router.biases[-1][:, 1] = torch.logit(wanted)
