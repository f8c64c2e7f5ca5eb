"""Dense causal attention over packed sequences: torch SDPA and flash-attn-4 (`flash_attn.cute`) varlen.

Shapes as in `flux_attention.kernels.api`; both implementations are differentiable.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_attention.kernels.packing import Packing

#: Queries a tile where a mask has to be written out: bounds it to `_TILE * k_len` bools.
_TILE = 256
#: Padding up to this factor is cheaper than a launch per sequence.
_MOST_PADDING = 1.3


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """torch SDPA on `q [B, Hq, n, D]`, `k, v [B, Hk, m, D]`, grouped heads expanded only where a back end needs it."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.is_cuda and mask is not None:
        # Among the CUDA back ends only the memory-efficient one takes a mask, and it takes no grouped heads.
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=group > 1)


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, scale: float) -> Tensor:
    """`api.dense_attention` by torch SDPA, a call per sequence (one for all of them when the lengths agree)."""
    rows = len(packing)
    if rows == 0 or packing.max_q == 0:
        return torch.zeros_like(q)
    if packing.uniform:
        # [S * n, H, D] → [S, H, n, D]
        q4, k4, v4 = (t.view(rows, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        return _causal(q4, k4, v4, scale).transpose(1, 2).reshape(q.shape)
    padded = rows * packing.max_q <= _MOST_PADDING * q.shape[0] and not needs_grad(q, k, v)
    if q.is_cuda and packing.q_lens == packing.k_lens and padded:
        # A call per sequence starves a GPU; what a right-padded row holds beyond its end, no query before it sees.
        inside, to = _padded_rows(packing.q_lens, q.device)
        q4, k4, v4 = (t[inside].transpose(1, 2) for t in (q, k, v))
        out = _causal(q4, k4, v4, scale).transpose(1, 2).flatten(0, 1)
        return q.new_empty(q.shape[0] + 1, *q.shape[1:]).index_copy_(0, to, out)[:-1]
    pieces = []
    for _, queries, keys in packing.slices():
        q4, k4, v4 = (t.transpose(0, 1)[None] for t in (q[queries], k[keys], v[keys]))
        pieces.append(_causal(q4, k4, v4, scale)[0].transpose(0, 1))
    return torch.cat(pieces)


def needs_grad(*tensors: Tensor) -> bool:
    """Whether a result of these will be differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@functools.lru_cache(maxsize=128)
def _padded_rows(lens: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of packed sequences as `[S, longest]`, each repeating its last one; and where results go, flat."""
    ends = torch.tensor(lens, device=device).cumsum(0)[:, None]
    starts = ends - torch.tensor(lens, device=device)[:, None]
    found = starts + torch.arange(max(lens), device=device)
    inside = torch.minimum(found, (ends - 1).clamp_min(0))
    return inside, torch.where(found < ends, inside, sum(lens)).flatten()


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Bottom-right causal attention, `q [B, Hq, n, D]`, `k, v [B, Hk, m, D]`, n <= m."""
    n, m = q.shape[2], k.shape[2]
    if n == m:
        return sdpa(q, k, v, scale=scale, causal=True)
    if n == 1:
        return sdpa(q, k, v, scale=scale)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.bias import causal_lower_right

        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=causal_lower_right(n, m), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    # torch's own causal flag is top-left, so a tile of queries at a time gets a mask of the keys up to its end.
    pieces = []
    for a in range(0, n, _TILE):
        b = min(a + _TILE, n)
        end = m - n + b
        mask = torch.ones(b - a, end, dtype=torch.bool, device=q.device).tril_(end - (b - a))
        pieces.append(sdpa(q[:, :, a:b], k[:, :, :end], v[:, :, :end], scale=scale, mask=mask))
    return torch.cat(pieces, 2)


def dense_flash4(q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, scale: float) -> Tensor:
    """`api.dense_attention` by flash-attn-4, in one launch for equal sequences and under gradients, else one each.

    Its kernels load whole tiles. What lies behind a sequence's end gets no weight, but a NaN times no weight is one:
    in a launch of packed sequences a request that overflows would spoil the one before it.
    """
    if packing.max_q == 0:
        return torch.zeros_like(q)
    if packing.uniform:
        from flash_attn.cute import flash_attn_func

        q4, k4, v4 = (t.view(len(packing), -1, *t.shape[1:]) for t in (q, k, v))
        out = flash_attn_func(q4, k4, v4, softmax_scale=scale, causal=True)
    elif needs_grad(q, k, v):
        from flash_attn.cute import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=packing.cu_q(q.device),
            cu_seqlens_k=packing.cu_k(q.device),
            max_seqlen_q=packing.max_q,
            max_seqlen_k=packing.max_k,
            softmax_scale=scale,
            causal=True,
        )
    else:
        # The public functions allocate their output; the sequences share one here.
        from flash_attn.cute.interface import _flash_attn_fwd

        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for _, queries, keys in packing.slices():
            parts = (t[None] for t in (q[queries], k[keys], v[keys]))
            _flash_attn_fwd(*parts, out=out[queries][None], softmax_scale=scale, causal=True)
    return (out[0] if isinstance(out, tuple) else out).view(q.shape)
