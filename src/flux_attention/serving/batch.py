"""Routes of the batch that a worker is about to run: known before it runs, or found by its layers as they run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.router import PoolPlan
from flux_attention.serving.bundles import Bundles
from flux_attention.serving.options import ROUTE_KEY, Deployment
from flux_attention.serving.probe import Probe, mean_over_ranks, on_queries


class BatchRoutes:
    """Which rows run which layers in full, in the batch's order.

    Attributes:
        layers: routable index of each decoder layer.
        max_rows: most rows that a batch can have, padding included.
        undecided: row and request id of prompts whose layers decide in this step.
    """

    def __init__(self, runner: Any, deployment: Deployment, bundles: Bundles, device: torch.device) -> None:
        self._runner = runner
        self._dense = np.ones(deployment.layers, bool)
        self._rows: NDArray[np.bool_] | None = None
        self._names: list[str] = []
        self.undecided: list[tuple[int, str]] = []
        self.layers = {index: routable for routable, index in enumerate(deployment.decoder_layers)}
        config = runner.vllm_config
        self.max_rows = max(
            config.scheduler_config.max_num_seqs, config.compilation_config.max_cudagraph_capture_size or 0
        )
        # Bundles one after the other, so that each is a slice. Read by kernels in captured graphs: never reallocated.
        self._bundles = bundles
        self._order = [layer for bundle in bundles for layer in bundle]
        self._sparse = torch.zeros(deployment.layers, self.max_rows, dtype=torch.uint8, device=device)
        self._uploaded = b""
        self._is_uploaded = False

    def begin_step(self, has_new: bool) -> None:
        """A new step begins; `has_new`: a request runs for the first time in it."""
        # A request keeps its route, so the rows of a step are mostly those of the last one.
        if has_new or self.undecided:
            self._rows, self.undecided = None, []

    def use_full(self, rows: int) -> NDArray[np.bool_]:
        """bool `[rows, L]`; rows that pad the batch are dense."""
        names = self._runner.input_batch.req_ids[:rows]
        if self._rows is None or len(self._rows) != rows or names != self._names:
            routes = [self._route(name) for name in names]
            self.undecided = [(i, names[i]) for i, route in enumerate(routes) if not len(route)]
            found = [route if len(route) else self._dense for route in routes]
            self._rows, self._names = np.array([*found, *[self._dense] * (rows - len(found))]), names
            self._is_uploaded = False
        return self._rows

    def is_dense(self, rows: int) -> bool:
        """Whether every row runs the model as it is."""
        return bool(self.use_full(rows).all()) and not self.undecided

    def decide(self, row: int, layer: int, full: bool) -> None:
        """Set an undecided row's mode of a layer, before that layer attends."""
        assert self._rows is not None
        self._rows[row, layer] = full

    def upload(self, rows: int) -> None:
        """Put the routes where `sparse_of` reads them, if they are not there; every group of layers asks for it."""
        use_full = self.use_full(rows)
        if self._is_uploaded:
            return
        self._is_uploaded = True
        sparse = np.zeros(self._sparse.shape, np.uint8)
        sparse[:, :rows] = ~use_full[:, self._order].T
        if (key := sparse.tobytes()) == self._uploaded:
            return
        self._uploaded = key
        host, on_gpu = torch.from_numpy(sparse), self._sparse.is_cuda
        # Whole and pinned: else the host would wait here for the step that the device is still at.
        self._sparse.copy_(host.pin_memory() if on_gpu else host, non_blocking=on_gpu)

    def sparse_of(self, bundle: tuple[int, ...]) -> Tensor:
        """uint8 `[len(bundle), max_rows]` on the device, 1 = the row runs sparse."""
        start = self._bundles.index(bundle) * len(bundle)
        return self._sparse[start : start + len(bundle)]

    def _route(self, request_id: str) -> NDArray[np.bool_]:
        request = self._runner.requests.get(request_id)
        params = None if request is None else request.sampling_params
        route = params.extra_args.get(ROUTE_KEY) if params is not None and params.extra_args else None
        return self._dense if route is None else np.asarray(route, bool)


class InlineRouting:
    """The paper's form: a layer decides from its own queries, in the pass that prefills the whole prompt.

    Args:
        probe: whose router and layers are used.
        batch: the routes to fill in.
        runner: vLLM's model runner.
        config: says what is pooled.
    """

    def __init__(self, probe: Probe, batch: BatchRoutes, runner: Any, config: FluxConfig) -> None:
        self._router, self._batch, self._runner, self._config = probe.router, batch, runner, config
        self._layers = len(probe.attention)
        self._plan: PoolPlan | None = None
        self._scores: dict[str, list[float]] = {}
        on_queries(probe.attention, self._decide)

    def _decide(self, layer: int, queries: Tensor) -> None:
        undecided = self._batch.undecided
        if not undecided:
            return
        if layer == 0:
            starts = self._runner.query_start_loc.cpu
            lengths = [self._runner.requests[name].num_prompt_tokens for _, name in undecided]
            rows = [int(starts[row]) for row, _ in undecided]
            config = self._config
            self._plan = PoolPlan.build(
                rows, lengths, config.pool_tokens, tail_tokens=config.tail_tokens, device=queries.device
            )
            self._scores = {name: [] for _, name in undecided}
        assert self._plan is not None
        pooled = mean_over_ranks(self._plan.mean(self._plan.gather(queries)))
        for (row, name), p_full in zip(undecided, self._router.p_full(pooled, layer).tolist(), strict=True):
            self._batch.decide(row, layer, p_full > 0.5)
            self._scores[name].append(p_full)

    def take(self) -> dict[str, list[float]]:
        """Scores of the prompts that were decided since the last call; their requests keep the route from here on."""
        scores, self._scores = self._scores, {}
        for name, p_full in scores.items():
            params = self._runner.requests[name].sampling_params
            params.extra_args = {**params.extra_args, ROUTE_KEY: tuple(p > 0.5 for p in p_full)}
        return scores
