"""Decode attention over paged keys: one query token per row, each row with its own page table and length.

Shapes as in `flux_attention.kernels.api.paged_decode`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paged_decode_sdpa(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """`api.paged_decode` in plain torch. On CUDA it gathers `max_pages` for every row rather than synchronise."""
    if out is None:
        out = torch.empty_like(q)
    if q.device.type != "cpu":
        return _gathered(q, k_pages, v_pages, page_table, lengths, scale, out)
    rows, hq, dim = q.shape
    page, hk = k_pages.shape[1:3]
    for s, n in enumerate(lengths.tolist()):
        if n == 0:
            out[s] = 0
            continue
        index = page_table[s, : -(-n // page)]
        k, v = _rows(k_pages, index, n), _rows(v_pages, index, n)
        # For one query two matrix products beat the fused kernel. [Hk, G, D] @ [Hk, D, n]
        scores = torch.matmul(q[s].view(hk, hq // hk, dim) * scale, k.permute(1, 2, 0))
        out[s] = torch.matmul(scores.softmax(-1), v.transpose(0, 1)).view(hq, dim)
    return out


def _rows(pages: Tensor, index: Tensor, n: int) -> Tensor:
    """The first n tokens `[n, Hk, D]` of the pages in `index`; a view when the pages lie side by side."""
    ids = index.tolist()
    if ids == list(range(ids[0], ids[0] + len(ids))):
        return pages[ids[0] : ids[0] + len(ids)].flatten(0, 1)[:n]
    return pages.index_select(0, index).flatten(0, 1)[:n]


def _gathered(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float, out: Tensor
) -> Tensor:
    rows, hq, dim = q.shape
    page, hk = k_pages.shape[1:3]
    max_tokens = page_table.shape[1] * page
    token = torch.arange(max_tokens, device=q.device)
    seen = token < lengths[:, None]
    # Entries past a row's length may hold anything; page 0 is as good as another once masked.
    table = page_table.where(seen[:, ::page], 0).long()
    hidden = ~seen[:, :, None, None]
    # Masked scores do not hide NaN in unused memory, so the memory itself is blanked.
    k = k_pages[table].view(rows, max_tokens, hk, dim).masked_fill(hidden, 0)
    v = v_pages[table].view(rows, max_tokens, hk, dim).masked_fill(hidden, 0)
    scores = torch.einsum("shgd,sthd->shgt", q.view(rows, hk, -1, dim), k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    # A row of length 0 has nothing to normalise: its NaN weights become zeros.
    weights = scores.softmax(-1).nan_to_num(0.0).to(q.dtype) if max_tokens else scores.to(q.dtype)
    out.copy_(torch.einsum("shgt,sthd->shgd", weights, v).reshape(rows, hq, dim))
    return out


#STUB
def paged_decode_triton(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, *, scale: float, out: Tensor | None = None
) -> Tensor:
    raise NotImplementedError
