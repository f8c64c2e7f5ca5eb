"""Question answering over rows of facts, in the form of RULER's QA: documents, one of which holds the answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

from flux_attention.data import words
from flux_attention.data.prompt import Draft
from flux_attention.data.tasks.base import TextTask, choose

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
    """People with a birthplace, a year, a job and a belonging; one fact about one person is asked for."""

    metric: str = "string_match_part"

    def sizes(self, length: int) -> tuple[int, int]:
        return 4, max(4, (length - 150) // 42)

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        (intro, ask), index = choose(rng, split, _TRAIN, _TEST)
        most = len(words.NAMES) * len(words.SURNAMES)
        if size > most:
            raise ValueError(f"task {self.name!r}: at most {most} rows have distinct names, the length asks for {size}")
        rows = []
        for pair in rng.sample(range(most), size):
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
        # Where in the list the person stands must not depend on the list's size.
        depth = rng.random()
        asked = int(depth * size)
        question, prefix, field = rng.choice(_QUESTIONS)
        texts = [
            f"Document {i}:\n{row['name']} was born in {row['city']} in {row['year']} and works as a {row['job']}. "
            f"{row['name']} keeps a {row['thing']} at home."
            for i, row in enumerate(rows, 1)
        ]
        row = rows[asked]
        user = "\n\n".join((intro, *texts, ask.format(question=question.format(**row))))
        meta = {"phrasing": index, "depth": round(depth, 3), "rows": size, "field": field}
        return Draft(user, "Answer: " + prefix.format(**row), (row[field],), meta=meta)
