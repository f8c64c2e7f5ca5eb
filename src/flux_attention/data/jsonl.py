"""JSONL files, row by row: whatever is wrong with one is said by the file's name and the row's number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with their rows' numbers. Raises ValueError naming file and row."""
    for number, line in jsonl_lines(path):
        yield number, parse_line(line, f"{path}, row {number}")


def jsonl_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    # Bytes that are no UTF-8 become lone surrogates, which `prompt.check_text` refuses the row for that holds them.
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def parse_line(line: str, where: str) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError naming `where`."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with fields, got {type(row).__name__}")
    return row
