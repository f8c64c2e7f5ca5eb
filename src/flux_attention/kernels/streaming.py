"""Streaming attention (sinks + block-aligned window): tiled SDPA, flash-attn-4 and FlexAttention.

Shapes as in `flux_attention.kernels.api`. No implementation builds an [n, n] mask: SDPA takes a tile of queries at a
time with the keys it can see; the other two get the lists of full and partial key blocks written directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from flux_attention.kernels import block_lists
from flux_attention.kernels.api import Packing
from flux_attention.kernels.block_lists import TILE
from flux_attention.kernels.dense import _causal, sdpa

#: Queries a tile on CPU and on CUDA. A small tile wastes fewer masked scores, a large one fewer calls and copies.
_TILE = {"cpu": 256, "cuda": 1024}
#: Tiles that share one SDPA call; bounds the gathered keys.
_TILES_A_CALL = 16


def streaming_sdpa(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, sink: int, window: int, block: int, scale: float
) -> Tensor:
    """`api.streaming_attention` by torch SDPA over tiles of queries; differentiable."""
    pieces = [q.new_empty(0, *q.shape[1:])]
    tile = max(block, _TILE.get(q.device.type, 256) // block * block)
    for s in range(len(packing)):
        if packing.q_lens[s]:
            q_s = q[packing.q_offsets[s] : packing.q_offsets[s + 1]]
            k_s = k[packing.k_offsets[s] : packing.k_offsets[s + 1]]
            v_s = v[packing.k_offsets[s] : packing.k_offsets[s + 1]]
            pieces += _one_sequence(q_s, k_s, v_s, packing.gaps[s], sink, window, block, tile, scale)
    return pieces[1] if len(pieces) == 2 else torch.cat(pieces)


def _one_sequence(
    q: Tensor, k: Tensor, v: Tensor, gap: int, sink: int, window: int, block: int, tile: int, scale: float
) -> list[Tensor]:
    """Pieces `[_, Hq, D]` of one sequence's output in order; key index i >= sink is position i + gap."""
    end = k.shape[0] + gap
    position = start = end - q.shape[0]
    pieces = []
    # Up to here (a block boundary) every query sees its whole past: the plain causal kernel, no mask.
    causal_end = min(end, sink + window + block)
    if position < causal_end and gap == 0:
        n = causal_end - position
        out = _causal(
            q[:n].transpose(0, 1)[None],
            k[:causal_end].transpose(0, 1)[None],
            v[:causal_end].transpose(0, 1)[None],
            scale,
        )
        pieces.append(out[0].transpose(0, 1))
        position = causal_end
    while position < end:
        aligned = position % block == 0
        tiles = min((end - position) // tile, _TILES_A_CALL) if aligned else 0
        if tiles:
            stop = position + tiles * tile
            rows = tile
        else:
            # A ragged piece: up to the next block boundary, or the last tile.
            stop = min(end, position + tile if aligned else -(-position // block) * block)
            rows, tiles = stop - position, 1
        first = max(sink, position // block * block - window)
        span = position + rows - first
        # [tiles, H, keys, D]: the sinks, then each tile's own stretch of keys
        k_t, v_t = (_gather(t, first - gap, span, rows, tiles, sink) for t in (k, v))
        q_t = q[position - start : stop - start].view(tiles, rows, *q.shape[1:]).transpose(1, 2)
        mask = _tile_mask(rows, position % block, position - first, span, sink, window, block, q.device)
        out = sdpa(q_t, k_t, v_t, scale=scale, mask=mask)
        pieces.append(out.transpose(1, 2).reshape(stop - position, *q.shape[1:]))
        position = stop
    return pieces


def _gather(x: Tensor, first: int, span: int, step: int, tiles: int, sink: int) -> Tensor:
    """Keys of each tile, `[tiles, Hk, sink + span, D]`: rows `[0, sink)` and `first + i*step .. + span` of `x`."""
    if tiles == 1:
        own = x[first : first + span]
        # With the window right behind the sinks the two are one stretch.
        both = x[: span + sink] if first == sink else torch.cat([x[:sink], own])
        return both.transpose(0, 1)[None]
    # [tiles, Hk, D, span], a view
    own = x[first : first + (tiles - 1) * step + span].unfold(0, span, step)
    own = own.transpose(2, 3)
    head = x[:sink].transpose(0, 1)[None].expand(tiles, -1, -1, -1)
    return torch.cat([head, own], 2)


@functools.lru_cache(maxsize=64)
def _tile_mask(
    rows: int, offset: int, behind: int, span: int, sink: int, window: int, block: int, device: torch.device
) -> Tensor:
    """bool [rows, sink + span]: what each query of a tile sees.

    The first query is `offset` tokens into its block; the tile's own keys start `behind` tokens before it.
    """
    t = torch.arange(rows, device=device)[:, None]
    # Both relative to the first query.
    j = torch.arange(span, device=device)[None] - behind
    floor = (t + offset) // block * block - offset - window
    own = (j <= t) & (j >= floor)
    return torch.cat([own.new_ones(rows, sink), own], 1)


def streaming_flash4(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, sink: int, window: int, block: int, scale: float
) -> Tensor:
    """`api.streaming_attention` by flash-attn-4, sequence by sequence; `block` a multiple of 128.

    Without gradients its paged causal kernel runs over page tables (`streaming_pages`); with gradients, or where
    tiles and blocks do not coincide, its block sparsity over lists of blocks.
    """
    from flux_attention.kernels import streaming_pages

    if streaming_pages.serves(q, k, v, packing, block):
        return streaming_pages.attend(q, k, v, packing, sink=sink, window=window, scale=scale)
    return _over_lists(block_lists.flash4_over, q, k, v, packing, sink, window, block, scale)


def streaming_flex(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, sink: int, window: int, block: int, scale: float
) -> Tensor:
    """`api.streaming_attention` by FlexAttention, a call per sequence; `block` a multiple of 128."""
    return _over_lists(block_lists.flex_over, q, k, v, packing, sink, window, block, scale)


def _over_lists(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    sink: int,
    window: int,
    block: int,
    scale: float,
) -> Tensor:
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    pieces = [q.new_empty(0, *q.shape[1:])]
    for s in range(len(packing)):
        if not packing.q_lens[s]:
            continue
        q_s = q[packing.q_offsets[s] : packing.q_offsets[s + 1]]
        k_s = k[packing.k_offsets[s] : packing.k_offsets[s + 1]]
        v_s = v[packing.k_offsets[s] : packing.k_offsets[s + 1]]
        start, gap = packing.starts[s], packing.gaps[s]
        if gap % TILE:
            # Give up the keys that no query sees: what is left starts on a tile boundary.
            first = start // block * block - window
            k_s, v_s = (torch.cat([t[:sink], t[first - gap :]]) for t in (k_s, v_s))
            gap = first - sink
        lead = start % TILE
        if lead:
            # Rows put in front so that query tiles are position tiles; cut off again below.
            q_s = torch.cat([q_s.new_zeros(lead, *q_s.shape[1:]), q_s])
        lists = block_lists.streaming_lists(
            -(-q_s.shape[0] // TILE),
            -(-k_s.shape[0] // TILE),
            start // TILE,
            gap // TILE,
            sink // TILE,
            window // TILE,
            block // TILE,
            q.device,
            gradients,
        )
        pieces.append(attend(q_s, k_s, v_s, lists, scale=scale)[lead:])
    return pieces[1] if len(pieces) == 2 else torch.cat(pieces)
