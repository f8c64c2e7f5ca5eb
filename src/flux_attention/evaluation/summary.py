"""What a board says: rows, figures and routes out of its records.

Scores lie in [0, 1]. A task scored by NLL counts with exp(NLL dense − NLL): the share of the dense model's probability
per token that is kept, 1 = dense. Macro scores give every cell (task at a length) the same weight within its class,
and both classes the same. Differences are paired sample by sample; intervals are bootstraps over samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flux_attention.data import HOLISTIC, RETRIEVAL, get_task
from flux_attention.evaluation.board import BoardRun
from flux_attention.evaluation.entrants import CURVES, STATIC, Cell, name_of
from flux_attention.evaluation.metrics import (
    Estimate,
    macro_difference,
    macro_mean,
    macro_ratio,
    paired_ratio,
)
from flux_attention.evaluation.results import Figure
from flux_attention.evaluation.runner import Record
from flux_attention.route import Dial

Scores = dict[str, NDArray[np.float64]]
"""Per-sample values of each cell, keyed "task@length"."""
Records = Mapping[Cell, Sequence[Record]]
#: Tasks whose NLL is that of running text.
_TEXT = ("continuation", "completion")


@dataclass(frozen=True)
class Row:
    """An entrant's line on the board.

    Attributes:
        sparsity, kv_share: mean Ω and mean share of a dense cache's bytes, over its cells.
        retrieval, holistic, macro: scores; None for a class of which it has no cell.
        nll_ratio: NLL over dense's, on tasks scored by NLL.
        cells: mean score by cell.
        samples: of a cell, at most.
        difference: router − this entrant, macro, on the entrant's samples.
        margin: the same for those that stand at the router's Ω, None for the others.
    """

    name: str
    family: str
    sparsity: float
    kv_share: float
    retrieval: Estimate | None
    holistic: Estimate | None
    macro: Estimate
    nll_ratio: Estimate | None
    cells: Mapping[str, float]
    samples: int
    difference: Estimate
    margin: Estimate | None = None


@dataclass(frozen=True)
class Summary:
    """A finished board.

    Attributes:
        left_out: cells that the dense model cannot do, with its score.
        routes: task → share of its prompts in which each layer runs full, under the routers.
        omega: mean Ω of the routers.
        held: dial that they were under.
        curves: those of the figures that say what adapters do otherwise: under the dial, trained otherwise, inline.
    """

    rows: tuple[Row, ...]
    figures: tuple[Figure, ...]
    curves: tuple[Figure, ...]
    left_out: tuple[tuple[str, float], ...]
    routes: Mapping[str, tuple[float, ...]]
    omega: float
    held: Dial

    @property
    def is_complete(self) -> bool:
        """Whether every static choice stood there: what a board says of the routers is only then said for good."""
        return _all_static(self.rows)

    @property
    def recorded(self) -> tuple[str, tuple[Figure, ...]]:
        """Name and figures of the results file: those of a board without all static choices replace no whole one's."""
        return ("board", self.figures) if self.is_complete else ("board-curves", self.curves)


def _all_static(rows: Sequence[Row]) -> bool:
    return {row.family for row in rows if row.margin is not None} >= set(STATIC)


def cell_scores(records: Records, dense: Records) -> Scores:
    """Per-sample scores of every cell, NLL tasks relative to dense."""
    found = {}
    for cell, rows in records.items():
        values = []
        for row, reference in zip(rows, dense[cell], strict=False):
            if row.score is not None:
                values.append(row.score)
            else:
                assert row.nll is not None and reference.nll is not None
                values.append(math.exp(reference.nll - row.nll))
        found[name_of(cell)] = np.array(values)
    return found


def cell_losses(records: Records) -> Scores:
    """Per-sample NLL of the tasks that are scored by it."""
    return {
        name_of(cell): np.array([row.nll for row in rows], dtype=np.float64)
        for cell, rows in records.items()
        if rows[0].metric == "nll"
    }


def average(many: Sequence[Scores]) -> Scores:
    """Per-sample means over runs on the same samples."""
    return {key: np.mean([scores[key] for scores in many], axis=0) for key in many[0]}


def like(scores: Scores, other: Scores) -> Scores:
    """The samples of `scores` that `other` has, too."""
    return {key: scores[key][: len(values)] for key, values in other.items()}


def class_of(key: str) -> str:
    return get_task(key.split("@")[0]).task_class


def balanced(scores: Scores) -> Scores:
    """Scores scaled so that the plain macro mean gives each class half the weight."""
    classes = {key: class_of(key) for key in scores}
    counts = {name: sum(c == name for c in classes.values()) for name in set(classes.values())}
    return {key: scores[key] * len(classes) / (len(counts) * counts[name]) for key, name in classes.items()}


def summarise(run: BoardRun) -> Summary:
    """Rows, figures and routes of a board."""
    reference = cell_scores(run.dense, run.dense)
    dense_losses = cell_losses(run.dense)
    ours = average([cell_scores(records, run.dense) for _, records in run.routers])
    our_losses = average([cell_losses(records) for _, records in run.routers])

    def line(name: str, family: str, many: Sequence[Records], scores: Scores, losses: Scores, matched: bool) -> Row:
        parts: dict[str, Estimate | None] = {}
        for task_class in (RETRIEVAL, HOLISTIC):
            some = {key: values for key, values in scores.items() if class_of(key) == task_class}
            parts[task_class] = macro_mean(some) if some else None
        difference = macro_difference(balanced(like(ours, scores)), balanced(scores))
        return Row(
            name,
            family,
            float(np.mean([_mean(records, "sparsity") for records in many])),
            float(np.mean([_mean(records, "kv_share") for records in many])),
            parts[RETRIEVAL],
            parts[HOLISTIC],
            macro_mean(balanced(scores)),
            macro_ratio(losses, like(dense_losses, losses)) if losses else None,
            {key: float(values.mean()) for key, values in scores.items()},
            max(map(len, scores.values())),
            difference,
            difference if matched else None,
        )

    rows = [
        line("router", "router", [records for _, records in run.routers], ours, our_losses, False),
        line("dense", "dense", [run.dense], reference, dense_losses, False),
    ]
    if len(run.routers) > 1:
        for entrant, records in run.routers:
            scores = cell_scores(records, run.dense)
            rows.append(line(entrant.name, "seed", [records], scores, cell_losses(records), False))
    for entrant, records in run.others:
        scores = cell_scores(records, run.dense)
        rows.append(line(entrant.name, entrant.family, [records], scores, cell_losses(records), entrant.matched))
    curves = _curves(run, rows)
    figures = [*_figures(run, rows, ours, reference, our_losses, dense_losses), *curves]
    left_out = tuple((name_of(cell), value) for cell, value in run.left_out.items())
    routes = task_routes([r for _, r in run.routers])
    return Summary(tuple(rows), tuple(figures), tuple(curves), left_out, routes, run.omega, run.held)


def _mean(records: Records, field: str) -> float:
    """Mean of a field over the cells, classes balanced."""
    means = {
        name_of(cell): np.array([np.mean([getattr(row, field) for row in rows])]) for cell, rows in records.items()
    }
    return float(np.mean([values.mean() for values in balanced(means).values()]))


def task_routes(many: Sequence[Records]) -> dict[str, tuple[float, ...]]:
    """Share of each task's prompts in which a layer runs full."""
    tasks: dict[str, list[list[int]]] = {}
    for records in many:
        for rows in records.values():
            for row in rows:
                tasks.setdefault(row.task, []).append([int(c) for c in row.route])
    return {task: tuple(np.mean(routes, axis=0).tolist()) for task, routes in tasks.items()}


def _figures(
    run: BoardRun, rows: Sequence[Row], ours: Scores, reference: Scores, our_losses: Scores, dense_losses: Scores
) -> list[Figure]:
    prompts = sum(map(len, run.dense.values()))
    by_seed = tuple(_mean(records, "sparsity") for _, records in run.routers)
    figures = [Figure("board_mean_sparsity", run.omega, "share", prompts, repetitions=by_seed)]

    def ratio(name: str, keys: Sequence[str]) -> None:
        if keys and any(reference[key].any() for key in keys):
            estimate = macro_ratio({key: ours[key] for key in keys}, {key: reference[key] for key in keys})
            figures.append(Figure.of(name, estimate, "ratio"))

    ratio("board_retrieval_vs_dense", [key for key in ours if class_of(key) == RETRIEVAL])
    holistic = [key for key in ours if class_of(key) == HOLISTIC]
    ratio("board_holistic_vs_dense", holistic)
    ratio("board_holistic_answers_vs_dense", [key for key in holistic if key not in dense_losses])
    ratio("board_unseen_tasks_vs_dense", [key for key in ours if get_task(key.split("@")[0]).held_out])
    text = [key for key in our_losses if any(word in key for word in _TEXT)]
    if text:
        routed, dense = (np.concatenate([losses[key] for key in text]) for losses in (our_losses, dense_losses))
        figures.append(Figure.of("board_nll_vs_dense", paired_ratio(routed, dense), "ratio"))
    margins = [row.margin for row in rows if row.margin is not None and row.family in (*STATIC, "searched")]
    if margins:
        # The best static split is the one that leaves the router the smallest lead here: chosen in its favour.
        best = min(margins, key=lambda margin: margin.value)
        value, low, high = (100 * x for x in (best.value, best.low, best.high))
        # A board without all of them has not met the best one.
        name = "board_margin_over_best_static" if _all_static(rows) else "board_margin_over_some_static"
        figures.append(Figure(name, value, "points", best.n, low, high))
        figures.append(Figure(f"{name}_low", low, "points", best.n))
    classes = {RETRIEVAL: [key for key in ours if class_of(key) == RETRIEVAL], HOLISTIC: holistic}
    if all(classes.values()):
        gaps = []
        for _, records in run.routers:
            means = {name_of(cell): float(np.mean([row.sparsity for row in some])) for cell, some in records.items()}
            per = [float(np.mean([means[key] for key in classes[name]])) for name in (RETRIEVAL, HOLISTIC)]
            gaps.append(per[1] - per[0])
        figures.append(
            Figure("board_class_sparsity_gap", float(np.mean(gaps)), "share", prompts, repetitions=tuple(gaps))
        )
    # Seeds share their prompts: a prompt counts once.
    shares = {
        name_of(cell): np.mean([[row.kv_share for row in records[cell]] for _, records in run.routers], axis=0)
        for cell in run.dense
    }
    figures.append(Figure.of("board_kv_vs_dense", macro_mean(balanced(shares)), "ratio"))
    return figures


def _curves(run: BoardRun, rows: Sequence[Row]) -> list[Figure]:
    figures = []
    for row in rows:
        if row.family in CURVES:
            name = "board_" + re.sub(r"[^a-z0-9]+", "_", row.name.lower())
            figures.append(Figure.of(f"{name}_macro", row.macro, "share"))
            figures.append(Figure(f"{name}_sparsity", row.sparsity, "share", row.macro.n))
    for entrant, records in run.others:
        if entrant.family == "inline":
            inline = cell_scores(records, run.dense)
            # Of the same adapter: the first.
            probe = like(cell_scores(run.routers[0][1], run.dense), inline)
            found = macro_difference(balanced(probe), balanced(inline))
            value, low, high = (100 * x for x in (found.value, found.low, found.high))
            figures.append(Figure("board_probe_minus_inline", value, "points", found.n, low, high))
    return figures
