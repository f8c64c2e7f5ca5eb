"""Counts what a training run costs: seconds, and tokens that passed through the backbone, by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flux_attention.models.controller import FluxAttention


class CostMeter:
    """Counts every pass of an attached decoder: teacher, student, probe and measurements alike.

    A pass with a padding mask counts its real tokens, one without counts all. Backward passes are not counted twice.

    Attributes:
        seconds: wall clock of each phase, the GPU's queue emptied at its end.
        booked: seconds of these that an earlier run spent.
    """

    def __init__(self, controller: FluxAttention) -> None:
        self._controller = controller
        self._tokens: dict[str, Tensor | int] = {}
        self.seconds: dict[str, float] = {}
        self.booked = 0.0
        self._phase: str | None = None
        self._handle = controller.decoder.register_forward_pre_hook(self._count, with_kwargs=True)

    def close(self) -> None:
        """Take the counting hook off the decoder."""
        self._handle.remove()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book what happens inside under `name`; entering a name twice adds up. Phases do not nest."""
        if self._phase is not None:
            raise RuntimeError(f"phase {name!r} inside of phase {self._phase!r}")
        self._phase, start = name, time.perf_counter()
        self._tokens.setdefault(name, 0)
        try:
            yield
        finally:
            if self._controller.device.type == "cuda":
                torch.cuda.synchronize(self._controller.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self._phase = None

    def add(self, name: str, seconds: float = 0.0, tokens: int = 0) -> None:
        """Book what an earlier run spent."""
        self.booked += seconds
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._tokens[name] = self._tokens.get(name, 0) + tokens

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of each phase."""
        return {name: int(count) for name, count in self._tokens.items()}

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._phase is None:
            return
        mask = kwargs.get("attention_mask")
        ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else (args[0] if args else None)
        # A sum stays on the device until it is asked for: counting must not stall the queue.
        count = mask.sum() if mask is not None else (0 if ids is None else ids.numel())
        self._tokens[self._phase] = self._tokens[self._phase] + count

    def table(self) -> str:
        """Phases with their seconds and million tokens, as text."""
        tokens = self.tokens
        lines = [f"{'phase':<14}{'seconds':>9}{'M tokens':>10}"]
        for name, seconds in self.seconds.items():
            lines.append(f"{name:<14}{seconds:>9.1f}{tokens.get(name, 0) / 1e6:>10.3f}")
        lines.append(f"{'total':<14}{sum(self.seconds.values()):>9.1f}{sum(tokens.values()) / 1e6:>10.3f}")
        return "\n".join(lines)
