"""Streaming attention by flash-attn-4's causal kernel over the tiles of keys that hold visible ones.

The kernel itself, which needs flash-attn-4 to be imported, is `streaming_tiles_cute.py`; here is what it can take and
how sequences are handed to it. Forward only. Shapes as in `flux_attention.kernels.api`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from flux_attention.kernels.block_lists import TILE
from flux_attention.kernels.dense import needs_grad
from flux_attention.kernels.packing import Packing


def serves(q: Tensor, k: Tensor, v: Tensor, packing: Packing, block: int) -> bool:
    """Whether `attend` can take this request: no gradients, sequences that start on a tile, gaps of whole blocks."""
    on_tiles = all(start % TILE == 0 for start in packing.starts) and not any(gap % block for gap in packing.gaps)
    return block % TILE == 0 and on_tiles and not needs_grad(q, k, v)


def attend(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, sink: int, window: int, block: int, scale: float
) -> Tensor:
    """`api.streaming_attention` where `serves` says yes."""
    from flux_attention.kernels.streaming_tiles_cute import launch

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    run = functools.partial(launch, sink=sink // TILE, window=window // TILE, block=block // TILE, scale=scale)
    if packing.uniform:
        run(*(t.unflatten(0, (len(packing), -1)) for t in (q, k, v, out)))
    else:
        # A launch each: tiles reach behind a sequence's end, where another one's NaN would spoil it (`dense.py`).
        for _, queries, keys in packing.slices():
            run(q[queries][None], k[keys][None], v[keys][None], out[queries][None])
    return out
