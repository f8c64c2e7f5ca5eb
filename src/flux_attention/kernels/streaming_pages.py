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

#: Passed on to flash-attn-4. Unpacked heads: a tile of queries is then a page of tokens, and measured 2 % faster.
OPTIONS: dict[str, Any] = {"pack_gqa": False}


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
    if not gap and start + n <= sink + window + TILE:
        causal(q[None], k[None], v[None], out[None], scale)
        return
    own, sinks, windows = (start - gap) // TILE, sink // TILE, window // TILE
    tiles, rest = divmod(n, TILE)
    if tiles:
        table, lengths = page_table(tiles, own, sinks, windows, q.device)
        # The first tiles of a prompt see fewer keys than the others; one launch takes them all.
        short = not gap and own < sinks + windows
        q_tiles, out_tiles = (t[: tiles * TILE].unflatten(0, (tiles, TILE)) for t in (q, out))
        causal(q_tiles, _pages(k), _pages(v), out_tiles, scale, table, lengths if short else None)
    if rest:
        # Less than a tile at the end: its few keys are gathered.
        low = start + n - rest - window - gap
        k_rest, v_rest = (t[None] if low <= sink else torch.cat([t[:sink], t[low:]])[None] for t in (k, v))
        causal(q[None, n - rest :], k_rest, v_rest, out[None, n - rest :], scale)


def _pages(x: Tensor) -> Tensor:
    """`[m, Hk, D]` → the whole tiles of it, `[pages, TILE, Hk, D]`, a view."""
    pages = x.shape[0] // TILE
    return x[: pages * TILE].unflatten(0, (pages, TILE))


@functools.lru_cache(maxsize=64)
def page_table(tiles: int, own: int, sink: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Key pages that each query tile sees, `[tiles, sink + window + 1]`, and its keys in tokens, `[tiles]`; int32.

    `own`: index among the keys of the first query tile's own tile. Arguments in tiles. Early tiles see fewer pages
    than the table is wide; what is behind their keys repeats the own tile and is never read.
    """
    width = sink + window + 1
    column = torch.arange(width, dtype=torch.int32, device=device)
    last = own + torch.arange(tiles, dtype=torch.int32, device=device)[:, None]
    table = torch.where(column < sink, column, column + (last - (width - 1)).clamp(min=0))
    return torch.minimum(table, last), (last[:, 0] + 1).clamp(max=width) * TILE


def causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scale: float,
    table: Tensor | None = None,
    lengths: Tensor | None = None,
) -> None:
    """Bottom-right causal attention into `out`, `q, out [B, n, Hq, D]`, by flash-attn-4.

    `k, v [B, m, Hk, D]`, or pages `[P, TILE, Hk, D]` with `table [B, pages of a row]`; `lengths [B]`: a row's keys,
    None = all of them.
    """
    # The public functions allocate their output; the pieces of a sequence share one here.
    from flash_attn.cute.interface import _flash_attn_fwd

    arguments: dict[str, Any] = {"softmax_scale": scale, "causal": True, "page_table": table, "seqused_k": lengths}
    _flash_attn_fwd(q, k, v, out=out, **arguments, **OPTIONS)
