"""Prompts as people write them: a question about a detail, or a request about the whole text, in many wordings.

The other tasks have few wordings each, and a router trained on them alone takes an unknown one for the class that it
resembles by accident. Both tasks share texts, lengths and places of the instruction, so only what is asked tells them
apart.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from flux_attention.data.corpus import documents, haystack, joiner
from flux_attention.data.prompt import Draft
from flux_attention.data.sample import HOLISTIC
from flux_attention.data.tasks.base import TextTask, choose

_QUESTIONS_TEST = (
    "What does the text say about {term}?",
    "Find the place where {term} is mentioned and quote it.",
    "Where does {term} come up? Give the exact sentence.",
    "I am looking for the part about {term}. What does it say?",
)
_QUESTIONS_TRAIN = (
    "Which sentence mentions {term}?",
    "According to the document, what about {term}?",
    "Quote the passage on {term}.",
    "Tell me what is written about {term}.",
    "What is said concerning {term}?",
    "Look up {term} in the text above.",
    "Search the document for {term} and copy the sentence.",
    "Does the text mention {term}? If so, how?",
    "Answer from the text: what is {term}?",
    "Explain {term} using only the text.",
    "How is {term} described?",
    "Give me the line with {term} in it.",
    "Who or what is {term} in this document?",
    "Using the material provided, state what it tells about {term}.",
    "Question: what does the author write on {term}?",
    "Please extract the statement about {term}.",
    "One detail matters to me: {term}. What exactly does it say there?",
    "Retrieve the information on {term}.",
    "In what context does the word {term} appear?",
    "Check the text for {term} and report what you find.",
)
_REQUESTS_TEST = (
    "Summarise the text.",
    "Give me a short overview of this document.",
    "What is this text mainly about?",
    "Write an introduction for the text above.",
)
_REQUESTS_TRAIN = (
    "Write a summary.",
    "Sum this up in a few sentences.",
    "Condense the document into one paragraph.",
    "What are the main points?",
    "Describe the general subject of the text.",
    "Give the gist.",
    "Write an abstract for this document.",
    "TL;DR",
    "Explain to a beginner what this document covers.",
    "What is the overall purpose of the text?",
    "Draft an opening paragraph that prepares the reader for the text.",
    "Which topic does the document treat? Answer in general terms.",
    "Outline the content briefly.",
    "Write a blurb for this document.",
    "Characterise the document as a whole.",
    "Give a high-level description.",
    "Please provide an executive summary.",
    "What would a reader learn from this text?",
    "Restate the essence of the text in your own words.",
    "Introduce the document to somebody who has not read it.",
)
_PROSE = re.compile(r"[a-z]+ [a-z]+ [a-z]+")
_TERM = re.compile(r"\b[A-Za-z][A-Za-z_.]{6,}[A-Za-z]\b")


def _place(rng: random.Random, instruction: str, text: str) -> str:
    """The instruction behind the text, before it, or both."""
    place = rng.random()
    if place < 0.6:
        return f"{text}\n\n{instruction}"
    if place < 0.8:
        return f"{instruction}\n\n{text}"
    return f"{instruction}\n\n{text}\n\n{instruction}"


@dataclass(frozen=True, kw_only=True)
class OpenQuestion(TextTask):
    """A question about a term that one sentence of the text mentions; the answer is that sentence."""

    metric: str = "f1"
    teacher_forced: bool = False
    sources: tuple[str, ...] = ("topics", "code")
    test_source: str = "docstrings"

    def sizes(self, length: int) -> tuple[int, int]:
        return 400, max(400, 4 * (length - 200))

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        question, index = choose(rng, split, _QUESTIONS_TRAIN, _QUESTIONS_TEST)
        source = self.test_source if split == "test" else rng.choice(self.sources)
        pieces = [piece.strip() for piece in haystack(source, split, rng, size) if piece.strip()]
        text = joiner(source).join(pieces)
        # Asked about: a sentence, from a random one on, with a term that stands nowhere else.
        start = rng.randrange(len(pieces))
        for i in [*range(start, len(pieces)), *range(start)]:
            terms = [term for term in _TERM.findall(pieces[i]) if text.count(term) == 1]
            if terms and len(pieces[i]) < 400:
                break
        else:
            i, terms = start, [pieces[start][:40]]
        user = _place(rng, question.format(term=f'"{rng.choice(terms)}"'), text)
        meta = {"source": source, "phrasing": index, "depth": round(i / max(1, len(pieces) - 1), 3)}
        return Draft(user, "", (pieces[i][:400],), meta=meta)


@dataclass(frozen=True, kw_only=True)
class OpenRequest(TextTask):
    """A request about a whole document that has lost its first paragraph; that paragraph is the answer."""

    task_class: str = HOLISTIC
    metric: str = "nll"
    teacher_forced: bool = False
    sources: tuple[str, ...] = ("topics", "code")
    test_source: str = "docstrings"

    def sizes(self, length: int) -> tuple[int, int]:
        return 600, max(600, 4 * (length - 150))

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        request, index = choose(rng, split, _REQUESTS_TRAIN, _REQUESTS_TEST)
        source = self.test_source if split == "test" else rng.choice(self.sources)
        found = documents(source, split)
        at = rng.randrange(len(found))
        name = found[at].name
        lines = found[at].text.strip().split("\n")
        lead = next((i for i, line in enumerate(lines) if len(line) >= 60 and _PROSE.search(line)), 0)
        text = "\n".join(lines[lead + 1 :])
        # A short document is followed by others: the request is about all of them, and the lead stays a fair answer.
        while len(text) < size:
            at = (at + 1) % len(found)
            text += "\n" + found[at].text
        meta = {"source": source, "phrasing": index, "document": name}
        return Draft(_place(rng, request, text[:size].strip()), "", (lines[lead][:600].strip() or name,), meta=meta)
