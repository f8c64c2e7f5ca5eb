"""What a route makes of a sample, measured once: results of (sample, route) pairs, kept in files.

A score depends on the sample, the route and the kernels, not on who asked for the route. So the entrants of a board
share results where their routes agree, passes mix the routes of all of them, and an interrupted board goes on where
it stopped. A file is named by a hash of everything else that determines its results: runs of different settings
never mix.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flux_attention.data import Sample
from flux_attention.data.sample_set import digest
from flux_attention.evaluation.results import write_json
from flux_attention.evaluation.runner import Record, RunOptions, score_batch
from flux_attention.models.controller import FluxAttention
from flux_attention.route import Fixed, parse_columns

VERSION = 2


@dataclass(frozen=True)
class Outcome:
    """One sample under one route.

    Attributes:
        score: in [0, 1]; None for tasks that are scored by NLL alone.
        nll: nats per answer token; None when nothing was teacher-forced.
    """

    score: float | None
    nll: float | None


class OutcomeFile:
    """Results of one task at one length.

    Args:
        folder: of the files.
        settings: everything that determines a result besides sample and route; `task` and `length` among it.
        checksums: of the samples, in their order; a file of other samples is refused.

    Raises:
        ValueError: the file is damaged, of another version, or of other settings or samples.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], checksums: Sequence[int]) -> None:
        self.settings = {"version": VERSION, **settings}
        self.path = folder / f"{settings['task']}-{settings['length']}-{digest(self.settings)}.json"
        self.checksums = checksums
        self._found: dict[str, dict[int, Outcome]] = {}
        self._known: dict[str, int] = {}
        self._changed = False
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        data = read_settings(self.path, self.settings)
        self._known = data["samples"]
        for index, found in self._known.items():
            if int(index) < len(self.checksums) and self.checksums[int(index)] != found:
                raise ValueError(
                    f"{self.path} holds results of other samples (number {index} differs); delete it or use another "
                    "folder"
                )
        for route, rows in data["routes"].items():
            self._found[route] = {int(index): Outcome(*values) for index, values in rows.items()}

    def get(self, index: int, route: str) -> Outcome | None:
        return self._found.get(route, {}).get(index)

    def put(self, index: int, route: str, outcome: Outcome) -> None:
        self._found.setdefault(route, {})[index] = outcome
        self._known[str(index)] = self.checksums[index]
        self._changed = True

    def save(self) -> None:
        """Write what is new."""
        if not self._changed:
            return
        routes = {
            route: {str(i): [row.score, row.nll] for i, row in rows.items()} for route, rows in self._found.items()
        }
        write_json(self.path, {"settings": self.settings, "samples": self._known, "routes": routes})
        self._changed = False


def read_settings(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A file's data, after its settings were compared. Raises ValueError for a damaged file or other settings."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and its part is computed anew") from error
    found = data.get("settings") if isinstance(data, dict) else None
    if found != json.loads(json.dumps(settings)):
        version = found.get("version") if isinstance(found, dict) else None
        raise ValueError(
            f"{path} holds a run of other settings (version {version}, this is {settings.get('version')}); delete it "
            "or use another folder"
        )
    assert isinstance(data, dict)
    return data


@dataclass(frozen=True)
class Pair:
    """Sample number `index` of a cell under a route in characters (`Route.column`)."""

    file: OutcomeFile
    index: int
    sample: Sample
    route: str


def batches(pairs: Sequence[Pair], batch_tokens: int, options: RunOptions) -> Iterator[list[Pair]]:
    """Pairs that share a pass: of about one length, scored the same way, `batch_tokens` at most.

    Generation takes four times as much: it keeps keys and values only, and its steps cost the same for few rows.
    """
    key = lambda pair: (options.generates(pair.sample), len(pair.route), len(pair.sample))  # noqa: E731
    batch: list[Pair] = []
    for pair in sorted(pairs, key=key):
        room = batch_tokens * (4 if options.generates(pair.sample) else 1)
        # Sorted by length, so this one is the longest: what padding there may be is counted with it.
        if batch and (key(pair)[:2] != key(batch[0])[:2] or (len(batch) + 1) * len(pair.sample) > room):
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


@torch.no_grad()
def outcomes_of(
    controller: FluxAttention, tokenizer: Any, samples: Sequence[Sample], routes: Sequence[str], options: RunOptions
) -> list[Outcome]:
    """Run samples of one kind of scoring, each under a route of its own: in one pass, or in as many as the device's
    memory takes, which others may share.

    Raises torch.OutOfMemoryError when it does not take one sample.
    """
    records: list[Record] | None = None
    try:
        with controller.using(Fixed(parse_columns(list(routes), len(controller.layers)))):
            records = score_batch(controller, tokenizer, samples, options)
    except torch.OutOfMemoryError:
        if len(samples) == 1:
            raise
    if records is None:
        # Not while the error is handled: its traceback holds what the pass had.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(samples) // 2
        parts = ((samples[:half], routes[:half]), (samples[half:], routes[half:]))
        return [row for part in parts for row in outcomes_of(controller, tokenizer, *part, options)]
    # What is in memory and what is in the file must be the same.
    return [Outcome(row.score, None if row.nll is None else round(row.nll, 6)) for row in records]


def keep(batch: Sequence[Pair], outcomes: Sequence[Outcome]) -> None:
    """Put a batch's results where they belong."""
    for pair, outcome in zip(batch, outcomes, strict=True):
        pair.file.put(pair.index, pair.route, outcome)
