"""`flux-attn bench`: programs of benchmarks/."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A program of benchmarks/, such as kernels or end_to_end.")] = "",
) -> None:
    """Run a program of benchmarks/ (in a checkout of the project); further arguments go to it."""
    import runpy

    folder = Path("benchmarks")
    known = sorted(path.stem for path in folder.glob("*.py"))
    if not known:
        raise ValueError(f"{folder.resolve()} holds no benchmarks: run this in a checkout of the project")
    if name not in known:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(known)}")
    path = folder / f"{name}.py"
    # The program sees its own arguments, as if started by itself.
    before, sys.argv = sys.argv, [str(path), *context.args]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
