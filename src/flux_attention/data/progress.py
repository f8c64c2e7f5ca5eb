"""How long loops show where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

#: `(items, total, label)` → the same items, one by one, shown as they are taken.
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


def tqdm_progress(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    # Quiet where nobody watches: a log file would get a line per batch.
    bar: Iterable[Any] = tqdm(items, total=total, desc=label or None, leave=False, disable=None)
    return bar
