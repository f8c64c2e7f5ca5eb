"""RULER's common words extraction: the words that a long numbered list repeats most; the same with other items."""

from __future__ import annotations

import random
from dataclasses import dataclass

from flux_attention.data.prompt import Draft
from flux_attention.data.sample import HOLISTIC
from flux_attention.data.tasks.base import TextTask, choose
from flux_attention.data.wordings import counting
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
_ITEMS_TEST = (
    (
        "These {items} were written down one after the other.",
        "Which {count} {items} were written down most?",
        "Written down most:",
    ),
)

#: Least ratio of common to rare repetitions in long lists; small enough to leave lists of up to 5,000 items alone.
_LEAD = 3


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

    Lists that are too long for `rare_times` repeat the rare items more often, and where those come near, the common
    ones too: they stay about `_LEAD` times as frequent.

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
        # A shorter list has no room for every common item.
        least = self.common * (self.rare_times + 1)
        return least, max(least, (length - 150) // 5)

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        words = self.items == "words"
        if split == "train":
            intro, question, prefix = counting(rng, self.items, self.common)
        else:
            parts, _ = choose(rng, split, (), _TEST if words else _ITEMS_TEST)
            intro, question, prefix = (part.format(count=self.common, items=self.items) for part in parts)
        pool = list(NOUNS + ADJECTIVES)
        if not words:
            pool = (_numbers if self.items == "numbers" else _codes)(rng, len(pool))
        rng.shuffle(pool)
        common, rare = pool[: self.common], pool[self.common :]
        # Short lists keep the ratio of common to rare repetitions instead of the counts.
        times = min(self.common_times, max(self.rare_times + 1, size // (2 * self.common)))
        times = max(times, _LEAD * size // (len(rare) + _LEAD * self.common))
        listed = [word for word in common for _ in range(times)]
        rest = size - len(listed)
        each = max(1, min(self.rare_times, times // 4))
        listed += [rare[i // each % len(rare)] for i in range(rest)]
        rng.shuffle(listed)
        text = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)) if words else " ".join(listed)
        user = "\n".join((intro, text, question)).strip()
        return Draft(user, prefix, tuple(common), meta={"words": size, "common_times": times})
