"""The benchmarks behind the project's speed figures, in order of importance, within a time limit.

    python benchmarks/session.py kernels|model [--seconds 560] [--out DIR] [--commit HASH]

For devices that are lent by the minute: two calls, "kernels" and "model", record every figure. A step gets what is left
of the time; figures reach the disk one by one, so a step that is stopped keeps those it has.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import ROOT


@dataclass(frozen=True)
class Step:
    """One program: a results file of its own.

    Attributes:
        arguments: program and options; `{left}` is replaced by the seconds there are.
        least: seconds without which it is not begun.
        reserve: seconds that are kept for the steps behind it.
    """

    arguments: tuple[str, ...]
    least: float
    reserve: float = 0.0


#: Seconds that a program takes to import what it needs, and to end.
STARTUP = 30.0

PARTS: dict[str, tuple[Step, ...]] = {
    "kernels": (
        Step(("kernels.py", "--sections", "streaming,dense,decode,xattn,context"), least=60, reserve=250),
        Step(("kernels.py", "--sections", "fuzz", "--fuzz-seconds", "{left}"), least=60),
    ),
    "model": (
        Step(("end_to_end.py", "--sections", "routing,memory,prefill,decode", "--seconds", "{left}"), least=120),
    ),
}


def finishes(command: Sequence[str], seconds: float) -> bool:
    """Run a program; whether it ends well and in time. It and the processes it began do not outlive this."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(timeout=seconds) == 0
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", flush=True)
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(part: str, seconds: float, extra: Sequence[str]) -> int:
    """Returns the number of steps that failed, were stopped or not begun."""
    until, unfinished = time.monotonic() + seconds, 0
    for step in PARTS[part]:
        left = until - time.monotonic() - step.reserve
        # A program's own limit comes before the one that ends it.
        program, *arguments = (a.format(left=max(1, round(left - STARTUP))) for a in step.arguments)
        name = " ".join((program, *arguments))
        if left < step.least:
            print(f"not begun, {max(0, round(left))} s left of {step.least:.0f}: {name}", flush=True)
            unfinished += 1
            continue
        print(f"{name}", flush=True)
        unfinished += not finishes([sys.executable, str(ROOT / "benchmarks" / program), *arguments, *extra], left)
    return unfinished


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=560, help="for all steps together")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results (benchmarks/results)")
    parser.add_argument("--commit", default=None, help="commit of the code, where the checkout cannot tell")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the program itself")
    options = parser.parse_args(arguments)
    extra = ["--tiny"] if options.tiny else []
    for name in ("out", "commit"):
        if getattr(options, name) is not None:
            extra += [f"--{name}", str(getattr(options, name))]
    return run(options.part, options.seconds, extra)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
