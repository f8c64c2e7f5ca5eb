"""Timing, checking and recording, shared by the benchmarks."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# The benchmarks run from a checkout: the package may not be installed, and the fuzz lies among the tests.
for _folder in (ROOT, ROOT / "src"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from flux_attention.evaluation.results import (  # noqa: E402
    UNKNOWN_COMMIT,
    Figure,
    commit_id,
    device_name,
    results_path,
    write_results,
)
from flux_attention.kernels.capture import capture  # noqa: E402


def add_run_options(parser: argparse.ArgumentParser, tiny: str = "toy sizes, to try the program itself") -> None:
    """Where a benchmark runs and what it writes; `tiny`: help of `--tiny`."""
    parser.add_argument("--tiny", action="store_true", help=tiny)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the results (benchmarks/results; --tiny: none)"
    )
    parser.add_argument("--commit", default=None, help="commit of the code, where the checkout cannot tell")


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


#: Cycles that the device spins before what is timed, a millisecond or two.
HOST_AHEAD_CYCLES = 3_000_000


def once_ms(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Milliseconds of one call, from CUDA events; on a CPU from the clock.

    The device spins first, so that the host is ahead of it, as it is inside a model: else the Python before the first
    launch, 100 µs of it and more, would count as the kernel's.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) * 1e3 / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    sync(device)
    torch.cuda._sleep(HOST_AHEAD_CYCLES)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def interleaved_ms(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, repetitions: int
) -> dict[str, list[float]]:
    """Milliseconds of every repetition of each run, in turns, so that clocks and heat treat all of them alike."""
    calls = {}
    for name, run in runs.items():
        run()
        calls[name] = max(1, min(20, int(10 / max(0.01, once_ms(run, device)))))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            found[name].append(once_ms(run, device, calls[name]))
    return found


def median_ms(run: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    return statistics.median(interleaved_ms({"run": run}, device, repetitions)["run"])


def consecutive_ms(step: Callable[[], Any], device: torch.device, steps: int) -> list[float]:
    """Milliseconds of each of `steps` steps without a wait between them, as generation runs them."""
    if device.type != "cuda":
        return [once_ms(step, device) for _ in range(steps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    sync(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    sync(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """`run` as a replay of a CUDA graph."""
    return capture(run, torch.device("cuda", torch.cuda.current_device()), warm_up=1).replay


def label(n: int) -> str:
    """131072 → 128k."""
    return f"{n // 1024}k"


def program_name(program: str, chosen: Sequence[str], every: Sequence[str]) -> str:
    """Name of the results file: a run of some sections must not replace that of all."""
    return program if set(chosen) == set(every) else "-".join((program, *chosen))


@dataclass
class Recorder:
    """Figures of one run; every addition goes to the disk at once, so that a kill loses nothing."""

    program: str
    device: torch.device
    settings: dict[str, Any]
    folder: Path | None
    commit: str | None = None
    prefix: str = ""
    suffix: str = ""
    figures: dict[str, Figure] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        repetitions: Sequence[float] = (),
        interval: tuple[float, float] | None = None,
    ) -> None:
        """`interval`: the bounds of the value's 95 % interval."""
        name = self.prefix + name + self.suffix
        low, high = interval or (None, None)
        figure = Figure(name, float(value), unit, low=low, high=high, repetitions=tuple(repetitions))
        self.figures[name] = figure
        print(f"  {name:<44} {figure.value:>12.4g} {unit}", flush=True)
        self.save()

    def note(self, name: str, value: Any) -> None:
        """Something to keep beside the figures."""
        self.details[name] = value
        print(f"  {name:<44} {value}", flush=True)
        self.save()

    def earlier(self) -> dict[str, Any]:
        """What the results file holds already, when it is of this code, device and settings; else {}.

        A commit that is unknown, or a checkout with changes, is not known to be the same code.
        """
        if self.folder is None:
            return {}
        device, commit = device_name(self.device), self.commit or commit_id()
        try:
            data = json.loads(results_path(self.program, device, self.folder).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        if commit == UNKNOWN_COMMIT or commit.endswith("-dirty"):
            print(f"  earlier results are not kept: the commit is {commit}; --commit can name it", flush=True)
            return {}
        same = (data["commit"], data["device"], data["settings"]) == (commit, device, self.settings)
        return data if same else {}

    def save(self) -> None:
        if self.folder is not None and self.figures:
            write_results(
                self.program,
                list(self.figures.values()),
                device=self.device,
                settings=self.settings,
                folder=self.folder,
                details=self.details,
                commit=self.commit,
            )


def run_sections(
    sections: Sequence[tuple[str, Callable[[Recorder], None]]], record: Recorder, until: float = math.inf
) -> int:
    """Run each section for itself: one that fails is reported, and the others still run. Returns the failures.

    A section that is not begun `until` then (`time.perf_counter`) counts as one.
    """
    failures = 0
    for name, section in sections:
        if time.perf_counter() > until:
            print(f"{name}\n  FAILED {name}: no time left for it", flush=True)
            failures += 1
            continue
        print(f"{name}", flush=True)
        started = time.perf_counter()
        try:
            section(record)
        except Exception as error:
            import traceback

            traceback.print_exc()
            print(f"  FAILED {name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            failures += 1
        print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failures
