"""RULER's common words extraction: the words that a long numbered list repeats most; the same with other items."""

from __future__ import annotations

import random
from dataclasses import dataclass

from flux_attention.data.prompt import Draft
from flux_attention.data.sample import HOLISTIC
from flux_attention.data.tasks.base import TextTask, choose
from flux_attention.data.words import ADJECTIVES, NOUNS

_TEST = (
    (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.",
        "Question: What are the {count} most common words in the above list?",
        "Answer: The top {count} words that appear most often in the list are:",
    ),
    (
        "Here are words, one a line.",
        "Which {count} words does the list repeat most?",
        "The {count} words repeated most are:",
    ),
)
_TRAIN = (
    (
        "Go through this list of words and notice repetitions.",
        "Name the {count} words that occur most often.",
        "The {count} most frequent words are:",
    ),
    (
        "The following list holds words, some of them many times.",
        "Give the {count} commonest words of the list.",
        "The {count} commonest words are:",
    ),
)
_ITEMS_TEST = (
    (
        "These {items} were written down one after the other.",
        "Which {count} {items} were written down most?",
        "Written down most:",
    ),
)
_ITEMS_TRAIN = (
    (
        "Count how often each of these {items} comes up.",
        "Which {count} {items} come up most often? Only name them.",
        "Most often come up:",
    ),
    (
        "Here are {items} in no order, many of them repeated.",
        "List the {count} {items} with the most occurrences, without an explanation.",
        "The {count} {items} with the most occurrences are:",
    ),
    (
        "What follows is a log of {items}. Keep a tally.",
        "By the tally, what are the {count} most frequent {items} above?",
        "By the tally, the {count} most frequent {items} are:",
    ),
)


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1000, 100_000), count)]


def _codes(rng: random.Random, count: int) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    codes: dict[str, None] = {}
    while len(codes) < count:
        codes["".join(rng.choice(letters) for _ in range(rng.randint(3, 5))) + str(rng.randrange(10))] = None
    return list(codes)


@dataclass(frozen=True, kw_only=True)
class CommonWords(TextTask):
    """`common` items `common_times` each among items that come `rare_times` each, shuffled.

    Their order in the answer is free, hence no teacher-forced accuracy. Items: "words" in a numbered list, as the
    original has them, "numbers" or "codes" without numbers before them.
    """

    task_class: str = HOLISTIC
    teacher_forced: bool = False
    items: str = "words"
    common: int = 10
    common_times: int = 30
    rare_times: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.items not in ("words", "numbers", "codes"):
            raise ValueError(f"task {self.name!r}: items must be words, numbers or codes, got {self.items!r}")

    def sizes(self, length: int) -> tuple[int, int]:
        return self.common, max(self.common, (length - 150) // 5)

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        words = self.items == "words"
        phrasings = (_TRAIN, _TEST) if words else (_ITEMS_TRAIN, _ITEMS_TEST)
        (intro, question, prefix), index = choose(rng, split, *phrasings)
        pool = list(NOUNS + ADJECTIVES)
        if not words:
            pool = (_numbers if self.items == "numbers" else _codes)(rng, len(pool))
        rng.shuffle(pool)
        common, rare = pool[: self.common], pool[self.common :]
        # Short lists keep the ratio of common to rare repetitions instead of the counts.
        times = min(self.common_times, max(self.rare_times + 1, size // (2 * self.common)))
        listed = [word for word in common for _ in range(times)][:size]
        rest = size - len(listed)
        each = max(1, min(self.rare_times, times // 4))
        listed += [rare[i // each % len(rare)] for i in range(rest)]
        rng.shuffle(listed)
        text = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)) if words else " ".join(listed)
        fields = {"count": str(self.common), "items": self.items}
        meta = {"phrasing": index, "words": size, "common_times": times}
        return Draft(
            "\n".join((intro.format(**fields), text, question.format(**fields))),
            prefix.format(**fields),
            tuple(common),
            meta=meta,
        )
