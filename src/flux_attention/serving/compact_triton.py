"""Compacted block tables on the GPU, for decode: one launch per bundle of layers, inside the engine's CUDA graph.

What `VirtualBatch` does on the host for any batch, for rows of one query token; nothing of it passes the host, so a
captured graph serves whatever routes the rows have at replay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _compact(
    p_blocks,
    p_lengths,
    p_sparse,
    p_tables,
    p_out_lengths,
    s_blocks,
    s_sparse,
    s_table_layer,
    s_table_row,
    s_out,
    SINK: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_row, i_layer = tl.program_id(0), tl.program_id(1)
    length = tl.load(p_lengths + i_row)
    sparse = tl.load(p_sparse + i_layer * s_sparse + i_row)
    start = tl.maximum(length - 1, 0) // TILE * TILE - WINDOW
    gap = tl.where(sparse != 0, tl.maximum(start - SINK, 0), 0) // SIZE
    tl.store(p_out_lengths + i_layer * s_out + i_row, length - gap * SIZE)
    count = (length + SIZE - 1) // SIZE - gap
    for first in range(0, count, COLUMNS):
        # [COLUMNS]
        o_column = first + tl.arange(0, COLUMNS)
        m_column = o_column < count
        source = o_column + tl.where(o_column < SINK // SIZE, 0, gap)
        block = tl.load(p_blocks + i_row * s_blocks + source, mask=m_column, other=0)
        tl.store(p_tables + i_layer * s_table_layer + i_row * s_table_row + o_column, block, mask=m_column)


def compact_decode(
    blocks: Tensor,
    lengths: Tensor,
    sparse: Tensor,
    tables: Tensor,
    out_lengths: Tensor,
    *,
    sink: int,
    window: int,
    tile: int,
    block_size: int,
) -> None:
    """Write every layer's block table and lengths for rows with one query token.

    Args:
        blocks: int32 `[R, W]`, the rows' own tables.
        lengths: int32 `[R]`, keys of each row, its query's included; 0 for rows that pad the batch.
        sparse: uint8 `[layers, ≥ R]`, 1 = the row runs streaming attention in this layer.
        tables: int32 `[layers, ≥ R, ≥ W]`, written up to a row's last block; what lies behind it is left as it is.
        out_lengths: int32 `[layers, ≥ R]`, written.
        sink, window, tile, block_size: the pattern, in tokens.
    """
    for name, tensor in (("blocks", blocks), ("tables", tables)):
        if tensor.stride(-1) != 1 or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 with contiguous rows, got {tensor.dtype}, stride {tensor.stride()}")
    _compact[(len(lengths), len(tables))](
        blocks,
        lengths,
        sparse,
        tables,
        out_lengths,
        blocks.stride(0),
        sparse.stride(0),
        tables.stride(0),
        tables.stride(1),
        out_lengths.stride(0),
        sink,
        window,
        tile,
        block_size,
        128,
    )
