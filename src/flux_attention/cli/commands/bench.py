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
    """Run a program of benchmarks/ (in a checkout of the project); further arguments go to it, --help as well."""
    import runpy

    folder = Path("benchmarks")
    # The others are modules that the programs share.
    known = sorted(path.stem for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
    if not known:
        raise ValueError(f"{folder.resolve()} holds no benchmarks: run this in a checkout of the project")
    if name in ("", "--help", "-h"):
        print("usage: flux-attn bench NAME [OPTIONS]; bench NAME --help lists the options of a program")
        print(f"NAME is one of {', '.join(known)}")
        return
    if name not in known:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(known)}")
    path = folder / f"{name}.py"
    # The program sees its own arguments and the modules beside it, as if started by itself.
    arguments, search = sys.argv, list(sys.path)
    sys.argv = [str(path), *context.args]
    sys.path.insert(0, str(folder.resolve()))
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = arguments, search
