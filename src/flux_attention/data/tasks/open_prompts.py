"""Prompts as people write them: a question about a detail, or a request about the whole text, in many wordings.

The other tasks have few wordings each, and a router trained on them alone takes an unknown one for the class that it
resembles by accident. All tasks here share texts, their forms, lengths and places of the instruction, so only what is
asked tells them apart. Training draws its wordings from `wordings`, tests have sentences written by hand.
"""

from __future__ import annotations

import random
import re
import textwrap
from dataclasses import dataclass
from typing import ClassVar

from flux_attention.data.corpus import cut, documents, joiner, window
from flux_attention.data.prompt import Draft
from flux_attention.data.sample import HOLISTIC
from flux_attention.data.styles import restyle, wrap_document
from flux_attention.data.tasks.base import TextTask, spread
from flux_attention.data.wordings import Fact, fact, request, term_question

_QUESTIONS_TEST = (
    "What does the text say about {term}?",
    "Find the place where {term} is mentioned and quote it.",
    "Where does {term} come up? Give the exact sentence.",
    "I am looking for the part about {term}. What does it say?",
)
_REQUESTS_TEST = (
    "Summarise the text.",
    "Give me a short overview of this document.",
    "What is this text mainly about?",
    "Write an introduction for the text above.",
)
#: By hand and for tests alone: facts of the kind that users lose in their files, and how they ask for them.
_FACTS_TEST = (
    (
        "The spare key for the boiler room hangs behind the blue fire extinguisher.",
        ("where did we leave the spare boiler room key?", "I need the spare boiler room key, where does it hang?"),
    ),
    (
        "Invoice 7741 was settled by Dorothea Blum on 3 May.",
        ("who settled invoice 7741", "Can you see from this who took care of invoice 7741?"),
    ),
    (
        "The pass phrase of the backup archive is tangerine-48.",
        (
            "I forgot the pass phrase of the backup archive, can you get it from this?",
            "What pass phrase opens the backup archive?",
        ),
    ),
    (
        "Our flight home leaves from gate C27.",
        ("Which gate does our flight home leave from?", "we fly home later - which gate?"),
    ),
    (
        "The reading on the second meter was 90316.",
        ("What was the reading on the second meter?", "Reading of the second meter, please."),
    ),
    (
        "Rehearsals have been moved to Thursday at 18:45 in the gym.",
        ("When do we rehearse now?", "At what hour on Thursday are the rehearsals?"),
    ),
    (
        "Please send the signed lease to Osterweg 112.",
        ("To which address do I send the signed lease?", "signed lease goes where?"),
    ),
    (
        "The cat of the neighbours answers to the name Mortimer.",
        ("What is the name of the neighbours' cat?", "The neighbours' cat, what do they call it?"),
    ),
)
_FREE_REQUESTS_TEST = (
    "Could you boil this down for me?",
    "I have two minutes: what is in here?",
    "Make a list of five takeaways.",
    "Who would want to read this, and why?",
    "Suggest a good title for it.",
    "How would you describe the style?",
    "What's this?",
    "Please write a two-line description that I can put in our catalogue.",
    "explain this to me like I'm twelve",
    "Would you recommend reading it? Say what it offers.",
)
_PROSE = re.compile(r"[a-z]+ [a-z]+ [a-z]+")
_TERM = re.compile(r"\b[A-Za-z][A-Za-z_.]{6,}[A-Za-z]\b")


def _document(rng: random.Random, source: str, split: str, pieces: list[str], asked: int) -> str:
    """The pieces as one text, in training mostly of another form than that of their source."""
    if split == "train" and rng.random() < 0.7:
        return restyle(rng, pieces, asked)
    return ("\n" if source == "readmes" else joiner(source)).join(pieces)


def _place(rng: random.Random, split: str, instruction: str, text: str) -> str:
    """The instruction behind the text, before it, or both."""
    if split == "train":
        text = wrap_document(rng, text)
    place = rng.random()
    if place < 0.6:
        return f"{text}\n\n{instruction}"
    if place < 0.8:
        return f"{instruction}\n\n{text}"
    return f"{instruction}\n\n{text}\n\n{instruction}"


def _lead(text: str) -> tuple[str, str]:
    """The first paragraph of prose, in one line, and what follows it.

    Texts without blank lines have a paragraph a line, others break their paragraphs.
    """
    lines = text.split("\n")
    long = (i for i, line in enumerate(lines) if len(line) >= 60 and _PROSE.search(line))
    # Badges and pictures open many descriptions and say nothing.
    first = next((i for i in long if not lines[i].lstrip().startswith(("<", "[!"))), 0)
    last = first
    if any(not line.strip() for line in lines):
        while first > 0 and lines[first - 1].strip():
            first -= 1
        while last + 1 < len(lines) and lines[last + 1].strip():
            last += 1
    return " ".join(" ".join(lines[first : last + 1]).split()), "\n".join(lines[last + 1 :])


def _without(text: str, *passages: str) -> str:
    """`text` without any of the passages, however it breaks their lines."""
    for passage in passages:
        text = re.sub(r"\s+".join(map(re.escape, passage.split())), "", text)
    return text


@dataclass(frozen=True, kw_only=True)
class OpenTask(TextTask):
    """What the tasks of this file share.

    Args:
        sources: of training texts, drawn evenly.
        test_source: of test texts.
    """

    teacher_forced: bool = False
    sources: tuple[str, ...] = ("topics", "code")
    test_source: str = "docstrings"

    def sizes(self, length: int) -> tuple[int, int]:
        return 400, max(400, 4 * (length - 200))

    def source(self, rng: random.Random, split: str) -> str:
        return self.test_source if split == "test" else rng.choice(self.sources)

    def pieces(self, rng: random.Random, source: str, split: str, size: int) -> tuple[list[str], str]:
        """Sentences or lines of a text of `size` characters, and the document that it ends in."""
        found = window(source, split, rng, size + 200)
        return [piece.strip() for piece in cut(found.text, source, size) if piece.strip()], found.name


@dataclass(frozen=True, kw_only=True)
class OpenQuestion(OpenTask):
    """A question about a term that one sentence of the text mentions; the answer is that sentence."""

    metric: str = "f1"

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        source = self.source(rng, split)
        pieces, name = self.pieces(rng, source, split, size)
        text = joiner(source).join(pieces)
        # Asked about: a sentence, from a random one on, with a term that stands nowhere else.
        start = rng.randrange(len(pieces))
        for i in [*range(start, len(pieces)), *range(start)]:
            terms = [term for term in _TERM.findall(pieces[i]) if text.count(term) == 1]
            if terms and len(pieces[i]) < 400:
                break
        else:
            i, terms = start, [pieces[start][:40]]
        term = rng.choice(terms)
        question = (
            term_question(rng, term) if split == "train" else rng.choice(_QUESTIONS_TEST).format(term=f'"{term}"')
        )
        user = _place(rng, split, question, _document(rng, source, split, pieces, i))
        meta = {"source": source, "document": name, "depth": round(i / max(1, len(pieces) - 1), 3)}
        return Draft(user, "", (pieces[i][:400],), meta=meta)


@dataclass(frozen=True, kw_only=True)
class OpenFact(OpenTask):
    """A question about a fact that one sentence of the text states; the answer is that sentence.

    Teacher-forced: small models seldom answer such a question of their own accord, and still find the sentence.
    """

    metric: str = "f1"
    teacher_forced: bool = True

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        source = self.source(rng, split)
        if split == "train":
            hidden = fact(rng)
        else:
            sentence, questions = rng.choice(_FACTS_TEST)
            hidden = Fact(sentence, rng.choice(questions))
        pieces, name = self.pieces(rng, source, split, size)
        (depth,) = spread(rng, pieces, [hidden.sentence])
        text = _document(rng, source, split, pieces, pieces.index(hidden.sentence))
        user = _place(rng, split, hidden.question, text)
        meta = {"source": source, "document": name, "depth": depth}
        return Draft(user, "", (hidden.sentence,), meta=meta)


@dataclass(frozen=True, kw_only=True)
class OpenRequest(OpenTask):
    """A request about a whole document that has lost its first paragraph; that paragraph is the answer.

    Args:
        test_wordings: requests of the test split.
    """

    task_class: str = HOLISTIC
    metric: str = "nll"
    #: 1 left the answer in the prompt where a later document repeats it.
    revision: ClassVar[int] = 2
    test_wordings: tuple[str, ...] = _REQUESTS_TEST

    def sizes(self, length: int) -> tuple[int, int]:
        return 300, max(300, 4 * (length - 150))

    def draft(self, rng: random.Random, size: int, split: str) -> Draft:
        source = self.source(rng, split)
        wording = request(rng) if split == "train" else rng.choice(self.test_wordings)
        found = documents(source, split)
        at = rng.randrange(len(found))
        name = found[at].name
        lead, text = _lead(found[at].text.strip())
        answer = lead[:600].strip() or name
        text = _without(text, lead, answer)
        # A short document is followed by others: the request is about all of them, and the lead stays a fair answer.
        while len(text) < size:
            at = (at + 1) % len(found)
            text = f"{text}\n{_without(found[at].text, lead, answer)}"
        text = text[:size].strip()
        if split == "train" and rng.random() < 0.7:
            # Lines of code are short: each as an entry of a log would be more log than code.
            text = restyle(rng, textwrap.wrap(text, 160))
        meta = {"source": source, "document": name}
        return Draft(_place(rng, split, wording, text), "", (answer,), meta=meta)


FREE_QUESTION = OpenFact(name="free_question", held_out=True, test_source="readmes")
FREE_REQUEST = OpenRequest(name="free_request", held_out=True, test_source="readmes", test_wordings=_FREE_REQUESTS_TEST)
