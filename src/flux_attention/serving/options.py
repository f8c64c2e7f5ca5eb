"""Options of the engine (`--additional-config '{"flux": {…}}'`) and of one request (`extra_args`).

Both are plain JSON values when they arrive, so everything is checked here, and the message names the option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

from flux_attention.config import ROUTER_INPUTS, FluxConfig, RouterInput
from flux_attention.models.adapter import Adapter, check_backbone, describe_backbone, load_adapter
from flux_attention.models.families import routable_layers
from flux_attention.route import Dial, Policy, PolicyContext, Static, parse_policy

CONFIG_KEY = "flux"
# Where the scheduler puts a request's route for the workers: with the request's own parameters, which vLLM sends along.
# A tuple of use_full per routable layer; () = the layers decide while they prefill.
ROUTE_KEY = "flux_route"
# vLLM names these after transformers' model types; the plugin reads queries before RoPE from `self_attn.rotary_emb`.
FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine routes.

    Attributes:
        adapter: folder, shipped name or Hub id, as everywhere else.
        router_input: "probe" or "inline"; None takes the adapter's.
        kv_bundle: layers that share a KV-cache group, or the groups themselves as lists of routable layers (equal
            lengths). A group gives blocks back for a request when all its layers run sparse for it, so a number
            stands for bundles of layers that the router treats alike (`bundles`). 1 saves most; every group costs
            the engine time at every step. None: as large as leaves six groups.
        break_even_tokens: prompts of at most this many tokens run dense without a probe; None takes sinks + window,
            below which both kinds of layer see the same keys.
        probe_batch: prompts that one engine step probes at most, 200 tokens each.
    """

    adapter: str
    router_input: RouterInput | None = None
    kv_bundle: int | tuple[tuple[int, ...], ...] | None = None
    break_even_tokens: int | None = None
    probe_batch: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, str) or not self.adapter:
            raise _refuse("adapter", "a folder, a shipped name or a Hub id", self.adapter)
        if self.router_input is not None and self.router_input not in ROUTER_INPUTS:
            raise _refuse("router_input", f"one of {', '.join(ROUTER_INPUTS)}", self.router_input)
        if isinstance(self.kv_bundle, (list, tuple)):
            if not all(isinstance(b, (list, tuple)) and all(_is_count(x, 0) for x in b) for b in self.kv_bundle):
                raise _refuse("kv_bundle", "a number of layers or lists of layers", self.kv_bundle)
            object.__setattr__(self, "kv_bundle", tuple(map(tuple, self.kv_bundle)))
        elif self.kv_bundle is not None and not _is_count(self.kv_bundle, 1):
            raise _refuse("kv_bundle", "a number of layers or lists of layers", self.kv_bundle)
        if self.break_even_tokens is not None and not _is_count(self.break_even_tokens, 0):
            raise _refuse("break_even_tokens", "a number of tokens", self.break_even_tokens)
        if not _is_count(self.probe_batch, 1):
            raise _refuse("probe_batch", "a positive number of prompts", self.probe_batch)

    @classmethod
    def of(cls, vllm_config: Any) -> EngineOptions | None:
        """The options of an engine, None where it does not use the plugin. Raises ValueError on a bad one."""
        extra = vllm_config.additional_config
        found = extra.get(CONFIG_KEY) if isinstance(extra, Mapping) else None
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise ValueError(f'additional_config["{CONFIG_KEY}"] must be a mapping of options, got {found!r}')
        known = {field.name for field in fields(cls)}
        if unknown := sorted(map(str, set(found) - known)):
            raise ValueError(f"unknown option flux.{', flux.'.join(unknown)}; known ones: {', '.join(sorted(known))}")
        if "adapter" not in found:
            raise ValueError("flux.adapter is missing: name the adapter to route with")
        return cls(**found)

    def bundle_size(self, layers: int) -> int:
        """Layers of each KV-cache group. Raises ValueError when groups do not cover `layers` evenly."""
        if self.kv_bundle is None:
            return max(
                size for size in range(1, layers + 1) if layers % size == 0 and (size == 1 or layers >= 6 * size)
            )
        if isinstance(self.kv_bundle, int):
            if layers % self.kv_bundle:
                raise _refuse("kv_bundle", f"a divisor of the model's {layers} routable layers", self.kv_bundle)
            return self.kv_bundle
        lengths = {len(bundle) for bundle in self.kv_bundle}
        if len(lengths) != 1 or sorted(layer for bundle in self.kv_bundle for layer in bundle) != list(range(layers)):
            expected = f"lists of equal length that hold each of the layers 0 … {layers - 1} once"
            raise _refuse("kv_bundle", expected, self.kv_bundle)
        return lengths.pop()


@dataclass(frozen=True)
class Deployment:
    """An adapter on an engine, checked against it.

    Attributes:
        options: the engine's.
        adapter: the adapter, on the CPU.
        inline: whether routes are found while prefilling, instead of by the probe before it.
        decoder_layers: index in the decoder of each routable layer.
    """

    options: EngineOptions
    adapter: Adapter
    inline: bool
    decoder_layers: tuple[int, ...]

    @property
    def config(self) -> FluxConfig:
        return self.adapter.config

    @property
    def layers(self) -> int:
        return len(self.decoder_layers)

    @property
    def break_even(self) -> int:
        """Longest prompt that runs dense unrouted, in tokens."""
        floor, wanted = self.config.min_routed_tokens, self.options.break_even_tokens
        return floor if wanted is None else max(floor, wanted)

    @classmethod
    def of(cls, vllm_config: Any) -> Deployment:
        """Load the adapter that the engine's options name.

        Raises:
            ValueError: no or bad options, an adapter for another model, a model family or an engine feature that the
                plugin does not serve, options that exclude each other. The message names the way out.
        """
        options = EngineOptions.of(vllm_config)
        if options is None:
            raise ValueError(
                'the Flux scheduler and worker need options: --additional-config \'{"flux": {"adapter": "…"}}\', or '
                "start the engine with flux-attn serve"
            )
        adapter = _load(options.adapter)
        config, model = adapter.config, vllm_config.model_config
        family = model.hf_text_config.model_type
        if family not in FAMILIES:
            raise ValueError(f"model family {family!r} is not served; {', '.join(FAMILIES)} are")
        layers = routable_layers(model.hf_text_config)
        check_backbone(config, describe_backbone(model.hf_config, layers))
        if (config.retrieval_mode, config.sparse_mode) != ("full", "streaming"):
            raise ValueError(
                f"the adapter routes between {config.retrieval_mode} and {config.sparse_mode}; vLLM serves full and "
                "streaming: paged kernels have no other mode"
            )
        deployment = cls(options, adapter, (options.router_input or config.router_input) == "inline", layers)
        options.bundle_size(deployment.layers)
        _check_engine(vllm_config, deployment)
        return deployment


@lru_cache(maxsize=4)
def _load(adapter: str) -> Adapter:
    # Scheduler, worker and request validation may share a process; an adapter is megabytes and never changes.
    return load_adapter(adapter)


def _check_engine(vllm_config: Any, deployment: Deployment) -> None:
    """Refuse engine features that routing cannot work with."""
    parallel, cache, scheduler = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.scheduler_config
    block, block_tokens = cache.block_size, deployment.config.block_tokens
    refused = {
        f"--block-size {block}: it must divide the adapter's block of {block_tokens} tokens": block_tokens % block,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "vLLM's second model runner: set VLLM_USE_V2_MODEL_RUNNER=0 in the environment": (
            vllm_config.use_v2_model_runner
        ),
        "cascade attention: rows of different routes share no prefix (--disable-cascade-attn, the default)": (
            not vllm_config.model_config.disable_cascade_attn
        ),
        "LoRA: the probe would run without a request's own weights": vllm_config.lora_config is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        "KV transfer between engines": vllm_config.kv_transfer_config is not None,
        "prompt embeddings (routes are made from token ids)": vllm_config.model_config.enable_prompt_embeds,
        "--disable-hybrid-kv-cache-manager: layers of one request hold different numbers of blocks": (
            scheduler.disable_hybrid_kv_cache_manager
        ),
    }
    for feature, asked in refused.items():
        if asked:
            raise ValueError(f"Flux routing does not work with {feature}")
    if not deployment.inline:
        return
    excluded = {
        "chunked prefill: layers decide when they see the whole prompt (--no-enable-chunked-prefill)": (
            scheduler.enable_chunked_prefill
        ),
        "prefix caching: blocks are looked up before the route is known (--no-enable-prefix-caching)": (
            cache.enable_prefix_caching
        ),
        "compiled models: layers decide on the host (--enforce-eager)": not vllm_config.model_config.enforce_eager,
    }
    for feature, asked in excluded.items():
        if asked:
            raise ValueError(f'router_input="inline" excludes {feature}; or route with router_input="probe"')


@dataclass(frozen=True)
class RequestOptions:
    """How one request is routed: `SamplingParams.extra_args`, over HTTP the field `vllm_xargs`.

    Keys: `flux_policy` (a name as on the command line: router, dense, sparse, static:1,4,…), `flux_min_sparsity` and
    `flux_max_sparsity` (the dial), `flux_report` (1 = put the route into the response).

    Attributes:
        policy: what makes the route; None = the adapter's router.
        dial: range that a router's sparsity is held in.
        report: whether the response tells the route.
    """

    policy: Policy | None = None
    dial: Dial = field(default_factory=Dial)
    report: bool = False

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None, layers: int, *, inline: bool = False) -> RequestOptions:
        """Read and check a request's options. Raises ValueError naming the option."""
        given = {key: value for key, value in (extra_args or {}).items() if str(key).startswith("flux_")}
        known = ("flux_max_sparsity", "flux_min_sparsity", "flux_policy", "flux_report")
        if unknown := sorted(set(given) - {*known, ROUTE_KEY}):
            raise ValueError(f"unknown option {', '.join(unknown)}; known ones: {', '.join(known)}")
        report = given.get("flux_report", False)
        if report not in (0, 1):
            raise ValueError(f"flux_report must be 0 or 1, got {report!r}")
        bounds = {k: given[f"flux_{k}"] for k in ("min_sparsity", "max_sparsity") if f"flux_{k}" in given}
        try:
            dial = Dial(**bounds)
        except ValueError as error:
            raise ValueError(f"flux_{error}") from None
        text = given.get("flux_policy", "router")
        if not isinstance(text, str):
            raise ValueError(f"flux_policy must be a policy's name, got {text!r}")
        policy = parse_policy(text)
        if policy is not None and not dial.is_open:
            raise ValueError(f"flux_policy {text!r} fixes the route; the sparsity dial is for the router only")
        if isinstance(policy, Static):
            policy(PolicyContext(layers, ()))  # raises for a layer that is not there
        if inline and not dial.is_open:
            raise ValueError("a sparsity dial ranks all layers before prefill; this engine routes inline")
        return cls(policy, dial, bool(report))


def check_request(vllm_config: Any, params: Any) -> None:
    """Refuse a request with bad routing options. Does nothing on an engine without the plugin."""
    options = EngineOptions.of(vllm_config)
    extra = getattr(params, "extra_args", None)
    if options is None or not extra:
        return
    if ROUTE_KEY in extra:
        raise ValueError(f"{ROUTE_KEY} is set by the engine; force a route with flux_policy")
    config = _load(options.adapter).config
    assert config.backbone is not None
    inline = (options.router_input or config.router_input) == "inline"
    RequestOptions.of(extra, len(config.backbone.routable_layers), inline=inline)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _refuse(name: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"flux.{name} must be {expected}, got {value!r}")


def probe_ends(prompt: Sequence[int], pool_tokens: int) -> list[int]:
    """The tokens of a prompt that the probe reads: its first and last `pool_tokens`."""
    return [*prompt[:pool_tokens], *prompt[max(pool_tokens, len(prompt) - pool_tokens) :]]
