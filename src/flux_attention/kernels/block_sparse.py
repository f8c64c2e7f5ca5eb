"""Causal attention over chosen key blocks, per head: gathered SDPA, flash-attn-4 and FlexAttention.

Shapes as in `flux_attention.kernels.api.block_sparse_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flux_attention.kernels import block_lists
from flux_attention.kernels.block_lists import TILE
from flux_attention.kernels.dense import needs_grad, sdpa
from flux_attention.kernels.packing import Packing

#: Gathered key and value elements a call may hold (64 Mi: 256 MB each in float32).
_GATHER_ELEMENTS = 1 << 26


def block_sparse_sdpa(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, blocks: Sequence[Tensor], *, block: int, scale: float
) -> Tensor:
    """`api.block_sparse_attention` by torch SDPA on gathered blocks; differentiable in q, k, v.

    Every (head, query block) is a job; jobs with the same number of key blocks go in one call, the own block last, so
    that one causal mask serves them all.
    """
    pieces = [q.new_empty(0, *q.shape[1:])]
    for s, queries, keys in packing.slices():
        pieces.append(_one_sequence(q[queries], k[keys], v[keys], blocks[s], packing.starts[s], block, scale))
    return pieces[1] if len(pieces) == 2 else torch.cat(pieces)


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, start: int, block: int, scale: float) -> Tensor:
    heads, dim = q.shape[1:]
    group = heads // k.shape[1]
    _, nq, nk = chosen.shape
    first, lead = nk - nq, start % block
    # [Hq * nq, A, D]: padded query rows are dropped again, padded keys sit behind the diagonal's mask.
    q_jobs = _blocks_of(q, lead, nq, block).reshape(-1, block, dim)
    k_blocks, v_blocks = (_blocks_of(t, 0, nk, block).reshape(-1, block, dim) for t in (k, v))
    # Own block forced, later ones never.
    own = first + torch.arange(nq, device=q.device)[:, None]
    j = torch.arange(nk, device=q.device)
    jobs = ((chosen & (j < own)) | (j == own)).view(-1, nk)
    counts = jobs.sum(-1)
    # Column of the key blocks in ascending order, so the own block, the last one seen, ends each list.
    columns = jobs.nonzero()[:, 1]
    ends = counts.cumsum(0)
    order = counts.argsort(stable=True)
    kv_head = torch.arange(heads, device=q.device).repeat_interleave(nq) // group * nk
    causal = torch.ones(block, block, dtype=torch.bool, device=q.device).tril_()
    outs = []
    sizes, sizes_n = torch.unique_consecutive(counts[order], return_counts=True)
    at = 0
    for c, n in zip(sizes.tolist(), sizes_n.tolist(), strict=True):
        mask = torch.cat([causal.new_ones(block, (c - 1) * block), causal], 1)
        step = max(1, _GATHER_ELEMENTS // (c * block * dim))
        for a in range(at, at + n, step):
            ids = order[a : min(a + step, at + n)]
            index = columns[(ends[ids] - c)[:, None] + torch.arange(c, device=q.device)] + kv_head[ids, None]
            k_j, v_j = (t[index].view(-1, 1, c * block, dim) for t in (k_blocks, v_blocks))
            outs.append(sdpa(q_jobs[ids][:, None], k_j, v_j, scale=scale, mask=mask)[:, 0])
        at += n
    out = torch.cat(outs)[order.argsort()].view(heads, nq * block, dim)
    return out[:, lead : lead + q.shape[0]].transpose(0, 1)


def _blocks_of(x: Tensor, lead: int, n: int, block: int) -> Tensor:
    """`[t, H, D]` → `[H, n * block, D]`, zeros before (`lead`) and behind."""
    full = x.new_zeros(x.shape[1], n * block, x.shape[2])
    full[:, lead : lead + x.shape[0]] = x.transpose(0, 1)
    return full


def block_sparse_flash4(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, blocks: Sequence[Tensor], *, block: int, scale: float
) -> Tensor:
    """`api.block_sparse_attention` by flash-attn-4's block sparsity, a call per sequence; `block` must be 128."""
    return _over_lists(block_lists.flash4_over, q, k, v, packing, blocks, scale)


def block_sparse_flex(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, blocks: Sequence[Tensor], *, block: int, scale: float
) -> Tensor:
    """`api.block_sparse_attention` by FlexAttention, a call per sequence; `block` must be 128."""
    return _over_lists(block_lists.flex_over, q, k, v, packing, blocks, scale)


def _over_lists(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    blocks: Sequence[Tensor],
    scale: float,
) -> Tensor:
    gradients = needs_grad(q, k, v)
    pieces = [q.new_empty(0, *q.shape[1:])]
    for s, queries, keys in packing.slices():
        q_s, k_s, v_s = q[queries], k[keys], v[keys]
        start = packing.starts[s]
        lead = start % TILE
        if lead:
            # Rows put in front so that query tiles are position tiles; cut off again below.
            q_s = torch.cat([q_s.new_zeros(lead, *q_s.shape[1:]), q_s])
        lists = block_lists.chosen_lists(blocks[s], start // TILE, gradients)
        pieces.append(attend(q_s, k_s, v_s, lists, scale=scale)[lead:])
    return pieces[1] if len(pieces) == 2 else torch.cat(pieces)
