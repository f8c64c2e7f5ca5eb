"""Batches measured by several processes that share a device, or several.

A small model's passes are bound by the host that launches them: one process leaves most of a GPU idle. Each process
here holds a model of its own and takes batches as it gets done; a result does not depend on who measured it.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from types import TracebackType
from typing import Any, Self

import torch

from flux_attention.config import FluxConfig
from flux_attention.data import Sample
from flux_attention.evaluation.outcomes import Outcome, Pair, outcomes_of
from flux_attention.evaluation.runner import RunOptions
from flux_attention.models.attach import attach, detach
from flux_attention.models.backbones import load_backbone


@dataclass(frozen=True)
class PoolModel:
    """What a process loads.

    Attributes:
        name_or_path: as `load_backbone` takes it.
        devices: processes take them in turn.
        impl: kernels of prefill.
    """

    name_or_path: str
    dtype: torch.dtype
    devices: tuple[str, ...]
    impl: str


def all_devices(device: torch.device) -> tuple[str, ...]:
    """Every visible GPU for the one that is chosen when none is named, else `device` alone."""
    if device.type == "cuda" and device.index is None:
        return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    return (str(device),)


class Pool:
    """Processes that measure; a context manager, which ends them.

    Args:
        processes: how many; each holds the model once, and a thread for work on the processor.
    """

    def __init__(self, processes: int, model: PoolModel) -> None:
        if processes < 1:
            raise ValueError(f"a pool needs at least one process, got {processes}")
        self.processes = processes
        # A forked process cannot use CUDA.
        context = multiprocessing.get_context("spawn")
        places = context.SimpleQueue()
        for i in range(processes):
            places.put(model.devices[i % len(model.devices)])
        # Of a device's memory, one share left to whoever made the pool: a process that meets the end of its own
        # halves its pass, and leaves the others' alone.
        share = 1 / (-(-processes // len(model.devices)) + 1)
        self._executor = ProcessPoolExecutor(processes, context, _start, (model, places, share))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def measure(
        self, config: FluxConfig, batches: Sequence[list[Pair]], options: RunOptions
    ) -> Iterator[tuple[list[Pair], list[Outcome]]]:
        """Batches with their outcomes, as they get done; `config` says what the two sides of a route are.

        Raises what a batch raised; `BrokenProcessPool` when a process died.
        """
        waiting, running = deque(batches), dict[Future[list[Outcome]], list[Pair]]()
        try:
            while waiting or running:
                # Two each: nobody waits for the next batch, and a stop waits for little.
                while waiting and len(running) < 2 * self.processes:
                    batch = waiting.popleft()
                    samples, routes = [pair.sample for pair in batch], [pair.route for pair in batch]
                    running[self._executor.submit(_measure, config, samples, routes, options)] = batch
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()


class _Process:
    """What a process holds between batches."""

    source: PoolModel
    model: Any
    tokenizer: Any
    config: FluxConfig | None = None
    controller: Any


def _start(source: PoolModel, places: SimpleQueue[str], share: float) -> None:
    torch.set_num_threads(1)
    device = torch.device(places.get())
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_per_process_memory_fraction(share, device)
    _Process.source = source
    _Process.model, _Process.tokenizer = load_backbone(source.name_or_path, source.dtype, device)


def _measure(
    config: FluxConfig, samples: Sequence[Sample], routes: Sequence[str], options: RunOptions
) -> list[Outcome]:
    if _Process.config != config:
        if _Process.config is not None:
            detach(_Process.model)
        _Process.controller = attach(_Process.model, config)
        _Process.controller.impl, _Process.config = _Process.source.impl, config
    return outcomes_of(_Process.controller, _Process.tokenizer, samples, routes, options)
