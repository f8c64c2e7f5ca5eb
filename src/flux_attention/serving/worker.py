"""Workers that probe new prompts, publish routed KV specs and tell the attention which rows run sparse."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from vllm.model_executor.model_loader.utils import get_model_architecture
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.outputs import AsyncModelRunnerOutput

from flux_attention.serving.batch import BatchRoutes, InlineRouting
from flux_attention.serving.bundles import plan
from flux_attention.serving.compat import check_version
from flux_attention.serving.kv import RoutedSpec
from flux_attention.serving.options import Deployment
from flux_attention.serving.probe import Probe
from flux_attention.serving.scheduler import PROBES, SCORES
from flux_attention.serving.weights import loading_with

if TYPE_CHECKING:
    _Mixed = Any
else:
    _Mixed = object


class RoutedWorker(_Mixed):
    """What the plugin adds to vLLM's workers; a mix-in for the CPU's and the GPU's."""

    def init_device(self) -> None:
        check_version()
        self.flux = Deployment.of(self.vllm_config)
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        model_class, _ = get_model_architecture(self.vllm_config.model_config)
        with loading_with(self.flux.adapter.delta, model_class):
            super().load_model(*args, **kwargs)
        self._probe = Probe(self.model_runner.get_model(), self.vllm_config, self.flux, self.device)
        self._scores: dict[str, list[float]] = {}
        self._inline: InlineRouting | None = None
        tokenizer = cached_tokenizer_from_config(self.vllm_config.model_config)
        self._bundles = plan(
            self.flux.options, self.flux.layers, self.flux.config.pool_tokens, tokenizer, self._probe.scores
        )

    def get_kv_cache_spec(self) -> dict[str, Any]:
        specs = super().get_kv_cache_spec()
        bundle_of = {self.flux.decoder_layers[layer]: bundle for bundle in self._bundles for layer in bundle}
        return {
            name: RoutedSpec.wrap(spec, bundle_of[extract_layer_index(name)], self.flux.config)
            for name, spec in specs.items()
        }

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)
        self._batch = BatchRoutes(self.model_runner, self.flux, self._bundles, self.device)
        if self.flux.inline:
            self._inline = InlineRouting(self._probe, self._batch, self.model_runner, self.flux.config)
        for groups in self.model_runner.attn_groups:
            for group in groups:
                group.get_metadata_builder().flux = self._batch

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        if self.device.type == "cuda" and not self.model_config.enforce_eager:
            self._probe.capture(self.flux.options.probe_batch)
        return result

    def execute_model(self, scheduler_output: Any) -> Any:
        probes: dict[str, list[int]] | None = getattr(scheduler_output, PROBES, None)
        if probes:
            self._scores.update(zip(probes, self._probe.scores(list(probes.values())), strict=True))
        self._batch.begin_step(bool(scheduler_output.scheduled_new_reqs))
        output = super().execute_model(scheduler_output)
        if self._inline is not None:
            self._scores.update(self._inline.take())
        # None: the tokens are sampled, and the output made, by a call of its own.
        return output if output is None else self._with_scores(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_scores(super().sample_tokens(*args, **kwargs))

    def _with_scores(self, output: Any) -> Any:
        if not self._scores:
            return output
        scores, self._scores = self._scores, {}
        if isinstance(output, AsyncModelRunnerOutput):
            return _AsyncOutput(output, scores)
        return _scored(output, scores)


def _scored(output: Any, scores: dict[str, list[float]]) -> Any:
    # A copy: vLLM returns one shared object for empty steps.
    output = copy.copy(output)
    setattr(output, SCORES, scores)
    return output


class _AsyncOutput(AsyncModelRunnerOutput):
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
