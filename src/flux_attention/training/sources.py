"""Data sets by name, and how their rows become `{context, question, answer, task}`.

The five of the published mixture (arXiv 2604.07394). A name stands for the set on the Hub; `name=file` reads the same
rows from a `.jsonl` or `.parquet` file of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_attention.data.jsonl import jsonl_lines, parse_line
from flux_attention.training.data import read_rows

Convert = Callable[[Mapping[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        name: on the command line.
        hub: its id there; None where it is not on the Hub, and `where` says how to get it.
        subset: configuration of the set on the Hub.
        convert: one of its rows as `{context, question, answer, task}`; None for a row to leave out. Raises KeyError,
            TypeError or ValueError for a row of another form.
        where: for people, where it comes from.
    """

    name: str
    hub: str | None
    subset: str | None
    convert: Convert
    where: str


def _chatqa2(row: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation in one string: the document, then the question, between the two role markers."""
    text = _string(row, "question").removeprefix("User: ").removesuffix("Assistant:").rstrip()
    context, _, question = text.rpartition("\n\n")
    if not context:
        raise ValueError("field 'question' must hold a document, an empty line and a question")
    answer = row["answer"]
    summary = "summar" in question.lower()
    return {
        "context": context,
        "question": question,
        "answer": list(answer) if isinstance(answer, list | tuple) else answer,
        "task": "summarization" if summary else "single_qa",
    }


def _musique(row: Mapping[str, Any]) -> dict[str, Any] | None:
    if row.get("answerable") is False:
        return None
    parts = [f"{part['title']}\n{part['paragraph_text']}" for part in row["paragraphs"]]
    return {
        "context": "\n\n".join(parts),
        "question": _string(row, "question"),
        "answer": [_string(row, "answer"), *(row.get("answer_aliases") or [])],
        "task": "multihop_qa",
    }


def _colt(row: Mapping[str, Any]) -> dict[str, Any]:
    """Files that the code depends on, then the code up to the gap; the answer is what was in the gap."""
    parts = [f"# {part['code_file_path']}\n{part['abstraction']}" for part in row.get("cross_file_dependency") or []]
    return {
        "context": "\n\n".join([*parts, f"# {_string(row, 'code_file_path')}\n{_string(row, 'prefix')}"]),
        "question": "Continue the code.",
        "answer": _string(row, "middle"),
        "task": "code",
    }


def _summaries(document: str) -> Convert:
    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "context": _string(row, document),
            "question": "Summarise the text above.",
            "answer": _string(row, "summary"),
            "task": "summarization",
        }

    return convert


def _string(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise TypeError(f"field {name!r} must be a string, got {type(row[name]).__name__}")
    return str(row[name])


SOURCES = {
    source.name: source
    for source in (
        Source(
            "chatqa2-long",
            "nvidia/ChatQA2-Long-SFT-data",
            "long_sft",
            _chatqa2,
            "Hub; non-commercial use only",
        ),
        Source("musique", "dgslibisey/MuSiQue", None, _musique, "Hub; CC BY 4.0"),
        Source("colt-132k", None, None, _colt, "zip archive at zenodo.org/records/15019938; CC BY 4.0"),
        Source("govreport", "ccdv/govreport-summarization", None, _summaries("report"), "Hub"),
        Source("xsum", "EdinburghNLP/xsum", None, _summaries("document"), "Hub"),
    )
}


@dataclass(frozen=True)
class Rows:
    """Where rows come from: a file of one's own (`source` None), or a named set, possibly from a file.

    Attributes:
        place: file, or id on the Hub.
    """

    source: Source | None
    place: str

    @classmethod
    def parse(cls, text: str) -> Rows:
        """From `NAME`, `NAME=FILE` or `FILE`.

        Raises:
            ValueError: an unknown name, or a set that is not on the Hub without a file.
            FileNotFoundError: the file does not exist.
        """
        name, given, file = text.partition("=")
        if not given:
            file = "" if text in SOURCES else text
            name = text if text in SOURCES else ""
        if name and name not in SOURCES:
            raise ValueError(f"unknown data set {name!r} in {text!r}; known: {', '.join(SOURCES)}")
        if file and not Path(file).is_file():
            known = ", ".join(SOURCES)
            raise FileNotFoundError(
                f"{file!r} is neither a file nor a known data set ({known}); a set's file: NAME=FILE"
            )
        if not name:
            return cls(None, file)
        source = SOURCES[name]
        if not file and source.hub is None:
            raise ValueError(f"data set {name!r} is not on the Hub ({source.where}): give its file, {name}=FILE")
        return cls(source, file or str(source.hub))

    @property
    def label(self) -> str:
        return self.place if self.source is None else self.source.name

    def read(self, split: str = "train") -> Iterator[tuple[str, dict[str, Any] | ValueError | None]]:
        """`(where, row)` for each row: in the common form, None for one to leave out, or what is wrong with it."""
        for number, found in self._numbered(split):
            where = f"{self.label}, row {number}"
            try:
                row = parse_line(found, where) if isinstance(found, str) else found
                yield where, row if self.source is None else self.source.convert(row)
            except KeyError as error:
                yield where, ValueError(f"{where}: field {error} is missing; the row has {', '.join(map(str, row))}")
            except (TypeError, ValueError) as error:
                told = str(error)
                yield where, ValueError(told if told.startswith(where) else f"{where}: {told}")

    def _numbered(self, split: str) -> Iterator[tuple[int, str | dict[str, Any]]]:
        path = Path(self.place)
        if path.is_file() and path.suffix != ".parquet":
            # Line by line, so that one that is not JSON does not hide the rest.
            yield from jsonl_lines(path)
        else:
            subset = None if path.is_file() or self.source is None else self.source.subset
            yield from read_rows(self.place, split, subset=subset)
