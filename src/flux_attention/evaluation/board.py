"""The board: the router beside dense and every baseline, on the same samples and kernels, with 95 % intervals.

A *cell* is one entrant on one task at one length. Cells are files, named by a hash of everything that determines them,
so an interrupted board goes on where it stopped and runs of different settings never mix.

Scores lie in [0, 1]. A task scored by NLL counts with exp(NLL dense − NLL): the share of the dense model's probability
per token that is kept, 1 = dense. Tasks on which the dense model itself scores below 0.10 are listed, not averaged.
Baselines are compared at *equal* mean Ω: between two static splits of neighbouring sizes, samples are interpolated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flux_attention.config import FluxConfig
from flux_attention.data import HOLISTIC, RETRIEVAL, Sample, get_task, make_samples
from flux_attention.data.corpus import fingerprint
from flux_attention.data.tasks import training_tasks
from flux_attention.evaluation.metrics import (
    Estimate,
    bootstrap_mean,
    macro_difference,
    macro_mean,
    macro_ratio,
    paired_ratio,
)
from flux_attention.evaluation.results import Figure, write_json
from flux_attention.evaluation.runner import Progress, Record, RunOptions, run_samples, tqdm_progress
from flux_attention.models.adapter import Adapter
from flux_attention.models.attach import FluxAttention, attach, detach
from flux_attention.route import AllSparse, Dense, Dial, Interleaved, Policy, Random, Static
from flux_attention.training.damage import DamageMeter, greedy_ranking, leave_one_out, static_ranking

CELL_VERSION = 1
LEAST_DENSE = 0.10
#: Half retrieval, half holistic; what `flux-attn board` runs unless told otherwise.
MIXED = (
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_two_values",
    "niah_multivalue",
    "variable_copies",
    "kv_lookup_numbers",
    "row_qa",
    "fewshot_topic",
    "fewshot_sentiment",
    "fewshot_intent",
    "common_words",
    "frequent_words",
    "code_completion",
    "docstring_continuation",
    "module_summary",
)
Scores = dict[str, NDArray[np.float64]]
"""Per-sample values of each cell, keyed "task@length"."""


@dataclass(frozen=True)
class Entrant:
    """Something that routes.

    Attributes:
        name: unique on the board.
        family: joins its points in the Pareto figure.
        policy: None = the router of `adapter`.
        sparse_mode: what a sparse layer does; None = the adapter's.
    """

    name: str
    family: str
    policy: Policy | None = None
    dial: Dial = field(default_factory=Dial)
    adapter: Adapter | None = None
    sparse_mode: str | None = None


@dataclass(frozen=True, kw_only=True)
class BoardConfig:
    """What a board runs.

    Attributes:
        tasks, lengths, samples, seed: the cells; the same samples for every entrant.
        sparsities: Ω at which baselines (and, under the dial, the router) are run for the curves; () = only where
            the router itself lands.
        calibration: samples per training task that static rankings are chosen on, from the training split.
        calibration_length: their tokens.
        batch_size: samples packed into one pass; it does not enter the hash, results do not depend on it.
    """

    tasks: tuple[str, ...] = MIXED
    lengths: tuple[int, ...] = (4096, 8000)
    samples: int = 200
    seed: int = 0
    sparsities: tuple[float, ...] = ()
    calibration: int = 4
    calibration_length: int = 4096
    batch_size: int = 1

    def __post_init__(self) -> None:
        names = [get_task(task).name for task in self.tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a board needs tasks, each once, got {', '.join(names) or 'none'}")
        object.__setattr__(self, "tasks", tuple(names))
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be positive, got {self.lengths}")
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2 for an interval, got {self.samples}")
        if self.calibration < 1 or self.batch_size < 1:
            raise ValueError(f"calibration and batch_size must be positive, got {self.calibration}, {self.batch_size}")
        for sparsity in self.sparsities:
            if not 0 <= sparsity <= 1:
                raise ValueError(f"sparsities must lie in [0, 1], got {sparsity}")


class Board:
    """Runs entrants on cells, from files where they are there.

    Args:
        model: not attached.
        adapters: trained alike with different seeds; the router's figures are means over them.
        folder: of the cells; created.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: Sequence[Adapter],
        config: BoardConfig,
        folder: Path,
        progress: Progress | None = None,
    ) -> None:
        if not adapters:
            raise ValueError("a board needs at least one adapter")
        self.model, self.tokenizer, self.adapters = model, tokenizer, tuple(adapters)
        self.config, self.folder, self.progress = config, folder, progress
        self._texts = fingerprint()
        self._weights = weights_digest(model)
        self._samples: dict[tuple[str, int], list[Sample]] = {}
        self.layers = len(adapters[0].config.backbone.routable_layers)  # type: ignore[union-attr]
        bases = {replace(adapter.config, backbone=None, full_bias=0.0) for adapter in adapters}
        if len(bases) > 1:
            raise ValueError("the adapters of one board differ in more than their router; give each a board of its own")

    # ------------------------------------------------------------------ cells

    def settings(self, entrant: Entrant, task: str, length: int) -> dict[str, Any]:
        """Everything that determines a cell's records."""
        adapter = entrant.adapter or self.adapters[0]
        config = self._flux_config(entrant).to_dict()
        routed = entrant.policy is None
        return {
            "version": CELL_VERSION,
            "task": task,
            "length": length,
            "samples": self.config.samples,
            "seed": self.config.seed,
            "policy": "router" if routed else repr(entrant.policy),
            "dial": [entrant.dial.min_sparsity, entrant.dial.max_sparsity],
            "router": adapter_digest(adapter) if routed else None,
            "config": config,
            "weights": self._weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "texts": self._texts,
        }

    def _flux_config(self, entrant: Entrant) -> FluxConfig:
        config = (entrant.adapter or self.adapters[0]).config
        return config if entrant.sparse_mode is None else replace(config, sparse_mode=entrant.sparse_mode)

    def run(self, entrant: Entrant) -> dict[str, list[Record]]:
        """The entrant's records, cell by cell; what is missing is computed and kept."""
        found: dict[str, list[Record]] = {}
        missing: list[tuple[str, int, Path, dict[str, Any]]] = []
        for task in self.config.tasks:
            for length in self.config.lengths:
                settings = self.settings(entrant, task, length)
                path = self.folder / "cells" / f"{task}-{length}-{digest(settings)}.json"
                records = read_cell(path, settings)
                if records is None:
                    missing.append((task, length, path, settings))
                else:
                    found[f"{task}@{length}"] = records
        if missing:
            config = self._flux_config(entrant)
            needs_router = entrant.policy is None
            controller = attach(self.model, (entrant.adapter or self.adapters[0]) if needs_router else config)
            try:
                for task, length, path, settings in missing:
                    records = self._measure(controller, entrant, task, length)
                    rows = [{**record.to_dict(), "text": None} for record in records]
                    write_json(path, {"settings": settings, "records": rows})
                    found[f"{task}@{length}"] = [Record.from_dict(row) for row in rows]
            finally:
                detach(self.model)
        # In the board's order, whatever came from files.
        return {
            f"{task}@{length}": found[f"{task}@{length}"]
            for task in self.config.tasks
            for length in self.config.lengths
        }

    def _measure(self, controller: FluxAttention, entrant: Entrant, task: str, length: int) -> list[Record]:
        key = (task, length)
        if key not in self._samples:
            config = self.config
            self._samples[key] = make_samples(task, config.samples, length, config.seed, "test", self.tokenizer)
        return run_samples(
            controller,
            self.tokenizer,
            self._samples[key],
            policy=entrant.policy,
            dial=entrant.dial,
            options=RunOptions(batch_size=self.config.batch_size),
            progress=self.progress,
            label=f"{entrant.name}: {task} {length}",
        )

    # ------------------------------------------------------------------ static rankings

    def rankings(self) -> dict[str, list[int]]:
        """Layer rankings, least needed first, by method; chosen on training texts and kept in a file.

        damage: single-layer damage on all training tasks. greedy: one layer after the other at the least damage, on
        the same samples. greedy-text: the same on running text alone, the training-free choice by NLL.
        """
        settings = {
            "version": CELL_VERSION,
            "calibration": self.config.calibration,
            "length": self.config.calibration_length,
            "seed": self.config.seed,
            "config": self.adapters[0].config.to_dict(),
            "weights": self._weights,
            "dtype": str(self.model.dtype),
            "device": self.model.device.type,
            "texts": self._texts,
        }
        path = self.folder / "cells" / f"rankings-{digest(settings)}.json"
        if path.is_file():
            data = read_json(path)
            _check_settings(path, data, settings)
            return {name: list(order) for name, order in data["rankings"].items()}
        samples = [
            sample
            for name in training_tasks()
            for sample in make_samples(
                name,
                self.config.calibration,
                self.config.calibration_length,
                # Another stream than the router's training data or the board's.
                self.config.seed + 7919,
                "train",
                self.tokenizer,
            )
        ]
        controller = attach(self.model, self.adapters[0].config)
        try:
            meter = DamageMeter(controller, samples)
            # What the dense model cannot answer tells nothing about layers.
            meter = meter.subset(meter.answered())
            text = meter.subset([i for i, s in enumerate(meter.samples) if s.metric == "nll"])
            # Layers whose single damage is next to nothing are taken at once.
            jump = self.layers // 5
            methods: dict[str, Callable[[], list[int]]] = {
                "damage": lambda: static_ranking(leave_one_out(meter)),
                "greedy": lambda: greedy_ranking(meter, jump=jump).order,
                "greedy-text": lambda: greedy_ranking(text, jump=jump).order,
            }
            show = self.progress or tqdm_progress
            found = {name: methods[name]() for name in show(list(methods), len(methods), "static rankings")}
        finally:
            detach(self.model)
        write_json(path, {"settings": settings, "rankings": found})
        return found

    def routers(self) -> list[Entrant]:
        many = len(self.adapters) > 1
        return [
            Entrant(f"router (seed {i})" if many else "router", "router", adapter=adapter)
            for i, adapter in enumerate(self.adapters)
        ]

    def baselines(self, omega: float) -> Iterator[Entrant]:
        """Every baseline; those with a sparsity at the two numbers of layers around Ω, and along the curve."""
        yield Entrant("dense", "dense", Dense())
        shares = sorted({*around(omega, self.layers), *(round(s * self.layers) for s in self.config.sparsities)})
        rankings = self.rankings()
        for count in shares:
            share = count / self.layers
            for method, order in rankings.items():
                yield Entrant(f"static {method} {share:.2f}", f"static {method}", Static(tuple(sorted(order[:count]))))
            yield Entrant(f"interleaved {share:.2f}", "interleaved", Interleaved(share))
            yield Entrant(f"random {share:.2f}", "random", Random(share))
        yield Entrant("all sparse", "all sparse", AllSparse())
        for mode in ("triangle", "xattention"):
            if mode != self.adapters[0].config.retrieval_mode:
                yield Entrant(f"{mode} everywhere", f"{mode} everywhere", AllSparse(), sparse_mode=mode)
        for sparsity in self.config.sparsities:
            yield Entrant(
                f"router, dial {sparsity:.2f}",
                "router, dial",
                dial=Dial(sparsity, sparsity),
                adapter=self.adapters[0],
            )


def around(omega: float, layers: int) -> tuple[int, int]:
    """The two numbers of sparse layers that a mean Ω lies between (twice the same when it is one)."""
    exact = omega * layers
    return math.floor(exact + 1e-6), math.ceil(exact - 1e-6)


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def adapter_digest(adapter: Adapter) -> str:
    """Of the router's weights; where they lie does not matter."""
    found = hashlib.sha256()
    for name in sorted(adapter.state):
        found.update(name.encode() + adapter.state[name].float().numpy().tobytes())
    return found.hexdigest()[:16]


def weights_digest(model: Any) -> str:
    """Of a sample of the backbone's weights: enough to tell models and quantisations apart, at no cost."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:64].float().cpu().numpy()
        found.update(f"{name}{tuple(parameter.shape)}".encode() + values.tobytes())
    return found.hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and its cell is computed anew") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is no cell of a board; delete it")
    return data


def _check_settings(path: Path, data: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    found = data.get("settings")
    if found != json.loads(json.dumps(settings)):
        version = found.get("version") if isinstance(found, dict) else None
        raise ValueError(
            f"{path} holds a run of other settings (version {version}, this is {CELL_VERSION}); delete it or use "
            "another folder"
        )


def read_cell(path: Path, settings: Mapping[str, Any]) -> list[Record] | None:
    """A cell's records; None when it was not computed yet. Raises ValueError for a file of other settings."""
    if not path.is_file():
        return None
    data = read_json(path)
    _check_settings(path, data, settings)
    return [Record.from_dict(row) for row in data["records"]]


# ---------------------------------------------------------------------------------------------------- scores


def cell_scores(records: Mapping[str, Sequence[Record]], dense: Mapping[str, Sequence[Record]]) -> Scores:
    """Per-sample scores of every cell, NLL tasks relative to dense (see the module's head)."""
    found = {}
    for key, rows in records.items():
        values = []
        for row, reference in zip(rows, dense[key], strict=True):
            if row.score is not None:
                values.append(row.score)
            else:
                assert row.nll is not None and reference.nll is not None
                values.append(math.exp(reference.nll - row.nll))
        found[key] = np.array(values)
    return found


def cell_losses(records: Mapping[str, Sequence[Record]]) -> Scores:
    """Per-sample NLL of the tasks that are scored by it."""
    return {
        key: np.array([row.nll for row in rows], dtype=np.float64)
        for key, rows in records.items()
        if rows[0].metric == "nll"
    }


def mean_omega(records: Mapping[str, Sequence[Record]]) -> float:
    """Mean Ω over the mixed suite: every cell the same within its class, both classes the same."""
    classes = [
        np.mean([np.mean([row.sparsity for row in rows]) for rows in records.values() if rows[0].task_class == name])
        for name in (RETRIEVAL, HOLISTIC)
        if any(rows[0].task_class == name for rows in records.values())
    ]
    return float(np.mean(classes))


def average(many: Sequence[Scores]) -> Scores:
    """Per-sample means over runs on the same samples."""
    return {key: np.mean([scores[key] for scores in many], axis=0) for key in many[0]}


def interpolate(low: Scores, high: Scores, weight: float) -> Scores:
    """Expected scores when a share `weight` of the requests takes the sparser split."""
    return {key: (1 - weight) * low[key] + weight * high[key] for key in low}


@dataclass(frozen=True)
class Row:
    """An entrant's line on the board."""

    name: str
    family: str
    sparsity: float
    kv_share: float
    retrieval: Estimate | None
    holistic: Estimate | None
    macro: Estimate
    nll_ratio: Estimate | None
    cells: Mapping[str, float]
    margin: Estimate | None = None
    """Router − this entrant on the macro score; only for baselines brought to the router's Ω."""


@dataclass(frozen=True)
class Outcome:
    """A finished board."""

    rows: tuple[Row, ...]
    figures: tuple[Figure, ...]
    left_out: tuple[tuple[str, float], ...]
    routes: Mapping[str, tuple[float, ...]]
    """Share of a task's prompts in which each layer runs full, under the router."""
    omega: float


def run_board(board: Board) -> Outcome:
    """Run the routers, then every baseline at their mean Ω, and compare."""
    dense = board.run(Entrant("dense", "dense", Dense()))
    routers = [board.run(entrant) for entrant in board.routers()]
    omega = float(np.mean([mean_omega(records) for records in routers]))
    runs = {entrant: board.run(entrant) for entrant in board.baselines(omega)}
    return summarise(board, dense, routers, {e.name: (e.family, records) for e, records in runs.items()}, omega)


def summarise(
    board: Board,
    dense: Mapping[str, list[Record]],
    routers: Sequence[Mapping[str, list[Record]]],
    others: Mapping[str, tuple[str, Mapping[str, list[Record]]]],
    omega: float,
) -> Outcome:
    """Rows, figures and routes out of records."""
    reference = cell_scores(dense, dense)
    plain = {key: rows[0].score is not None for key, rows in dense.items()}
    left_out = tuple((key, float(s.mean())) for key, s in reference.items() if plain[key] and s.mean() < LEAST_DENSE)
    kept = [key for key in reference if key not in dict(left_out)]
    if not kept:
        raise ValueError(f"the dense model scores below {LEAST_DENSE} on every task: there is nothing to compare")
    classes = {key: dense[key][0].task_class for key in kept}
    ours = average([cell_scores(records, dense) for records in routers])
    our_losses = average([cell_losses(records) for records in routers])
    dense_losses = cell_losses(dense)

    def line(name: str, family: str, many: Sequence[Mapping[str, list[Record]]], scores: Scores, losses: Scores) -> Row:
        by_class = {}
        for task_class in (RETRIEVAL, HOLISTIC):
            chosen = {key: scores[key] for key in kept if classes[key] == task_class}
            by_class[task_class] = macro_mean(chosen) if chosen else None
        return Row(
            name,
            family,
            float(np.mean([mean_omega(records) for records in many])),
            float(np.mean([np.mean([row.kv_share for row in rows]) for records in many for rows in records.values()])),
            by_class[RETRIEVAL],
            by_class[HOLISTIC],
            _macro(scores, classes),
            macro_ratio(losses, dense_losses) if losses else None,
            {key: float(values.mean()) for key, values in scores.items()},
        )

    rows = [line("router", "router", routers, ours, our_losses)]
    points: dict[str, list[tuple[float, Scores, Row]]] = {}
    for name, (family, records) in others.items():
        scores = cell_scores(records, dense)
        row = line(name, family, [records], scores, cell_losses(records))
        rows.append(row)
        points.setdefault(family, []).append((row.sparsity, scores, row))
    margins = {}
    for family in ("static damage", "static greedy", "static greedy-text", "interleaved", "random"):
        matched = at_omega([(s, scores) for s, scores, _ in points.get(family, ())], omega)
        if matched is not None:
            margins[family] = macro_difference(_balanced(ours, classes), _balanced(matched, classes))
    rows = [
        replace(row, margin=margins.get(row.family)) if abs(row.sparsity - omega) <= 1 / board.layers else row
        for row in rows
    ]
    figures = _figures(board, dense, routers, ours, reference, our_losses, dense_losses, classes, margins, omega)
    return Outcome(tuple(rows), tuple(figures), left_out, _task_routes(routers), omega)


def at_omega(points: Sequence[tuple[float, Scores]], omega: float) -> Scores | None:
    """Scores of a family at exactly Ω, between its two nearest members; None when it does not reach around Ω."""
    below = [p for p in points if p[0] <= omega + 1e-6]
    above = [p for p in points if p[0] >= omega - 1e-6]
    if not below or not above:
        return None
    (s0, low), (s1, high) = max(below, key=lambda p: p[0]), min(above, key=lambda p: p[0])
    return low if s1 - s0 < 1e-9 else interpolate(low, high, (omega - s0) / (s1 - s0))


def _balanced(scores: Scores, classes: Mapping[str, str]) -> Scores:
    """Scores scaled so that the plain macro mean gives each class half the weight."""
    counts = {name: sum(c == name for c in classes.values()) for name in set(classes.values())}
    total, parts = len(classes), len(counts)
    return {key: scores[key] * total / (parts * counts[name]) for key, name in classes.items()}


def _macro(scores: Scores, classes: Mapping[str, str]) -> Estimate:
    return macro_mean(_balanced(scores, classes))


def _task_routes(routers: Sequence[Mapping[str, list[Record]]]) -> dict[str, tuple[float, ...]]:
    tasks: dict[str, list[list[int]]] = {}
    for records in routers:
        for rows in records.values():
            for row in rows:
                tasks.setdefault(row.task, []).append([int(c) for c in row.route])
    return {task: tuple(np.mean(routes, axis=0).tolist()) for task, routes in tasks.items()}


def _figures(
    board: Board,
    dense: Mapping[str, list[Record]],
    routers: Sequence[Mapping[str, list[Record]]],
    ours: Scores,
    reference: Scores,
    our_losses: Scores,
    dense_losses: Scores,
    classes: Mapping[str, str],
    margins: Mapping[str, Estimate],
    omega: float,
) -> list[Figure]:
    by_prompt: dict[str, list[float]] = {RETRIEVAL: [], HOLISTIC: []}
    for records in routers:
        for rows in records.values():
            by_prompt[rows[0].task_class].append(float(np.mean([row.sparsity for row in rows])))
    prompts = sum(map(len, dense.values()))
    figures = [Figure("board_mean_sparsity", omega, "share", prompts)]

    def ratio(name: str, keys: Sequence[str]) -> None:
        if any(reference[key].any() for key in keys):
            estimate = macro_ratio({key: ours[key] for key in keys}, {key: reference[key] for key in keys})
            figures.append(Figure.of(name, estimate, "ratio"))

    ratio("board_retrieval_vs_dense", [key for key, name in classes.items() if name == RETRIEVAL])
    ratio("board_holistic_vs_dense", [key for key, name in classes.items() if name == HOLISTIC])
    answers = [key for key, name in classes.items() if name == HOLISTIC and dense[key][0].score is not None]
    ratio("board_holistic_answers_vs_dense", answers)
    ratio("board_unseen_tasks_vs_dense", [key for key in classes if get_task(key.split("@")[0]).held_out])
    text = [key for key in our_losses if "continuation" in key or "completion" in key]
    if text:
        ours_nll, dense_nll = (np.concatenate([losses[key] for key in text]) for losses in (our_losses, dense_losses))
        figures.append(Figure.of("board_nll_vs_dense", paired_ratio(ours_nll, dense_nll), "ratio"))
    static = {name: margin for name, margin in margins.items() if name.startswith("static")}
    if static:
        # The best static split is the one that leaves the router the smallest lead here: chosen in its favour.
        margin = min(static.values(), key=lambda found: found.value)
        points, low, high = (100 * value for value in (margin.value, margin.low, margin.high))
        figures.append(Figure("board_margin_over_best_static", points, "points", margin.n, low, high))
        figures.append(Figure("board_margin_over_best_static_low", low, "points", margin.n))
    if all(by_prompt.values()):
        gap = np.mean(by_prompt[HOLISTIC]) - np.mean(by_prompt[RETRIEVAL])
        figures.append(Figure("board_class_sparsity_gap", float(gap), "share", prompts))
    shares = [row.kv_share for records in routers for rows in records.values() for row in rows]
    figures.append(Figure.of("board_kv_vs_dense", bootstrap_mean(shares), "ratio"))
    return figures
