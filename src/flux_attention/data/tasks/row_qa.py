"""Question answering over rows of facts, in the form of RULER's QA: documents, one of which holds the answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

from flux_attention.data import words
from flux_attention.data.prompt import Draft, SizeLimitError
from flux_attention.data.tasks.base import TextTask, choose
from flux_attention.data.tasks.passages import paragraphs

_QUESTIONS = (
    ("In which city was {name} born?", "{name} was born in", "city"),
    ("In which year was {name} born?", "{name} was born in the year", "year"),
    ("What does {name} work as?", "{name} works as a", "job"),
    ("What kind of object does {name} keep at home?", "{name} keeps a", "thing"),
)
_TEST = (
    (
        "Answer the question based on the given documents. Only give me the answer and do not output any other "
        "words.\n\nThe following are given documents.",
        "Answer the question based on the given documents. Only give me the answer and do not output any other "
        "words.\n\nQuestion: {question}",
    ),
    ("Here is what is known about several people.", "Now tell me: {question}"),
)
_TRAIN = (
    ("Consult these records.", "Using the records, answer: {question}"),
    ("The following notes describe people.", "Question about the notes: {question}"),
)


@dataclass(frozen=True, kw_only=True)
class RowQA(TextTask):
    """People with a birthplace, a year, a job and a belonging; one fact about one person is asked for.

    Args:
        people: documents about people, among others of prose; None for people only, out of reach of the smallest
            models.
    """

    metric: str = "string_match_part"
    people: int | None = 4
    haystacks: tuple[str, ...] = ("topics",)
    test_haystack: str = "docstrings"

    def sizes(self, length: int) -> tuple[int, int]:
        least = self.people or 4
        return least, max(least, (length - 150) // (42 if self.people is None else 110))

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        (intro, ask), index = choose(rng, split, _TRAIN, _TEST)
        source = self.test_haystack if split == "test" else rng.choice(self.haystacks)
        most = len(words.NAMES) * len(words.SURNAMES)
        count = size if self.people is None else self.people
        if count > most:
            raise SizeLimitError(f"{count} rows need distinct names, there are {most}", most)
        # Where in the list the person stands must not depend on the list's size.
        depth = rng.random()
        rows = []
        for pair in rng.sample(range(most), count):
            row = {
                "name": f"{words.NAMES[pair % len(words.NAMES)]} {words.SURNAMES[pair // len(words.NAMES)]}",
                "city": rng.choice(words.CITIES),
                "year": str(rng.randint(1900, 2005)),
                "job": rng.choice(words.JOBS),
                "adjective": rng.choice(words.ADJECTIVES),
                "thing": rng.choice(words.NOUNS),
            }
            row["thing"] = f"{row['adjective']} {row['thing']}"
            rows.append(row)
        question, prefix, field = rng.choice(_QUESTIONS)
        bodies = [
            f"{row['name']} was born in {row['city']} in {row['year']} and works as a {row['job']}. "
            f"{row['name']} keeps a {row['thing']} at home."
            for row in rows
        ]
        asked = int(depth * size)
        row = rows[0]
        bodies, first = bodies[1:], bodies[0]
        try:
            bodies += paragraphs(source, split, rng, size - count)
        except SizeLimitError as error:
            raise SizeLimitError(str(error), error.most + count) from error
        rng.shuffle(bodies)
        bodies.insert(asked, first)
        texts = [f"Document {i}:\n{body}" for i, body in enumerate(bodies, 1)]
        user = "\n\n".join((intro, *texts, ask.format(question=question.format(**row))))
        meta = {"phrasing": index, "depth": round(depth, 3), "rows": size, "field": field}
        return Draft(user, prefix.format(**row), (row[field],), meta=meta)
