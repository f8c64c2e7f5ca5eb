"""Pooled queries of a pass, layer by layer: a probe collects them, an inline router and training gates decide on them.

A fused layer hands over the queries that it has just made. In other layers they are made anew from the hidden states of
the pooled tokens, at most `2 * pool_tokens` a prompt. Either way a decision is on its way to the host while the layer's
other projections run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flux_attention.kernels.fused import Norm, decide_arrivals, decides, pool_queries
from flux_attention.models.step import Step
from flux_attention.router import straight_through_gate

if TYPE_CHECKING:
    from flux_attention.models.controller import FluxAttention


class ProbeDoneError(Exception):
    """Ends a probe once it has what it came for."""


class LayerPooling:
    """What one controller's layers pool and decide during a pass."""

    def __init__(self, controller: FluxAttention) -> None:
        self._controller = controller
        self._side: torch.cuda.Stream | None = None
        self._arrivals: Tensor | None = None
        #: False: everything on the layer's own stream.
        self.beside = True

    def before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of a routable attention module: pool what its queries will be, before it begins."""
        controller = self._controller
        step = controller._step
        if step is None or not (step.collect or step.inline):
            return
        assert step.pool_plan is not None
        _, layer = module._flux_attention  # type: ignore[misc]
        if not (step.soft or step.collect_heads) and controller.fusion is not None and controller.fusion.pools(layer):
            return  # the layer calls `pool`
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if step.soft is not None and not step.collect:
            self.gate(step, layer, hidden, lambda tokens: controller.family.queries(module, tokens))
            return
        # At most 2·pool_tokens tokens of each prompt: their queries cost nothing to compute a second time.
        plan = step.plan_on(hidden.device)
        tokens = plan.gather(hidden.flatten(0, 1))
        with controller.on(hidden.device), self._beside(step, tokens):
            queries = controller.family.queries(module, tokens)
            if step.collect_heads:
                parts = queries.chunk(step.collect_heads, 2)
                self._collect(step, layer, torch.stack([plan.mean(part) for part in parts], 1))
                return
            pooled = plan.mean(queries)
            if step.collect:
                # All layers' are exchanged at once, when the probe is done.
                self._collect(step, layer, pooled[:, None])
                return
            pooled = controller.ranks.mean(pooled.detach()).to(controller.device)
        with controller.on(controller.device):
            step.decisions[layer] = _to_host(controller.router(pooled, layer))

    def pool(self, layer: int, queries: Tensor, norm: Norm | None) -> None:
        """Pool a fused layer's queries before the rotary embedding, `[N, Hq * D]`: for a probe, or to route inline.

        An inline decision is one launch of few programs that writes to the host's memory. It begins as the queries are
        done, before the next projection, on a stream that comes first, and the projection takes the rest of the device:
        a product's blocks hold what they have until it is done. So the decision has two projections and the rotary
        embedding to reach the host, and the host to launch what it has ready by then.
        """
        controller = self._controller
        step = controller._step
        if step is None or step.soft or step.collect_heads or not (step.collect or step.inline):
            return
        plan, backbone = step.plan_on(queries.device), controller.config.backbone
        assert backbone is not None
        if step.collect:
            with self._beside(step, queries):
                self._collect(step, layer, pool_queries(queries, plan.index, plan.weight, backbone.head_dim, norm))
            return
        if decides(queries, plan.index, backbone.head_dim):
            if self._arrivals is None or self._arrivals.device != queries.device:
                self._arrivals = decide_arrivals(queries.device)
            host, own = torch.empty(plan.index.shape[0], 2, pin_memory=True), torch.cuda.current_stream(queries.device)
            with self._beside(step, queries):
                side = torch.cuda.current_stream(queries.device)
                ready = side.record_event()
                controller.router.decide(queries, plan, norm, layer, arrivals=self._arrivals, out=host)
                step.decisions[layer] = host, side.record_event()
            # Without this the next product would be there first, and the decision would wait for its blocks.
            own.wait_event(ready)
            return
        parts = pool_queries(queries, plan.index, plan.weight, backbone.head_dim, norm)
        logits = controller.router.from_parts(parts, layer)
        # Only the copy runs beside, by the device's copy engine.
        with self._beside(step, logits):
            step.decisions[layer] = _to_host(logits)

    def _collect(self, step: Step, layer: int, pooled: Tensor) -> None:
        """Keep a layer's pooled queries. Raises `ProbeDoneError` with the last one's: the rest of the pass is idle."""
        step.pooled[layer] = pooled
        if layer == len(self._controller.layers) - 1:
            raise ProbeDoneError

    def gate(self, step: Step, layer: int, hidden: Tensor, queries: Callable[[Tensor], Tensor]) -> Tensor:
        """A training step's gate z `[S]` of one layer, decided once however often the layer runs.

        Args:
            hidden: `[B, T, hidden]`, what `queries` turns into queries before RoPE.
            queries: `[S, K, hidden]` → `[S, K, Hq, D]`.
        """
        if step.gates is not None:
            return step.gates[layer]
        if ("gate", layer) not in step.packings:
            assert step.soft is not None and step.pool_plan is not None
            with torch.no_grad():
                if step.soft.exchange is not None:
                    pooled = step.soft.exchange.pooled(hidden, step.pool_plan, queries)
                else:
                    pooled = step.pool_plan.mean(queries(step.pool_plan.gather(hidden.flatten(0, 1))))
            logits = self._controller.router(pooled, layer)
            noise = None if step.soft._noise is None else step.soft._noise[layer]
            step.pooled[layer] = pooled
            step.decisions[layer] = (logits, None)
            step.packings[("gate", layer)] = straight_through_gate(logits, step.soft.temperature, noise)
        gate: Tensor = step.packings[("gate", layer)]
        return gate

    @contextmanager
    def _beside(self, step: Step, tokens: Tensor) -> Iterator[None]:
        """Run what is inside beside the layer's own projections: on CUDA, on a stream of its own."""
        # What runs beside a probe is held until it is done: too much, where whole prompts are read.
        whole = step.collect and not self._controller.probing
        # Layers on several devices, and ranks that exchange, keep one order of everything.
        if not (tokens.is_cuda and self.beside) or self._controller.is_split or whole:
            yield
            return
        if self._side is None:
            self._side = torch.cuda.Stream(tokens.device, priority=-1)
        step.held.append(tokens)
        self._side.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(self._side):
            yield

    def decide(self, step: Step, layer: int) -> list[bool]:
        """Wait for this layer's decisions, True = full, and write them into the step's route."""
        decision, route = step.decisions[layer], step.route
        assert decision is not None and route is not None and route.p_full is not None
        logits, event = decision
        if event is not None:
            event.synchronize()
            step.held.clear()
        use_full = []
        # The device waits for these lines: plain numbers are quicker than a dozen operations on two of them.
        for s, ((sparse, full), short) in enumerate(zip(logits.tolist(), step.keep_short_full, strict=True)):
            use_full.append(short or full > sparse)
            if not short:
                route.p_full[layer, s] = 0.5 + 0.5 * math.tanh(0.5 * (full - sparse))
                route.use_full[layer, s] = use_full[s]
        return use_full

    def join(self, step: Step) -> None:
        """Have the device wait for what runs beside, so that the pooled queries can be read."""
        if step.held:
            # Only where this pass has used it: a graph being captured must not wait for work outside of it.
            assert self._side is not None
            torch.cuda.current_stream(self._controller.device).wait_stream(self._side)
            step.held.clear()


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on its way to the host, and the event after which it is there."""
    if not values.is_cuda:
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
