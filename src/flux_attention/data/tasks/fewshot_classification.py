"""Many-shot classification: short texts with their labels, then one to label (in-context learning)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from flux_attention.data.prompt import Draft
from flux_attention.data.sample import HOLISTIC
from flux_attention.data.tasks.base import TextTask, choose
from flux_attention.data.words import ADJECTIVES, CITIES, JOBS, NAMES

#: theme -> label -> (subjects, what happened)
_THEMES: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "topic": {
        "sports": (
            ("the home team", "a young striker", "the tennis champion", "the swimming squad", "the goalkeeper"),
            (
                "won the final match",
                "missed a penalty",
                "broke the league record",
                "trained for the cup",
                "lost in overtime",
            ),
        ),
        "weather": (
            ("a cold front", "heavy rain", "thick fog", "a warm wind", "the first snow"),
            (
                "is expected by evening",
                "will last until Sunday",
                "covered the coast",
                "flooded the valley",
                "faded at noon",
            ),
        ),
        "finance": (
            ("the central bank", "a large insurer", "the stock index", "the savings fund", "the currency"),
            (
                "raised interest rates",
                "fell by two percent",
                "reported higher profits",
                "cut its dividend",
                "sold bonds",
            ),
        ),
        "science": (
            ("a team of physicists", "the space telescope", "a new vaccine study", "the laboratory", "a biologist"),
            (
                "measured a distant galaxy",
                "found a new species",
                "published the results",
                "tested the theory",
                "grew cells",
            ),
        ),
        "cooking": (
            ("the pastry chef", "this soup", "a simple stew", "the fresh pasta", "her apple cake"),
            (
                "needs an hour in the oven",
                "tastes best with basil",
                "simmers on low heat",
                "uses two eggs",
                "calls for butter",
            ),
        ),
        "travel": (
            ("the night train", "our hotel", "the airline", "a guided tour", "the ferry"),
            (
                "leaves from platform four",
                "has a view of the bay",
                "cancelled two flights",
                "visits the old town",
                "is booked out",
            ),
        ),
    },
    "intent": {
        "refund": (
            ("the blender", "my last order", "this jacket", "the concert ticket", "the broken lamp"),
            (
                "should be paid back",
                "must go back for the money",
                "was charged and I want it returned",
                "cost me money I want back",
            ),
        ),
        "delivery": (
            ("my parcel", "the sofa", "the second box", "the letter", "the order from Monday"),
            (
                "has not arrived",
                "went to another address",
                "is still on the way",
                "should come on Friday",
                "got lost in transit",
            ),
        ),
        "account": (
            ("my password", "the login page", "the profile picture", "my user name", "the mail address"),
            ("needs to be reset", "does not accept me", "has to be changed", "was locked", "should be deleted"),
        ),
        "praise": (
            ("the driver", "your staff", "the new shop", "this product", "the support team"),
            ("was wonderful", "made my day", "deserves five stars", "helped me at once", "is better than I hoped"),
        ),
    },
    "sentiment": {
        "positive": (
            ("the film", "this novel", "the concert", "the meal", "the play"),
            ("was a delight", "moved everyone", "is worth every cent", "left us smiling", "was superb throughout"),
        ),
        "negative": (
            ("the film", "this novel", "the concert", "the meal", "the play"),
            ("was a waste of time", "bored everyone", "is far too long", "left us cold", "was awful from the start"),
        ),
    },
}
_LEADS = (
    "In {city}, {subject} {event}.",
    "{name} the {job} says {subject} {event}.",
    "We hear that {subject} {event}.",
    "On one {adjective} day {subject} {event}.",
    "As {name} put it, {subject} {event}.",
)
_TEST = (
    ("Please determine the type of the text below. Here are some examples.", "Text: {text}\nType: {label}"),
    ("Label the last text as in the examples.", "Input: {text}\nLabel: {label}"),
)
_TRAIN = (
    ("Each line has a category. Give the category of the last one.", "Line: {text}\nCategory: {label}"),
    ("Examples of a classification follow; finish the last.", "Sentence: {text}\nClass: {label}"),
)


@dataclass(frozen=True, kw_only=True)
class FewShotClassification(TextTask):
    """One theme's texts with labels.

    Args:
        in_reply: examples that the reply starts with: broken by the turn's end, a small model loses the pattern.
        scored: labels asked for; those before the last belong to examples that the ones behind them see.
    """

    task_class: str = HOLISTIC
    metric: str = "exact_match"
    theme: str = "topic"
    in_reply: int = 4
    scored: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theme not in _THEMES:
            raise ValueError(f"task {self.name!r}: theme must be one of {tuple(_THEMES)}, got {self.theme!r}")

    def sizes(self, length: int) -> tuple[int, int]:
        return 8, max(8, (length - 120) // 27)

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        (intro, form), index = choose(rng, split, _TRAIN, _TEST)
        labels = tuple(_THEMES[self.theme])
        asked = [self._text(rng, rng.choice(labels)) for _ in range(self.scored)]
        examples: list[str] = []
        while len(examples) < size:
            text, label = self._text(rng, rng.choice(labels))
            if all(text != other for other, _ in asked):
                examples.append(form.format(text=text, label=label))
        open_forms = [form.format(text=text, label="").rstrip() for text, _ in asked]
        user = "\n\n".join((intro, *examples[: -self.in_reply]))
        prefix = "\n\n".join((*examples[-self.in_reply :], open_forms[0]))
        meta = {"phrasing": index, "examples": size, "theme": self.theme}
        answers = tuple(label for _, label in asked)
        return Draft(user, prefix, answers, separator=tuple("\n\n" + text for text in open_forms[1:]), meta=meta)

    def _text(self, rng: random.Random, label: str) -> tuple[str, str]:
        subjects, events = _THEMES[self.theme][label]
        lead = rng.choice(_LEADS).format(
            city=rng.choice(CITIES),
            name=rng.choice(NAMES),
            job=rng.choice(JOBS),
            adjective=rng.choice(ADJECTIVES),
            subject=rng.choice(subjects),
            event=rng.choice(events),
        )
        return lead[0].upper() + lead[1:], label
