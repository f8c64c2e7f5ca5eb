"""Needles in a haystack: RULER's single, multi-key, multi-value and multi-query families (Hsieh et al., 2404.06654)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from flux_attention.data import words
from flux_attention.data.corpus import haystack, joiner
from flux_attention.data.prompt import Draft, join_list
from flux_attention.data.tasks.base import TextTask, choose, spread

#: Makers of values and nouns for them.
VALUES = {"number": words.numbers, "uuid": words.uuids, "word": words.keys}
KINDS = {"number": ("number", "numbers"), "uuid": ("uuid", "uuids"), "word": ("word", "words")}


@dataclass(frozen=True)
class Phrasing:
    """Texts with the fields that `Needle.draft` fills in; nouns and verbs follow the number of answers."""

    intro: str
    needle: str
    question: str
    prefix: str


_RULER_INTRO = (
    "{Some} special magic {kind} {be} hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards."
)
RULER_NEEDLE = "One of the special magic {kinds} for {key} is: {value}."
TEST_PHRASINGS = (
    Phrasing(
        _RULER_INTRO,
        RULER_NEEDLE,
        "What {be} {the_all} special magic {kind} for {keys} mentioned in the provided text?",
        "The special magic {kind} for {keys} mentioned in the provided text {be}",
    ),
    Phrasing(
        "Please go through the passage below. It mentions {kinds} that belong to certain keys.",
        "Note that the {singular} that belongs to {key} is {value}.",
        "According to the passage, which {kind} belong{s} to {keys}?",
        "According to the passage, the {kind} that belong{s} to {keys} {be}",
    ),
)
TRAIN_PHRASINGS = (
    Phrasing(
        "Read the text below closely; you will be asked about the secret {kinds} in it.",
        "The secret {singular} for {key} is {value}.",
        "Which secret {kind} does the text give for {keys}?",
        "The secret {kind} for {keys} {be}",
    ),
    Phrasing(
        "Here is a document. A question about it follows at the end.",
        "Remember: the access code of {key} is {value}.",
        "Question: what {be} the access code{plural} of {keys}?",
        "The access code{plural} of {keys} {be}",
    ),
    Phrasing(
        "Study this material, then answer.",
        "For {key}, the registered {singular} is {value}.",
        "Tell me the registered {kind} for {keys}.",
        "The registered {kind} for {keys} {be}",
    ),
    Phrasing(
        "Somewhere in these pages {kinds} are noted down. You are going to need one of them.",
        "The {singular} noted for {key} is {value}.",
        "Look up {the_all} {kind} noted for {keys}.",
        "Noted for {keys} {be} the {kind}",
    ),
    Phrasing(
        "I have a long text and want to know a certain {singular} from it.",
        "By the way, {key} has the {singular} {value}.",
        "What {be} {the_all} {kind} of {keys} according to the text above?",
        "According to the text above, the {kind} of {keys} {be}",
    ),
    Phrasing(
        "Context:",
        "Important: the {singular} assigned to {key} is {value}.",
        "Using the context, state {the_all} {kind} assigned to {keys}.",
        "The {kind} assigned to {keys} {be}",
    ),
    Phrasing(
        "Find the {singular} in the following passage and keep it in mind.",
        "{key} is paired with the {singular} {value}.",
        "Which {kind} {be} paired with {keys}? Repeat exactly.",
        "Paired with {keys} {be} the {kind}",
    ),
    Phrasing(
        "The text that follows hides facts that you must find.",
        "One special {singular} for {key} is: {value}.",
        "What {be} the special {kind} for {keys} in the text?",
        "The special {kind} for {keys} in the text {be}",
    ),
)


def wording(singular: str, plural: str, keys: Sequence[str], *, many: bool) -> dict[str, str]:
    """Fields of a phrasing's intro, question and prefix for one value or `many` of these keys."""
    return {
        "kind": plural if many else singular,
        "kinds": plural,
        "singular": singular,
        "Some": "Some" if many else "A",
        "be": "are" if many else "is",
        "the_all": "all the" if many else "the",
        "s": "" if many else "s",
        "plural": "s" if many else "",
        "keys": join_list(keys),
    }


@dataclass(frozen=True, kw_only=True)
class Needle(TextTask):
    """`keys` needles with `values_per_key` values each, `asked` keys in the question.

    Args:
        haystacks: text sources for training; the sample draws one.
        test_haystack: the source for testing. "needles" makes the haystack of further needles of the same form.
        value: "number" (7 digits), "uuid" or "word".
        key: "word" (adjective-noun) or "uuid".
    """

    keys: int = 1
    values_per_key: int = 1
    asked: int = 1
    value: str = "number"
    key: str = "word"
    haystacks: tuple[str, ...] = ("filler", "topics", "code")
    test_haystack: str = "docstrings"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.asked <= self.keys:
            raise ValueError(f"task {self.name!r}: asked must lie in 1..keys={self.keys}, got {self.asked}")
        if self.value not in VALUES or self.key not in ("word", "uuid"):
            raise ValueError(f"task {self.name!r}: unknown value {self.value!r} or key {self.key!r}")

    def sizes(self, length: int) -> tuple[int, int]:
        if self.test_haystack == "needles":
            per_needle = 90 if self.key == "uuid" else 24
            return self.keys, max(self.keys, (length - 200) // per_needle)
        return 200, max(200, 4 * (length - 150 - 30 * self.keys * self.values_per_key))

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        source = (
            self.test_haystack if split == "test" or self.test_haystack == "needles" else rng.choice(self.haystacks)
        )
        phrasing, index = choose(rng, split, TRAIN_PHRASINGS, TEST_PHRASINGS)
        count = size if source == "needles" else self.keys
        make_keys = words.uuids if self.key == "uuid" else words.keys
        keys = make_keys(rng, count)
        values = VALUES[self.value](rng, count * self.values_per_key)
        singular, plural = KINDS[self.value]
        pairs = [
            (key, values[i * self.values_per_key + j]) for i, key in enumerate(keys) for j in range(self.values_per_key)
        ]
        rng.shuffle(pairs)
        needles = [
            phrasing.needle.format(kinds=plural, singular=singular, key=key, value=value) for key, value in pairs
        ]
        asked = rng.sample(keys, self.asked)
        if source == "needles":
            pieces, depths = needles, [round(i / max(1, count - 1), 3) for i in range(count)]
        else:
            pieces = haystack(source, split, rng, size)
            depths = spread(rng, pieces, needles)
        answers = tuple(value for key in asked for k, value in pairs if k == key)
        words_for = wording(singular, plural, asked, many=len(answers) > 1)
        text = joiner(source).join(pieces)
        user = "\n".join((phrasing.intro.format(**words_for), text, phrasing.question.format(**words_for)))
        where = [depth for (key, _), depth in zip(pairs, depths, strict=True) if key in asked]
        meta = {"haystack": source, "phrasing": index, "depth": where[0], "depths": where}
        return Draft(user, phrasing.prefix.format(**words_for), answers, meta=meta)
