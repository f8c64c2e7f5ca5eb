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


def partial_blend(
    side: Side, full: Mode, sparse: Mode, gate: Tensor, exact: Sequence[bool | None], counts: Sequence[int]
) -> Tensor:
    """What `soft_blend` gives where only some gates are fractions: the other sequences run their own side alone.

    Args:
        side: runs a mode over members.
        gate: `[S]`; those that are exactly 0 or 1 get no gradient.
        exact: their values, on the host; None for a fraction.
    """
    found: dict[bool, dict[int, Tensor]] = {}
    for mode, value in ((full, True), (sparse, False)):
        members = [s for s, e in enumerate(exact) if e is None or e is value]
        pieces = side(mode, members).split([counts[s] for s in members]) if members else ()
        found[value] = dict(zip(members, pieces, strict=True))
    rows = []
    for s, own in enumerate(exact):
        if own is None:
            z = gate[s].to(found[True][s].dtype)
            rows.append(z * found[True][s] + (1 - z) * found[False][s])
        else:
            rows.append(found[own][s])
    return torch.cat(rows)


def hard_blend(
    side: Side, full: Mode, sparse: Mode, gate: Tensor, use_full: Sequence[bool], counts: Sequence[int]
) -> Tensor:
    """What `soft_blend` gives for gates of 0 and 1, at the cost of one side's backward pass instead of two.

    Args:
        side: runs a mode over members.
        gate: straight-through gates `[S]`; their gradient is that of `soft_blend`.
        use_full: their values, on the host.
    """
    members = [[s for s, f in enumerate(use_full) if f], [s for s, f in enumerate(use_full) if not f]]
    chosen = _assemble(side, ((full, members[0]), (sparse, members[1])), counts)
    if not (torch.is_grad_enabled() and gate.requires_grad):
        return chosen
    with torch.no_grad():
        other = _assemble(side, ((sparse, members[0]), (full, members[1])), counts)
    signs = torch.tensor([1.0 if f else -1.0 for f in use_full], device=gate.device)
    out: Tensor = _Choice.apply(chosen, other, gate, signs, tuple(counts))
    return out


def _assemble(side: Side, parts: Sequence[tuple[Mode, list[int]]], counts: Sequence[int]) -> Tensor:
    """The members' outputs in the order of the sequences."""
    found = [(members, side(mode, members)) for mode, members in parts if members]
    if len(found) == 1:
        return found[0][1]
    pieces: dict[int, Tensor] = {}
    for members, output in found:
        pieces |= zip(members, output.split([counts[s] for s in members]), strict=True)
    return torch.cat([pieces[s] for s in range(len(counts))])


class _Choice(torch.autograd.Function):
    """Returns `chosen`; the gate's gradient is ⟨∂L/∂out, chosen − other⟩ of its sequence, with the side's sign."""

    @staticmethod
    def forward(
        ctx: Any, chosen: Tensor, other: Tensor, gate: Tensor, signs: Tensor, counts: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(chosen, other, signs)
        ctx.counts, ctx.dtype = counts, gate.dtype
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        chosen, other, signs = ctx.saved_tensors
        totals, start = [], 0
        for count in ctx.counts:
            total = torch.zeros((), device=chosen.device)
            for a in range(start, start + count, _CHUNK):
                rows = slice(a, min(a + _CHUNK, start + count))
                total = total + (gradient[rows].float() * (chosen[rows].float() - other[rows].float())).sum()
            totals.append(total)
            start += count
        return gradient, None, (torch.stack(totals) * signs).to(ctx.dtype), None, None


def members_of(x: Tensor, members: list[int], counts: Sequence[int]) -> Tensor:
    """The tokens of some of the packed sequences, `x [N, …]` → `[tokens of the members, …]`."""
    if len(members) == len(counts):
        return x
    pieces = x.split(list(counts))
    return pieces[members[0]] if len(members) == 1 else torch.cat([pieces[s] for s in members])
