"""`flux-attn board`: runs the board and writes it as JSON, Markdown, figures and one HTML page."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from flux_attention.cli.session import Bars, choose_device, find_adapter, quiet
from flux_attention.cli.terminal import print_table
from flux_attention.evaluation.board import Board, run_board
from flux_attention.evaluation.board_config import BoardConfig, prepare
from flux_attention.evaluation.entrants import POLICIES, STATIC
from flux_attention.evaluation.metrics import Estimate
from flux_attention.evaluation.pool import Pool, PoolModel, all_devices
from flux_attention.evaluation.results import environment, write_json, write_results
from flux_attention.evaluation.summary import Row, Summary, summarise
from flux_attention.models.adapter import load_adapter
from flux_attention.models.backbones import choose_dtype, load_backbone
from flux_attention.report import Point, Section, Table, pareto, render, route_heat_map, save_image, svg, task_routes


def run(
    config: BoardConfig,
    model: str,
    adapters: list[str],
    folder: Path,
    *,
    others: list[str],
    only_prepare: bool,
    only_report: bool,
    device: str,
    dtype: str,
    record: bool,
    commit: str | None,
    console: Console,
    notes: Console,
) -> Summary | None:
    """Run, print and write `folder/board.{json,md,html}` and the figures as PNG; None when it only prepares.

    `folder/run.json` says where it was measured; a board that only reports needs no such device.
    """
    whole = set(STATIC) <= set(config.policies)
    if record and not (whole or config.dial or others or "inline" in config.policies):
        raise ValueError(
            f"--record keeps a board with every static choice ({', '.join(STATIC)}), or one with --dial, --other or "
            "inline: this one has none of these"
        )
    where = choose_device("cpu" if only_report else device)
    known = _measured(folder) if only_report else environment(where)
    kind = choose_dtype(known["dtype"] if only_report else dtype, where)
    if commit is not None:
        known["commit"] = commit
    loaded = [load_adapter(name) for name in adapters]
    names = [Path(name).name for name in others]
    if len(set(names)) < len(names):
        raise ValueError(f"--other adapters are known by the names of their folders, got {', '.join(names)}")
    further = {name: load_adapter(place) for name, place in zip(names, others, strict=True)}
    quiet()
    with notes.status("loading"):
        # Samples are made by forked processes, so the model stays off the GPU until they are there.
        backbone, tokenizer = load_backbone(model, dtype=kind)
        if not loaded:
            loaded = [find_adapter(backbone)]
    with Bars(notes) as bars:
        prepare(config, tokenizer, folder, bars)
        if only_prepare:
            notes.print(f"samples: [bold]{folder}[/bold]")
            return None
        if not only_report:
            known |= {"dtype": str(kind).removeprefix("torch."), "device_type": where.type}
            write_json(folder / "run.json", known)
        source = PoolModel(model, kind, all_devices(where), config.impl)
        # Other processes load while this one does.
        with Pool(config.processes, source) if config.processes > 1 and not only_report else nullcontext() as pool:
            backbone.to(where)
            elsewhere = known["device_type"] if only_report else None
            run_ = run_board(Board(backbone, tokenizer, loaded, config, folder, bars, further, pool, elsewhere))
    outcome = summarise(run_)
    table = summary(outcome.rows)
    print_table(console, table, f"board: mean Ω of the router {outcome.omega:.2f}")
    for figure in outcome.figures:
        console.print(str(figure))
    settings = {
        "backbone": str(backbone.config.name_or_path),
        "adapters": [adapter.source for adapter in loaded],
        "dtype": str(kind).removeprefix("torch."),
        "n": config.samples * len(config.lengths),
        "repetitions": len(loaded),
        **asdict(config),
    }
    details = {
        "rows": [asdict(row) for row in outcome.rows],
        "left_out": [list(item) for item in outcome.left_out],
        "routes": {task: [round(x, 4) for x in shares] for task, shares in outcome.routes.items()},
    }
    figures = [figure.to_dict() for figure in outcome.figures]
    write_json(folder / "board.json", {**known, "settings": settings, "figures": figures, **details})
    (folder / "board.md").write_text(markdown(outcome, table), encoding="utf-8")
    (folder / "board.html").write_text(page(outcome, table, settings, known), encoding="utf-8")
    for name, plot in _plots(outcome).items():
        save_image(plot, folder / f"{name}.png")
    notes.print(f"board: [bold]{folder / 'board.html'}[/bold]")
    if record:
        name, kept = outcome.recorded
        written = write_results(name, kept, device=where, settings=settings, details=details, measured=known)
        notes.print(f"figures: [bold]{written}[/bold]")
    return outcome


def _measured(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there: a board is measured before it is only reported")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _cell(estimate: Estimate | None, digits: int = 3) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.{digits}f} ± {(estimate.high - estimate.low) / 2:.{digits}f}"


def _points(margin: Estimate | None) -> str:
    return "" if margin is None else f"{100 * margin.value:+.1f} [{100 * margin.low:+.1f}, {100 * margin.high:+.1f}]"


def summary(rows: tuple[Row, ...]) -> Table:
    """One line per entrant, best macro score first."""
    ordered = sorted(rows, key=lambda row: -_comparable(row, rows).value)
    most = max(len(row.cells) for row in rows)
    lines = [
        (
            row.name if len(row.cells) == most else f"{row.name} †",
            f"{row.sparsity:.3f}",
            f"{row.kv_share:.2f}",
            _cell(row.macro),
            _cell(row.retrieval),
            _cell(row.holistic),
            _cell(row.nll_ratio),
            _points(row.margin),
            str(row.samples),
        )
        for row in ordered
    ]
    head = ("", "Ω", "KV", "macro", "retrieval", "holistic", "NLL ratio", "router's lead", "n")
    return Table(head, lines, next(i for i, row in enumerate(ordered) if row.family == "router"))


def _comparable(row: Row, rows: tuple[Row, ...]) -> Estimate:
    """A row's macro score; of one that lacks tasks or samples, the router's less the difference on what both ran."""
    router = next(other for other in rows if other.family == "router")
    if len(row.cells) == len(router.cells) and row.samples == router.samples:
        return row.macro
    value, half = router.macro.value - row.difference.value, (row.difference.high - row.difference.low) / 2
    return Estimate(value, value - half, value + half, row.difference.n)


def by_task(rows: tuple[Row, ...]) -> Table:
    """Scores of every task: router, dense, and whoever is compared with the router at its Ω."""
    router = next(row for row in rows if row.family == "router")
    shown = [router, *(row for row in rows if row.family == "dense" or row.margin is not None)]
    lines = [(key, *(f"{row.cells[key]:.3f}" if key in row.cells else "" for row in shown)) for key in router.cells]
    return Table(("task @ tokens", *(row.name for row in shown)), lines)


def _notes(outcome: Summary) -> str:
    text = (
        "Means with half the width of their 95 % interval (bootstrap over samples); n: samples a task and length. "
        "Tasks scored by NLL count with exp(NLL dense − NLL). Macro: both classes of tasks the same. KV: bytes of the "
        "cache over dense. A lead is the paired macro difference in points on the samples that both ran, the baseline "
        "brought to exactly the router's mean Ω: of the two whole sizes around it, some prompts get the one and some "
        "the other. † Routes by KV head have no cache: tasks whose answers are generated are missing from their "
        "means. Entrants with fewer tasks or samples than the router stand in the order, and in the figure, at the "
        "router's macro score less the paired difference."
    )
    if not outcome.held.is_open:
        low, high = outcome.held.min_sparsity, outcome.held.max_sparsity
        text += f" The routers are under a dial: every prompt's Ω is held between {low:g} and {high:g}."
    if outcome.left_out:
        listed = ", ".join(f"{key} ({value:.2f})" for key, value in outcome.left_out)
        text += f" Not averaged, because the dense model itself scores below 0.10: {listed}."
    return text


def legend(rows: tuple[Row, ...]) -> Table:
    """What the baselines' names mean."""
    families = dict.fromkeys(row.family for row in rows if row.family in POLICIES)
    return Table(("", "what it is"), [(name, POLICIES[name]) for name in families])


def markdown(outcome: Summary, table: Table) -> str:
    """The board for a text page."""
    figures = "\n".join(f"- {figure}" for figure in outcome.figures)
    tables = (table.markdown(), _notes(outcome), legend(outcome.rows).markdown(), by_task(outcome.rows).markdown())
    return "\n\n".join((*tables, figures)) + "\n"


def _plots(outcome: Summary) -> dict[str, Any]:
    points = []
    for row in outcome.rows:
        if row.family != "seed":
            score = _comparable(row, outcome.rows)
            family = row.name if row.family == "other" else row.family
            points.append(
                Point(family, row.sparsity, score.value, score.low, score.high, highlight=row.family == "router")
            )
    return {
        "pareto": pareto(points, "macro score"),
        "routes": route_heat_map(task_routes(outcome.routes), "share of prompts full"),
    }


def page(outcome: Summary, table: Table, settings: dict[str, Any], known: dict[str, Any]) -> str:
    """The HTML page."""
    plots = _plots(outcome)
    facts = []
    wanted = {
        "board_mean_sparsity": "mean share of layers sparse",
        "board_retrieval_vs_dense": "retrieval, of dense",
        "board_holistic_vs_dense": "holistic, of dense",
        "board_nll_vs_dense": "continuation NLL, of dense",
        "board_margin_over_best_static": "points over the best static split at equal Ω",
        "board_margin_over_some_static": "points over the best static split measured, at equal Ω",
    }
    for figure in outcome.figures:
        if figure.name in wanted:
            facts.append(
                (wanted[figure.name], f"{figure.value:+.1f}" if figure.unit == "points" else f"{figure.value:.3f}")
            )
    sections = [
        Section("Everyone on the board", table=table, note=_notes(outcome)),
        Section(
            "Quality against sparsity",
            figures=[(svg(plots["pareto"], "macro score against Ω"), "Right and up is better.")],
        ),
        Section(
            "Routes by task",
            "Share of a task's prompts in which a layer runs full.",
            figures=[(svg(plots["routes"], "routes by task"), "A dot: full for most prompts.")],
        ),
        Section("Task by task", table=by_task(outcome.rows)),
        Section("Who is who", table=legend(outcome.rows)),
    ]
    lead = (
        f"{settings['backbone']}, {len(settings['tasks'])} tasks at {' and '.join(map(str, settings['lengths']))} "
        f"tokens, {settings['samples']} samples each; everyone answers the same samples on the same kernels."
    )
    foot = f"{known['device']} · torch {known['torch']} · commit {known['commit']} · {known['date']}"
    return render("Does the context know better?", lead, facts, sections, foot)
