"""Sparse attention by compacted block tables: the engine's own kernel only ever sees the blocks that are attended to.

Cached keys carry their absolute position in RoPE and softmax does not care about their order, so a table row
`[sink blocks | window blocks … last block]` with a shortened length is exact for one query token; and, with the
kernel's bottom-right causal mask, for all queries that share a window start, which are those of one tile of
`block_tokens` positions.

Shapes: `R` rows (requests of the batch), `V ≥ R` virtual sequences, `W` blocks per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.kernels.transfer import upload

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Pattern:
    """Streaming attention over KV blocks of `block_size` tokens; all other lengths are multiples of it."""

    sink: int
    window: int
    tile: int
    block_size: int

    @classmethod
    def of(cls, config: FluxConfig, block_size: int) -> Pattern:
        return cls(config.sink_tokens, config.window_tokens, config.block_tokens, block_size)

    def gap(self, position: int) -> tuple[int, int]:
        """Blocks `[first, last)` that no query at `position` or later attends to; empty when first ≥ last."""
        start = position // self.tile * self.tile - self.window
        return self.sink // self.block_size, max(self.sink, start) // self.block_size

    def drops(self, ends: Ints) -> NDArray[np.bool_]:
        """bool `[R]`: whether the query behind a row's last key sees less of `ends[row]` keys than all of them."""
        dropped: NDArray[np.bool_] = (ends - 1) // self.tile * self.tile - self.window > self.sink
        return dropped


@dataclass(frozen=True)
class VirtualBatch:
    """The batch as a paged kernel gets it, on the host.

    Attributes:
        query_starts: int32 `[V + 1]`, first query token of each virtual sequence; tokens keep their order.
        lengths: int32 `[V]`, keys of each virtual sequence, its queries included.
        rows: int `[V]`, the request of each virtual sequence.
        gaps: int `[V]`, blocks left out after the sinks.
    """

    query_starts: Ints
    lengths: Ints
    rows: NDArray[np.int64]
    gaps: NDArray[np.int64]

    @classmethod
    def of(
        cls, starts: NDArray[np.integer], ends: NDArray[np.integer], sparse: NDArray[np.bool_], pattern: Pattern
    ) -> VirtualBatch:
        """Cut the sparse rows' queries into tiles.

        Args:
            starts, ends: `[R]`, positions `[start, end)` of each row's queries; `end` keys are in the cache.
            sparse: `[R]`, rows that run streaming attention.
        """
        starts, ends = starts.astype(np.int64), ends.astype(np.int64)
        tile = pattern.tile
        first = starts // tile
        tiles = np.where(sparse, (ends + tile - 1) // tile - first, 1)
        rows = np.repeat(np.arange(len(starts)), tiles)
        index = np.arange(len(rows)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        begin = (first[rows] + index) * tile
        is_sparse = sparse[rows]
        q_start = np.where(is_sparse, np.maximum(starts[rows], begin), starts[rows])
        q_end = np.where(is_sparse, np.minimum(ends[rows], begin + tile), ends[rows])
        dropped = np.where(is_sparse, np.maximum(begin - pattern.window, pattern.sink) - pattern.sink, 0)
        query_starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(q_end - q_start, out=query_starts[1:])
        return cls(query_starts, (q_end - dropped).astype(np.int32), rows, dropped // pattern.block_size)

    def tensors(self, blocks: Tensor, pattern: Pattern) -> VirtualTensors:
        """The batch on the device of `blocks`, int32 `[R, W]`, the requests' own tables; gaps are not read."""
        device, size, sinks = blocks.device, pattern.block_size, pattern.sink // pattern.block_size
        count = len(self.rows)
        host = torch.from_numpy(
            np.concatenate([self.query_starts, self.lengths, self.rows, self.gaps]).astype(np.int32)
        )
        # One copy for all that the device needs to know.
        packed = upload(host, device)
        query_starts, lengths, rows, gaps = packed.split([count + 1, count, count, count])
        column = torch.arange(-(-int(self.lengths.max(initial=1)) // size), dtype=torch.int32, device=device)
        source = column + torch.where(column < sinks, 0, gaps[:, None])
        # Behind a sequence's last block stands whatever is there: kernels stop at the length.
        table = blocks[rows[:, None].long(), source.clamp_(max=blocks.shape[1] - 1).long()]
        return VirtualTensors(query_starts, host[: count + 1], lengths, table)


@dataclass(frozen=True)
class VirtualTensors:
    """A virtual batch as a paged kernel takes it.

    Attributes:
        query_starts: int32 `[V + 1]`.
        query_starts_cpu: the same on the host.
        lengths: int32 `[V]`.
        table: int32 `[V, …]`.
    """

    query_starts: Tensor
    query_starts_cpu: Tensor
    lengths: Tensor
    table: Tensor
