"""Key–value lookup: the value of one key in a long JSON object (Liu et al., "Lost in the Middle")."""

from __future__ import annotations

import random
from dataclasses import dataclass

from flux_attention.data import words
from flux_attention.data.prompt import Draft
from flux_attention.data.tasks.base import TextTask, choose

_TEST = (
    (
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:",
        'Key: "{key}"\nCorresponding value:',
    ),
    ("This dictionary maps names to numbers:", 'What does it hold under "{key}"?'),
)
_TRAIN = (
    ("Look up one entry of this mapping.", 'The entry to look up is "{key}".'),
    ("Below is a configuration in JSON.", 'Which value is set for "{key}"?'),
    ("Given the following table of keys and values:", 'return the value stored for the key "{key}".'),
)


@dataclass(frozen=True, kw_only=True)
class KeyValueLookup(TextTask):
    metric: str = "exact_match"
    digits: int = 7

    def sizes(self, length: int) -> tuple[int, int]:
        return 4, max(4, (length - 150) // (13 + self.digits))

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        (intro, question), index = choose(rng, split, _TRAIN, _TEST)
        keys = words.keys(rng, size)
        values = words.numbers(rng, size, self.digits)
        depth = rng.random()
        asked = int(depth * size)
        body = ",\n".join(f' "{key}": "{value}"' for key, value in zip(keys, values, strict=True))
        user = f"{intro}\n{{\n{body}\n}}\n{question.format(key=keys[asked])}"
        meta = {"phrasing": index, "depth": round(depth, 3), "entries": size}
        return Draft(user, f'The value for "{keys[asked]}" is', (values[asked],), meta=meta)
