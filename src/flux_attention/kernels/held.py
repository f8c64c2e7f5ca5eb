"""Attention by flash-attn-4, or by a kernel made from it, with everything done but its launch.

Between a call of flash-attn-4 and its launch lie a hundred microseconds of Python: checks, a configuration, views.
Where a device waits for a decision of the host, that time belongs before the decision.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class _Held(threading.local):
    """Launches that a thread holds back; None while it makes them at once."""

    launches: list[Callable[[], None]] | None = None


_held = _Held()


def launch(kernel: Callable[..., None], *arguments: Any) -> None:
    """Launch a compiled kernel, now or, inside `hold`, when what that returned is called."""
    if _held.launches is None:
        kernel(*arguments)
    else:
        _held.launches.append(functools.partial(kernel, *arguments))


class _Kernels:
    """flash-attn-4's compiled kernels by key, as it looks them up; what it gets is launched by `launch`."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def __contains__(self, key: Any) -> bool:
        return key in self._compiled

    def __setitem__(self, key: Any, kernel: Any) -> None:
        self._compiled[key] = kernel

    def __getitem__(self, key: Any) -> Callable[..., None]:
        return functools.partial(launch, self._compiled[key])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


def hold(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Call `run` with the launches of flash-attn-4's forward kernels, and of those run by `launch`, held back.

    Returns a function that makes them, on the stream that is current then, and gives what `run` returned. `run`
    must not read what these kernels write: it would read it too early.
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    kernels = _flash_attn_fwd.compile_cache
    if not isinstance(kernels, _Kernels):
        # Left in place: other threads may be calling, and for what is not held it changes nothing.
        _flash_attn_fwd.compile_cache = _Kernels(kernels)
    launches: list[Callable[[], None]] = []
    _held.launches = launches
    try:
        out = run()
    finally:
        _held.launches = None

    def make() -> Tensor:
        for one in launches:
            one()
        return out

    return make
