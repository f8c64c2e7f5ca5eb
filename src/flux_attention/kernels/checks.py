"""What the ops ask of their input; each raises ValueError naming the op, what is wanted and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from flux_attention.kernels.packing import Packing


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise ValueError(
            f"{op}: expected q [N, Hq, D] and k, v [M, Hk, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    n, m = packing.totals
    if q.shape[0] != n or k.shape[0] != m:
        raise ValueError(
            f"{op}: packing holds {n} query and {m} key tokens, got q with {q.shape[0]} and k with {k.shape[0]}"
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"{op}: q and k must share the head dim, got {q.shape[2]} and {k.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: query heads must be a multiple of key heads, got {q.shape[1]} and {k.shape[1]}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"{op}: q, k and v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"{op}: q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")


def no_gaps(op: str, packing: Packing) -> None:
    if any(packing.gaps):
        raise ValueError(f"{op}: needs every key of a sequence, got a packing with gaps {packing.gaps}")


def check_block(op: str, block: int) -> None:
    if block < 1:
        raise ValueError(f"{op}: block must be >= 1, got {block}")


def check_streaming(op: str, packing: Packing, sink: int, window: int, block: int) -> None:
    check_block(op, block)
    if window < 0 or window % block:
        raise ValueError(f"{op}: window must be a non-negative multiple of block={block}, got {window}")
    if sink < 0 or sink % block:
        raise ValueError(f"{op}: sink must be a non-negative multiple of block={block}, got {sink}")
    if not any(packing.gaps):
        return
    for s, (gap, start) in enumerate(zip(packing.gaps, packing.starts, strict=True)):
        if gap and packing.q_lens[s] and start // block * block - window < sink + gap:
            raise ValueError(
                f"{op}: sequence {s} dropped keys [{sink}, {sink + gap}), but its first query at position {start} sees "
                f"keys from {max(sink, start // block * block - window)}; gaps[{s}] may be at most "
                f"{max(0, start // block * block - window - sink)}"
            )


def check_pages(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, out: Tensor | None
) -> None:
    """Shapes, dtypes and devices of `paged_decode`."""
    if q.dim() != 3 or k_pages.dim() != 4 or v_pages.shape != k_pages.shape:
        raise ValueError(
            "paged_decode: expected q [S, Hq, D] and k_pages, v_pages [P, page, Hk, D], got "
            f"{list(q.shape)}, {list(k_pages.shape)}, {list(v_pages.shape)}"
        )
    rows, hq, dim = q.shape
    page, hk = k_pages.shape[1], k_pages.shape[2]
    if k_pages.shape[3] != dim or hk == 0 or hq % hk:
        raise ValueError(
            f"paged_decode: q has {hq} heads of {dim}, k_pages {hk} heads of {k_pages.shape[3]}; the head dims must "
            "agree and the query heads be a multiple of the key heads"
        )
    if page % 16:
        raise ValueError(f"paged_decode: the page size (k_pages.shape[1]) must be a multiple of 16, got {page}")
    if page_table.dim() != 2 or page_table.shape[0] != rows or lengths.shape != (rows,):
        raise ValueError(
            f"paged_decode: expected page_table [{rows}, max_pages] and lengths [{rows}], got "
            f"{list(page_table.shape)} and {list(lengths.shape)}"
        )
    for name, index in (("page_table", page_table), ("lengths", lengths)):
        if index.dtype != torch.int32:
            raise ValueError(f"paged_decode: {name} must be int32, got {index.dtype}")
    if not (k_pages.dtype == v_pages.dtype == q.dtype and q.is_floating_point()):
        raise ValueError(
            f"paged_decode: q, k_pages and v_pages must share a floating dtype, got {q.dtype}, {k_pages.dtype}, "
            f"{v_pages.dtype}"
        )
    if any(t.device != q.device for t in (k_pages, v_pages, page_table, lengths)):
        raise ValueError(
            f"paged_decode: all tensors must be on q's device {q.device}, got k_pages on {k_pages.device}, v_pages on "
            f"{v_pages.device}, page_table on {page_table.device}, lengths on {lengths.device}"
        )
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or out.device != q.device):
        raise ValueError(
            f"paged_decode: out must be {list(q.shape)} {q.dtype} on {q.device}, got {list(out.shape)} {out.dtype} on "
            f"{out.device}"
        )
