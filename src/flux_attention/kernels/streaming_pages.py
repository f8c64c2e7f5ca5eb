"""Streaming attention as paged causal attention: flash-attn-4's own causal kernel over page tables.

A block of `TILE` queries is a batch entry of its own, and the keys it sees are a row of a page table: the sinks, the
window, its own tile. In that order bottom-right causal attention is streaming attention, so no mask function and no
list of masked tiles is needed: the plain kernel runs, and it visits exactly the tiles that hold visible keys.

Forward only. Shapes as in `flux_attention.kernels.api`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from flux_attention.kernels.api import Packing
from flux_attention.kernels.block_lists import TILE


def serves(q: Tensor, k: Tensor, v: Tensor, packing: Packing, block: int) -> bool:
    """Whether `attend` can take this request: no gradients, blocks of one tile, sequences that start on a tile."""
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    on_tiles = all(start % TILE == 0 for start in packing.starts) and not any(gap % TILE for gap in packing.gaps)
    return block == TILE and on_tiles and not gradients


def attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, sink: int, window: int, scale: float) -> Tensor:
    """`api.streaming_attention` with `block = TILE`, where `serves` says yes."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for s in range(len(packing)):
        if packing.q_lens[s]:
            queries = slice(packing.q_offsets[s], packing.q_offsets[s + 1])
            keys = slice(packing.k_offsets[s], packing.k_offsets[s + 1])
            _one_sequence(
                q[queries], k[keys], v[keys], out[queries], packing.starts[s], packing.gaps[s], sink, window, scale
            )
    return out


def _one_sequence(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, start: int, gap: int, sink: int, window: int, scale: float
) -> None:
    """One sequence, `q, out [n, Hq, D]` from position `start` on; key index i >= sink is position i + gap."""
    n = q.shape[0]
    # Up to here every query sees its whole past: plain causal attention. A sequence with a gap is past it.
    whole = 0 if gap else max(0, min(n, sink + window + TILE - start))
    if whole:
        past = start + whole
        causal(q[None, :whole], k[None, :past], v[None, :past], out[None, :whole], scale)
    tiles = (n - whole) // TILE
    if tiles:
        end = whole + tiles * TILE
        table = page_table(tiles, (start + whole - gap) // TILE, sink // TILE, window // TILE, q.device)
        q_tiles, out_tiles = (t[whole:end].unflatten(0, (tiles, TILE)) for t in (q, out))
        k_pages, v_pages = (_pages(t) for t in (k, v))
        causal(q_tiles, k_pages, v_pages, out_tiles, scale, table)
    rest = n - whole - tiles * TILE
    if rest:
        # Less than a tile at the end: its few keys are gathered.
        first = start + n - rest - window - gap
        k_rest, v_rest = (torch.cat([t[:sink], t[first:]])[None] for t in (k, v))
        causal(q[None, n - rest :], k_rest, v_rest, out[None, n - rest :], scale)


def _pages(x: Tensor) -> Tensor:
    """`[m, Hk, D]` → the whole tiles of it, `[pages, TILE, Hk, D]`, a view."""
    pages = x.shape[0] // TILE
    return x[: pages * TILE].unflatten(0, (pages, TILE))


@functools.lru_cache(maxsize=64)
def page_table(tiles: int, own: int, sink: int, window: int, device: torch.device) -> Tensor:
    """Key pages that each query tile sees, int32 `[tiles, sink + window + 1]`; everything in tiles.

    `own`: index among the keys of the first query tile's own tile.
    """
    column = torch.arange(sink + window + 1, dtype=torch.int32, device=device)
    tile = torch.arange(tiles, dtype=torch.int32, device=device)[:, None]
    return torch.where(column < sink, column, own + tile - window + column - sink)


def causal(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, table: Tensor | None = None) -> None:
    """Bottom-right causal attention into `out`, `q, out [B, n, Hq, D]`, by flash-attn-4.

    `k, v [B, m, Hk, D]`, or pages `[P, TILE, Hk, D]` with `table [B, pages of a row]`.
    """
    # The public functions allocate their output; the pieces of a sequence share one here.
    from flash_attn.cute.interface import _flash_attn_fwd

    # Unpacked heads: a tile of queries is then a page of tokens, and measured 2 % faster at 128K tokens.
    arguments: dict[str, Any] = {"softmax_scale": scale, "causal": True, "page_table": table, "out": out}
    _flash_attn_fwd(q, k, v, pack_gqa=False, **arguments)
