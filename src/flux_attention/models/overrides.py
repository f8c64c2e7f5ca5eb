"""Forward functions of single module instances, put in their place for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def forward_overrides() -> Iterator[Callable[[nn.Module, Callable[[Forward], Forward]], None]]:
    """Gives a function `override(module, make)`: the module runs `make(forward it had)` inside the block.

    Afterwards the module has what it had before: its class's method, or an override of somebody else's. Blocks nest;
    they end in the reverse order.
    """
    changed: list[tuple[nn.Module, Forward | None]] = []

    def override(module: nn.Module, make: Callable[[Forward], Forward]) -> None:
        before = vars(module).get("forward")
        # nn.Module types `forward` as a method; an instance attribute comes before it, and hooks still run.
        vars(module)["forward"] = make(module.forward)
        changed.append((module, before))

    try:
        yield override
    finally:
        for module, before in reversed(changed):
            if before is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = before
