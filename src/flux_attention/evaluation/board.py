"""The board: the router beside dense and every baseline, on the same samples and kernels, with 95 % intervals.

First the dense model: tasks on which it scores below 0.10 are listed, not averaged, and nobody else runs them. Then
the routers' routes, whose mean Ω the baselines are brought to. Then every (sample, route) pair that any entrant asks
for, once, many to a pass. Everything that was found is in files: a board that is interrupted goes on in its folder.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux_attention.config import FluxConfig, RouterInput
from flux_attention.data import HOLISTIC, RETRIEVAL, Sample, get_task
from flux_attention.data.progress import Progress, tqdm_progress
from flux_attention.evaluation import baselines
from flux_attention.evaluation.board_config import BoardConfig, Prepared, prepare
from flux_attention.evaluation.entrants import (
    POLICIES,
    WEAK,
    Cell,
    Entrant,
    by_policy,
    by_scores,
    by_size,
    by_threshold,
    mean_omega,
    omega_of,
)
from flux_attention.evaluation.outcomes import Outcome, OutcomeFile, Pair, batches, keep, outcomes_of
from flux_attention.evaluation.pool import Pool
from flux_attention.evaluation.runner import Record, RunOptions, check_samples, kv_share_of
from flux_attention.models.adapter import Adapter
from flux_attention.models.attach import attach, detach
from flux_attention.models.controller import FluxAttention
from flux_attention.route import AllSparse, Dense, Dial, Interleaved, Random, Static, StaticHeads

LEAST_DENSE = 0.10


class UnfinishedError(RuntimeError):
    """Results are missing: the board ran out of its time, or only reads; run it again in the same folder."""


class Board:
    """Runs entrants on cells, from files where they are there.

    Args:
        model: not attached.
        adapters: trained alike with different seeds; the router's figures are means over them.
        others: further adapters by name, each a line of its own (for single targets, say).
        folder: of everything that is kept; created.
        pool: processes that measure with a model of the same weights; None = this one does.
        measured_on: type of the device of an earlier run whose files are only read ("cuda"); None = measure here.

    Raises:
        ValueError: no adapter, adapters whose configurations differ, or samples that the model's context cannot hold.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: Sequence[Adapter],
        config: BoardConfig,
        folder: Path,
        progress: Progress | None = None,
        others: Mapping[str, Adapter] | None = None,
        pool: Pool | None = None,
        measured_on: str | None = None,
    ) -> None:
        if not adapters:
            raise ValueError("a board needs at least one adapter")
        changed = [a.source for a in (*adapters, *(others or {}).values()) if a.delta is not None]
        if changed:
            raise ValueError(
                f"{changed[0]} replaces weights of the backbone, and everyone on a board runs on the same ones: attach "
                "it, save the model, and name that folder as the model and an adapter of the router alone"
            )
        self.model, self.tokenizer, self.adapters = model, tokenizer, tuple(adapters)
        self.others, self._pool = dict(others or {}), pool
        self._measured_on = measured_on
        self.config, self.folder, self.progress = config, Path(folder), progress or tqdm_progress
        self.layers = len(adapters[0].config.backbone.routable_layers)  # type: ignore[union-attr]
        bases = {_without_router(adapter.config) for adapter in (*adapters, *self.others.values())}
        if len(bases) > 1:
            raise ValueError("the adapters of one board differ in more than their router; give each a board of its own")
        self._weights = weights_digest(model)
        self._options = RunOptions()
        self._files: dict[tuple[Cell, str | None], OutcomeFile] = {}
        self._begun = time.perf_counter()
        self._saved = self._begun

    @cached_property
    def samples(self) -> Prepared:
        found = prepare(self.config, self.tokenizer, self.folder, self.progress)
        # Found out before anything is run, not in the middle of it.
        controller = attach(self.model, self.adapters[0].config)
        try:
            for some in (*found.test.cells.values(), found.tasks, found.text, found.heads):
                extra = self._options.extra_tokens if any(map(self._options.generates, some)) else 0
                check_samples(controller, some, extra)
        finally:
            detach(self.model)
        return found

    # ------------------------------------------------------------------ files

    def _base(self, config: FluxConfig) -> dict[str, Any]:
        """What determines every result, besides samples and routes."""
        return {
            "config": {**_without_router(config).to_dict(), "backbone": None},
            "weights": self._weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self._measured_on or self.model.device.type,
            "impl": self.config.impl,
        }

    def _mode(self, mode: str | None) -> FluxConfig:
        config = self.adapters[0].config
        return config if mode is None else replace(config, sparse_mode=mode)

    def _file(self, cell: Cell, mode: str | None) -> OutcomeFile:
        if (cell, mode) not in self._files:
            test = self.samples.test
            settings = {
                **self._base(self._mode(mode)),
                "code": code_digest(),
                "task": cell[0],
                "length": cell[1],
                "seed": self.config.seed,
                "texts": test.settings["texts"],
                "tokenizer": test.settings["tokenizer"],
            }
            self._files[cell, mode] = OutcomeFile(self.folder / "outcomes", settings, test.checksums[cell])
        return self._files[cell, mode]

    def attach(self, adapter: Adapter | FluxConfig) -> FluxAttention:
        controller = attach(self.model, adapter)
        controller.impl = self.config.impl
        return controller

    # ------------------------------------------------------------------ running

    def measure(self, entrants: Sequence[Entrant], label: str) -> None:
        """Every pair that the entrants ask for and no file has, packed into passes; kept every few seconds.

        Raises UnfinishedError when the time is up, and when a board that only reads finds no result.
        """
        test = self.samples.test
        for mode in dict.fromkeys(entrant.mode for entrant in entrants):
            wanted: dict[tuple[Cell, int, str], Pair] = {}
            for entrant in entrants:
                for cell, columns in entrant.columns.items() if entrant.mode == mode else ():
                    file, some = self._file(cell, mode), test.cells[cell]
                    for i, column in enumerate(columns):
                        if file.get(i, column) is None:
                            wanted.setdefault((cell, i, column), Pair(file, i, some[i], column))
            if not wanted:
                continue
            if self._measured_on is not None:
                (task, length), *_ = next(iter(wanted))
                raise UnfinishedError(
                    f"{len(wanted)} results of {label} are not in {self.folder}, the first one of {task} at {length} "
                    "tokens: go on measuring, or name policies that are complete"
                )
            work = list(batches(list(wanted.values()), self.config.batch_tokens, self._options))
            found = self._outcomes(self._mode(mode), work)
            try:
                for batch, outcomes in self.progress(found, len(work), label if mode is None else f"{label}: {mode}"):
                    keep(batch, outcomes)
                    self._pause()
            finally:
                # Also what a stop leaves behind: an attached model, batches that wait.
                found.close()
                self._save()

    def _outcomes(self, config: FluxConfig, work: list[list[Pair]]) -> Generator[tuple[list[Pair], list[Outcome]]]:
        if self._pool is not None:
            yield from self._pool.measure(config, work, self._options)
            return
        controller = self.attach(config)
        try:
            for batch in work:
                samples, routes = [pair.sample for pair in batch], [pair.route for pair in batch]
                yield batch, outcomes_of(controller, self.tokenizer, samples, routes, self._options)
        finally:
            detach(self.model)

    def _pause(self) -> None:
        now = time.perf_counter()
        if now - self._saved > 20:
            self._save()
        if self.config.minutes and now - self._begun > 60 * self.config.minutes:
            raise UnfinishedError(
                f"{self.config.minutes:g} minutes are over and the board is not finished; what was measured is in "
                f"{self.folder}. Run the same command again to go on"
            )

    def _save(self) -> None:
        for file in self._files.values():
            file.save()
        self._saved = time.perf_counter()

    def records(self, entrant: Entrant) -> dict[Cell, list[Record]]:
        """The entrant's samples one by one, after `measure`."""
        config, found = self._mode(entrant.mode), {}
        for cell, columns in entrant.columns.items():
            rows = []
            for i, (column, sample) in enumerate(zip(columns, self.samples.test.cells[cell], strict=False)):
                outcome = self._file(cell, entrant.mode).get(i, column)
                assert outcome is not None
                tokens, omega = len(sample.prompt_ids), omega_of(column)
                rows.append(
                    Record(
                        task=sample.task,
                        task_class=sample.task_class,
                        metric=sample.metric,
                        length=cell[1],
                        index=i,
                        tokens=tokens,
                        score=outcome.score,
                        exact=None,
                        nll=outcome.nll,
                        sparsity=omega,
                        route=column,
                        p_full=None,
                        kv_share=kv_share_of(config, omega, tokens),
                        depth=sample.meta.get("depth"),
                    )
                )
            found[cell] = rows
        return found

    # ------------------------------------------------------------------ entrants

    def dense(self) -> Entrant:
        return Entrant("dense", "dense", by_policy(Dense(), self.layers, self.samples.test.cells))

    def kept(self, dense: Mapping[Cell, Sequence[Record]]) -> dict[Cell, tuple[Sample, ...]]:
        """The cells that the dense model can do. Raises ValueError when there is none."""
        cells = {}
        for cell, some in self.samples.test.cells.items():
            scores = [record.score for record in dense[cell] if record.score is not None]
            if not scores or np.mean(scores) >= LEAST_DENSE:
                cells[cell] = some
        if not cells:
            raise ValueError(f"the dense model scores below {LEAST_DENSE} on every task: there is nothing to compare")
        return cells

    @contextmanager
    def _routing(self, adapter: Adapter, router_input: RouterInput) -> Iterator[tuple[FluxAttention, dict[str, Any]]]:
        """The model under an adapter that routes this way, and what determines its routes besides the prompts."""
        adapter = replace(adapter, config=replace(adapter.config, router_input=router_input))
        controller = self.attach(adapter)
        try:
            yield controller, {**self._base(adapter.config), "router": adapter_digest(adapter)}
        finally:
            detach(self.model)

    def _scores(self, adapter: Adapter, cells: Mapping[Cell, Sequence[Sample]]) -> dict[Cell, torch.Tensor]:
        with self._routing(adapter, "probe") as (controller, base):
            return baselines.router_scores(controller, cells, self.folder, base)

    def routers(self, cells: Mapping[Cell, Sequence[Sample]]) -> list[Entrant]:
        many = len(self.adapters) > 1
        return [
            Entrant(
                f"router (seed {i})" if many else "router",
                "router",
                by_scores(self._scores(adapter, cells), self.config.held),
            )
            for i, adapter in enumerate(self.adapters)
        ]

    def baselines(self, cells: Mapping[Cell, Sequence[Sample]], routers: Sequence[Entrant]) -> list[Entrant]:
        """Those of the policies at the routers' mean Ω, and the points of the curves."""
        config, layers = self.config, self.layers
        omega = routers_omega(routers, cells)
        chosen = [name for name in POLICIES if name in config.policies]
        few = {cell: some[: config.weak_samples] for cell, some in cells.items()}
        found: list[Entrant] = []

        def add(
            family: str, columns: dict[Cell, list[str]], share: float | None = None, mode: str | None = None
        ) -> None:
            matched = share is not None and abs(share - omega) < 1e-9
            name = family if share is None else f"{family} {share:.2f}"
            found.append(Entrant(name, family, columns, mode, matched))

        rankings = self._rankings([name for name in ("greedy-text", "damage", "greedy") if name in chosen])
        if "searched" in chosen:
            rankings["searched"] = list(config.searched)
        for share in dict.fromkeys((omega, *config.sparsities)):
            here = cells if share == omega else few
            for name, order in rankings.items():
                make = lambda n, order=order: Static(tuple(sorted(order[:n])))  # noqa: E731
                add(name, by_size(make, share * layers, layers, here), share)
            if "interleaved" in chosen:
                add("interleaved", by_size(lambda n: Interleaved(n / layers), share * layers, layers, few), share)
            if "random" in chosen:
                add("random", by_size(lambda n: Random(n / layers), share * layers, layers, few), share)
        found += self._heads(cells, routers, chosen)
        if "sparse" in chosen:
            add("sparse", by_policy(AllSparse(), layers, few))
        for mode in ("triangle", "xattention"):
            if mode in chosen and mode not in (self.adapters[0].config.retrieval_mode,):
                less = max(2, config.weak_samples // 4) if mode == "xattention" else config.weak_samples
                add(mode, by_policy(AllSparse(), layers, {cell: s[:less] for cell, s in few.items()}), mode=mode)
        if "inline" in chosen:
            add("inline", self._inline(few))
        return found

    def curves(self, cells: Mapping[Cell, Sequence[Sample]]) -> list[Entrant]:
        """The first adapter under its dial, and the other adapters."""
        few = {cell: some[: self.config.weak_samples] for cell, some in cells.items()}
        found = []
        if self.config.dial:
            scores = self._scores(self.adapters[0], few)
            for share in self.config.dial:
                found.append(Entrant(f"dial {share:.2f}", "dial", by_scores(scores, Dial(share, share))))
        for name, adapter in self.others.items():
            found.append(Entrant(name, "other", by_scores(self._scores(adapter, few), self.config.held)))
        return found

    def _rankings(self, methods: Sequence[str]) -> dict[str, list[int]]:
        if not methods:
            return {}
        controller = self.attach(self.adapters[0].config)
        try:
            return baselines.layer_rankings(
                controller,
                {name: self.samples.text if name == "greedy-text" else self.samples.tasks for name in methods},
                self.folder,
                self._base(self.adapters[0].config),
                batch_tokens=self.config.batch_tokens,
                progress=self.progress,
            )
        finally:
            detach(self.model)

    def _heads(
        self, cells: Mapping[Cell, Sequence[Sample]], routers: Sequence[Entrant], chosen: Sequence[str]
    ) -> list[Entrant]:
        """Head-level entrants. They have no cache, so cells whose answers are generated are not theirs: they stand at
        the routers' mean Ω on the others."""
        if not {"duo", "elastic"} & set(chosen):
            return []
        some = self.samples.heads
        own = {cell: s for cell, s in cells.items() if not any(map(self._options.generates, s))}
        if not own:
            return []
        omega = routers_omega(routers, own)
        config = self.adapters[0].config
        base, training = self._base(config), self.config.heads
        assert config.backbone is not None
        count = config.backbone.num_key_value_heads
        controller = self.attach(config)
        found = []
        try:
            if "duo" in chosen:
                order = baselines.static_heads(controller, some, training, self.folder, base, self.progress)
                make = lambda n: StaticHeads(tuple(sorted(order[:n])), count)  # noqa: E731
                columns = by_size(make, omega * self.layers * count, self.layers, own)
                found.append(Entrant(f"duo {omega:.2f}", "duo", columns, matched=True))
            if "elastic" in chosen:
                scores = baselines.head_scores(controller, some, training, own, self.folder, base, self.progress)
                columns = by_threshold(scores, cell_weights(own), omega, self.layers)
                found.append(Entrant(f"elastic {omega:.2f}", "elastic", columns, matched=True))
        finally:
            detach(self.model)
        return found

    def _inline(self, few: Mapping[Cell, Sequence[Sample]]) -> dict[Cell, list[str]]:
        with self._routing(self.adapters[0], "inline") as (controller, base):
            return baselines.inline_routes(
                controller, few, self.folder, base, batch_tokens=self.config.batch_tokens, progress=self.progress
            )


@dataclass(frozen=True)
class BoardRun:
    """What was measured: records by entrant and cell.

    Attributes:
        omega: mean Ω of the routers over the kept cells.
        left_out: cells that the dense model cannot do, with its score.
        held: dial that the routers were under.
    """

    dense: Mapping[Cell, list[Record]]
    routers: Sequence[tuple[Entrant, Mapping[Cell, list[Record]]]]
    others: Sequence[tuple[Entrant, Mapping[Cell, list[Record]]]]
    omega: float
    left_out: Mapping[Cell, float]
    held: Dial = field(default_factory=Dial)


def run_board(board: Board) -> BoardRun:
    """Dense, the routers, and every baseline at their mean Ω."""
    dense = board.dense()
    board.measure([dense], "dense")
    reference = board.records(dense)
    cells = board.kept(reference)
    routers = board.routers(cells)
    omega = routers_omega(routers, cells)
    entrants = [*board.baselines(cells, routers), *board.curves(cells)]
    strong = [entrant for entrant in entrants if entrant.matched and entrant.family not in WEAK]
    board.measure([*routers, *strong], "routers and static splits")
    board.measure([entrant for entrant in entrants if entrant not in strong], "other entrants")
    left_out = {
        cell: float(np.mean([row.score for row in rows])) for cell, rows in reference.items() if cell not in cells
    }
    return BoardRun(
        {cell: reference[cell] for cell in cells},
        [(entrant, board.records(entrant)) for entrant in routers],
        [(entrant, board.records(entrant)) for entrant in entrants],
        omega,
        left_out,
        board.config.held,
    )


def routers_omega(routers: Sequence[Entrant], cells: Mapping[Cell, Sequence[Sample]]) -> float:
    """Mean Ω of the routers over cells that may be a part of theirs."""
    weights = cell_weights(cells)
    return float(np.mean([mean_omega({cell: entrant.columns[cell] for cell in cells}, weights) for entrant in routers]))


def cell_weights(cells: Mapping[Cell, Sequence[Sample]]) -> dict[Cell, float]:
    """Every cell the same within its class, both classes the same; they sum to 1."""
    classes = {cell: get_task(cell[0]).task_class for cell in cells}
    present = [name for name in (RETRIEVAL, HOLISTIC) if name in classes.values()]
    return {cell: 1 / len(present) / sum(c == name for c in classes.values()) for cell, name in classes.items()}


def _without_router(config: FluxConfig) -> FluxConfig:
    """What is left of a configuration when the route is given."""
    return replace(config, router_input="probe", full_bias=0.0, pool_tokens=1, tail_tokens=0)


#: What a score depends on besides sample, route and weights, from the package's root.
_SCORING = (
    *("kernels", "modes", "models", "cache.py", "generation.py", "route.py"),
    *("evaluation/metrics.py", "evaluation/runner.py", "training/answers.py"),
)


@cache
def code_digest() -> str:
    """Of the code that makes scores: results of one version of it must not stand beside another's."""
    return files_digest(Path(__file__).resolve().parents[1], _SCORING)


def files_digest(root: Path, names: Sequence[str]) -> str:
    """Of files, and of the Python files of folders, below `root`."""
    found = hashlib.sha256()
    for place in (root / name for name in names):
        for path in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def adapter_digest(adapter: Adapter) -> str:
    """Of the router's weights and its pooling; where they lie does not matter."""
    config = adapter.config
    pooled = f"{config.pool_tokens} {config.tail_tokens}" if config.tail_tokens else str(config.pool_tokens)
    found = hashlib.sha256(pooled.encode())
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
