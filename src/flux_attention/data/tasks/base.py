"""What every task is."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from flux_attention.data.corpus import SPLITS
from flux_attention.data.prompt import Draft, fit
from flux_attention.data.sample import METRICS, RETRIEVAL, TASK_CLASSES, Sample

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A generator of samples.

    Args:
        held_out: kept out of training mixtures, to measure tasks that the router has never seen.
        teacher_forced: whether teacher-forced accuracy means anything (see `Sample`).
    """

    name: str
    task_class: str = RETRIEVAL
    metric: str = "string_match_all"
    held_out: bool = False
    teacher_forced: bool = field(default=True)
    #: Goes up when earlier samples turn out wrong: files that hold them are then not used any more.
    revision: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.task_class not in TASK_CLASSES:
            raise ValueError(f"task {self.name!r}: task_class must be one of {TASK_CLASSES}, got {self.task_class!r}")
        if self.metric not in METRICS:
            raise ValueError(f"task {self.name!r}: metric must be one of {METRICS}, got {self.metric!r}")

    def files(self) -> tuple[Path, ...]:
        """Files that the samples are made from."""
        return ()

    @abstractmethod
    def sample(self, rng: random.Random, tokenizer: Any, length: int, split: str) -> Sample:
        """One sample of at most `length` tokens, prompt and answer together."""

    def _check(self, length: int, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"task {self.name!r}: split must be one of {SPLITS}, got {split!r}")
        if length < 1:
            raise ValueError(f"task {self.name!r}: length must be positive, got {length}")


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A task that writes a text of adjustable size: subclasses say how, the length is fitted here."""

    @abstractmethod
    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        """The prompt with `size` units of context; a larger size must never shrink it."""

    @abstractmethod
    def sizes(self, length: int) -> tuple[int, int]:
        """Smallest sensible size, and a guess of the size that fills `length` tokens."""

    def sample(self, rng: random.Random, tokenizer: Any, length: int, split: str) -> Sample:
        self._check(length, split)
        # Each try at a size starts from the same seed, so that sizes differ in size alone.
        seed = rng.getrandbits(64)
        least, guess = self.sizes(length)
        build: Callable[[int], Draft] = lambda size: self.draft(random.Random(seed), size, split)  # noqa: E731
        draft, encoded = fit(tokenizer, length, build, least=least, guess=guess, name=self.name)
        return Sample(
            task=self.name,
            task_class=self.task_class,
            prompt_ids=encoded.prompt_ids,
            answer_ids=encoded.answer_ids,
            answers=draft.references,
            metric=self.metric,
            spans=encoded.spans,
            teacher_forced=self.teacher_forced,
            meta={"split": split, "length": length, **draft.meta},
        )


def choose(rng: random.Random, split: str, train: Sequence[T], test: Sequence[T]) -> tuple[T, int]:
    """One phrasing for the split and its index. The first test phrasing is the published one, used half the time."""
    if split == "train":
        index = rng.randrange(len(train))
        return train[index], index
    index = 0 if len(test) == 1 or rng.random() < 0.5 else rng.randrange(1, len(test))
    return test[index], index


def spread(rng: random.Random, pieces: list[str], inserts: Sequence[str]) -> list[float]:
    """Insert into `pieces` at random places, in order; returns the depths in [0, 1]."""
    depths = sorted(rng.random() for _ in inserts)
    total = len(pieces)
    for depth, text in reversed(list(zip(depths, inserts, strict=True))):
        pieces.insert(int(depth * (total + 1)), text)
    return [round(depth, 3) for depth in depths]
