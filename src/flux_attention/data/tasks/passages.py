"""Passage retrieval and passage count, after LongBench's two synthetic tasks (Bai et al., 2308.14508)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from flux_attention.data.corpus import documents
from flux_attention.data.prompt import Draft, SizeLimitError
from flux_attention.data.tasks.base import TextTask, choose

_PARAGRAPH_CHARS = (250, 900)


def paragraphs(source: str, split: str, rng: random.Random, count: int) -> list[str]:
    """`count` distinct paragraphs of one source, in random order.

    Raises SizeLimitError when there are fewer; its `most` is their number.
    """
    low, high = _PARAGRAPH_CHARS
    pool = sorted({p for d in documents(source, split) for p in d.text.split("\n") if low <= len(p) <= high})
    if count > len(pool):
        raise SizeLimitError(
            f"text source {source!r} ({split}) has {len(pool)} paragraphs, {count} are needed", len(pool)
        )
    # A prefix of one permutation, so that more paragraphs keep the first ones.
    rng.shuffle(pool)
    return pool[:count]


_RETRIEVAL_TEST = (
    (
        "Here are paragraphs of a documentation, and an excerpt of one of them. "
        "Please determine which paragraph the excerpt is from.",
        "The following is the excerpt.\n\n{excerpt}\n\nPlease enter the number of the paragraph that the excerpt is "
        "from.",
    ),
    ("Numbered paragraphs follow.", "In which of the paragraphs does this sentence occur?\n{excerpt}"),
)
_RETRIEVAL_TRAIN = (
    ("Read these numbered passages.", "Which passage holds these words?\n{excerpt}"),
    ("The passages below are numbered.", "Find the passage with this text: {excerpt}"),
)


@dataclass(frozen=True, kw_only=True)
class PassageRetrieval(TextTask):
    """Which numbered paragraph an excerpt comes from.

    The number stands behind its paragraph and the excerpt ends it: a small model can then find it by copying.
    """

    metric: str = "exact_match"
    haystacks: tuple[str, ...] = ("topics",)
    test_haystack: str = "docstrings"

    def sizes(self, length: int) -> tuple[int, int]:
        return 3, max(3, (length - 200) // 115)

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        (intro, question), index = choose(rng, split, _RETRIEVAL_TRAIN, _RETRIEVAL_TEST)
        source = self.test_haystack if split == "test" else rng.choice(self.haystacks)
        # Numbers are drawn, so that the answer cannot be guessed from the depth.
        labels = rng.sample(range(10, 100), 90) if size <= 90 else rng.sample(range(100, 100 + 10 * size), size)
        depth = rng.random()
        texts = paragraphs(source, split, rng, size)
        asked = int(depth * size)
        body = "\n\n".join(f"{text} (paragraph {label})" for label, text in zip(labels, texts, strict=False))
        excerpt = texts[asked][-160:].split(" ", 1)[1]
        user = "\n\n".join((intro, body, question.format(excerpt=excerpt)))
        meta = {"haystack": source, "phrasing": index, "depth": round(depth, 3), "paragraphs": size}
        return Draft(user, f"{excerpt} (paragraph", (str(labels[asked]),), meta=meta)


_COUNT_TEST = (
    (
        "There are some paragraphs below. Some of them may be duplicates. Please carefully read these paragraphs and "
        "determine how many unique paragraphs there are after removing duplicates.",
        "Please enter the final count of unique paragraphs after removing duplicates.",
        "The final answer is:",
    ),
)
_COUNT_TRAIN = (
    (
        "These paragraphs repeat themselves in part.",
        "How many different paragraphs are there?",
        "Number of different paragraphs:",
    ),
)


@dataclass(frozen=True, kw_only=True)
class PassageCount(TextTask):
    """How many different paragraphs there are among repetitions."""

    metric: str = "exact_match"
    haystacks: tuple[str, ...] = ("topics",)
    test_haystack: str = "docstrings"

    def sizes(self, length: int) -> tuple[int, int]:
        return 3, max(3, (length - 200) // 115)

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        (intro, question, prefix), index = choose(rng, split, _COUNT_TRAIN, _COUNT_TEST)
        source = self.test_haystack if split == "test" else rng.choice(self.haystacks)
        share = rng.uniform(0.4, 1.0)
        unique = max(2, int(size * share))
        try:
            texts = paragraphs(source, split, rng, unique)
        except SizeLimitError as error:
            raise SizeLimitError(str(error), int(error.most / share)) from error
        listed = texts + [texts[rng.randrange(unique)] for _ in range(size - unique)]
        rng.shuffle(listed)
        body = "\n\n".join(f"Paragraph {i}: {text}" for i, text in enumerate(listed, 1))
        meta = {"haystack": source, "phrasing": index, "paragraphs": size}
        return Draft("\n\n".join((intro, body, question)), prefix, (str(unique),), meta=meta)
