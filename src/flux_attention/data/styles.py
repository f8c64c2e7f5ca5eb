"""Forms of documents: the same sentences as a letter, a log, a list or a table.

What a document looks like says nothing of what is asked about it, and a router should learn that.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Iterator, Sequence

from flux_attention.data import words

Style = Callable[[random.Random, Sequence[str]], str]


#: White space that no line may be broken at, and that `textwrap` leaves as it is: characters that no text has.
_FIXED = {ord(space): chr(0xE000 + ord(space)) for space in " \t\n\x0b\x0c\r"}
_LOOSE = {ord(fixed): chr(space) for space, fixed in _FIXED.items()}


def restyle(rng: random.Random, pieces: Sequence[str], whole: int | None = None) -> str:
    """`pieces` (sentences or lines) as a document of a random form, in their order; piece `whole` stays in one line."""
    fixed = [piece.translate(_FIXED) if i == whole else piece for i, piece in enumerate(pieces)]
    return rng.choice(_STYLES)(rng, fixed).translate(_LOOSE)


def wrap_document(rng: random.Random, text: str) -> str:
    """`text` as prompts set documents off from instructions, or as it is."""
    return rng.choice(_FRAMES).format(text)


_FRAMES = (
    *("{}",) * 6,
    "Document:\n{}",
    "Text:\n{}",
    "Context: {}",
    "<document>\n{}\n</document>",
    '"""\n{}\n"""',
    "```\n{}\n```",
    "---\n{}\n---",
    "### Input\n{}\n\n### Task",
    "BEGIN\n{}\nEND",
)


def _blocks(rng: random.Random, pieces: Sequence[str], low: int, high: int) -> Iterator[Sequence[str]]:
    start = 0
    while start < len(pieces):
        size = rng.randint(low, high)
        yield pieces[start : start + size]
        start += size


def _title(rng: random.Random) -> str:
    return words.thing(rng).capitalize()


def _wrapped(rng: random.Random, pieces: Sequence[str]) -> str:
    width, indent = rng.randint(56, 100), rng.choice(("", "", "    ", "> ", "# ", "  "))
    paragraphs = (" ".join(block) for block in _blocks(rng, pieces, 2, 8))
    # The piece that stays whole is one long word; it may hold hyphens.
    wrapper = textwrap.TextWrapper(
        width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n\n".join(map(wrapper.fill, paragraphs))


def _markdown(rng: random.Random, pieces: Sequence[str]) -> str:
    parts = [f"# {_title(rng)}"]
    for block in _blocks(rng, pieces, 3, 9):
        mark = rng.choice(("", "", "- ", "* ", "1. "))
        parts.append(f"## {_title(rng)}\n\n" + "\n".join(mark + piece for piece in block))
    return "\n\n".join(parts)


def _numbered(rng: random.Random, pieces: Sequence[str]) -> str:
    form = rng.choice(("{}. {}", "[{}] {}", "({}) {}", "{}) {}", "§ {} {}"))
    return "\n".join(form.format(i, piece) for i, piece in enumerate(pieces, rng.choice((1, 1, 101))))


def _letters(rng: random.Random, pieces: Sequence[str]) -> str:
    people = [words.person(rng) for _ in range(3)]
    parts = []
    for block in _blocks(rng, pieces, 4, 14):
        sender, receiver = rng.sample(people, 2)
        head = f"From: {sender}\nTo: {receiver}\nSubject: Re: {_title(rng)}\n"
        parts.append(f"{head}\nHi {receiver.split()[0]},\n\n{' '.join(block)}\n\nBest,\n{sender.split()[0]}")
    return "\n\n".join(parts)


def _talk(rng: random.Random, pieces: Sequence[str]) -> str:
    people = [rng.choice(words.NAMES) for _ in range(rng.randint(2, 4))]
    if rng.random() < 0.5:
        people = [name.upper() for name in people]
    return "\n".join(f"{rng.choice(people)}: {' '.join(block)}" for block in _blocks(rng, pieces, 1, 3))


def _log(rng: random.Random, pieces: Sequence[str]) -> str:
    seconds, lines = rng.randrange(80_000), []
    for piece in pieces:
        seconds = (seconds + rng.randint(1, 40)) % 86_400
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        lines.append(f"{clock} {rng.choice(('INFO', 'INFO', 'DEBUG', 'WARN'))} {rng.choice(words.NOUNS)}: {piece}")
    return "\n".join(lines)


def _table(rng: random.Random, pieces: Sequence[str]) -> str:
    mark = rng.choice((",", ";", "\t", " | "))
    rows = [mark.join(("id", "name", "count", "remark"))]
    for i, piece in enumerate(pieces, 1):
        rows.append(mark.join((str(i), rng.choice(words.NOUNS), str(rng.randrange(1000)), piece)))
    return "\n".join(rows)


def _objects(rng: random.Random, pieces: Sequence[str]) -> str:
    return "\n".join(f"- id: {i}\n  tag: {rng.choice(words.NOUNS)}\n  text: {piece}" for i, piece in enumerate(pieces))


def _web(rng: random.Random, pieces: Sequence[str]) -> str:
    blocks = "\n".join(f"<p>{' '.join(block)}</p>" for block in _blocks(rng, pieces, 1, 5))
    return f"<html>\n<h1>{_title(rng)}</h1>\n{blocks}\n</html>"


def _prose(rng: random.Random, pieces: Sequence[str]) -> str:
    return "\n\n".join(" ".join(block) for block in _blocks(rng, pieces, 3, 12))


_STYLES: tuple[Style, ...] = (
    _wrapped,
    _wrapped,
    _markdown,
    _numbered,
    _letters,
    _talk,
    _log,
    _table,
    _objects,
    _web,
    _prose,
    _prose,
)
