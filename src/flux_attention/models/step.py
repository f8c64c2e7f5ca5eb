"""State of one forward pass, and the gates of training passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from flux_attention.cache import FluxCache
from flux_attention.models.layout import Layout
from flux_attention.route import Route
from flux_attention.router import PoolPlan


@dataclass
class Step:
    """State of one forward pass of the decoder."""

    layout: Layout
    cache: FluxCache | None
    route: Route | None = None
    """Known before the pass (policy, probe, cache), or filled layer by layer (inline)."""
    gates: Tensor | None = None
    """Training: differentiable z `[L, S]` or `[L, Hk, S]`, 1 = full; both sides run and are blended."""
    exact: tuple[tuple[bool | None, ...], ...] | None = None
    """Gates `[L, S]` on the host: True and False for exactly 1 and 0, None for a fraction. None: not known."""
    soft: SoftRouting | None = None
    inline: bool = False
    keep_short_full: tuple[bool, ...] = ()
    prompt_ends: tuple[int, ...] = ()
    pool_plan: PoolPlan | None = None
    pooled: list[Tensor | None] = field(default_factory=list)
    collect: bool = False
    collect_heads: int = 0
    """A probe that keeps the KV heads apart: their number."""
    impl: str | None = None
    """Kernels of this pass, where they are not the controller's."""
    held: list[Tensor] = field(default_factory=list)
    """What the side stream reads: kept until it has."""
    decisions: list[tuple[Tensor, torch.cuda.Event | None] | None] = field(default_factory=list)
    index: dict[torch.device, Tensor] = field(default_factory=dict)
    """By device, where the layers lie on several: the layout's token index."""
    counts: dict[torch.device, Tensor] = field(default_factory=dict)
    """Decoding: keys of each layer and row, the new token's included, int32 `[L, B]`, by device."""
    plans: dict[torch.device, PoolPlan] = field(default_factory=dict)
    packings: dict[Any, Any] = field(default_factory=dict)

    def plan_on(self, device: torch.device) -> PoolPlan:
        """The pool plan on a layer's device."""
        assert self.pool_plan is not None
        if device not in self.plans:
            self.plans[device] = self.pool_plan.to(device)
        return self.plans[device]


class Exchange(Protocol):
    """Several ranks hold a share of the tokens each; attention wants all tokens of a share of the heads."""

    def to_heads(self, x: Tensor) -> Tensor:
        """`[B, H, T/P, D]` → `[B, H/P, T, D]`, differentiable."""
        ...

    def to_tokens(self, x: Tensor) -> Tensor:
        """`[B, T, H/P, D]` → `[B, T/P, H, D]`, differentiable."""
        ...

    def pooled(self, hidden: Tensor, plan: PoolPlan, queries: Callable[[Tensor], Tensor]) -> Tensor:
        """Pooled queries `[S, D]` of the whole sequences, the same bits on every rank; no gradient."""
        ...


@dataclass
class SoftRouting:
    """Gates of training passes: give it to `FluxAttention.soft_routing`, read `gates` after a forward pass.

    Attributes:
        temperature: τ of the Gumbel-softmax.
        noise: whether Gumbel noise is drawn (False: the noise-free straight-through gate).
        forced: gates `[L, S]` to use instead of the router's, or `[L, Hk, S]` for
            gates of KV heads; may require grad.
        forced_exact: the values of forced gates `[L, S]` on the host, True and False for exactly 1 and 0, None for a
            fraction: only the chosen side of an exact one gets a backward pass then.
        layout: where the sequences of the pass are, for callers that pack or split them; None = read from the inputs.
        exchange: of the ranks that share the tokens of a pass; None = every token is here.
        logits: the router's logits of the last pass, `[L, S, 2]`.
        gates: z of the last pass, `[L, S]`, differentiable.
    """

    temperature: float = 1.0
    noise: bool = True
    generator: torch.Generator | None = None
    forced: Tensor | None = None
    forced_exact: tuple[tuple[bool | None, ...], ...] | None = None
    layout: Layout | None = None
    exchange: Exchange | None = None
    logits: Tensor | None = None
    gates: Tensor | None = None
    pooled: Tensor | None = None
    _noise: Tensor | None = None


def host_decisions(gates: Tensor) -> tuple[tuple[bool, ...], ...]:
    """Straight-through gates `[L, S]` as booleans on the host; waits for the device once."""
    return tuple(tuple(value > 0.5 for value in row) for row in gates.detach().tolist())


def exact_values(gates: Tensor) -> tuple[tuple[bool | None, ...], ...]:
    """Forced gates `[L, S]` on the host as `SoftRouting.forced_exact` takes them; waits where they are on a device."""
    return tuple(tuple(None if 0 < value < 1 else value == 1 for value in row) for row in gates.tolist())
