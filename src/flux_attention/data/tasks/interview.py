"""Many needles in one haystack, asked for one after the other: as many answers as a pass has needles."""

from __future__ import annotations

import random
from dataclasses import dataclass

from flux_attention.data.corpus import haystack, joiner
from flux_attention.data.prompt import Draft
from flux_attention.data.tasks.base import TextTask, choose, spread
from flux_attention.data.tasks.niah import KINDS, TEST_PHRASINGS, TRAIN_PHRASINGS, VALUES, wording
from flux_attention.data.words import keys as make_keys


@dataclass(frozen=True, kw_only=True)
class NeedleInterview(TextTask):
    """Needles of several kinds, all asked for: the reply names each key before its value.

    One prompt says as much about which layers retrieve as many prompts with a needle each, at the cost of one.

    Args:
        kinds: of `niah.VALUES`, each `per_kind` times.
        haystacks, test_haystack: as in `Needle`.
    """

    kinds: tuple[str, ...] = ("number", "uuid", "number", "word")
    per_kind: int = 3
    haystacks: tuple[str, ...] = ("filler", "topics", "code")
    test_haystack: str = "docstrings"

    def sizes(self, length: int) -> tuple[int, int]:
        return 200, max(200, 4 * (length - 150 - 75 * self.per_kind * len(self.kinds)))

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        source = self.test_haystack if split == "test" else rng.choice(self.haystacks)
        phrasing, index = choose(rng, split, TRAIN_PHRASINGS, TEST_PHRASINGS)
        kinds = list(self.kinds) * self.per_kind
        found = [
            (kind, key, VALUES[kind](rng, 1)[0]) for kind, key in zip(kinds, make_keys(rng, len(kinds)), strict=True)
        ]

        def text(form: str, kind: str, key: str, value: str = "") -> str:
            return form.format(**wording(*KINDS[kind], [key], many=False), key=key, value=value)

        rng.shuffle(found)
        pieces = haystack(source, split, rng, size)
        depths = spread(rng, pieces, [text(phrasing.needle, *needle) for needle in found])
        rng.shuffle(found)
        # In the plural: what is asked for is of several kinds.
        several = wording("value", "values", [key for _, key, _ in found], many=True)
        intro, question = phrasing.intro.format(**several), phrasing.question.format(**several)
        prefixes = [text(phrasing.prefix, kind, key) for kind, key, _ in found]
        return Draft(
            "\n".join((intro, joiner(source).join(pieces), question)),
            prefixes[0],
            tuple(value for _, _, value in found),
            separator=tuple(f".\n{prefix}" for prefix in prefixes[1:]),
            meta={"haystack": source, "phrasing": index, "depths": depths},
        )
