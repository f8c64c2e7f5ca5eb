"""Where the sequences of a forward pass are: padding and packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flux_attention.cache import FluxCache


@dataclass(frozen=True)
class Layout:
    """Where the real tokens of a `[B, T]` batch are: one entry per sequence.

    Attributes:
        batch, columns: `B`, `T`.
        rows, starts, counts: row, first column and number of new tokens of each sequence.
        past: tokens of each sequence already in the cache.
        slots: the cache row of each sequence; () = the same as `rows`.
        is_decode: whether this is one new token for every row of a cache that holds some of each. Never inferred from
            the shape alone: a packed chunk of one token looks alike, and its cache is not planned for a decode step.
    """

    batch: int
    columns: int
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    past: tuple[int, ...]
    slots: tuple[int, ...] = ()
    is_decode: bool = False

    def __post_init__(self) -> None:
        if not self.slots:
            object.__setattr__(self, "slots", self.rows)

    @classmethod
    def pack(cls, slots: Sequence[int], counts: Sequence[int], past: Sequence[int]) -> Layout:
        """Sequences back to back in one row of `sum(counts)` columns, each for its own cache row."""
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return cls(1, sum(counts), (0,) * len(counts), tuple(starts), tuple(counts), tuple(past), tuple(slots))

    @classmethod
    def decode(cls, past: Sequence[int]) -> Layout:
        """One new token for every cache row."""
        rows = len(past)
        return cls(rows, 1, tuple(range(rows)), (0,) * rows, (1,) * rows, tuple(past), is_decode=True)

    @cached_property
    def is_plain(self) -> bool:
        """Whether the flat token axis holds the sequences back to back, nothing else."""
        return sum(self.counts) == self.batch * self.columns

    @cached_property
    def flat_starts(self) -> tuple[int, ...]:
        """First token of each sequence on the flat axis `[B·T]`."""
        return tuple(r * self.columns + s for r, s in zip(self.rows, self.starts, strict=True))

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(p + n for p, n in zip(self.past, self.counts, strict=True))

    def token_index(self, device: torch.device) -> Tensor:
        """Flat index of every real token, sequence by sequence, int64 `[N]`."""
        ranges = [torch.arange(s, s + n) for s, n in zip(self.flat_starts, self.counts, strict=True)]
        return torch.cat(ranges).to(device)

    @classmethod
    def of(
        cls,
        batch: int,
        columns: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: FluxCache | None,
    ) -> Layout:
        """Read the layout from what transformers passes; raises ValueError on a mask that leaves holes."""
        past = [0] * batch if cache is None or cache.is_empty else cache.lengths
        if len(past) != batch:
            raise ValueError(f"the cache holds {len(past)} rows, the batch has {batch}")
        if attention_mask is None and position_ids is not None and cache is None and position_ids.shape[1] == columns:
            packed = cls._packed(batch, position_ids)
            if packed is not None:
                return packed
        if attention_mask is None:
            return cls._rows((0,) * batch, (columns,) * batch, past, columns)
        if attention_mask.ndim != 2:
            raise ValueError(
                f"routed attention takes a 2D attention mask [batch, tokens], got {tuple(attention_mask.shape)}"
            )
        seen = 0 if cache is None else cache.seen_tokens
        if tuple(attention_mask.shape) != (batch, seen + columns):
            raise ValueError(
                f"attention_mask must be [{batch}, {seen + columns}] ({seen} tokens in the cache + {columns} new), "
                f"got {list(attention_mask.shape)}"
            )
        new = attention_mask[:, seen:].to("cpu", torch.bool)
        counts = new.sum(1)
        starts = new.int().argmax(1)
        column = torch.arange(columns)
        solid = (column >= starts[:, None]) & (column < (starts + counts)[:, None])
        if not torch.equal(new, solid):
            row = int((new != solid).any(1).nonzero()[0])
            raise ValueError(f"attention_mask has holes in row {row}; only left or right padding is supported")
        # A chunk of a left-padded batch may hold nothing of a short row; a whole prompt may not be empty.
        if cache is None and any(int(n) == 0 for n in counts):
            raise ValueError("the prompt is empty: attention_mask leaves a row without tokens")
        return cls._rows(starts.tolist(), counts.tolist(), past, columns)

    @classmethod
    def _rows(cls, starts: Sequence[int], counts: Sequence[int], past: Sequence[int], columns: int) -> Layout:
        """One sequence a row, for the cache row of the same number."""
        decode = columns == 1 and all(counts) and all(past)
        rows = tuple(range(len(counts)))
        return cls(len(rows), columns, rows, tuple(starts), tuple(counts), tuple(past), is_decode=decode)

    @classmethod
    def _packed(cls, batch: int, position_ids: Tensor) -> Layout | None:
        """Several sequences per row, where positions begin again; None when nothing is packed."""
        positions = position_ids.expand(batch, -1).cpu()
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        if bool(begins[:, 1:].any()):
            flat = begins.flatten().nonzero()[:, 0].tolist()
            columns = positions.shape[1]
            ends = [*flat[1:], batch * columns]
            return cls(
                batch,
                columns,
                tuple(f // columns for f in flat),
                tuple(f % columns for f in flat),
                tuple(e - f for f, e in zip(flat, ends, strict=True)),
                (0,) * len(flat),
            )
        return None
