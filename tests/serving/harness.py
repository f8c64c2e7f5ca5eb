"""Engines of vLLM, and the transformers path that they must agree with. Used by the tests and by the benchmark."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.models.adapter import save_adapter
from flux_attention.models.attach import attach
from flux_attention.models.backbones import converted_folder, load_backbone
from flux_attention.models.controller import FluxAttention
from flux_attention.route import Fixed, Route
from flux_attention.serving.launch import engine_arguments

# Read when vLLM is imported: no look-ups outside, the engine in this process, the runner that CPUs have.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    # Ranks of a tensor parallel engine share the cores as they come.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
os.environ.update(ENVIRONMENT)

TOLERANCE = 1e-3
TINY_CONFIG = FluxConfig(sink_tokens=32, window_tokens=64, block_tokens=32, pool_tokens=8, tail_tokens=3)


@dataclass
class Reference:
    """A model on the transformers path, attached, and the folders that an engine is started from."""

    folder: str
    adapter: str
    controller: FluxAttention
    tokenizer: Any = None
    _found: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return len(self.controller.layers)

    def logprobs(self, prompt: Sequence[int], tokens: Sequence[int], sparse_layers: Sequence[int]) -> Tensor:
        """Log-probabilities `[len(tokens), vocabulary]` of the positions that `tokens` were sampled at."""
        # The same requests come again, warm or after preemption; this is the slow side.
        key = tuple(prompt), tuple(tokens), tuple(sparse_layers)
        if key not in self._found:
            self._found[key] = self._logprobs(prompt, tokens, sparse_layers)
        return self._found[key]

    @torch.no_grad()
    def _logprobs(self, prompt: Sequence[int], tokens: Sequence[int], sparse_layers: Sequence[int]) -> Tensor:
        use_full = torch.ones(self.layers, 1, dtype=torch.bool)
        use_full[list(sparse_layers)] = False
        ids = torch.tensor([[*prompt, *tokens]])
        with self.controller.using(Fixed(Route(use_full))):
            logits = self.controller.model(ids, use_cache=False, logits_to_keep=len(tokens) + 1).logits
        return logits[0, :-1].float().log_softmax(-1)

    @torch.no_grad()
    def sparse_layers(self, prompt: Sequence[int]) -> list[int]:
        """Layers that the router runs sparse."""
        ids = torch.tensor(prompt)
        if self.controller.config.router_input == "inline":
            self.controller.model(ids[None], use_cache=False)
            route = self.controller.last_route
        else:
            route = self.controller.route([ids])
        assert route is not None
        use_full = route.use_full[:, 0]
        return [layer for layer, full in enumerate(use_full.tolist()) if not full]


def smollm2() -> Reference:
    model, tokenizer = load_backbone("smollm2")
    return Reference(
        str(converted_folder()), "smollm2-135m-instruct", attach(model, "smollm2-135m-instruct"), tokenizer
    )


def tiny(
    family: str, folder: Path, seed: int = 0, *, head_dim: int = 32, config: FluxConfig = TINY_CONFIG
) -> Reference:
    """A random model of four layers whose router is of many minds, saved with its adapter under `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from tests.unit.tiny_backbone import make_tokenizer

    shape: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # Peaked attention: with the default every mask yields nearly the same logits.
        "initializer_range": 0.12,
    }
    torch.manual_seed(seed)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape)),
    }[family]().eval()
    backbone, adapter = folder / "backbone", folder / "adapter"
    model.save_pretrained(backbone)
    make_tokenizer().save_pretrained(backbone)
    controller = attach(model, config)
    router = controller.router
    with torch.no_grad():
        prompts = [torch.randint(3, 259, (200,)) for _ in range(16)]
        router.fit_input_scale(controller.probe(prompts))
        router.weights[-1].normal_(0, 1)
        router.biases[-1].zero_()
        # Centred on these prompts, so that every layer decides either way.
        logits = router(controller.probe(prompts))
        router.biases[-1][:, 1] = (logits[..., 0] - logits[..., 1]).median(1).values
    save_adapter(adapter, controller.config, router.state_dict())
    return Reference(str(backbone), str(adapter), controller)


class Engines:
    """Starts engines in this process, one at a time."""

    def __init__(self) -> None:
        self._llm: Any = None

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(
        self, reference: Reference, *, flux: dict[str, Any] | None = None, on_cpu: bool = True, **arguments: Any
    ) -> Any:
        """An engine of the plugin with `flux` options; `arguments` are vLLM's, over what suits small models."""
        from vllm import LLM

        self.stop()
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2560,
            "block_size": reference.controller.config.block_tokens,
            "seed": 0,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            **engine_arguments(
                reference.adapter, on_cpu=on_cpu, asynchronous=not on_cpu, flux={"kv_bundle": 1, **(flux or {})}
            ),
        }
        self._llm = LLM(reference.folder, **{**defaults, **arguments})
        return self._llm

    def stop(self) -> None:
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


@dataclass(frozen=True)
class Ask:
    """One request. `options` as in `RequestOptions`; `tokens` to generate, greedily."""

    prompt: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()
    tokens: int = 8

    def parameters(self) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,
            max_tokens=self.tokens,
            ignore_eos=True,
            logprobs=1,
            extra_args={"flux_report": 1, **dict(self.options)},
        )


def generate(llm: Any, asks: Sequence[Ask]) -> list[Any]:
    """vLLM's outputs of one batch."""
    prompts = [{"prompt_token_ids": list(ask.prompt)} for ask in asks]
    return llm.generate(prompts, [ask.parameters() for ask in asks], use_tqdm=False)


def differences(reference: Reference, asks: Sequence[Ask], outputs: Sequence[Any]) -> list[float]:
    """Largest difference of log-probabilities per request, after checking that greedy tokens and routes are equal.

    Raises AssertionError where a token or a route differs.
    """
    found = []
    for ask, output in zip(asks, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert len(tokens) == ask.tokens
        sparse = output.kv_transfer_params["flux"]["sparse_layers"]
        options = dict(ask.options)
        if not options:
            assert sparse == reference.sparse_layers(ask.prompt)
        expected = reference.logprobs(ask.prompt, tokens, sparse)
        assert expected.argmax(-1).tolist() == tokens
        ours = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        theirs = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        found.append(float((torch.tensor(ours) - theirs).abs().max()))
    return found


def free_blocks(llm: Any) -> tuple[int, int]:
    """Free blocks of the KV pool, and all of them but the null block."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    return pool.get_num_free_blocks(), pool.num_gpu_blocks - 1


def scheduler(llm: Any) -> Any:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def mixed_asks(reference: Reference, text_ids: Sequence[int], lengths: Sequence[int], tokens: int = 8) -> list[Ask]:
    """Requests of every kind: the router's choice, a dial, dense, sparse, lists; each on its own stretch of text."""
    layers = reference.layers
    kinds: list[dict[str, Any]] = [
        {},
        {"flux_policy": "dense"},
        {"flux_policy": "static:" + ",".join(map(str, range(0, layers, 2)))},
        {"flux_max_sparsity": 0.5},
        {},
        {"flux_policy": "sparse"},
        {"flux_min_sparsity": 0.9},
        {"flux_policy": "interleaved:0.75"},
    ]
    asks = []
    for i, length in enumerate(lengths):
        start = (i * 997) % max(1, len(text_ids) - length)
        prompt = tuple(text_ids[start : start + length])
        assert len(prompt) == length, "the text is too short"
        asks.append(Ask(prompt, tuple(kinds[i % len(kinds)].items()), tokens))
    return asks


def random_ids(length: int, seed: int = 0) -> list[int]:
    """Tokens of the tiny model's vocabulary."""
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_traffic(llm: Any, requests: int, seed: int = 0) -> int:
    """Random requests, some aborted at random moments, until none is left; returns how many were aborted.

    Raises AssertionError where a request gets lost, or the plugin keeps something of one.
    """
    rng = random.Random(seed)
    engine, state = llm.llm_engine, scheduler(llm)
    config = state.flux.config
    # The longest prompt that drops no key: longer ones wait for their route.
    short = config.sink_tokens + config.window_tokens
    lengths = (3, short // 2, short + 1, short + 34, short + 164, short + 294)
    policies = ["router", "dense", "sparse", "static:0,2", "random:0.5"]
    live: list[str] = []
    aborted = finished = held_back = 0

    def step() -> int:
        done = [output.request_id for output in engine.step() if output.finished]
        live[:] = [name for name in live if name not in done]
        return len(done)

    for number in range(requests):
        prompt = random_ids(rng.choice(lengths), seed=rng.randrange(40))
        ask = Ask(tuple(prompt), (("flux_policy", rng.choice(policies)),), tokens=rng.randrange(1, 12))
        engine.add_request(str(number), {"prompt_token_ids": prompt}, ask.parameters())
        live.append(str(number))
        held_back += len(state._unrouted)
        if rng.random() < 0.3:
            engine.abort_request([live.pop(rng.randrange(len(live)))])
            aborted += 1
        if rng.random() < 0.7:
            finished += step()
    while engine.has_unfinished_requests():
        finished += step()
    # Workers hear of the last requests with the next step; an engine that schedules ahead has more of them on the way.
    for _ in range(3):
        engine.step()
    assert finished + aborted == requests
    # Else no abort can have met a request that waits for its route.
    assert held_back > requests // 10
    assert not state.flux_routes and not state._unrouted and not state._probing and not state._settled
    assert not any(llm.collective_rpc(lambda worker: len(worker.model_runner.requests)))
    return aborted


def preemptions(llm: Any) -> list[int]:
    """Preemptions that the engine counted."""
    return [int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
