"""Where the sequences of packed queries and keys are."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Lengths of the sequences packed along the token axis. Host integers; device copies are made once and kept.

    Queries are the last `q_lens[s]` tokens of sequence s. Its key array holds positions
    `[0, sink) ∪ [sink + gaps[s], n)` with `n = k_lens[s] + gaps[s]`; `gaps[s] = 0` is an unbroken sequence.

    Raises ValueError when the tuples differ in length, or a length is negative, or `q_lens[s] > k_lens[s]`.
    """

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    gaps: tuple[int, ...] = ()
    _device: dict[tuple[str, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    def __post_init__(self) -> None:
        # Lists are accepted for convenience; stored as tuples so that the packing hashes.
        for name in ("q_lens", "k_lens", "gaps"):
            object.__setattr__(self, name, tuple(int(x) for x in getattr(self, name)))
        if not self.gaps:
            object.__setattr__(self, "gaps", (0,) * len(self.k_lens))
        if not len(self.q_lens) == len(self.k_lens) == len(self.gaps):
            raise ValueError(
                "Packing: q_lens, k_lens and gaps must have one entry per sequence, got "
                f"{len(self.q_lens)}, {len(self.k_lens)} and {len(self.gaps)} entries"
            )
        for s, (q, k, g) in enumerate(zip(self.q_lens, self.k_lens, self.gaps, strict=True)):
            if not 0 <= q <= k:
                raise ValueError(f"Packing: sequence {s} needs 0 <= q_len <= k_len, got q_len={q}, k_len={k}")
            if g < 0:
                raise ValueError(f"Packing: gaps[{s}] must be >= 0, got {g}")

    def __len__(self) -> int:
        return len(self.q_lens)

    @functools.cached_property
    def max_q(self) -> int:
        """Longest query length, tokens."""
        return max(self.q_lens, default=0)

    @functools.cached_property
    def max_k(self) -> int:
        """Longest key length, tokens (keys held, dropped ones not counted)."""
        return max(self.k_lens, default=0)

    @functools.cached_property
    def totals(self) -> tuple[int, int]:
        """(N, M): query and key tokens over all sequences."""
        return sum(self.q_lens), sum(self.k_lens)

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """Position of the first query of each sequence."""
        return tuple(k + g - q for q, k, g in zip(self.q_lens, self.k_lens, self.gaps, strict=True))

    @functools.cached_property
    def uniform(self) -> bool:
        """Whether all sequences have the same query length, key length and gap."""
        return len(set(zip(self.q_lens, self.k_lens, self.gaps, strict=True))) <= 1

    @functools.cached_property
    def q_offsets(self) -> tuple[int, ...]:
        """S + 1 host offsets of the sequences in the packed queries."""
        return _offsets(self.q_lens)

    @functools.cached_property
    def k_offsets(self) -> tuple[int, ...]:
        """S + 1 host offsets of the sequences in the packed keys."""
        return _offsets(self.k_lens)

    def slices(self) -> Iterator[tuple[int, slice, slice]]:
        """Each sequence that has queries: its number, and where its queries and its keys lie."""
        for s in range(len(self)):
            if self.q_lens[s]:
                yield s, slice(*self.q_offsets[s : s + 2]), slice(*self.k_offsets[s : s + 2])

    def cu_q(self, device: torch.device | str) -> Tensor:
        """int32 [S + 1] query offsets on `device`, made once per device."""
        return self._on("q", self.q_offsets, device)

    def cu_k(self, device: torch.device | str) -> Tensor:
        """int32 [S + 1] key offsets on `device`, made once per device."""
        return self._on("k", self.k_offsets, device)

    def _on(self, name: str, values: tuple[int, ...], device: torch.device | str) -> Tensor:
        key = (name, torch.device(device))
        if key not in self._device:
            self._device[key] = torch.tensor(values, dtype=torch.int32, device=device)
        return self._device[key]


def _offsets(lens: tuple[int, ...]) -> tuple[int, ...]:
    out = [0]
    for n in lens:
        out.append(out[-1] + n)
    return tuple(out)
