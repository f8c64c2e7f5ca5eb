"""`flux-attn board`: the router beside every baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flux_attention.cli.options import (
    SMOLLM2,
    Commit,
    Device,
    DType,
    MaxSparsity,
    MinSparsity,
    Model,
    Record,
    Seed,
    make_console,
    numbers,
)


def board(
    model: Model = SMOLLM2,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="Several = seeds of one recipe, whose figures are averaged."),
    ] = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Names with commas between them, or mixed.")] = "mixed",
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of the samples.")] = "4096,8000",
    samples: Annotated[int, typer.Option("--samples", "-n", help="Samples per task and length.")] = 200,
    policies: Annotated[
        str, typer.Option("--policies", help="Names with commas between them, or all; an unknown one lists them.")
    ] = "all",
    searched: Annotated[
        Path | None,
        typer.Option(
            "--searched", help="Costs that the router was fitted to (JSON): their mean as one more static split."
        ),
    ] = None,
    weak_samples: Annotated[
        int, typer.Option("--weak-samples", help="Samples per task and length for weak baselines and curves.")
    ] = 25,
    min_sparsity: MinSparsity = 0.0,
    max_sparsity: MaxSparsity = 1.0,
    dial: Annotated[
        str, typer.Option("--dial", help="Ω that the first adapter's dial is set to, such as 0.5,0.7,0.9: a curve.")
    ] = "",
    other: Annotated[
        list[str] | None, typer.Option("--other", help="An adapter with a line of its own, trained for one target say.")
    ] = None,
    sparsities: Annotated[
        str, typer.Option("--sparsities", help="Further Ω of the static splits; by default only the router's.")
    ] = "",
    calibration: Annotated[
        int, typer.Option("--calibration", help="Samples per training task that static splits are chosen on.")
    ] = 2,
    calibration_text: Annotated[
        int, typer.Option("--calibration-text", help="The same per training task of running text.")
    ] = 12,
    calibration_length: Annotated[int, typer.Option("--calibration-length", help="Their tokens.")] = 3072,
    head_steps: Annotated[int, typer.Option("--head-steps", help="Training steps of the head-level baselines.")] = 80,
    head_samples: Annotated[
        int, typer.Option("--head-samples", help="Their training samples per task and length.")
    ] = 16,
    head_lengths: Annotated[
        str, typer.Option("--head-lengths", help="Tokens of their training samples.")
    ] = "2048,3072",
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", "-b", help="Tokens of one pass; by default 131072 on a GPU.")
    ] = None,
    impl: Annotated[str, typer.Option("--impl", help="Prefill kernels: auto, sdpa, flash4 or flex.")] = "auto",
    seed: Seed = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; an interrupted board goes on in it.")] = Path(
        "runs/board"
    ),
    prepare: Annotated[bool, typer.Option("--prepare", help="Only make the samples, which needs no GPU.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Only make the tables of what the folder holds, measured anywhere.")
    ] = False,
    minutes: Annotated[float, typer.Option("--minutes", help="Stop after this time; 0 = never.")] = 0.0,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes that make samples; by default one a core, 16 at most.")
    ] = None,
    processes: Annotated[
        int,
        typer.Option("--processes", help="Processes that measure, each with a model of its own, on all GPUs in turn."),
    ] = 1,
    device: Device = "auto",
    dtype: DType = "auto",
    record: Record = False,
    commit: Commit = None,
) -> None:
    """Put the router beside dense and every baseline: tables, figures and HTML, with 95 % intervals. Resumable."""
    import os

    from flux_attention.cli.board import run
    from flux_attention.cli.session import choose_device
    from flux_attention.evaluation.board_config import MIXED, BoardConfig
    from flux_attention.route import Dial
    from flux_attention.training.card import mean_ranking
    from flux_attention.training.heads import HeadTraining

    named = BoardConfig.policies if policies == "all" else tuple(policies.split(","))
    if policies == "all" and not Dial(min_sparsity, max_sparsity).is_open:
        named = tuple(name for name in named if name != "inline")
    on_gpu = choose_device(device).type == "cuda"
    config = BoardConfig(
        tasks=MIXED if tasks == "mixed" else tuple(tasks.split(",")),
        lengths=numbers("--lengths", lengths, int),
        samples=samples,
        seed=seed,
        policies=named if searched is None else tuple(dict.fromkeys((*named, "searched"))),
        searched=() if searched is None else mean_ranking(searched),
        weak_samples=min(weak_samples, samples),
        min_sparsity=min_sparsity,
        max_sparsity=max_sparsity,
        dial=numbers("--dial", dial, float),
        sparsities=numbers("--sparsities", sparsities, float),
        calibration=calibration,
        calibration_text=calibration_text,
        calibration_length=calibration_length,
        # Activations kept for gradients: about a megabyte a token for the smallest models.
        heads=HeadTraining(steps=head_steps, pass_tokens=16384 if on_gpu else 2048),
        head_samples=head_samples,
        head_lengths=numbers("--head-lengths", head_lengths, int),
        batch_tokens=batch_tokens or (131072 if on_gpu else 8192),
        impl=impl,
        workers=workers or min(16, os.cpu_count() or 1),
        processes=processes,
        minutes=minutes,
    )
    run(
        config,
        model,
        adapter or [],
        out,
        others=other or [],
        only_prepare=prepare,
        only_report=report,
        device=device,
        dtype=dtype,
        record=record,
        commit=commit,
        console=make_console(),
        notes=make_console(stderr=True),
    )
