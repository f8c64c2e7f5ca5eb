"""Kernels of a decode step or a probe that begin while the one before them ends (programmatic dependent launch).

Both are chains of short kernels, and at each link the device would drain and fill again. With overlap a kernel
is launched as soon as the last blocks of its predecessor run; it waits with `after_previous` before it reads or writes
anything that another kernel touches. Hopper and later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import triton
from triton.language.extra import cuda

_enabled = False


@triton.jit
def after_previous():
    """Wait until the kernel before has ended and its writes are seen, and let the kernel behind be launched."""
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()


def options(on: bool | None = None) -> dict[str, bool]:
    """What a kernel that calls `after_previous` where OVERLAP is set is launched with; None = as `overlapping` says."""
    on = _enabled if on is None else on
    return {"OVERLAP": on, "launch_pdl": on}


@contextmanager
def overlapping(on: bool = True) -> Iterator[None]:
    """Launch the kernels inside with overlap, or without."""
    global _enabled
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before
