"""Workers that probe new prompts, publish routed KV specs and tell the attention which rows run sparse."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from flux_attention.serving.compat import check_version
from flux_attention.serving.kv import RoutedSpec
from flux_attention.serving.options import ROUTE_KEY, Deployment
from flux_attention.serving.probe import Probe
from flux_attention.serving.scheduler import PROBES, SCORES


class BatchRoutes:
    """Routes of the batch that a worker is about to run, in the batch's order."""

    def __init__(self, runner: Any, deployment: Deployment) -> None:
        self._runner = runner
        self._dense = np.ones(deployment.layers, bool)
        self._rows: NDArray[np.bool_] | None = None
        self.layers = {index: routable for routable, index in enumerate(deployment.decoder_layers)}

    def forget(self) -> None:
        """A new step begins."""
        self._rows = None

    def use_full(self, rows: int) -> NDArray[np.bool_]:
        """bool `[rows, L]`; rows that pad the batch are dense."""
        if self._rows is None or len(self._rows) != rows:
            ids = self._runner.input_batch.req_ids[:rows]
            found = [self._route(request_id) for request_id in ids]
            self._rows = np.stack([*found, *[self._dense] * (rows - len(found))]) if rows else self._dense[None][:0]
        return self._rows

    def _route(self, request_id: str) -> NDArray[np.bool_]:
        request = self._runner.requests.get(request_id)
        params = None if request is None else request.sampling_params
        route = params.extra_args.get(ROUTE_KEY) if params is not None and params.extra_args else None
        return self._dense if route is None else np.asarray(route, bool)


class RoutedWorker:
    """What the plugin adds to vLLM's workers; a mix-in for the CPU's and the GPU's."""

    def init_device(self) -> None:
        check_version()
        self.flux = Deployment.of(self.vllm_config)
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self._probe = Probe(self.model_runner.get_model(), self.vllm_config, self.flux, self.device)
        self._scores: dict[str, list[float]] = {}

    def get_kv_cache_spec(self) -> dict[str, Any]:
        specs = super().get_kv_cache_spec()
        bundles = self.flux.options.bundles(self.flux.layers)
        bundle_of = {self.flux.decoder_layers[layer]: bundle for bundle in bundles for layer in bundle}
        return {
            name: RoutedSpec.wrap(spec, bundle_of[extract_layer_index(name)], self.flux.config)
            for name, spec in specs.items()
        }

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)
        self._batch = BatchRoutes(self.model_runner, self.flux)
        for groups in self.model_runner.attn_groups:
            for group in groups:
                group.get_metadata_builder().flux = self._batch

    def execute_model(self, scheduler_output: Any) -> Any:
        probes: dict[str, list[int]] | None = getattr(scheduler_output, PROBES, None)
        if probes:
            self._scores.update(zip(probes, self._probe.scores(list(probes.values())), strict=True))
        self._batch.forget()
        output = super().execute_model(scheduler_output)
        # None: the tokens are sampled, and the output made, by a call of its own.
        return output if output is None else self._with_scores(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_scores(super().sample_tokens(*args, **kwargs))

    def _with_scores(self, output: Any) -> Any:
        if not self._scores:
            return output
        scores, self._scores = self._scores, {}
        if hasattr(output, "get_output"):
            return _AsyncOutput(output, scores)
        return _scored(output, scores)


def _scored(output: Any, scores: dict[str, list[float]]) -> Any:
    # A copy: vLLM returns one shared object for empty steps.
    output = copy.copy(output)
    setattr(output, SCORES, scores)
    return output


class _AsyncOutput:
    """An output still on the device, which gets the scores when it arrives."""

    def __init__(self, inner: Any, scores: dict[str, list[float]]) -> None:
        self._inner, self._scores = inner, scores

    def get_output(self) -> Any:
        return _scored(self._inner.get_output(), self._scores)


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


class FluxWorker(RoutedWorker, _Worker):
    """`--worker-cls flux_attention.serving.worker.FluxWorker`."""
