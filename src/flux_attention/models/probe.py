"""Probes as CUDA graph replays: hundreds of small launches, one call.

A prompt of at least `2 * pool_tokens` tokens always gives the same shapes, whatever its length, so the pass over its
two ends and all layers' routers are captured once for each number of prompts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flux_attention.models.controller import FluxAttention
    from flux_attention.models.step import Step

#: Graphs kept, and prompts that one may hold: each graph keeps the memory of its pass.
_KEPT, _MOST = 4, 8
#: Rotary embeddings whose frequencies do not depend on the positions of a pass: others look at them on the host.
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")


class ProbeGraphs:
    """Captured probes of one controller."""

    def __init__(self, controller: FluxAttention) -> None:
        self._controller = controller
        self._graphs: OrderedDict[tuple[object, ...], Callable[[Tensor], Tensor]] = OrderedDict()

    def p_full(self, prompts: Sequence[Tensor]) -> Tensor | None:
        """The router's `p_full [L, S]` on the host, or None for what is not replayed: CPU models and short prompts."""
        controller = self._controller
        columns = 2 * controller.config.pool_tokens
        if not self._can_capture() or len(prompts) > _MOST or any(p.numel() < columns for p in prompts):
            return None
        # Another router or other kernels make another graph.
        key = (len(prompts), controller.impl, *(p.data_ptr() for p in controller.router.parameters()))
        if key not in self._graphs:
            self._graphs[key] = self._capture(len(prompts), columns)
            if len(self._graphs) > _KEPT:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key](torch.stack([controller.prompt_ends(p) for p in prompts]))

    def _can_capture(self) -> bool:
        controller = self._controller
        rotary = getattr(controller.decoder, "rotary_emb", None)
        return (
            controller.device.type == "cuda"
            and len(controller.layers) == controller.decoder.config.num_hidden_layers
            and getattr(rotary, "rope_type", None) in _STATIC_ROTARY
            and not torch.is_grad_enabled()
        )

    def _capture(self, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        controller = self._controller
        ids = torch.zeros(rows, columns, dtype=torch.long, device=controller.device)
        step = controller.probe_step([columns] * rows, columns)

        def run() -> Tensor:
            return controller.router.from_parts(controller.run_probe(ids, step)).softmax(-1)[..., 1]

        stream = torch.cuda.Stream(controller.device)
        stream.wait_stream(torch.cuda.current_stream(controller.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream(controller.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            p_full = run()

        return _Replay(ids, graph, p_full, step)


@dataclass(frozen=True)
class _Replay:
    """A captured probe. Its graph reads and writes the memory of these tensors, so they live as long as it does."""

    ids: Tensor
    graph: torch.cuda.CUDAGraph
    p_full: Tensor
    step: Step

    def __call__(self, ends: Tensor) -> Tensor:
        """`p_full [L, S]` on the host for the prompts' two ends, `[S, columns]`."""
        self.ids.copy_(ends)
        self.graph.replay()
        return self.p_full.cpu()
