"""`flux-attn eval` and `flux-attn lm-eval`: scores of routed against dense."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flux_attention.cli.options import (
    SMOLLM2,
    AdapterOption,
    Commit,
    Device,
    DType,
    MaxSparsity,
    MinSparsity,
    Model,
    PolicyOption,
    Record,
    Seed,
    make_console,
)


def _prepare_suite(suite: Any, model: str, n: int | None, seed: int, folder: Path | None) -> None:
    import os
    from dataclasses import replace

    from flux_attention.cli.session import Bars
    from flux_attention.evaluation.suites import suite_samples
    from flux_attention.models.backbones import load_backbone

    if folder is None:
        raise ValueError("--prepare needs --samples, the folder that keeps the samples")
    _, tokenizer = load_backbone(model)
    with Bars(make_console(stderr=True)) as bars:
        chosen = suite if n is None else replace(suite, n=n)
        suite_samples(chosen, tokenizer, seed, folder=folder, workers=os.cpu_count() or 1, progress=bars)


def evaluate(
    suite: Annotated[str, typer.Option("--suite", "-s", help="needle, continuation, free or quick.")] = "quick",
    model: Model = SMOLLM2,
    adapter: AdapterOption = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Samples per task; by default the suite's.")] = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Samples packed into one pass.")] = 1,
    scoring: Annotated[str, typer.Option("--scoring", help="auto, forced or generated.")] = "auto",
    policy: PolicyOption = "router",
    min_sparsity: MinSparsity = 0.0,
    max_sparsity: MaxSparsity = 1.0,
    device: Device = "auto",
    dtype: DType = "auto",
    record: Record = False,
    results: Annotated[Path, typer.Option("--results", help="Folder that --record writes to.")] = Path(
        "benchmarks/results"
    ),
    figure: Annotated[Path | None, typer.Option("--figure", help="Write the needle map (PNG) here.")] = None,
    samples: Annotated[Path | None, typer.Option("--samples", help="Folder that keeps the samples.")] = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Only make them, on all cores; needs no GPU.")] = False,
    impl: Annotated[str, typer.Option("--impl", help="Kernels of prefill: auto or a name of kernels.api.")] = "auto",
    commit: Commit = None,
) -> None:
    """Score routed against dense on the same samples."""
    from flux_attention.evaluation.suites import get_suite

    chosen = get_suite(suite)
    if prepare:
        _prepare_suite(chosen, model, n, seed, samples)
        return
    if record and policy != "router":
        raise ValueError(f"--record is for the adapter's router; --policy {policy} is a baseline")
    if record and (min_sparsity, max_sparsity, scoring) != (0.0, 1.0, "auto"):
        # The figures' names do not say so, and they would stand in the place of the suite's own.
        raise ValueError("--record is for the suite as it is: leave out the dial and --scoring")
    if figure is not None and suite != "needle":
        raise ValueError(f"--figure is a map of needles, which the suite {suite!r} has none of: use --suite needle")
    if record:
        results.mkdir(parents=True, exist_ok=True)
    from flux_attention.cli.session import Bars, open_session
    from flux_attention.cli.terminal import print_table
    from flux_attention.evaluation.runner import RunOptions
    from flux_attention.evaluation.suites import run_suite
    from flux_attention.report import Table

    options = RunOptions(batch_size=batch_size, scoring=scoring)  # type: ignore[arg-type]
    notes = make_console(stderr=True)
    with notes.status("loading"):
        session = open_session(
            model,
            adapter,
            device=device,
            dtype=dtype,
            policy=policy,
            min_sparsity=min_sparsity,
            max_sparsity=max_sparsity,
        )
        session.controller.impl = impl
    with Bars(notes) as bars:
        run = run_suite(
            session.controller,
            session.tokenizer,
            chosen,
            n=n,
            seed=seed,
            policy=session.policy,
            dial=session.dial,
            options=options,
            progress=bars,
            samples=samples,
        )
    rows = []
    for found in run.figures:
        interval = "" if found.low is None else f"{found.low:.4f} – {found.high:.4f}"
        rows.append((found.name, f"{found.value:.4f} {found.unit}", interval, "" if found.n is None else str(found.n)))
    backbone = session.controller.config.backbone
    assert backbone is not None
    title = f"{suite}: {session.adapter_name} on {backbone.name}"
    print_table(make_console(), Table(("figure", "value", "95 % interval", "n"), rows), title)
    if record:
        from flux_attention.evaluation.results import write_results

        settings = {
            "backbone": backbone.name,
            "adapter": session.adapter_name,
            "impl": impl,
            "dtype": str(session.model.dtype).removeprefix("torch."),
            "seed": seed,
            "n": run.suite.n,
            "repetitions": 1,
            "tasks": list(run.suite.tasks),
            "lengths": list(run.suite.lengths),
            "scoring": scoring,
            "min_sparsity": min_sparsity,
            "max_sparsity": max_sparsity,
            "texts": dict(run.texts),
        }
        path = write_results(
            f"eval-{suite}",
            run.figures,
            device=session.controller.device,
            settings=settings,
            folder=results,
            details=run.details(),
            commit=commit,
        )
        notes.print(f"figures: [bold]{path}[/bold]")
    if figure is not None:
        from flux_attention.report import needle_map, save_image

        cells: dict[tuple[int, float], list[float]] = {}
        for records in run.routed.values():
            for r in records:
                if r.depth is not None and r.score is not None:
                    cells.setdefault((r.length, r.depth), []).append(r.score)
        save_image(needle_map(cells), figure)
        notes.print(f"figure: {figure}")


def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness, which knows `--model flux` here; its own options follow."""
    from flux_attention.cli.harness import run

    run(context.args)
