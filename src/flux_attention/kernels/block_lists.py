"""Lists of key blocks per query block, and flash-attn-4 and FlexAttention run over them.

A *tile* is `TILE` tokens of queries or keys. Each query tile has a list of *full* key tiles, seen by all its rows, and
its *own* tile, the only one that needs a mask: the causal one. Lists are written directly, never derived from a dense
token mask. `h` below is 1 (the same for every head) or Hq.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Tokens a tile: the tile size of flash-attn-4's Hopper kernels for head dims up to 128.
TILE = 128

#: How flash-attn-4 masks the own tile. "mod" evaluates a mask function on that tile alone; "causal" uses the kernel's
#: own causal mask, cheaper per element, but applied to every listed tile.
DIAGONAL = "mod"


@dataclass(frozen=True)
class BlockLists:
    """Block lists of one sequence. Counts `[1, h, rows]`, indices `[1, h, rows, width]`, all int32.

    `own_*` and `full_*` run over query tiles and list key tiles; the `back_*` ones, needed for gradients only, run
    over key tiles and list query tiles.
    """

    own_count: Tensor
    own_index: Tensor
    full_count: Tensor
    full_index: Tensor
    back: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


@functools.lru_cache(maxsize=64)
def streaming_lists(
    n_q: int,
    n_k: int,
    first: int,
    gap: int,
    sink: int,
    window: int,
    block: int,
    device: torch.device,
    gradients: bool,
) -> BlockLists:
    """Lists of streaming attention; every argument in tiles.

    `n_q` query tiles from position tile `first` on; `n_k` key tiles, index j >= sink being position j + gap.
    """
    position = first + torch.arange(n_q, dtype=torch.int32, device=device)
    low = (position // block * block - window).clamp(min=sink)
    n_sink = position.clamp(max=sink)
    n_window = (position - low).clamp(min=0)
    count = n_sink + n_window
    width = max(1, min(n_k, sink + window + block - 1))
    c = torch.arange(width, dtype=torch.int32, device=device)
    index = torch.where(c < n_sink[:, None], c, (low - gap - n_sink)[:, None] + c)
    index = index.where(c < count[:, None], 0)
    back = _streaming_back(n_q, n_k, first, gap, sink, window, block, device) if gradients else None
    return BlockLists(
        own_count=torch.ones_like(count)[None, None],
        own_index=(position - gap)[None, None, :, None].contiguous(),
        full_count=count[None, None],
        full_index=index[None, None],
        back=back,
    )


def _streaming_back(
    n_q: int, n_k: int, first: int, gap: int, sink: int, window: int, block: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each key tile the query tiles that see it: a single range, since windows only move forward."""
    j = torch.arange(n_k, dtype=torch.int32, device=device)
    position = torch.where(j < sink, j, j + gap)
    begin = (position + 1 - first).clamp(min=0)
    # The last query tile whose window reaches back to this key tile is the last one of its block.
    end = (((position + window) // block + 1) * block - first).clamp(max=n_q)
    end = end.where(j >= sink, n_q)
    count = (end - begin).clamp(min=0)
    c = torch.arange(max(1, n_q), dtype=torch.int32, device=device)
    index = (begin[:, None] + c).where(c < count[:, None], 0)
    own = position - first
    own_count = ((own >= 0) & (own < n_q)).to(torch.int32)
    own_index = own.clamp(min=0, max=max(0, n_q - 1))
    return own_count[None, None], own_index[None, None, :, None].contiguous(), count[None, None], index[None, None]


def chosen_lists(chosen: Tensor, first: int, gradients: bool) -> BlockLists:
    """Lists from chosen blocks of one tile each: `chosen` bool `[Hq, nq, nk]`, query tile i at position first + i."""
    heads, n_q, n_k = chosen.shape
    own = first + torch.arange(n_q, dtype=torch.int32, device=chosen.device)
    j = torch.arange(n_k, dtype=torch.int32, device=chosen.device)
    full = chosen & (j < own[:, None])
    count, index = compact(full)
    ones = torch.ones(1, heads, n_q, dtype=torch.int32, device=chosen.device)
    back = None
    if gradients:
        back_count, back_index = compact(full.transpose(1, 2).contiguous())
        own_q = j - first
        back_own = (own_q >= 0).to(torch.int32).expand(1, heads, n_k).contiguous()
        back_own_index = own_q.clamp(min=0).expand(1, heads, n_k)[..., None].contiguous()
        back = (back_own, back_own_index, back_count[None], back_index[None])
    return BlockLists(ones, own.expand(1, heads, n_q)[..., None].contiguous(), count[None], index[None], back)


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts `[...]` and ascending columns `[..., n]`, int32, zeros behind, of the true entries of `mask [..., n]`."""
    rank = mask.cumsum(-1, dtype=torch.int32)
    n = mask.shape[-1]
    index = torch.zeros(*mask.shape[:-1], n + 1, dtype=torch.int32, device=mask.device)
    columns = torch.arange(n, dtype=torch.int32, device=mask.device).expand(mask.shape)
    # False entries all write to the spare last column.
    index.scatter_(-1, torch.where(mask, rank - 1, n).long(), columns)
    count = rank[..., -1].contiguous() if n else rank.sum(-1, dtype=torch.int32)
    return count, index[..., :n].contiguous()


def flash4_over(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, *, scale: float) -> Tensor:
    """flash-attn-4 on one sequence, `q [n, Hq, D]`, `k, v [m, Hk, D]`, `(m - n) % TILE == 0`; differentiable."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    size = (TILE, TILE)
    forward = BlockSparseTensorsTorch(
        lists.own_count, lists.own_index, lists.full_count, lists.full_index, block_size=size
    )
    backward = BlockSparseTensorsTorch(*lists.back, block_size=size) if lists.back is not None else None
    out = flash_attn_func(
        q[None],
        k[None],
        v[None],
        softmax_scale=scale,
        causal=DIAGONAL == "causal",
        pack_gqa=packs_heads(q.shape[1], k.shape[1], TILE),
        mask_mod=_causal_mod() if DIAGONAL == "mod" else None,
        block_sparse_tensors=forward,
        block_sparse_tensors_bwd=backward,
    )
    return (out[0] if isinstance(out, tuple) else out)[0]


def packs_heads(query_heads: int, key_heads: int, tile: int) -> bool:
    """Whether flash-attn-4 is to lay the query heads of a group side by side in tiles of `tile` rows.

    Only where whole tokens fill a tile: it loads any other packing row by row, a path that its block sparsity is not
    made for.
    """
    return tile % (query_heads // key_heads) == 0


@functools.cache
def _causal_mod() -> Any:
    """flash-attn-4's mask function of the own tile: bottom-right causal."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute import utils

    @cute.jit
    def causal(batch, head, q_index, k_index, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        offset = utils.scalar_to_ssa(seqlen_info.seqlen_k - seqlen_info.seqlen_q, cutlass.Int32)
        return k_index <= q_index + offset

    # Names the function in flash-attn's compile cache, which would otherwise hash its source.
    causal.__cute_hash__ = "flux_attention.block_lists.causal"
    return causal


def flex_over(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, *, scale: float) -> Tensor:
    """FlexAttention (triton back end) on one sequence; shapes as `flash4_over`; differentiable."""
    from torch.nn.attention.flex_attention import BlockMask

    n_k = -(-k.shape[0] // TILE)
    mask = BlockMask.from_kv_blocks(
        lists.own_count,
        _widen(lists.own_index, n_k),
        lists.full_count,
        _widen(lists.full_index, n_k),
        BLOCK_SIZE=TILE,
        mask_mod=_within_tile,
        seq_lengths=(q.shape[0], k.shape[0]),
    )
    q4, k4, v4 = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = _compiled_flex()(q4, k4, v4, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def _widen(index: Tensor, width: int) -> Tensor:
    """Index lists padded to `width` columns, which FlexAttention takes for the number of key blocks."""
    return torch.nn.functional.pad(index, (0, width - index.shape[-1])).contiguous()


def _within_tile(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
    """Causal mask of the own tile, where query and key tiles are the same stretch of tokens."""
    return k_index % TILE <= q_index % TILE


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
