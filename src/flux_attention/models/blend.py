"""Both sides of a layer under a gate: `z·full + (1 − z)·sparse`, the training form.

Shapes: `S` sequences packed into `N` tokens, `[N, H, D]`. Gates z `[S]`: 1 = full.

A straight-through gate is exactly 0 or 1, so one side alone is the layer's output, and the other is multiplied by 0 in
the forward pass *and* in the gradient of queries, keys and values. It is needed for one thing only: the gate's own
gradient, ⟨∂L/∂out, full − sparse⟩. So the other side runs without a graph, and not at all in a pass without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flux_attention.modes import Mode

#: Tokens whose products are summed at a time in float32; bounds that copy.
_CHUNK = 8192

Side = Callable[[Mode, list[int]], Tensor]
"""Runs a mode over some of the sequences: `(mode, members)` → `[tokens of the members, H, D]`."""


def soft_blend(full: Tensor, sparse: Tensor, gate: Tensor, counts: Sequence[int]) -> Tensor:
    """`z·full + (1 − z)·sparse` for any z in [0, 1], differentiable in all three; z `[S]`, or `[Hk, S]` by KV head."""
    lengths = torch.tensor(counts, device=gate.device)
    weight = gate.repeat_interleave(lengths, -1, output_size=full.shape[0]).to(full.dtype)
    if weight.ndim == 1:
        weight = weight[:, None, None]
    else:
        weight = weight.T.repeat_interleave(full.shape[1] // weight.shape[0], 1)[..., None]
    return weight * full + (1 - weight) * sparse


def gated_blend(
    side: Side, full: Mode, sparse: Mode, gate: Tensor, exact: Sequence[bool | None], counts: Sequence[int]
) -> Tensor:
    """What `soft_blend` gives where gates are exactly 0 or 1, at the cost of one side's backward pass instead of two.

    Args:
        side: runs a mode over some of the sequences.
        gate: `[S]`; its gradient is that of `soft_blend`.
        exact: their values, on the host; None for a fraction, whose sequence runs both sides.
    """
    parts: list[tuple[list[int], Tensor]] = []
    for value in (True, False, None):
        members = [s for s, e in enumerate(exact) if e is value]
        if not members:
            continue
        some_gates = gate if len(members) == len(counts) else torch.stack([gate[s] for s in members])
        some_counts = [counts[s] for s in members]
        own, other = (sparse, full) if value is False else (full, sparse)
        out = side(own, members)
        if value is None:
            out = soft_blend(out, side(other, members), some_gates, some_counts)
        elif torch.is_grad_enabled() and gate.requires_grad:
            with torch.no_grad():
                unchosen = side(other, members)
            out = _Choice.apply(out, unchosen, some_gates, 1 if value else -1, some_counts)
        parts.append((members, out))
    return _in_order(parts, counts)


def _in_order(parts: Sequence[tuple[list[int], Tensor]], counts: Sequence[int]) -> Tensor:
    """Outputs of some sequences each, in the order of all sequences."""
    if len(parts) == 1:
        return parts[0][1]
    pieces: dict[int, Tensor] = {}
    for members, output in parts:
        pieces |= zip(members, output.split([counts[s] for s in members]), strict=True)
    return torch.cat([pieces[s] for s in range(len(counts))])


class _Choice(torch.autograd.Function):
    """Returns `chosen`; a gate has the gradient ⟨∂L/∂out, chosen − other⟩ of its sequence, times `sign` (1: full)."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, other: Tensor, gate: Tensor, sign: int, counts: Sequence[int]) -> Tensor:
        ctx.save_for_backward(chosen, other)
        ctx.sign, ctx.counts, ctx.dtype = sign, counts, gate.dtype
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        chosen, other = ctx.saved_tensors
        totals, start = [], 0
        for count in ctx.counts:
            total = torch.zeros((), device=chosen.device)
            for a in range(start, start + count, _CHUNK):
                rows = slice(a, min(a + _CHUNK, start + count))
                total = total + (gradient[rows].float() * (chosen[rows].float() - other[rows].float())).sum()
            totals.append(total)
            start += count
        return gradient, None, (ctx.sign * torch.stack(totals)).to(ctx.dtype), None, None


def members_of(x: Tensor, members: list[int], counts: Sequence[int]) -> Tensor:
    """The tokens of some of the packed sequences, `x [N, …]` → `[tokens of the members, …]`."""
    if len(members) == len(counts):
        return x
    pieces = x.split(list(counts))
    return pieces[members[0]] if len(members) == 1 else torch.cat([pieces[s] for s in members])
