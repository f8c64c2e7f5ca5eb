"""Probes: a dense pass over the two ends of prompts, which gives every layer's pooled query.

On CUDA they are graph replays: hundreds of small launches, one call. A prompt of at least `2 * pool_tokens` tokens
always gives the same shapes, whatever its length, so the pass over its two ends and all layers' routers are captured
once for each number of prompts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flux_attention.kernels.capture import capture
from flux_attention.models.layout import Layout
from flux_attention.models.pooling import ProbeDoneError
from flux_attention.models.step import Step
from flux_attention.route import Route
from flux_attention.router import PoolPlan

if TYPE_CHECKING:
    from flux_attention.models.controller import FluxAttention

#: Graphs kept, and prompts that one may hold: each graph keeps the memory of its pass.
_KEPT, _MOST = 4, 8
#: Rotary embeddings whose frequencies do not depend on the positions of a pass: others look at them on the host.
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")


def pooled_ends(controller: FluxAttention, prompts: Sequence[Tensor], by_head: bool = False) -> Tensor:
    """Every layer's pooled query `[L, S, D]` of prompts `[n]`, or `[L, S, Hk, D]`; see `FluxAttention.probe`."""
    ends = [_ends(controller, p).to(controller.device) for p in prompts]
    ids = nn.utils.rnn.pad_sequence(ends, batch_first=True)
    step = _step(controller, [e.numel() for e in ends], ids.shape[1])
    if by_head:
        assert controller.config.backbone is not None
        step.collect_heads = controller.kv_heads
    found = _run(controller, ids, step)
    return controller.ranks.cat(found, 2) if by_head else controller.ranks.mean(found.sum(2))


def pooled_prompts(controller: FluxAttention, prompts: Sequence[Tensor], route: Route) -> Tensor:
    """Every layer's pooled query `[L, S, D]` of whole prompts `[n]` under `route`; see `FluxAttention.read`."""
    ids = nn.utils.rnn.pad_sequence([p.to(controller.device) for p in prompts], batch_first=True)
    step = _step(controller, [p.numel() for p in prompts], ids.shape[1])
    step.route, step.impl = route, None
    return controller.ranks.mean(_run(controller, ids, step).sum(2))


def _ends(controller: FluxAttention, prompt: Tensor) -> Tensor:
    """First and last `pool_tokens` tokens of a prompt, side by side."""
    pool = controller.config.pool_tokens
    return torch.cat((prompt[:pool], prompt[max(pool, prompt.numel() - pool) :]))


def _step(controller: FluxAttention, lengths: Sequence[int], columns: int) -> Step:
    """The step of a probe over rows of `lengths` tokens in `columns` columns."""
    rows = len(lengths)
    layout = Layout(rows, columns, tuple(range(rows)), (0,) * rows, tuple(lengths), (0,) * rows)
    step = Step(layout, None, Route.full(len(controller.layers), rows), collect=True, prompt_ends=layout.ends)
    # Every token of a probe is pooled: one weight per token, the overlap of short prompts included.
    config = controller.config
    step.pool_plan = PoolPlan.build(
        layout.flat_starts, lengths, config.pool_tokens, tail_tokens=config.tail_tokens, device=controller.device
    )
    # Rows this short gain nothing from other kernels, and these can be captured in a graph.
    step.impl = "sdpa" if controller.impl == "auto" else None
    return step


def _run(controller: FluxAttention, ids: Tensor, step: Step) -> Tensor:
    """Pooled queries of `ids [S, columns]` in parts to be added up, `[L, S, parts, D]`; device work only.

    With `step.collect_heads` `[L, S, Hk, D]`, the heads' own. Of a rank, its own heads'.
    """
    step.pooled = [None] * len(controller.layers)
    outer, controller._step = controller._step, step
    try:
        controller.decoder(input_ids=ids, use_cache=False)
    except ProbeDoneError:
        pass
    finally:
        controller._step = outer
    controller.pooling.join(step)
    return torch.stack([p.to(controller.device) for p in step.pooled if p is not None])


class ProbeGraphs:
    """Captured probes of one controller."""

    def __init__(self, controller: FluxAttention) -> None:
        self._controller = controller
        self._graphs: OrderedDict[tuple[object, ...], Callable[[Tensor], Tensor]] = OrderedDict()

    def p_full(self, prompts: Sequence[Tensor]) -> Tensor | None:
        """The router's `p_full [L, S]` on the host, or None for what is not replayed: CPU models and short prompts."""
        controller = self._controller
        columns = 2 * controller.config.pool_tokens
        if len(prompts) > _MOST or any(p.numel() < columns for p in prompts):
            return None
        # Another router or other kernels make another graph.
        key = (len(prompts), controller.impl, *(p.data_ptr() for p in controller.router.parameters()))
        if key not in self._graphs:
            if not self._can_capture():
                return None
            self._graphs[key] = self._capture(len(prompts), columns)
            if len(self._graphs) > _KEPT:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key](torch.stack([_ends(controller, p) for p in prompts]))

    def _can_capture(self) -> bool:
        controller = self._controller
        rotary = getattr(controller.decoder, "rotary_emb", None)
        return (
            controller.device.type == "cuda"
            # A graph is of one device, and ranks that replay in different order than others run would wait for ever.
            and not controller.is_split
            and len(controller.layers) == controller.decoder.config.num_hidden_layers
            and getattr(rotary, "rope_type", None) in _STATIC_ROTARY
            and not torch.is_grad_enabled()
        )

    def _capture(self, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        controller = self._controller
        # Copies from and to the host are part of the graph: a replay is then one call, and a wait for it.
        ids = torch.zeros(rows, columns, dtype=torch.long, pin_memory=True)
        shares = torch.empty(len(controller.layers), rows, 2, pin_memory=True)
        step = _step(controller, [columns] * rows, columns)

        def run() -> None:
            found = _run(controller, ids.to(controller.device, non_blocking=True), step)
            # Added up once: each of the routers' many programs would do it again.
            pooled = found.sum(2, keepdim=True)
            shares.copy_(controller.router.from_parts(pooled).softmax(-1), non_blocking=True)

        return _Replay(ids, capture(run, controller.device, warm_up=2), shares, step, controller.device)


@dataclass(frozen=True)
class _Replay:
    """A captured probe. Its graph reads and writes the memory of these tensors, so they live as long as it does.

    Attributes:
        ids: token ids `[S, columns]`, pinned.
        shares: the routers' two probabilities, `[L, S, 2]`, pinned.
        step: of the captured pass.
    """

    ids: Tensor
    graph: torch.cuda.CUDAGraph
    shares: Tensor
    step: Step
    device: torch.device

    def __call__(self, ends: Tensor) -> Tensor:
        """`p_full [L, S]` on the host for the prompts' two ends, `[S, columns]`."""
        self.ids.copy_(ends)
        self.graph.replay()
        torch.cuda.current_stream(self.device).synchronize()
        return self.shares[..., 1].clone()
