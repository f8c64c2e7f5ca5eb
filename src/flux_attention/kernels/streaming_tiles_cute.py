"""flash-attn-4's Hopper forward kernel, told which key tiles a tile of queries visits: sinks, window, its own.

The kernel is theirs as it is. Two things are said differently: how many steps over key tiles a tile of queries takes
(`_Tiles`), and which tile a step loads (`load_KV`). Steps count down from the own tile, so that a window's tiles keep
the numbers of their positions and the causal mask, which the own tile alone needs, holds; the last steps are the
sinks. A tile is known from the block's own number: nothing is read from memory for it, as a page of a page table or
an entry of a list of blocks would be.

Imported only where flash-attn-4 is there. Shapes as in `flux_attention.kernels.api`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32
from flash_attn.cute.block_info import BlockInfo
from flash_attn.cute.cute_dsl_utils import maybe_contiguous, to_cute_tensor, torch2cute_dtype_map
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.utils import AuxData
from torch import Tensor

from flux_attention.kernels import held
from flux_attention.kernels.block_lists import TILE


@dataclass(frozen=True)
class _Tiles(BlockInfo):
    """Steps of a tile of queries. The fields of a local window, which the causal kernel does not use, hold its sizes.

    Attributes:
        window_size_left, window_size_right: window and sinks of streaming attention, in tiles.
        block: tiles of a block, whose start the window reaches back from; a constant of the compiled kernel.
        last: number of the query tile's last step, once it is known; as many steps as there are sinks end there.
    """

    block: int = 1
    last: list[Int32] = field(default_factory=list)

    @cute.jit
    def get_n_block_min_max(self, seqlen_info: Any, m_block: Int32, split_idx: Any = 0, num_splits: Any = 1) -> Any:
        own = m_block + (seqlen_info.seqlen_k - seqlen_info.seqlen_q) // TILE
        start = own // self.block * self.block - self.window_size_left
        # Where the window touches the sinks, all tiles up to the own one are visible and every step is its own number.
        last = cutlass.max(start - self.window_size_right, 0)
        self.last[:] = [last]
        return last, own + 1

    @cute.jit
    def loaded(self, step: Int32) -> Any:
        """The key tile that a step loads."""
        past = step - self.last[0]
        return past if past < self.window_size_right else step


class StreamingForward(FlashAttentionForwardSm90):
    """The forward kernel over `_Tiles`; `block` in tiles.

    `is_local` chooses the order of blocks: tiles of queries cost the same, as under a local window, and in order they
    share keys in L2. Causal attention's order, longest first, took 3 % more time. Masks are causal.
    """

    def __init__(self, *args: Any, block: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._block = block

    def _tiles(self, theirs: BlockInfo) -> _Tiles:
        known = {item.name: getattr(theirs, item.name) for item in fields(theirs)}
        return _Tiles(**{**known, "is_local": False}, block=self._block)

    def _with_tiles(self, arguments: Sequence[Any]) -> list[Any]:
        return [self._tiles(one) if isinstance(one, BlockInfo) else one for one in arguments]

    # The parts of the kernel, traced where it calls them.

    def load(self, *arguments: Any) -> None:
        with_tiles = self._with_tiles(arguments)
        (self._loading,) = (one for one in with_tiles if isinstance(one, _Tiles))
        super().load(*with_tiles)

    def load_KV(self, *arguments: Any, block: Int32, **named: Any) -> None:  # noqa: N802, flash-attn-4's name
        super().load_KV(*arguments, block=self._loading.loaded(block), **named)

    def mma(self, *arguments: Any) -> None:
        self.is_local = False
        try:
            super().mma(*self._with_tiles(arguments))
        finally:
            self.is_local = True


@functools.cache
def _compiled(dtype: torch.dtype, dim: int, group: int, block: int) -> Any:
    """The kernel for `group` query heads a key head and `block` tiles a block, seconds to compile."""
    kernel = StreamingForward(
        torch2cute_dtype_map[dtype],
        dim,
        dim,
        group,
        is_causal=True,
        is_local=True,
        # A tile of queries is a tile of tokens: heads are not packed into it.
        pack_gqa=False,
        tile_m=TILE,
        tile_n=TILE,
        num_stages=2,
        num_threads=384,
        Q_in_regs=False,
        block=block,
    )
    # No dimension is one, which a compiler could take for a constant.
    q, k = (torch.empty(2, 2 * TILE, heads, dim, dtype=dtype, device="cuda") for heads in (2 * group, 2))
    tensors = [to_cute_tensor(t) for t in (q, k, k, q)]
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel, *_arguments(tensors, 1, 1, 1.0), stream, options="--enable-tvm-ffi")


def _arguments(tensors: Sequence[Any], sink: int, window: int, scale: float) -> list[Any]:
    """What the kernel is called with, of all that it can do; `tensors`: queries, keys, values, output."""
    nothing = (None,) * 5
    return [*tensors, None, scale, *nothing, window, sink, None, None, AuxData(), None, None]


def launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, sink: int, window: int, block: int, scale: float) -> None:
    """Streaming attention into `out`, `q, out [B, n, Hq, D]`, `k, v [B, m, Hk, D]`; sizes in tiles.

    The last query sees the last key, and the first one lies whole tiles behind the first key.
    """
    kernel = _compiled(q.dtype, q.shape[-1], q.shape[-2] // k.shape[-2], block)
    tensors = [*(maybe_contiguous(t.detach()) for t in (q, k, v)), out]
    held.launch(kernel, *_arguments(tensors, sink, window, scale))
