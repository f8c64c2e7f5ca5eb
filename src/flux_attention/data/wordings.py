"""What people ask of a document, in many wordings, for training: a few slots filled at random make thousands.

A router that has seen twenty wordings knows twenty wordings: it takes the next one for whatever the document resembles.
Tests use sentences of their own (`tasks/open_prompts.py`), which no slot here produces.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from flux_attention.data import words

_OPENERS = (
    *("",) * 12,
    "Hi! ",
    "Hello, ",
    "Please help. ",
    "One thing. ",
    "Short question: ",
    "Question: ",
    "Q: ",
    "Task: ",
    "Your task: ",
    "I have a request. ",
    "Read the text first. ",
    "Based on this: ",
    "From the above: ",
    "Regarding the document: ",
    "Using only what is given: ",
    "Instruction: ",
    "Now, ",
    "Okay. ",
    "As an assistant, read carefully. ",
    "Here is what I need: ",
)
_QUESTION_CLOSERS = (
    *("",) * 14,
    " Answer briefly.",
    " Just the answer.",
    " No explanation.",
    " Reply with a few words.",
    " Be exact.",
    " Use the wording of the text.",
    " If it is not there, say so.",
    " Thanks.",
    " Thank you!",
    " It is somewhere in there.",
    " I could not find it.",
    " Answer in one sentence.",
    "\nAnswer:",
    "\nA:",
)
_REQUEST_CLOSERS = (
    *("",) * 12,
    " Keep it short.",
    " Two or three sentences are enough.",
    " Use plain words.",
    " Write for somebody who knows nothing of it.",
    " Use bullet points.",
    " No more than a hundred words.",
    " Leave details out.",
    " Be thorough.",
    " Thanks.",
    " Thank you!",
    " My boss wants it by noon.",
    " Do not quote.",
    " In your own words.",
    "\nAnswer:",
    "\nSummary:",
)

#: About a term that stands in one place.
TERM_QUESTIONS = (
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
    "{term}?",
    "What do we know about {term}?",
    "Show me where {term} occurs.",
    "Copy the sentence in which {term} occurs.",
    "Is there anything on {term}?",
    "Which statement is made about {term}?",
    "Remind me what {term} was.",
    "I remember something about {term}. What was it?",
    "What follows from the text about {term}?",
    "Locate {term} and repeat what is said there.",
    "What role does {term} play here?",
    "Let me know what they write about {term}.",
)

_DOCUMENTS = (
    "the text",
    "this text",
    "the document",
    "this document",
    "this file",
    "the material",
    "these notes",
    "the page",
    "this article",
    "the above",
    "it",
    "all of this",
    "everything above",
    "the passage",
    "what I pasted",
    "this chapter",
    "this report",
    "the content",
)
#: About a document as a whole.
_REQUESTS = (
    "Write a summary of {doc}.",
    "Sum up {doc}.",
    "Sum {doc} up in a few sentences.",
    "Condense {doc} into one paragraph.",
    "What are the main points of {doc}?",
    "Describe the general subject of {doc}.",
    "Give the gist of {doc}.",
    "Write an abstract for {doc}.",
    "TL;DR",
    "tldr of {doc}",
    "Explain to a beginner what {doc} covers.",
    "What is the overall purpose of {doc}?",
    "Draft an opening paragraph that prepares the reader for {doc}.",
    "Which topic does {doc} treat? Answer in general terms.",
    "Outline {doc} briefly.",
    "Write a blurb for {doc}.",
    "Characterise {doc} as a whole.",
    "Give a high-level description of {doc}.",
    "Please provide an executive summary of {doc}.",
    "What would a reader learn from {doc}?",
    "Restate the essence of {doc} in your own words.",
    "Introduce {doc} to somebody who has not read it.",
    "Shorten {doc}.",
    "Make {doc} shorter, keeping what matters.",
    "Turn {doc} into a short post for social media.",
    "Write three keywords for {doc}.",
    "Find a headline for {doc}.",
    "Which conclusions can be drawn from {doc}?",
    "What kind of document is this?",
    "What is the tone of {doc}?",
    "Who wrote {doc}, and for whom? Guess from how it is written.",
    "Review {doc}: what is good, what is missing?",
    "How is {doc} organised?",
    "Make an outline with headings for {doc}.",
    "What have all parts of {doc} in common?",
    "Tell me roughly what {doc} says.",
    "I have no time to read {doc}. What does it say?",
    "Why does {doc} matter?",
    "Which ideas run through {doc}?",
    "List the most important facts of {doc}.",
    "Write an email that tells a colleague what {doc} is about.",
    "Rate how easy {doc} is to read, and say why.",
    "In general, what happens in {doc}?",
    "Put {doc} in a nutshell.",
    "Draw the big picture of {doc}.",
    "Give an overview of {doc} for a newcomer.",
    "What questions does {doc} answer?",
    "What did you understand of {doc}?",
    "Comment on {doc}.",
    "Write a conclusion for {doc}.",
)


def term_question(rng: random.Random, term: str) -> str:
    """A question about `term`, which stands in one place of the document."""
    quoted = rng.choice(('"{}"', "'{}'", "{}", "“{}”", "*{}*")).format(term)
    return _between(rng, rng.choice(TERM_QUESTIONS).format(term=quoted), _QUESTION_CLOSERS)


def request(rng: random.Random) -> str:
    """A request about a whole document."""
    return _between(rng, rng.choice(_REQUESTS).format(doc=rng.choice(_DOCUMENTS)), _REQUEST_CLOSERS)


def _between(rng: random.Random, core: str, closers: tuple[str, ...]) -> str:
    text = rng.choice(_OPENERS) + core + rng.choice(closers)
    form = rng.random()
    if form < 0.15:
        return text.lower()
    return text.rstrip("?.!") if form < 0.25 else text


_COUNT_INTROS = (
    "Go through this list of {items} and notice repetitions.",
    "The following list holds {items}, some of them many times.",
    "Count how often each of these {items} comes up.",
    "Here are {items} in no order, many of them repeated.",
    "What follows is a log of {items}. Keep a tally.",
    "A machine printed these {items}.",
    "These are all the {items} that we received.",
    "You will see many {items}. Some return again and again.",
    "{items}:",
    "Statistics on {items} are wanted. The data:",
    "Look at how the {items} below are distributed.",
    "The text consists of {items} in random order. Pay attention to how often each of them returns.",
    "Somebody recorded {items} for a week, without order. Your job is to find out which of them dominate.",
    "",
)
_COUNT_QUESTIONS = (
    "Name the {count} {items} that occur most often.",
    "Give the {count} commonest {items} of the list.",
    "Which {count} {items} come up most often? Only name them.",
    "List the {count} {items} with the most occurrences, without an explanation.",
    "By the tally, what are the {count} most frequent {items} above?",
    "Sort the {items} by frequency and show the first {count}.",
    "Top {count} {items}?",
    "Which {items} dominate? Name {count}.",
    "Find the {count} {items} with the highest counts.",
    "Tell me the {count} {items} that are repeated the most.",
    "What {count} {items} did you see more often than all others?",
    "Ignore rare {items}: which {count} remain?",
    "Count all {items}. Which {count} have the largest number?",
    "Return the {count} most typical {items}.",
    "Skip explanations and everything that is rare. Which {count} {items} were there most of the time?",
    "Do not show how you count. State the {count} {items} with the highest frequency in the data.",
    "Which {items} appeared again and again? Give {count}, the commonest first.",
)
_COUNT_PREFIXES = (
    "The {count} most frequent {items} are:",
    "The {count} commonest {items} are:",
    "Most often come up:",
    "The {count} {items} with the most occurrences are:",
    "By the tally, the {count} most frequent {items} are:",
    "Answer:",
    "Top {count}:",
    "These {items} dominate:",
    "The highest counts belong to:",
    "Answer: In the data above, the {count} {items} with the highest frequency are:",
    "Going by the text, the {count} commonest {items} are:",
    "Result: the {items} that returned most are:",
    "",
)
#: Other names for what is counted.
_ITEM_NAMES = {
    "words": ("words", "words", "terms", "expressions", "entries", "names"),
    "numbers": ("numbers", "numbers", "figures", "values", "entries", "ids"),
    "codes": ("codes", "codes", "labels", "symbols", "entries", "strings"),
}


def counting(rng: random.Random, items: str, count: int) -> tuple[str, str, str]:
    """What stands before a list, what is asked behind it, and how the answer begins.

    `items`: "words", "numbers" or "codes"; `count` of the commonest are asked for.
    """
    fields = {"items": rng.choice(_ITEM_NAMES[items]), "count": count}
    question = rng.choice(_OPENERS) + rng.choice(_COUNT_QUESTIONS)
    parts = (rng.choice(_COUNT_INTROS), question, rng.choice(_COUNT_PREFIXES))
    intro, question, prefix = (part.format(**fields) for part in parts)
    return intro, question, prefix


@dataclass(frozen=True)
class Fact:
    """A sentence that a document hides, and a question that it alone answers."""

    sentence: str
    question: str


def fact(rng: random.Random) -> Fact:
    """A random fact about a made-up thing, asked for in one of many wordings."""
    noun = rng.choice(words.NOUNS)
    thing = f"{rng.choice(words.ADJECTIVES)} {noun}"
    person = words.person(rng)
    kind = rng.choice(_FACTS)
    fields = {"thing": thing, "noun": noun, "person": person, "city": rng.choice(words.CITIES)}
    sentence = rng.choice(kind.sentences).format(**fields, value=kind.value(rng))
    question = _between(rng, rng.choice(kind.questions).format(**fields), _QUESTION_CLOSERS)
    return Fact(sentence[0].upper() + sentence[1:], question)


@dataclass(frozen=True)
class _Kind:
    value: Callable[[random.Random], str]
    sentences: tuple[str, ...]
    questions: tuple[str, ...]


_MONTHS = ("January", "February", "March", "April", "June", "July", "August", "September", "October", "December")


def _clock(rng: random.Random) -> str:
    return f"{rng.randint(6, 22)}:{rng.choice(('00', '10', '15', '20', '30', '40', '50'))}"


def _day(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(_MONTHS)}"


def _number(rng: random.Random) -> str:
    return str(rng.randint(11, 99_999))


def _mark(rng: random.Random) -> str:
    return f"{rng.choice(words.NOUNS)}-{rng.randint(10, 999)}"


_FACTS = (
    _Kind(
        _clock,
        (
            "the {noun} leaves at {value}.",
            "note that the {noun} starts at {value} now.",
            "the meeting about the {thing} begins at {value}.",
        ),
        (
            "At what time does it start, the {noun}?",
            "When exactly is the {noun}?",
            "what time was it again for the {noun}",
            "Time of the {noun}?",
        ),
    ),
    _Kind(
        _day,
        (
            "the {thing} is due on {value}.",
            "the deadline for the {thing} is {value}.",
            "the {thing} has been moved to {value}.",
        ),
        (
            "By which date is the {thing} wanted?",
            "What is the date for the {thing}?",
            "On which day is the {thing}?",
            "until when do we have for the {thing}",
        ),
    ),
    _Kind(
        words.person,
        (
            "the {thing} belongs to {value}.",
            "{value} is responsible for the {thing}.",
            "the {thing} was found by {value}.",
            "{value} wrote the part about the {thing}.",
        ),
        (
            "Whose name is connected with the {thing}?",
            "Which person has to do with the {thing}?",
            "Who is it that the {thing} is linked to?",
            "Name the person behind the {thing}.",
            "whom do I ask about the {thing}",
        ),
    ),
    _Kind(
        _number,
        (
            "the {thing} costs {value} euros.",
            "we paid {value} euros for the {thing}.",
            "the price of the {thing} is {value} euros.",
        ),
        (
            "How much is the {thing}?",
            "What does the {thing} cost?",
            "Price of the {thing}?",
            "How many euros are asked for the {thing}?",
        ),
    ),
    _Kind(
        _number,
        (
            "the stock holds {value} pieces of the {noun}.",
            "they counted {value} units of the {noun}.",
            "exactly {value} of the {noun} were sent.",
        ),
        (
            "How many of the {noun} are there?",
            "What number is given for the {noun}?",
            "Give the quantity of the {noun}.",
            "count for {noun}, please",
        ),
    ),
    _Kind(
        _mark,
        (
            "the password of {person} is {value}.",
            "to open the {thing}, enter {value}.",
            "{person} uses the key word {value} for the {thing}.",
        ),
        (
            "What must I type in, according to the text?",
            "Which key word is given?",
            "There is a secret word in there. Which one?",
            "Repeat the password that is mentioned.",
        ),
    ),
    _Kind(
        lambda rng: rng.choice(words.CITIES),
        (
            "{person} moved to {value} with the {thing}.",
            "the {thing} is kept in {value}.",
            "{person} has an office in {value} since the {noun} closed.",
        ),
        (
            "Which city is named in connection with the {noun}?",
            "In what town is that, with the {noun}?",
            "Which place do they mention together with the {noun}?",
        ),
    ),
    _Kind(
        lambda rng: rng.choice(words.JOBS),
        ("{person} works as a {value}.", "{person} was a {value} before that.", "{person} is the new {value}."),
        (
            "What is {person} by profession?",
            "What job does {person} have?",
            "As what is {person} employed?",
            "occupation of {person}?",
        ),
    ),
    _Kind(
        lambda rng: f"{rng.choice('ABCDEFGH')}{rng.randint(1, 60)}",
        (
            "the {thing} is in room {value}.",
            "go to room {value} for the {thing}.",
            "they put the {noun} into locker {value}.",
        ),
        (
            "Where can I find the {noun}?",
            "Which room or locker is it, for the {noun}?",
            "Where do they keep the {noun}?",
            "location of the {noun}?",
        ),
    ),
    _Kind(
        words.thing,
        (
            "the nickname of {person} is {value}.",
            "{person} keeps a {value} on the desk.",
            "{person} always talks about a {value}.",
        ),
        (
            "What is special about {person}?",
            "What do we learn about {person}?",
            "Tell me the thing about {person}.",
            "something about {person} was mentioned, what?",
        ),
    ),
    _Kind(
        lambda rng: f"{rng.randint(0, 9)}.{rng.randint(0, 30)}.{rng.randint(0, 99)}",
        (
            "the {noun} module needs version {value}.",
            "version {value} of {noun} has a fault.",
            "since {value}, {noun} is off by default.",
        ),
        (
            "Which version of {noun} is mentioned?",
            "What version number goes with {noun}?",
            "{noun}: which release?",
            "Version of {noun}?",
        ),
    ),
    _Kind(
        lambda rng: f"0{rng.randint(100, 999)} {rng.randint(100_000, 999_999)}",
        (
            "{person} can be reached at {value}.",
            "call {value} and ask for {person}.",
            "the telephone number of {person} is {value}.",
        ),
        (
            "How can I reach {person}?",
            "What is the telephone number of {person}?",
            "number to call for {person}",
            "Under which number is {person}?",
        ),
    ),
)
