"""RULER's variable tracking: a value handed from variable to variable across the text."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise

from flux_attention.data.corpus import haystack, joiner
from flux_attention.data.prompt import Draft
from flux_attention.data.tasks.base import TextTask, choose, spread

_TEST = (
    (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.",
        "Question: Find all variables that are assigned the value {value} in the text above.",
        "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
        "the value {value}, they are:",
    ),
    (
        "The text below hides assignments to variables. Follow them.",
        "Which variables end up holding {value}?",
        "The {count} variables that hold {value} are:",
    ),
)
_TRAIN = (
    (
        "Some lines of this text set variables, some of them from other variables.",
        "List every variable whose value is {value}.",
        "The {count} variables with the value {value} are:",
    ),
    (
        "Keep track of the variables in the following text.",
        "Name all variables equal to {value}.",
        "There are {count} variables equal to {value}:",
    ),
)


@dataclass(frozen=True, kw_only=True)
class VariableTracking(TextTask):
    """`chains` chains of `hops` assignments each; one chain's value is asked for. Scored as a share of variables.

    Args:
        forward: write "Copy VAR A to VAR B." instead of "VAR B = VAR A.": what follows a name in the text is then
            what follows it in the answer, which small models can do.
    """

    chains: int = 1
    hops: int = 4
    forward: bool = False
    haystacks: tuple[str, ...] = ("filler", "topics")
    test_haystack: str = "ruler_filler"

    def sizes(self, length: int) -> tuple[int, int]:
        return 200, max(200, 4 * (length - 250 - 16 * self.chains * (self.hops + 1)))

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        source = self.test_haystack if split == "test" else rng.choice(self.haystacks)
        (intro, question, prefix), index = choose(rng, split, _TRAIN, _TEST)
        count = self.chains * (self.hops + 1)
        # Three letters keep a name at about three tokens; RULER's five cost more than they test.
        letters = rng.sample([a + b + c for a in string.ascii_uppercase for b in "AEIOU" for c in "BDGKLMNPRST"], count)
        values = [str(v) for v in rng.sample(range(10000, 100000), self.chains)]
        chains = [letters[i * (self.hops + 1) : (i + 1) * (self.hops + 1)] for i in range(self.chains)]
        lines = []
        for chain, value in zip(chains, values, strict=True):
            lines.append(self._steps(chain, value))
        # Chains interleave, but each keeps its order: an assignment never precedes what it copies.
        order = [i for i in range(self.chains) for _ in range(self.hops + 1)]
        rng.shuffle(order)
        taken = [iter(steps) for steps in lines]
        pieces = haystack(source, split, rng, size)
        depths = spread(rng, pieces, [next(taken[i]) for i in order])
        asked = rng.randrange(self.chains)
        sign, sep = ("VAR ", " to") if self.forward else ("", ",")
        fields = {"value": values[asked], "count": str(self.hops + 1)}
        user = "\n\n".join((intro, joiner(source).join(pieces), question.format(**fields)))
        meta = {"haystack": source, "phrasing": index, "depth": depths[0], "depths": depths}
        return Draft(user, prefix.format(**fields), tuple(f"{sign}{name}" for name in chains[asked]), sep, meta=meta)

    def _steps(self, chain: list[str], value: str) -> list[str]:
        if self.forward:
            first = f"Set {value} to VAR {chain[0]}."
            return [first] + [f"Copy VAR {before} to VAR {after}." for before, after in pairwise(chain)]
        first = f"VAR {chain[0]} = {value}."
        return [first] + [f"VAR {after} = VAR {before}." for before, after in pairwise(chain)]
