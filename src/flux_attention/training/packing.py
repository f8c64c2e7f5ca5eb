"""Documents packed back to back into rows of a fixed length.

A *pack* is the unit of training at scale: one row of `T` tokens that holds several documents. Attention, positions and
the router's pooling begin anew with each document, so a pack computes what its documents compute alone.

Shapes: `T` tokens of a pack, `S` documents in it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flux_attention.data.sample import Sample
from flux_attention.training.data import class_index

#: Documents that are open to the next pack at a time; more fill packs better, fewer keep the order of the data.
WINDOW = 64


def pack_lengths(lengths: Sequence[int], capacity: int, window: int = WINDOW) -> list[list[int]]:
    """Indices of the documents of each pack: every document in one pack, no pack above `capacity` tokens.

    Each pack starts with the oldest waiting document and takes the longest ones that still fit, out of the `window`
    oldest. The result depends on the lengths alone.

    Raises:
        ValueError: an empty document, or one longer than the pack, by its index.
    """
    if capacity < 1 or window < 1:
        raise ValueError(f"capacity and window must be at least 1, got {capacity} and {window}")
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(
                f"document {index} has {length} tokens, a pack {capacity}: shorten the document (max_length) or take a "
                "longer pack"
            )
    waiting = list(range(min(window, len(lengths))))
    following = len(waiting)
    packs = []
    while waiting:
        pack, room = [waiting[0]], capacity - lengths[waiting[0]]
        for index in sorted(waiting[1:], key=lambda i: (-lengths[i], i)):
            if lengths[index] <= room:
                pack.append(index)
                room -= lengths[index]
        taken = set(pack)
        waiting = [index for index in waiting if index not in taken]
        more = range(following, min(len(lengths), following + window - len(waiting)))
        waiting += more
        following += len(more)
        packs.append(sorted(pack))
    return packs


@dataclass(frozen=True)
class Pack:
    """One pack as tensors; what `PackedObjective` takes.

    Attributes:
        input_ids, position_ids: int64 `[1, T]`; positions begin at 0 with each document.
        targets: int64 `[1, T]`, the token that follows; 0 where nothing is learned.
        token_weight: float32 `[1, T]`: 1/n over the n answer tokens of a document, over the documents; 0 elsewhere. The
            weighted sum of token losses is the mean over documents of their means.
        lengths, prompt_lens, class_index: int64 `[S]`.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    token_weight: Tensor
    lengths: Tensor
    prompt_lens: Tensor
    class_index: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample], multiple: int = 1) -> Pack:
        """Pack samples in their order; the row is filled up to a multiple of `multiple` tokens.

        What fills it up belongs to no document: it is not pooled, learned or attended to.
        """
        if not samples:
            raise ValueError("a pack needs at least one document")
        lengths = [len(sample) for sample in samples]
        total = sum(lengths)
        columns = -(-total // multiple) * multiple
        ids = torch.zeros(columns, dtype=torch.long)
        positions = torch.arange(columns)
        targets = torch.zeros(columns, dtype=torch.long)
        weight = torch.zeros(columns)
        start = 0
        for sample, length in zip(samples, lengths, strict=True):
            tokens = torch.tensor(sample.prompt_ids + sample.answer_ids)
            end, answers = start + length, len(sample.answer_ids)
            ids[start:end] = tokens
            positions[start:end] = torch.arange(length)
            targets[start : end - 1] = tokens[1:]
            # The position before a token predicts it.
            weight[end - answers - 1 : end - 1] = 1.0 / (answers * len(samples))
            start = end
        positions[total:] = torch.arange(columns - total)
        return cls(
            ids[None],
            positions[None],
            targets[None],
            weight[None],
            torch.tensor(lengths),
            torch.tensor([len(sample.prompt_ids) for sample in samples]),
            class_index(samples),
        )

    def as_dict(self) -> dict[str, Tensor]:
        return dict(vars(self))


@dataclass(frozen=True)
class PackCollator:
    """What a data loader with one pack a batch needs: `[documents]` → the tensors of their `Pack`.

    Args:
        multiple: rows are filled up to a multiple of this; the number of ranks that share a row must divide it.
    """

    multiple: int = 1

    def __call__(self, packs: Sequence[Sequence[Sample]]) -> dict[str, Tensor]:
        if len(packs) != 1:
            raise ValueError(f"one pack is one batch, got {len(packs)}: set batch_size=1 and accumulate")
        return Pack.of(packs[0], self.multiple).as_dict()


class PackedDataset(Dataset[Sequence[Sample]]):
    """Packs of a data set's documents, in a random order that the seed fixes.

    Args:
        samples: an indexable data set of `Sample`s.
        capacity: tokens of a pack.
        lengths: tokens of each sample, where they are known; asked of the samples otherwise.
        seed: of the order in which documents are packed.
        short_first: a curriculum: documents of up to 2**k tokens come before those of up to 2**(k+1).

    Attributes:
        packs: sample indices of each pack.
        filled: share of the packs' tokens that are documents.

    Raises:
        ValueError: no documents, or one that is longer than a pack.
    """

    def __init__(
        self,
        samples: Dataset[Sample] | Sequence[Sample],
        capacity: int,
        *,
        lengths: Sequence[int] | None = None,
        seed: int = 0,
        short_first: bool = False,
    ) -> None:
        self.samples = samples
        if lengths is None:
            lengths = [len(samples[i]) for i in range(len(samples))]  # type: ignore[arg-type]
        if not lengths:
            raise ValueError("there are no documents to pack")
        order = list(range(len(lengths)))
        random.Random(seed).shuffle(order)
        longest = max(order, key=lambda i: lengths[i])
        if lengths[longest] > capacity:
            raise ValueError(
                f"document {longest} has {lengths[longest]} tokens, a pack {capacity}: shorten the documents "
                "(max_length) or take longer packs"
            )
        levels = [order]
        if short_first:
            level = {i: (lengths[i] - 1).bit_length() for i in order}
            levels = [[i for i in order if level[i] == k] for k in sorted(set(level.values()))]
        self.packs = [
            [members[i] for i in pack]
            for members in levels
            for pack in pack_lengths([lengths[i] for i in members], capacity)
        ]
        self.capacity = capacity
        self.filled = sum(lengths) / (capacity * len(self.packs))

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Sample]:
        return [self.samples[i] for i in self.packs[index]]
