"""RULER's frequent words extraction: the three commonest of made-up words drawn from a Zipf law."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from flux_attention.data.prompt import Draft
from flux_attention.data.sample import HOLISTIC
from flux_attention.data.tasks.base import TextTask, choose

_TEST = (
    (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words.",
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
)
_TRAIN = (
    (
        "This text is in an unknown language. Count its words.",
        "Which three words occur most often? Ignore the dots.",
        "The three most frequent words are:",
    ),
)
#: Words that every phrasing asks for.
_ASKED = 3


@dataclass(frozen=True, kw_only=True)
class FrequentWords(TextTask):
    """Words drawn with probability ∝ rank^-alpha, the most frequent rank being dots. In order of frequency."""

    task_class: str = HOLISTIC
    teacher_forced: bool = False
    alpha: float = 2.0
    vocabulary: int = 200
    letters: int = 6

    def sizes(self, length: int) -> tuple[int, int]:
        return 40, max(40, (length - 150) // 4)

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        (intro, question, prefix), index = choose(rng, split, _TRAIN, _TEST)
        coded: list[str] = []
        while len(coded) < self.vocabulary:
            word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(self.letters))
            if word not in coded:
                coded.append(word)
        weights = [(rank + 1) ** -self.alpha for rank in range(self.vocabulary + 1)]
        # Exact shares, not draws: the answer is then the same at every length.
        shares = [weight / sum(weights) for weight in weights]
        times = [round(share * size) for share in shares]
        # Rounding must not make a rank that is asked for, or the one behind them, as frequent as the one before it.
        for rank in range(2, _ASKED + 1):
            times[rank] = min(times[rank], times[rank - 1] - 1)
        times[_ASKED + 1 :] = [min(count, times[_ASKED] - 1) for count in times[_ASKED + 1 :]]
        listed = [word for word, count in zip(("....", *coded), times, strict=True) for _ in range(count)]
        listed += ["...."] * (size - len(listed))
        rng.shuffle(listed)
        counts = Counter(word for word in listed if word != "....")
        top = tuple(coded[:_ASKED])
        meta = {"phrasing": index, "counts": [counts[word] for word in top]}
        return Draft("\n".join((intro, " ".join(listed), question)), prefix, top, meta=meta)
