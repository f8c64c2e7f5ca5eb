"""Checkpoints that a killed run can be resumed from, and only with the settings it began with."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

SETTINGS_FILE = "flux_settings.json"
#: What a checkpoint of the Trainer consists of; the state is written last.
_WEIGHTS = "model.safetensors"
_FILES = (_WEIGHTS, "optimizer.pt", "scheduler.pt")
_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class ResumeError(ValueError):
    """A run that cannot be resumed as asked; the message lists why."""


def newest_checkpoint(folder: str | Path) -> Path:
    """The newest checkpoint that was written to its end: a kill may have left a later one half-written.

    Raises ResumeError when there is none.
    """
    folder = Path(folder)
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        if is_complete(path):
            return path
    raise ResumeError(f"{folder} holds no complete checkpoint to resume from ({len(found)} incomplete)")


def is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all((checkpoint / name).is_file() for name in _FILES)


def begin_checkpoint(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Put the settings of the run where its checkpoint will be.

    One of an earlier run in the same place loses its state, so that a kill between two files leaves no mixture that
    looks complete. Its other files are replaced one by one: other ranks may be writing theirs already.
    """
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / _STATE).unlink(missing_ok=True)
    (checkpoint / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_settings(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to resume with other settings than the checkpoint's. Raises ResumeError that lists the differences."""
    path = checkpoint / SETTINGS_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResumeError(f"{checkpoint} is no checkpoint of this program: {SETTINGS_FILE} is missing") from None
    except ValueError as error:
        raise ResumeError(f"{path}: {error}") from error
    # As JSON would give them back, so that tuples and lists compare equal.
    current = json.loads(json.dumps(settings))
    differences = [
        f"{name}: {stored.get(name)!r} → {current.get(name)!r}"
        for name in sorted(set(stored) | set(current))
        if stored.get(name) != current.get(name)
    ]
    if differences:
        raise ResumeError(
            f"{checkpoint} was trained with other settings (then → now): {'; '.join(differences)}. Resume with its "
            "own, or start anew in another folder"
        )


def check_weights(checkpoint: Path, names: Collection[str]) -> None:
    """Refuse weights with other names than the run's, which the Trainer would only warn of. Raises ResumeError."""
    path = checkpoint / _WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            stored = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{path} is missing, corrupt or truncated: {error}") from error
    unknown, missing = sorted(stored - set(names)), sorted(set(names) - stored)
    if unknown or missing:
        raise ResumeError(
            f"{path} is of another program or version: unknown {', '.join(unknown) or 'none'}; "
            f"missing {', '.join(missing) or 'none'}"
        )
