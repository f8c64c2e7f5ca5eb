"""Eager oracles of every op, written from the definitions; slow, O(n²) memory, any floating dtype (float64 too).

Shapes as in `flux_attention.kernels.api`. Nothing fast imports this module. All but `select_blocks` and
`paged_decode` are differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flux_attention.kernels.packing import Packing

#: (sequence index, query positions [n, 1], key positions [1, m]) → bool mask that broadcasts to [Hq, n, m]
Mask = Callable[[int, Tensor, Tensor], Tensor]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention of one sequence: q [n, Hq, D], k, v [m, Hk, D], mask → [Hq, n, m] true where seen."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    # Softmax in at least float32, as eager transformers does.
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, -1, dtype=wide).to(q.dtype)
    return torch.einsum("hnm,mhd->nhd", weights, v)


def _per_sequence(q: Tensor, k: Tensor, v: Tensor, packing: Packing, sink: int, mask: Mask, scale: float) -> Tensor:
    """Attend within each sequence; `mask` is called with true token positions, gaps undone."""
    pieces = [q.new_empty(0, *q.shape[1:])]
    for s in range(len(packing)):
        qs = q[packing.q_offsets[s] : packing.q_offsets[s + 1]]
        ks = k[packing.k_offsets[s] : packing.k_offsets[s + 1]]
        vs = v[packing.k_offsets[s] : packing.k_offsets[s + 1]]
        if not len(qs):
            continue
        t = packing.starts[s] + torch.arange(len(qs), device=q.device)[:, None]
        index = torch.arange(len(ks), device=q.device)[None]
        position = torch.where(index < sink, index, index + packing.gaps[s])
        pieces.append(_attend(qs, ks, vs, mask(s, t, position), scale))
    return torch.cat(pieces)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, scale: float) -> Tensor:
    """See `api.dense_attention`."""
    return _per_sequence(q, k, v, packing, 0, lambda s, t, j: j <= t, scale)


def streaming_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, sink: int, window: int, block: int, scale: float
) -> Tensor:
    """See `api.streaming_attention`."""

    def mask(s: int, t: Tensor, j: Tensor) -> Tensor:
        return (j <= t) & ((j < sink) | (j >= t // block * block - window))

    return _per_sequence(q, k, v, packing, sink, mask, scale)


def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    sink: int,
    window: int,
    block: int,
    dense_from: tuple[int, ...],
    scale: float,
) -> Tensor:
    """See `api.triangle_attention`."""

    def mask(s: int, t: Tensor, j: Tensor) -> Tensor:
        return (j <= t) & ((j < sink) | (j >= t // block * block - window) | (t >= dense_from[s]))

    return _per_sequence(q, k, v, packing, 0, mask, scale)


def block_masses(q: Tensor, k: Tensor, start: int, *, block: int, stride: int, scale: float) -> Tensor:
    """Softmax mass of every key block for every query block of one sequence.

    `q [n, Hq, D]` at positions `start ..`, `k [start + n, Hk, D]` → `[Hq, nq, nk]`, in float32 or wider.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    n_k = -(-len(k) // block)
    first = start // block
    heads, dim = q.shape[1:]
    q_full = q.new_zeros((n_k - first) * block, heads, dim, dtype=wide)
    q_full[start - first * block : start - first * block + len(q)] = q
    k_full = k.new_zeros(n_k * block, heads, dim, dtype=wide)
    k_full[: len(k)] = k.repeat_interleave(heads // k.shape[1], 1)
    q_rows = q_full.view(-1, stride, heads, dim)
    k_rows = k_full.view(-1, stride, heads, dim).flip(1)
    scores = torch.einsum("ashd,bshd->hab", q_rows, k_rows) * (scale / stride)
    a = first * (block // stride) + torch.arange(len(q_rows), device=q.device)
    b = torch.arange(len(k_rows), device=q.device)
    weights = scores.masked_fill(b[None] > a[:, None], float("-inf")).softmax(-1)
    # Rows without a single query carry no mass.
    present = ((a + 1) * stride > start) & (a * stride < len(k))
    weights = weights * present[None, :, None]
    rows = block // stride
    return weights.view(heads, -1, rows, n_k, rows).sum((2, 4))


def blocks_from_masses(masses: Tensor, first: int, threshold: float) -> Tensor:
    """Blocks by descending mass until they hold `threshold` of it; block 0 and the own block `first + i` always.

    `masses [Hq, nq, nk]` → bool of the same shape.
    """
    order = masses.sort(dim=-1, descending=True, stable=True)
    before = order.values.cumsum(-1) - order.values
    taken = before < threshold * masses.sum(-1, keepdim=True)
    chosen = torch.zeros_like(masses, dtype=torch.bool).scatter(-1, order.indices, taken)
    j = torch.arange(masses.shape[2], device=masses.device)
    i = first + torch.arange(masses.shape[1], device=masses.device)[:, None]
    return (chosen & (j <= i)) | (j == i) | (j == 0)


def select_blocks(
    q: Tensor, k: Tensor, packing: Packing, *, block: int, stride: int, threshold: float, scale: float
) -> list[Tensor]:
    """See `api.select_blocks`."""
    chosen = []
    for s in range(len(packing)):
        qs = q[packing.q_offsets[s] : packing.q_offsets[s + 1]]
        ks = k[packing.k_offsets[s] : packing.k_offsets[s + 1]]
        if not len(qs):
            chosen.append(torch.zeros(q.shape[1], 0, -(-len(ks) // block), dtype=torch.bool, device=q.device))
            continue
        start = packing.starts[s]
        masses = block_masses(qs, ks, start, block=block, stride=stride, scale=scale)
        chosen.append(blocks_from_masses(masses, start // block, threshold))
    return chosen


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, blocks: Sequence[Tensor], *, block: int, scale: float
) -> Tensor:
    """See `api.block_sparse_attention`."""

    def mask(s: int, t: Tensor, j: Tensor) -> Tensor:
        chosen = blocks[s][:, t // block - packing.starts[s] // block, j // block]
        return (j <= t) & (chosen | (j // block == t // block))

    return _per_sequence(q, k, v, packing, 0, mask, scale)


def paged_decode(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, *, scale: float
) -> Tensor:
    """See `api.paged_decode`."""
    out = torch.zeros_like(q)
    page = k_pages.shape[1]
    for s, n in enumerate(lengths.tolist()):
        if n == 0:
            continue
        index = page_table[s, : -(-n // page)].long()
        k, v = k_pages[index].flatten(0, 1)[:n], v_pages[index].flatten(0, 1)[:n]
        out[s] = _attend(q[s : s + 1], k, v, torch.ones(1, n, dtype=torch.bool, device=q.device), scale)[0]
    return out
