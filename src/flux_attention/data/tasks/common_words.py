"""RULER's common words extraction: the words that a long numbered list repeats most."""

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


@dataclass(frozen=True, kw_only=True)
class CommonWords(TextTask):
    """`common` words `common_times` each among words that come `rare_times` each, shuffled.

    Their order in the answer is free, hence no teacher-forced accuracy.
    """

    task_class: str = HOLISTIC
    teacher_forced: bool = False
    common: int = 10
    common_times: int = 30
    rare_times: int = 3

    def sizes(self, length: int) -> tuple[int, int]:
        return self.common, max(self.common, (length - 150) // 5)

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        (intro, question, prefix), index = choose(rng, split, _TRAIN, _TEST)
        pool = list(NOUNS + ADJECTIVES)
        rng.shuffle(pool)
        common, rare = pool[: self.common], pool[self.common :]
        # Short lists keep the ratio of common to rare repetitions instead of the counts.
        times = min(self.common_times, max(self.rare_times + 1, size // (2 * self.common)))
        listed = [word for word in common for _ in range(times)][:size]
        rest = size - len(listed)
        each = max(1, min(self.rare_times, times // 4))
        listed += [rare[i // each % len(rare)] for i in range(rest)]
        rng.shuffle(listed)
        text = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
        fields = {"count": str(self.common)}
        meta = {"phrasing": index, "words": size, "common_times": times}
        return Draft(
            "\n".join((intro, text, question.format(**fields))), prefix.format(**fields), tuple(common), meta=meta
        )
