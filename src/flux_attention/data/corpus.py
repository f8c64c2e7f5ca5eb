"""Text that needs no download: what ships with Python itself, plus fillers and JSONL files of one's own.

Families (`SOURCES`):

* `topics`: the reference manual inside `pydoc_data.topics`.
* `docstrings`: prose of module, class and function docstrings of the standard library, one document per module.
* `code`: the modules' source.
* `filler`, `ruler_filler`: repeated short sentences; the second is RULER's noise.
* `readmes`: descriptions and licences of the packages that this one needs, as they are and one licence per wording; for
  tests alone.

A document belongs to "train" or "test" by a hash of its name. `docstrings` and `code` share the names of their
modules, so a test docstring never occurs in training code. Training haystacks come from `topics`, `code` and `filler`;
test haystacks from `docstrings`, `ruler_filler` and `readmes`: other families, and other documents.

The texts are those of the running Python and of what is installed. Between versions they differ a little, which is why
results should record `fingerprint()`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import platform
import random
import re
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flux_attention.data.jsonl import jsonl_rows
from flux_attention.data.prompt import check_text

SPLITS = ("train", "test")

# Distributions strip some packages of the standard library, and releases remove others: none of them is used, so
# that machines agree. Tables of numbers are no code worth continuing.
_SKIPPED_NAMES = """
    test tests idle_test lib2to3 distutils idlelib tkinter turtledemo ensurepip encodings pydoc_data lib-dynload
    site-packages dist-packages config __pycache__ asynchat asyncore imp smtpd cgi cgitb chunk crypt imghdr
    mailcap nntplib pipes sndhdr telnetlib uu xdrlib aifc sunau msilib turtle this antigravity __phello__
    sre_compile sre_constants sre_parse pathlib tomllib _pyrepl compression
"""
_SKIPPED = frozenset(_SKIPPED_NAMES.split())
_FILLER = (
    "Rain fell on the harbour all night. The ferry left before dawn. Nobody waved from the pier. "
    "A dog barked twice and went to sleep. ",
    "The train was late again. Someone read a newspaper. The coffee had gone cold. Outside it was snowing. ",
    "Bread was baking in the kitchen. The window stood open. A bell rang far away. It was a quiet morning. ",
    "He counted the steps. She carried the lamp. They did not speak. The road went on and on. ",
)
# The noise of RULER's needle tasks, kept for comparability.
_RULER_FILLER = ("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ",)


@dataclass(frozen=True)
class Document:
    name: str
    text: str


def split_of(name: str) -> str:
    """Split a document belongs to, by its name alone: 3 in 5 train, 2 in 5 test."""
    return "train" if int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 5 < 3 else "test"


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")


@lru_cache(maxsize=1)
def _modules() -> tuple[tuple[str, Path], ...]:
    library = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).with_suffix("").parts
        if not _SKIPPED.intersection(parts) and not parts[0].startswith(("_sysconfigdata", "_distutils", "config-")):
            found.append((".".join(parts), path))
    return tuple(sorted(found))


@lru_cache(maxsize=2)
def _code(split: str) -> tuple[Document, ...]:
    documents = []
    for name, path in _modules():
        if split_of(name) == split:
            text = path.read_text(encoding="utf-8", errors="ignore").strip()
            # A long module without a function is a table.
            if len(text) > 500 and (len(text) < 5000 or "def " in text):
                documents.append(Document(name, text + "\n"))
    return tuple(documents)


def _as_prose(text: str) -> str:
    """Paragraphs that read as sentences, each on one line; tables, doctests and signatures are dropped."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        letters = sum(c.isalpha() or c == " " for c in line)
        if len(line) >= 60 and not line.startswith((">>>", "|", "+-", "$")) and letters >= 0.85 * len(line):
            kept.append(line)
    return "\n".join(kept)


@lru_cache(maxsize=2)
def _docstrings(split: str) -> tuple[Document, ...]:
    documents = []
    for source in _code(split):
        try:
            tree = ast.parse(source.text)
        except SyntaxError:  # templates of other languages' grammar
            continue
        texts = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                prose = _as_prose(ast.get_docstring(node) or "")
                if len(prose) > 100:
                    texts.append(prose)
        if texts:
            documents.append(Document(source.name, "\n".join(texts) + "\n"))
    return tuple(documents)


@lru_cache(maxsize=2)
def _topics(split: str) -> tuple[Document, ...]:
    from pydoc_data.topics import topics

    documents = []
    for name in sorted(topics):
        if split_of(name) == split:
            paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", topics[name]))
            text = "\n".join(p for p in paragraphs if p and set(p) - set("*=-~^ "))
            if len(text) > 500:
                documents.append(Document(name, text + "\n"))
    return tuple(documents)


#: Packages that torch and transformers bring along everywhere, and whose description is a document.
_PACKAGES = [
    "fsspec",
    "huggingface_hub",
    "jinja2",
    "networkx",
    "numpy",
    "regex",
    "sympy",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
]


def _description(package: importlib.metadata.Distribution) -> str:
    """What stands behind the headers of a package's metadata."""
    return (package.read_text("METADATA") or "").partition("\n\n")[2]


def _phrases(text: str) -> set[tuple[str, ...]]:
    """Every six words that stand in a row, whatever breaks, marks and indents them."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}


@lru_cache(maxsize=1)
def _readmes() -> tuple[Document, ...]:
    found = []
    licences: list[set[tuple[str, ...]]] = []
    for name in _PACKAGES:
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(Document(name, _description(package)))
        for file in package.files or []:
            if ".dist-info" in str(file) and file.name.upper().startswith(("LICENSE", "LICENCE")):
                path = Path(str(file.locate()))
                if path.is_file():
                    text = path.read_text(encoding="utf-8", errors="ignore")
                    phrases = _phrases(text)
                    # The names of their owners are all that tells most licences apart.
                    if all(len(phrases & other) < 0.8 * len(phrases) for other in licences):
                        found.append(Document(f"{name}:{file.name}", text))
                        licences.append(phrases)
                break
    return tuple(Document(d.name, d.text.strip() + "\n") for d in found if len(d.text) > 1000)


def _fillers(texts: tuple[str, ...]) -> tuple[Document, ...]:
    return tuple(Document(f"filler{i}", text * 50) for i, text in enumerate(texts))


SOURCES: dict[str, Callable[[str], tuple[Document, ...]]] = {
    "topics": _topics,
    "docstrings": _docstrings,
    "code": _code,
    "filler": lambda split: _fillers(_FILLER),
    "ruler_filler": lambda split: _fillers(_RULER_FILLER),
    "readmes": lambda split: _readmes() if split == "test" else (),
}


def documents(source: str, split: str) -> tuple[Document, ...]:
    """Documents of one family and split, in a fixed order."""
    _check_split(split)
    if source not in SOURCES:
        raise ValueError(f"unknown text source {source!r}; known: {', '.join(SOURCES)} (add one with add_jsonl_source)")
    found = SOURCES[source](split)
    if not found:
        raise ValueError(f"text source {source!r} holds no {split!r} document on this machine")
    return found


def read_jsonl_texts(path: str | Path, field: str = "text") -> tuple[Document, ...]:
    """Documents of a JSONL file, one object a line with the text under `field`."""
    found = []
    for number, row in jsonl_rows(Path(path)):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise ValueError(f"{path}, row {number}: field {field!r} with a non-empty string is missing")
        check_text(row[field], f"{path}, row {number}: field {field!r}")
        found.append(Document(f"{Path(path).name}:{number}", row[field].strip() + "\n"))
    if not found:
        raise ValueError(f"{path}: no rows")
    return tuple(found)


def add_jsonl_source(name: str, path: str | Path, field: str = "text") -> None:
    """Register a JSONL file as a text source; its rows are split by file name and row number."""
    if name in SOURCES:
        raise ValueError(f"text source {name!r} exists already; pick another name for {path}")
    rows = read_jsonl_texts(path, field)
    by_split = {split: tuple(row for row in rows if split_of(row.name) == split) for split in SPLITS}
    SOURCES[name] = lambda split: by_split[split]


@dataclass(frozen=True)
class Window:
    """A stretch of text that ends inside document `name`."""

    text: str
    name: str


def window(source: str, split: str, rng: random.Random, chars: int) -> Window:
    """`chars` characters that end somewhere in a random document (by length), preceded by its neighbours.

    The same `rng` state with a larger `chars` gives the same end and a longer beginning. Neighbours come in the
    order of names, so a module is preceded by its package.
    """
    found = documents(source, split)
    index = rng.choices(range(len(found)), weights=[len(document.text) for document in found])[0]
    last = found[index].text
    end = rng.randint(min(1500, len(last)), len(last))
    pieces, size, name = [last[:end]], end, found[index].name
    while size < chars:
        index = (index - 1) % len(found)
        pieces.append(found[index].text)
        size += len(found[index].text)
    return Window("".join(reversed(pieces))[-chars:], name)


def haystack(source: str, split: str, rng: random.Random, chars: int) -> list[str]:
    """A window cut into sentences (lines for code): the places between them can take a needle."""
    return cut(window(source, split, rng, chars + 200).text, source, chars)


def cut(text: str, source: str, chars: int) -> list[str]:
    """The last sentences (lines for code) of a window, `chars` characters of them."""
    if source == "code":
        pieces = text.split("\n")
    else:
        pieces = [piece for line in text.split("\n") for piece in re.split(r"(?<=[.!?:;]) +(?=[A-Z])", line)]
    pieces = pieces[1:] or pieces  # the first is torn
    size, start = 0, len(pieces)
    while start > 0 and size < chars:
        start -= 1
        size += len(pieces[start]) + 1
    return pieces[start:]


def joiner(source: str) -> str:
    return "\n" if source == "code" else " "


def fingerprint(sources: Iterable[str] = ("topics", "docstrings", "code", "readmes")) -> dict[str, str]:
    """Python version and a hash of each family's texts, to tell whether two results used the same ones."""
    result = {"python": platform.python_version()}
    for source in sources:
        digest = hashlib.sha256()
        for split in SPLITS:
            for document in SOURCES[source](split):
                digest.update(document.name.encode() + document.text.encode())
        result[source] = digest.hexdigest()[:12]
    return result
