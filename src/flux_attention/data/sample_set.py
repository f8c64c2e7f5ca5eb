"""Sets of samples: made in parallel before a GPU is touched, kept in one small file, the same for everyone.

A file holds token ids, so a run can be prepared on one machine and run on another whose Python ships other texts.
Format: xz of one line of JSON (settings and everything but the ids), then the ids of all samples, little endian.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import multiprocessing
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flux_attention.data import Sample, get_task, make_sample
from flux_attention.data.corpus import fingerprint
from flux_attention.data.progress import Progress

VERSION = 1
# Haystacks are windows of the same texts: one dictionary over all samples finds them again.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 4, "dict_size": 1 << 26}]


def digest(data: Any) -> str:
    """16 hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_digest(tokenizer: Any) -> str:
    """Of what the tokenizer does to text: its vocabulary and its chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return digest([vocabulary, getattr(tokenizer, "chat_template", None)])


def checksum(sample: Sample) -> int:
    """Tells samples apart by their tokens."""
    return zlib.crc32(np.array([*sample.prompt_ids, -1, *sample.answer_ids], dtype="<i4").tobytes())


@dataclass(frozen=True)
class SampleSet:
    """Samples by cell.

    Attributes:
        settings: what they were made from, `texts` (fingerprint of the text sources) included.
        cells: (task, length) → samples, number i at place i.
    """

    settings: Mapping[str, Any]
    cells: Mapping[tuple[str, int], tuple[Sample, ...]]

    @cached_property
    def checksums(self) -> dict[tuple[str, int], list[int]]:
        """Of every sample, by cell."""
        return {cell: [checksum(sample) for sample in samples] for cell, samples in self.cells.items()}

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        rows, ids = [], []
        for (task, length), samples in self.cells.items():
            for sample in samples:
                row = asdict(sample)
                row["prompt_ids"], row["answer_ids"] = len(sample.prompt_ids), len(sample.answer_ids)
                rows.append({**row, "cell": [task, length]})
                ids += [np.array(sample.prompt_ids + sample.answer_ids)]
        flat = np.concatenate(ids)
        width = "<u2" if flat.max() < 1 << 16 else "<u4"
        head = {"version": VERSION, "settings": dict(self.settings), "ids": width, "samples": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".next")
        with lzma.open(temporary, "wb", filters=_FILTERS) as file:
            file.write(json.dumps(head).encode() + b"\n")
            file.write(flat.astype(width).tobytes())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> SampleSet:
        """Read a file. Raises ValueError for a damaged one or one of another version."""
        try:
            with lzma.open(path, "rb") as file:
                head = json.loads(file.readline())
                raw = file.read()
            version = head.get("version")
        except (lzma.LZMAError, EOFError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is no file of samples or is damaged ({error}); delete it") from error
        if version != VERSION:
            raise ValueError(f"{path} holds samples of version {version}, this is {VERSION}; delete it")
        ids = np.frombuffer(raw, dtype=head["ids"]).tolist()
        if len(ids) != sum(row["prompt_ids"] + row["answer_ids"] for row in head["samples"]):
            raise ValueError(f"{path} is damaged: it lacks token ids; delete it")
        cells: dict[tuple[str, int], list[Sample]] = {}
        start = 0
        for row in head["samples"]:
            task, length = row.pop("cell")
            middle = start + row["prompt_ids"]
            end = middle + row["answer_ids"]
            row["spans"] = tuple(map(tuple, row["spans"]))
            row["answers"] = tuple(row["answers"])
            row["prompt_ids"], row["answer_ids"] = tuple(ids[start:middle]), tuple(ids[middle:end])
            cells.setdefault((task, length), []).append(Sample(**row))
            start = end
        return cls(head["settings"], {key: tuple(samples) for key, samples in cells.items()})


_TOKENIZER: Any = None


class Job(NamedTuple):
    """One sample to make, as `make_sample` takes it."""

    task: str
    number: int
    length: int
    seed: int
    split: str


def spread_jobs(
    tasks: Sequence[str], count: int, lengths: Sequence[int], seed: int, split: str = "train", first: int = 0
) -> list[Job]:
    """`count` jobs that go round tasks, and round lengths for each task; the first has number `first`."""
    return [
        # Numbers are not shared between tasks, so that one named twice gives different samples.
        Job(tasks[i % len(tasks)], first + i, lengths[(i // len(tasks)) % len(lengths)], seed, split)
        for i in range(count)
    ]


def _make(job: Job) -> Sample:
    return make_sample(*job, _TOKENIZER)


def make_jobs(
    jobs: Sequence[Job],
    tokenizer: Any,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> list[Sample]:
    """The jobs' samples, by `workers` forked processes (before CUDA starts)."""
    global _TOKENIZER
    _TOKENIZER = tokenizer
    show = progress or (lambda batches, total, label: batches)
    if workers <= 1:
        return [_make(job) for job in show(jobs, len(jobs), "samples")]
    # Threads of the tokenizer do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return list(show(pool.imap(_make, jobs, chunksize=4), len(jobs), "samples"))


def make_sample_set(
    cells: Sequence[tuple[str, int]],
    n: int,
    seed: int,
    split: str,
    tokenizer: Any,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> SampleSet:
    """`n` samples of every (task, length), by `workers` forked processes (before CUDA starts: a fork cannot use it).

    Raises ValueError for unknown tasks and lengths that are too short.
    """
    jobs = [Job(task, index, length, seed, split) for task, length in cells for index in range(n)]
    made = make_jobs(jobs, tokenizer, workers=workers, progress=progress)
    found: dict[tuple[str, int], tuple[Sample, ...]] = {}
    for i, cell in enumerate(cells):
        found[cell] = tuple(made[i * n : (i + 1) * n])
    return SampleSet({**_settings(cells, n, seed, split, tokenizer), "texts": fingerprint()}, found)


def _settings(cells: Sequence[tuple[str, int]], n: int, seed: int, split: str, tokenizer: Any) -> dict[str, Any]:
    tokens = tokenizer_digest(tokenizer)
    settings = {"cells": [list(cell) for cell in cells], "samples": n, "seed": seed, "split": split}
    return {**settings, "tokenizer": tokens, **_versions(task for task, _ in cells)}


def _versions(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What names of tasks do not tell: the contents of their files, and revisions. Empty for most tasks."""
    tasks = {name: get_task(name) for name in sorted(set(names))}
    files = {
        name: [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in task.files()]
        for name, task in tasks.items()
        if task.files()
    }
    revisions = {name: task.revision for name, task in tasks.items() if task.revision > 1}
    return {key: value for key, value in (("files", files), ("revisions", revisions)) if value}


def _load_made_for(path: Path, settings: Mapping[str, Any]) -> SampleSet:
    """A file of samples. Raises ValueError when it is damaged, or not made from these settings (it may have more)."""
    found = SampleSet.load(path)
    if {key: found.settings.get(key) for key in settings} != settings:
        raise ValueError(f"{path} holds samples of other settings; delete it or keep these elsewhere")
    return found


def prepared_samples(
    folder: Path,
    cells: Sequence[tuple[str, int]],
    n: int,
    seed: int,
    split: str,
    tokenizer: Any,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> SampleSet:
    """The samples from their file in `folder`, which is made when it is not there.

    The file's name says what is in it, except for the texts that the Python which made it ships.
    """
    wanted = _settings(cells, n, seed, split, tokenizer)
    path = folder / f"samples-{split}-{digest(wanted)}.xz"
    if path.is_file():
        return _load_made_for(path, wanted)
    made = make_sample_set(cells, n, seed, split, tokenizer, workers=workers, progress=progress)
    made.save(path)
    return made


def prepared_jobs(
    path: Path | None, jobs: Mapping[str, Sequence[Job]], tokenizer: Any, *, workers: int = 1
) -> dict[str, list[Sample]]:
    """Samples of named lists of jobs: a run's phases, say.

    Args:
        path: file that keeps them, made when it is not there; None = none.
        workers: forked processes that make them (before CUDA starts).

    Raises ValueError when the file holds samples of other jobs, another tokenizer or other files of the tasks, or is
    damaged.
    """
    settings = {
        "jobs": {name: [list(job) for job in some] for name, some in jobs.items()},
        "tokenizer": tokenizer_digest(tokenizer),
        **_versions(job.task for some in jobs.values() for job in some),
    }
    if path is not None and path.is_file():
        cells = _load_made_for(path, settings).cells
        return {name: list(cells.get((name, 0), ())) for name in jobs}
    made = iter(make_jobs([job for some in jobs.values() for job in some], tokenizer, workers=workers))
    result = {name: [next(made) for _ in some] for name, some in jobs.items()}
    if path is not None:
        SampleSet(settings, {(name, 0): tuple(some) for name, some in result.items() if some}).save(path)
    return result
