"""Key–value lookup: the value of one key in a long JSON object (Liu et al., "Lost in the Middle")."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from flux_attention.data import words
from flux_attention.data.corpus import haystack
from flux_attention.data.prompt import Draft
from flux_attention.data.tasks.base import TextTask, choose

_TEST = (
    (
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:",
        'Key: "{key}"\nCorresponding value:',
    ),
    ("This dictionary maps names to values:", 'What does it hold under "{key}"?'),
)
_TRAIN = (
    ("Look up one entry of this mapping.", 'The entry to look up is "{key}".'),
    ("Below is a configuration in JSON.", 'Which value is set for "{key}"?'),
    ("Given the following table of keys and values:", 'return the value stored for the key "{key}".'),
)
_SENTENCE_CHARS = 130


@dataclass(frozen=True, kw_only=True)
class KeyValueLookup(TextTask):
    """Numbers under adjective-noun keys, one of which is asked for.

    Args:
        numeric: entries that hold a number, the others hold a sentence; None for numbers only, the original task,
            which is out of reach of the smallest models.
    """

    metric: str = "exact_match"
    digits: int = 4
    numeric: int | None = None
    haystacks: tuple[str, ...] = ("topics",)
    test_haystack: str = "docstrings"

    def sizes(self, length: int) -> tuple[int, int]:
        tokens = 13 + self.digits if self.numeric is None else 35
        least = self.numeric or 4
        return least, max(least, (length - 150) // tokens)

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        (intro, question), index = choose(rng, split, _TRAIN, _TEST)
        source = self.test_haystack if split == "test" else rng.choice(self.haystacks)
        depth = rng.random()
        keys = words.keys(rng, size)
        values = words.numbers(rng, size, self.digits)
        asked = int(depth * size)
        if self.numeric is not None:
            numeric = {asked, *rng.sample([i for i in range(size) if i != asked], self.numeric - 1)}
            # From the end, which stays where it is when the text grows with the size.
            found = reversed(haystack(source, split, rng, size * _SENTENCE_CHARS * 2))
            sentences = [s[:_SENTENCE_CHARS].strip() for s in found if len(s) > 20] or ["nothing"]
            values = [v if i in numeric else sentences[i % len(sentences)] for i, v in enumerate(values)]
        body = ",\n".join(f' "{key}": {json.dumps(value)}' for key, value in zip(keys, values, strict=True))
        user = f"{intro}\n{{\n{body}\n}}\n{question.format(key=keys[asked])}"
        meta = {"phrasing": index, "depth": round(depth, 3), "entries": size}
        return Draft(user, f'The value of "{keys[asked]}" is "', (values[asked],), meta=meta)
