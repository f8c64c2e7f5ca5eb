"""`flux-attn data build | check`: rows become a tokenised data set, or are named one by one where they are bad."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Build and check training data.", no_args_is_help=True, rich_markup_mode="rich")

Sources = Annotated[
    list[str],
    typer.Argument(
        help="Rows {context, question, answer, task[, class]} in a .jsonl or .parquet file; or a known set: "
        "chatqa2-long, musique, colt-132k, govreport, xsum; NAME=FILE reads a set's rows from a file."
    ),
]
Tokenizer = Annotated[
    str, typer.Option("--model", "-m", help="Model whose tokenizer is used: 'smollm2', folder or Hub id.")
]
Classes = Annotated[
    list[str] | None,
    typer.Option("--class", help="TASK=retrieval or TASK=holistic, for tasks without a known class; repeatable."),
]
MaxLength = Annotated[int | None, typer.Option("--max-length", help="Most tokens of a document, answer included.")]
Overlong = Annotated[str, typer.Option("--overlong", help="Longer documents: truncate (their middle), skip or error.")]
Split = Annotated[str, typer.Option("--split", help="Of sets on the Hub.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Most documents of each source.")]


@app.command()
def build(
    sources: Sources,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the data set.")],
    model: Tokenizer = "smollm2",
    max_length: MaxLength = None,
    overlong: Overlong = "truncate",
    task_class: Classes = None,
    pack_tokens: Annotated[int, typer.Option("--pack-tokens", help="Length of the packs that it is for.")] = 65536,
    split: Split = "train",
    limit: Limit = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out instead of refusing them.")] = False,
) -> None:
    """Tokenise rows into a data set for `train-packs` and say what is in it. The same call again costs nothing."""
    from rich.console import Console

    from flux_attention.cli.terminal import print_table
    from flux_attention.report import Table
    from flux_attention.training.build import build as make
    from flux_attention.training.sources import Rows

    rows = [Rows.parse(source) for source in sources]
    fmt = _format(task_class, min(max_length or pack_tokens, pack_tokens), overlong)
    notes = Console(stderr=True, highlight=False)
    with notes.status("tokenising"):
        manifest, there = make(
            rows, _tokenizer(model), out, fmt, split=split, limit=limit, skip_bad=skip_bad, pack_tokens=pack_tokens
        )
    columns = ("class", "task", "samples", "tokens", "median", "p95", "longest", "answer_tokens")
    table = Table(columns, [tuple(str(row[name]) for name in columns) for row in manifest["statistics"]])
    print_table(Console(highlight=False), table, f"{out}: {manifest['samples']} samples, {manifest['tokens']:,} tokens")
    packs = manifest["packs"]
    notes.print(f"{packs['count']} packs of {packs['tokens']:,} tokens, {packs['filled']:.0%} filled")
    for reason, count in manifest["left_out"].items():
        notes.print(f"left out: {count} {reason}")
    if manifest["bad_rows"]:
        notes.print(f"left out: {manifest['bad_rows']} bad rows (flux-attn data check names them)")
    if "warning" in manifest:
        notes.print(f"[yellow]warning:[/yellow] {manifest['warning']}")
    if there:
        notes.print("[dim]built before from the same rows, tokenizer and options[/dim]")


@app.command()
def check(
    sources: Sources,
    model: Tokenizer = "smollm2",
    max_length: MaxLength = None,
    task_class: Classes = None,
    split: Split = "train",
    limit: Limit = None,
) -> None:
    """Name every row that cannot be used, on the output, one a line; exit code 1 when there is one."""
    from rich.console import Console

    from flux_attention.training.build import checked_rows
    from flux_attention.training.sources import Rows

    rows = [Rows.parse(source) for source in sources]
    fmt = _format(task_class, max_length, "error")
    tokenizer = _tokenizer(model)
    counts: Counter[str] = Counter()
    seen: set[bytes] = set()
    for source in rows:
        for row in checked_rows(source, tokenizer, fmt, seen, split, limit):
            counts["good" if row.sample is not None else row.left_out or "bad"] += 1
            if row.error is not None:
                print(row.error)
            elif row.left_out == "duplicate":
                print(f"{row.where}: duplicate of an earlier row")
    notes = Console(stderr=True, highlight=False)
    notes.print(", ".join(f"{count} {name}" for name, count in counts.items()) or "no rows")
    if counts["bad"]:
        raise SystemExit(1)


def _format(task_class: list[str] | None, max_length: int | None, overlong: str) -> Any:
    from flux_attention.training.data import RowFormat

    classes = {}
    for text in task_class or []:
        name, given, value = text.partition("=")
        if not given or not name:
            raise ValueError(f"--class must be TASK=retrieval or TASK=holistic, got {text!r}")
        classes[name] = value
    return RowFormat(task_classes=classes, max_length=max_length, overlong=overlong)  # type: ignore[arg-type]


def _tokenizer(model: str) -> Any:
    if model == "smollm2":
        from flux_attention.models.backbones import load_backbone

        return load_backbone(model)[1]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
