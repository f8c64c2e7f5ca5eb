"""Streaming attention (sinks + block-aligned window): tiled SDPA, flash-attn-4 and FlexAttention.

Shapes as in `flux_attention.kernels.api`. No implementation builds an [n, n] mask: SDPA takes a tile of queries at a
time with the keys it can see; the other two get the lists of full and partial key blocks written directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from flux_attention.kernels import block_lists
from flux_attention.kernels.block_lists import TILE
from flux_attention.kernels.dense import _causal, needs_grad, sdpa
from flux_attention.kernels.packing import Packing

T = TypeVar("T")

#: Queries a tile on CPU and on CUDA. A small tile wastes fewer masked scores, a large one fewer calls and copies.
_TILE = {"cpu": 256, "cuda": 1024}
#: Tiles that share one SDPA call; bounds the gathered keys.
_TILES_A_CALL = 16
#: The same for whole prompts, in blocks.
_BLOCKS_A_CALL = {"cpu": 64, "cuda": 1024}


def streaming_sdpa(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, sink: int, window: int, block: int, scale: float
) -> Tensor:
    """`api.streaming_attention` by torch SDPA over tiles of queries; differentiable."""
    if len(packing) > 1 and packing.q_lens == packing.k_lens and not any(packing.gaps) and not needs_grad(q, k, v):
        return _whole_prompts(q, k, v, packing.q_lens, sink, window, block, scale)
    pieces = [q.new_empty(0, *q.shape[1:])]
    tile = max(block, _TILE.get(q.device.type, 256) // block * block)
    for s, queries, keys in packing.slices():
        pieces += _one_sequence(q[queries], k[keys], v[keys], packing.gaps[s], sink, window, block, tile, scale)
    return pieces[1] if len(pieces) == 2 else torch.cat(pieces)


def _whole_prompts(
    q: Tensor, k: Tensor, v: Tensor, lens: tuple[int, ...], sink: int, window: int, block: int, scale: float
) -> Tensor:
    """Many unbroken sequences in a constant number of launches: a small model's passes are launch-bound otherwise.

    What a block of queries sees ends with the block itself, so bottom-right causal attention over sinks, window and
    block needs no mask. No gradients: gathered keys would have theirs added up row by row.
    """
    n = q.shape[0]
    # One row more than there are tokens takes what calls hold beyond a sequence's end.
    out = q.new_empty(n + 1, *q.shape[1:])
    for q_rows, k_rows, to in _prompt_calls(lens, sink, window, block, q.device):
        part = _causal(q[q_rows].transpose(1, 2), k[k_rows].transpose(1, 2), v[k_rows].transpose(1, 2), scale)
        out.index_copy_(0, to.flatten(), part.transpose(1, 2).flatten(0, 1))
    return out[:n]


# Layers of one forward pass share an entry; the next pass has other lengths, and entries hold device memory.
@functools.lru_cache(maxsize=8)
def _prompt_calls(
    lens: tuple[int, ...], sink: int, window: int, block: int, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Calls that cover packed sequences: query rows `[C, r]`, key rows `[C, m]`, output rows `[C, r]`.

    Rows beyond a sequence's end are its last one, written to row `sum(lens)`; no query before the end sees them.
    """
    total, starts = sum(lens), [sum(lens[:s]) for s in range(len(lens))]
    # Up to here (a block boundary) every query sees its whole past.
    causal_end = sink + window + block
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def columns(group: Sequence[tuple[int, ...]]) -> list[Tensor]:
        return [torch.tensor(column, device=device)[:, None] for column in zip(*group, strict=True)]

    def span(count: int) -> Tensor:
        return torch.arange(count, device=device)

    heads = [(s, s + n - 1) for s, n in zip(starts, lens, strict=True) if n]
    if not heads:
        return calls
    width = min(causal_end, max(lens))
    for some in _groups(heads, _BLOCKS_A_CALL.get(device.type, 64) * block // width + 1):
        begin, last = columns(some)
        rows = begin + span(width)
        inside = torch.minimum(rows, last)
        calls.append((inside, inside, torch.where(rows <= last, inside, total)))
    blocks = [(s, s + p, s + n - 1) for s, n in zip(starts, lens, strict=True) for p in range(causal_end, n, block)]
    for group in _groups(blocks, _BLOCKS_A_CALL.get(device.type, 64)):
        begin, first, last = columns(group)
        rows = first + span(block)
        inside = torch.minimum(rows, last)
        keys = torch.cat([begin + span(sink), torch.minimum(first - window + span(window + block), last)], 1)
        calls.append((inside, keys, torch.where(rows <= last, inside, total)))
    return calls


def _groups(items: list[T], size: int) -> list[list[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


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
    """`api.streaming_attention` by flash-attn-4; `block` a multiple of 128.

    Without gradients its causal kernel runs over the tiles that are visible (`streaming_tiles`); with gradients, or
    where a sequence starts inside a tile, its block sparsity over lists of blocks.
    """
    from flux_attention.kernels import streaming_tiles

    if streaming_tiles.serves(q, k, v, packing, block):
        return streaming_tiles.attend(q, k, v, packing, sink=sink, window=window, block=block, scale=scale)
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
    gradients = needs_grad(q, k, v)
    pieces = [q.new_empty(0, *q.shape[1:])]
    for s, queries, keys in packing.slices():
        q_s, k_s, v_s = q[queries], k[keys], v[keys]
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
