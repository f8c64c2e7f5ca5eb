"""Options that several commands share, and what reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

T = TypeVar("T")

SMOLLM2 = "smollm2"

Model = Annotated[
    str,
    typer.Option(
        "--model", "--backbone", "-m", help="'smollm2', a folder, or a Hub id of a causal LM.", show_default=True
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", "-a", help="Folder, Hub id or shipped name; by default the shipped one that fits."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
DType = Annotated[str, typer.Option("--dtype", help="auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16.")]
PolicyOption = Annotated[
    str,
    typer.Option(
        "--policy", help="router, dense, sparse, interleaved:SHARE, random:SHARE[:SEED] or static:LAYER,LAYER,…"
    ),
]
MinSparsity = Annotated[float, typer.Option("--min-sparsity", help="Least share of layers that run sparse, 0 to 1.")]
MaxSparsity = Annotated[float, typer.Option("--max-sparsity", help="Largest share of layers that run sparse, 0 to 1.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Prompt text; may be given several times.")]
Files = Annotated[list[Path] | None, typer.Option("--file", "-f", help="File with a prompt, - for standard input.")]
Raw = Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of samples and sampling.")]
Record = Annotated[bool, typer.Option("--record", help="Write the figures to benchmarks/results.")]
Commit = Annotated[
    str | None, typer.Option("--commit", help="Commit to record, where the code is not in a git checkout.")
]


def numbers(option: str, text: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    """A tuple of what stands between commas. Raises ValueError, naming the option."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between them, got {text!r}") from None


def make_console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)
