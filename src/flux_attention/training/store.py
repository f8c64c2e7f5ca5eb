"""A tokenised data set in a folder: built once, mapped into memory by every run.

`samples.safetensors` holds the tokens of all samples back to back, `manifest.json` what they were made of and their
statistics. The manifest is written last, so a folder with one is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from flux_attention.data.sample import TASK_CLASSES, Sample

SAMPLES_FILE = "samples.safetensors"
MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


class StoreError(ValueError):
    """A data set folder that is missing, incomplete or damaged; the message names the file."""


class StoredSamples(Dataset[Sample]):
    """The samples of a folder.

    Attributes:
        manifest: `manifest.json`.
        lengths: tokens of each sample.
        largest_token: highest token id, to be checked against a model's vocabulary.

    Raises:
        StoreError: no data set in the folder, or a damaged one.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        path = folder / MANIFEST_FILE
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(f"{folder} is no data set: {MANIFEST_FILE} is missing (flux-attn data build)") from None
        except ValueError as error:
            raise StoreError(f"{path}: {error}") from error
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise StoreError(f"{path}: format_version must be {FORMAT_VERSION}: build the data set again")
        try:
            found = load_file(folder / SAMPLES_FILE)
        except (FileNotFoundError, SafetensorError) as error:
            raise StoreError(f"{folder / SAMPLES_FILE} is missing, corrupt or truncated: {error}") from error
        self._tokens: Tensor = found["tokens"]
        self._offsets: list[int] = found["offsets"].tolist()
        self._prompts: list[int] = found["prompt_lens"].tolist()
        self._task: list[int] = found["task_index"].tolist()
        self._tasks: list[dict[str, str]] = self.manifest["tasks"]
        if len(self._prompts) != self.manifest["samples"]:
            raise StoreError(f"{folder}: {len(self._prompts)} samples, the manifest says {self.manifest['samples']}")
        self.lengths = [b - a for a, b in zip(self._offsets, self._offsets[1:], strict=False)]
        self.largest_token = int(self.manifest["largest_token"])

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        ids = self._tokens[self._offsets[index] : self._offsets[index + 1]].tolist()
        task, prompt = self._tasks[self._task[index]], self._prompts[index]
        return Sample(
            task=task["name"],
            task_class=task["class"],
            prompt_ids=tuple(ids[:prompt]),
            answer_ids=tuple(ids[prompt:]),
            answers=("",),
            metric="f1",
        )


def write_store(folder: Path, samples: Sequence[Sample], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write samples with `facts` about their making; returns the manifest.

    What was in the folder is replaced only when all is written. Raises OSError when the disk is full.
    """
    if not samples:
        raise StoreError(f"{folder}: no samples to store")
    tasks = sorted({(sample.task, sample.task_class) for sample in samples})
    place = {task: i for i, task in enumerate(tasks)}
    lengths = torch.tensor([len(sample) for sample in samples])
    tokens = torch.cat([torch.tensor(s.prompt_ids + s.answer_ids, dtype=torch.int32) for s in samples])
    tensors = {
        "tokens": tokens,
        "offsets": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        "prompt_lens": torch.tensor([len(sample.prompt_ids) for sample in samples]),
        "task_index": torch.tensor([place[sample.task, sample.task_class] for sample in samples]),
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "samples": len(samples),
        "tokens": int(lengths.sum()),
        "largest_token": int(tokens.max()),
        "tasks": [{"name": name, "class": task_class} for name, task_class in tasks],
        "statistics": describe(samples),
        **facts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    next_samples, next_manifest = folder / (SAMPLES_FILE + ".next"), folder / (MANIFEST_FILE + ".next")
    try:
        try:
            save_file(tensors, next_samples)
        except SafetensorError as error:
            raise OSError(f"{next_samples}: {error}") from error
        next_manifest.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        # Without a manifest there is no data set: a kill between the renames is found, not trusted.
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        os.replace(next_samples, folder / SAMPLES_FILE)
        os.replace(next_manifest, folder / MANIFEST_FILE)
    except OSError:
        next_samples.unlink(missing_ok=True)
        next_manifest.unlink(missing_ok=True)
        raise
    return manifest


def describe(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Counts and lengths (tokens) of each task, by class."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.task_class, sample.task), []).append(sample)
    rows = []
    for (task_class, task), members in sorted(
        groups.items(), key=lambda item: (TASK_CLASSES.index(item[0][0]), item[0])
    ):
        lengths = sorted(map(len, members))
        rows.append(
            {
                "class": task_class,
                "task": task,
                "samples": len(members),
                "tokens": sum(lengths),
                "median": int(statistics.median(lengths)),
                "p95": lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))],
                "longest": lengths[-1],
                "answer_tokens": sum(len(member.answer_ids) for member in members),
            }
        )
    return rows


def fingerprint(value: Any) -> str:
    """Short digest of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
