"""The vLLM plugin, measured on real engines: exactness, blocks, the scheduler's time; on a GPU, latency and throughput.

    python benchmarks/serving.py                       SmolLM2 and a tiny model on the processor
    python benchmarks/serving.py --gpu --seconds 270   shapes of Qwen3-8B with random weights
    python benchmarks/serving.py --gpu --loads 32768x16,131072x2    other loads alone, in a file of theirs
    python benchmarks/serving.py --gpu --tensor-parallel 2          the same over two GPUs, in a file of its own

On a GPU a small model comes first, and is compared with float32 in batches of every kind (chunked, from the prefix
cache, preempted, after aborts, after random traffic): without that no speed is measured. Speed is that of
one engine, which answers the same prompts routed and forced dense, request by request. Three quarters of the layers run
sparse, whole KV groups of them: what is fixed here is the route, so that the figures are about the engine. The figures
that matter most come first, and each is on the disk as soon as it is known: a run that is cut off keeps what it has,
and names the loads that it had no time for. `--shape` and `--long` make a rehearsal of it that a processor can run.

Over two GPUs the check and the speeds run tensor parallel, after the ranks were asked for their own scores and routes:
they must be equal, bit for bit. Figures of such a run end in `_tp2`.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import Recorder, label, run_sections
from tests.serving import harness
from tests.serving.harness import Ask, Engines, differences, free_blocks, generate, mixed_asks, random_ids, scheduler
from torch import Tensor

# Around sinks + window (640), over block boundaries, several chunks of 512 tokens.
LENGTHS = (660, 300, 641, 700, 5, 769, 897, 656, 640, 33, 650, 800, 1025, 150, 64, 1281)
Q75 = tuple(layer for layer in range(36) if layer % 4 != 3)
SPARSE75 = "static:" + ",".join(map(str, Q75))
# Neither has a part in these models, and both may be installed in halves.
GPU_ENVIRONMENT = {"VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
# Ranks exchange through plain NCCL. NVLink multicast, which the other ways try to set up, is not there on every virtual
# machine with NVLink, and a failure to set it up may be a hang. Fork is no way to start ranks from a process that may
# have looked for a device.
PARALLEL_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
WORKER = "serving_worker.MeasuredWorker"
RESULTS = Path("benchmarks/results")
#: Engines of several ranks. One that is collected waits for ever for sockets that are still open (seen with vLLM 0.26),
#: so a process that has made one ends without collecting it.
KEPT: list[Any] = []
UNCOMPILED = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
BUNDLES = [*[list(Q75[i::3]) for i in range(3)], [layer for layer in range(36) if layer % 4 == 3]]


# ---------------------------------------------------------------------------------------------------- processor


def text_ids(reference: harness.Reference) -> list[int]:
    from flux_attention.data.corpus import documents

    text = "\n\n".join(document.text for document in documents("docstrings", "test"))
    ids: list[int] = reference.tokenizer(text[:40_000]).input_ids
    return ids


def cached_tokens(outputs: Sequence[Any]) -> int:
    """Prompt tokens that came out of the prefix cache; RuntimeError for none."""
    if not (found := sum(output.num_cached_tokens for output in outputs)):
        raise RuntimeError("no request found its prefix in the cache")
    return int(found)


def abort_some(llm: Any, asks: Sequence[Ask], steps: int) -> None:
    """Begin the same requests with their prompts backwards, and abort them after `steps`."""
    engine = llm.llm_engine
    for i, ask in enumerate(asks):
        engine.add_request(f"gone-{i}", {"prompt_token_ids": list(ask.prompt[::-1])}, ask.parameters())
    for _ in range(steps):
        engine.step()
    engine.abort_request([f"gone-{i}" for i in range(len(asks))])


def preempted(llm: Any) -> int:
    """Preemptions so far; RuntimeError for none."""
    if not (found := sum(harness.preemptions(llm))):
        raise RuntimeError("the pool was large enough for all: nothing was preempted")
    return found


def exactness(recorder: Recorder) -> None:
    """Mixed batches of SmolLM2 against the transformers path: chunked, cached, preempted, beside aborts, parallel."""
    reference = harness.smollm2()
    ids = text_ids(reference)
    asks = mixed_asks(reference, ids, LENGTHS)
    found: dict[str, list[float]] = {}

    def compare(case: str, llm: Any, asks: Sequence[Ask]) -> list[Any]:
        outputs = generate(llm, asks)
        found[case] = differences(reference, asks, outputs)
        recorder.note(f"dlogp_{case}", max(found[case]))
        return outputs

    with Engines() as engines:
        llm = engines.start(reference, max_num_batched_tokens=512, enable_prefix_caching=True)
        compare("chunked", llm, asks)
        cached_tokens(compare("warm_prefix_cache", llm, asks))
        abort_some(llm, asks, steps=1)
        compare("after_aborts", llm, asks)
        if free_blocks(llm)[0] != free_blocks(llm)[1]:
            raise RuntimeError("blocks are missing after aborts")
        # Four tokens below a block boundary: 180 blocks each, in 30 groups, so that four requests fill the pool, and
        # all of them want more at the same step.
        edge = [replace(ask, prompt=tuple(ids[i * 500 : i * 500 + 764])) for i, ask in enumerate(asks[:8])]
        llm = engines.start(reference, max_num_batched_tokens=512, num_gpu_blocks_override=740)
        compare("preempted", llm, edge)
        recorder.note("preemptions", preempted(llm))
        # Its 9 query and 3 key heads divide among three.
        llm = engines.start(reference, tensor_parallel_size=3, max_num_batched_tokens=512, kv_cache_memory_bytes=2**30)
        compare("tensor_parallel_3", llm, asks)
    recorder.note("requests", sum(map(len, found.values())))
    recorder.add("vllm_cpu_max_dlogp", max(max(values) for values in found.values()), "nat")
    if recorder.figures["vllm_cpu_max_dlogp"].value > harness.TOLERANCE:
        raise RuntimeError("the engine does not agree with the transformers path")


def leaks(recorder: Recorder) -> None:
    """500 random requests with aborts, on a tiny model; every block must be back."""
    with tempfile.TemporaryDirectory() as folder, Engines() as engines:
        reference = harness.tiny("llama", Path(folder))
        llm = engines.start(reference, max_num_batched_tokens=128, enable_prefix_caching=True, max_model_len=1024)
        aborted = harness.random_traffic(llm, requests=500)
        recorder.note("aborted", aborted)
        free, every = free_blocks(llm)
        asks = mixed_asks(reference, random_ids(4000), (300, 97, 400, 500), tokens=8)
        recorder.note("dlogp_after", max(differences(reference, asks, generate(llm, asks))))
        recorder.add("vllm_blocks_leaked", every - free, "blocks")


def scheduler_share(recorder: Recorder) -> None:
    """The plugin's scheduler time in a step with 64 running requests, over the stock scheduler's."""
    reference = harness.smollm2()
    prompt = text_ids(reference)[:1000]
    with Engines() as engines:
        seconds = {}
        for name in ("stock", "flux"):
            stock = {"scheduler_cls": None, "worker_cls": "auto", "additional_config": {}} if name == "stock" else {}
            llm = engines.start(
                reference, max_num_seqs=64, enable_prefix_caching=True, kv_cache_memory_bytes=4 << 30, **stock
            )
            seconds[name] = _scheduler_seconds(llm, prompt, "static:" + ",".join(map(str, range(0, 30, 2))))
    for name, (scheduling, step) in seconds.items():
        recorder.note(f"{name}_scheduler_ms", scheduling * 1e3)
        recorder.note(f"{name}_step_ms", step * 1e3)
    extra = seconds["flux"][0] - seconds["stock"][0]
    recorder.add("vllm_scheduler_share", max(0.0, extra) / seconds["flux"][1], "share")


def _scheduler_seconds(
    llm: Any, prompt: Sequence[int], policy: str, requests: int = 64, steps: int = 140
) -> tuple[float, float]:
    """Mean seconds of scheduling, and of a step, over decode steps of `requests` requests (more than a block's)."""
    engine, state = llm.llm_engine, scheduler(llm)
    spent = [0.0]
    for name in ("schedule", "update_from_output"):
        _timed(state, name, spent)
    ask = Ask(tuple(prompt), (("flux_policy", policy),), tokens=3 * steps + requests)
    # One first: the others find its prefix.
    for i in range(requests):
        engine.add_request(f"load-{i}", {"prompt_token_ids": list(prompt)}, ask.parameters())
        if i == 0:
            engine.step()
            engine.step()
    while len(state.running) < requests or any(r.num_computed_tokens < len(prompt) for r in state.running):
        engine.step()
    scheduling, whole = [], []
    for _ in range(steps):
        spent[0], started = 0.0, time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - started)
        scheduling.append(spent[0])
    if len(state.running) != requests:
        raise RuntimeError(f"{len(state.running)} requests ran, not {requests}")
    engine.abort_request([f"load-{i}" for i in range(requests)])
    # The mean: steps that cross a block boundary are the ones that cost.
    return statistics.fmean(scheduling), statistics.fmean(whole)


def _timed(owner: Any, name: str, spent: list[float]) -> None:
    inner = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - started

    setattr(owner, name, timed)


# ---------------------------------------------------------------------------------------------------- GPU


def big_model(folder: Path, context: int, **shape: int) -> tuple[Path, Path]:
    """Folders of a Qwen3-8B without weights, and of a random adapter for it; `shape` for a rehearsal."""
    from transformers import Qwen3Config

    from flux_attention.config import FluxConfig
    from flux_attention.models.adapter import describe_backbone, save_adapter
    from flux_attention.router import LayerRouter

    eight_b = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    config = Qwen3Config(
        **{**eight_b, **shape},
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )
    backbone, adapter = folder / "backbone", folder / "adapter"
    config.save_pretrained(backbone)
    flux = FluxConfig(backbone=describe_backbone(config, tuple(range(36))))
    torch.manual_seed(0)
    save_adapter(adapter, flux, LayerRouter(36, config.head_dim, 0.0).state_dict())
    return backbone, adapter


def parallel(ranks: int) -> dict[str, Any]:
    """vLLM's arguments for an engine of `ranks` ranks."""
    if ranks == 1:
        return {}
    return {
        "tensor_parallel_size": ranks,
        "distributed_executor_backend": "mp",
        # It sets up multicast memory whenever it can, whatever the environment says.
        "disable_custom_all_reduce": True,
    }


def ranks_agree(llm: Any, pool_tokens: int, vocabulary: int) -> int:
    """Compare what the ranks of an engine decide and were told; returns the number of decisions (layers of requests).

    A rank's scores are its own: all-reduced pooled queries through its own copy of the router. Only the first rank's
    reach the scheduler, whose route goes to all ranks.

    Raises:
        RuntimeError: two ranks differ in a bit of a score, or in a route.
    """
    rng, compared = random.Random(1), 0
    # One probe of each kind: replayed as it is, replayed with rows left over, and of other shapes, which is eager.
    for lengths in ([2 * pool_tokens], [2 * pool_tokens] * 3, [pool_tokens + 1, 2 * pool_tokens]):
        ends = [rng.choices(range(3, vocabulary), k=length) for length in lengths]
        first, *others = llm.collective_rpc("rank_scores", args=(ends,))
        compared += sum(map(len, first))
        if not (first and all(math.isfinite(p) for scores in first for p in scores)):
            raise RuntimeError("scores of a probe are not finite")
        if any(scores != first for scores in others):
            raise RuntimeError(f"the ranks score {len(ends)} prompts differently")
    first, *others = llm.collective_rpc("rank_routes")
    if any(routes != first for routes in others):
        raise RuntimeError("the ranks were told different routes")
    return compared + sum(map(len, first.values()))


class Speed:
    """One engine, and what it answers in which time.

    Args:
        settings: see `main`.
        recorder: gets every figure when it is known.
        until: when to stop, on the clock of `time.perf_counter`.
    """

    WAYS: ClassVar[dict[str, dict[str, Any]]] = {
        "dense": {"flux_policy": "dense"},
        "sparse75": {"flux_policy": SPARSE75},
        "router": {},
        "probed75": {"flux_min_sparsity": 0.75, "flux_max_sparsity": 0.75},
    }

    def __init__(self, settings: dict[str, Any], recorder: Recorder, until: float) -> None:
        self.recorder, self.until = recorder, until
        self.short, self.long, self.tokens = settings["short"], settings["long"], settings["tokens"]
        self.alone: dict[int, dict[str, dict[str, float]]] = {}
        self.left_out: set[tuple[int, int]] = set()
        self._started, self._loads, self._rng = time.perf_counter(), 0, random.Random(0)
        self._folder = tempfile.TemporaryDirectory()
        context = max(self.long, *(length for length, _ in settings["loads"] or ()), 0) + 2048
        model, adapter = big_model(Path(self._folder.name), context, **settings["shape"])
        say("importing vLLM")
        from vllm import LLM
        from vllm.platforms import current_platform

        from flux_attention.serving.launch import engine_arguments

        on_cpu = current_platform.is_cpu()
        arguments: dict[str, Any] = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": context,
            "max_num_seqs": 16,
            "max_num_batched_tokens": settings["chunk"],
            "block_size": 128,
            "gpu_memory_utilization": settings["memory"],
            "enable_prefix_caching": False,
            "seed": 0,
        }
        ahead = not on_cpu and not settings["synchronous"]
        arguments |= engine_arguments(str(adapter), on_cpu=on_cpu, asynchronous=ahead, flux={"kv_bundle": BUNDLES})
        arguments |= {"worker_cls": WORKER} | parallel(settings["tensor_parallel"])
        if not on_cpu:
            arguments["async_scheduling"] = ahead
        # Compiling takes a minute of the device and helps both ways alike; decode runs in full graphs all the same.
        graphs = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]} | ({} if settings["compile"] else UNCOMPILED)
        say("starting the engine")
        self.llm = LLM(str(model), compilation_config=graphs, **arguments)
        if settings["tensor_parallel"] > 1:
            KEPT.append(self.llm)
        state = scheduler(self.llm)
        groups = len(state.kv_cache_config.kv_cache_groups)
        self.pool = state.kv_cache_manager.block_pool.num_gpu_blocks * 128 // groups
        self._pool_tokens = state.flux.config.pool_tokens
        recorder.note("engine_start_s", round(time.perf_counter() - self._started, 1))
        recorder.note("kv_pool_dense_tokens", self.pool)
        recorder.note("probe_graphs", self.llm.collective_rpc("rank_graphs")[0])
        if not (on_cpu or recorder.details["probe_graphs"]):
            say("the probe is no CUDA graph and runs eagerly: the log says why")

    def load(self, way: str, length: int, concurrency: int, tokens: int, *, quiet: bool = False) -> dict[str, float]:
        """`concurrency` requests at once: median seconds to the first token, ms per token after it, and the whole."""
        from vllm import SamplingParams

        self._loads += 1
        prompts = [self._rng.choices(range(1000, self._vocabulary), k=length) for _ in range(concurrency)]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=dict(self.WAYS[way]))
        engine, first, last = self.llm.llm_engine, {}, {}
        started = time.perf_counter()
        for i, prompt in enumerate(prompts):
            engine.add_request(f"{self._loads}-{i}", {"prompt_token_ids": prompt}, params.clone())
        while engine.has_unfinished_requests():
            for output in engine.step():
                now = time.perf_counter() - started
                if output.outputs[0].token_ids:
                    first.setdefault(output.request_id, now)
                last[output.request_id] = now
            if time.perf_counter() > self.until:
                raise TimeoutError(f"no time left in the middle of {way}, {concurrency} × {length} tokens")
        whole = time.perf_counter() - started
        found = {
            "ttft_s": statistics.median(first.values()),
            "tpot_ms": statistics.median((last[name] - first[name]) / max(1, tokens - 1) for name in first) * 1e3,
            "seconds": whole,
            "tokens_per_s": concurrency * (length + tokens) / whole,
        }
        if not quiet:
            say(f"{way:<9} {concurrency:>2} × {length} tokens: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
        return found

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.perf_counter()

    @property
    def _vocabulary(self) -> int:
        size: int = self.llm.llm_engine.model_config.get_vocab_size()
        return size

    def warm_up(self) -> None:
        """Kernels are compiled, loaded or chosen when they first run: two chunks, and decode after them."""
        for way in ("dense", "sparse75", "probed75"):
            self.load(way, self.short + self.recorder.settings["chunk"], 1, 8)

    def compare_ranks(self) -> None:
        """See `ranks_agree`; nothing to do for one rank."""
        if self.recorder.settings["tensor_parallel"] > 1:
            decisions = ranks_agree(self.llm, self._pool_tokens, self._vocabulary)
            self.recorder.note("decisions_alike", self.recorder.details.get("decisions_alike", 0) + decisions)

    def overhead(self, seconds: float = 35, tokens: int = 32) -> None:
        """Prompts that are too short for any key to be dropped: what routing costs where it cannot gain.

        `router` is a request without options, which at this length runs dense, unprobed; `sparse75` is made to run
        sparse layers all the same. The figure is the worse of the two. Single requests vary by a tenth, whatever they
        ask for, so medians are compared, of many turns in every order.
        """
        orders = itertools.cycle(itertools.permutations(("dense", "router", "sparse75")))
        found: dict[str, list[float]] = {"dense": [], "router": [], "sparse75": []}
        began = now = time.perf_counter()
        until = min(began + seconds, self.until)
        # As long as another turn fits, of what the turns so far took.
        while not found["dense"] or now + (now - began) / len(found["dense"]) < until:
            for way in next(orders):
                found[way].append(self.load(way, self.short, 1, tokens, quiet=True)["seconds"])
            now = time.perf_counter()
        dense, size, rng = found.pop("dense"), label(self.short), random.Random(0)
        bounds = {}
        for way, each in found.items():
            draws = sorted(
                statistics.median(rng.choices(each, k=len(each))) / statistics.median(rng.choices(dense, k=len(dense)))
                for _ in range(2000)
            )
            bounds[way] = draws[50], draws[-51]
        self.recorder.note(f"overhead_{size}_dense_s", dense)
        ratios = {way: statistics.median(each) / statistics.median(dense) for way, each in found.items()}
        worst = max(ratios, key=lambda way: ratios[way])
        for way, name in (*((way, f"_{way}") for way in ratios), (worst, "")):
            each = [a / statistics.median(dense) for a in found[way]]
            self.recorder.add(f"vllm_overhead_{size}{name}", ratios[way], "ratio", each, bounds[way])

    def probe(self, rounds: int = 8) -> None:
        """Milliseconds that a probe adds to the time to first token, at twice the short length."""
        extra = []
        for _ in range(rounds):
            static, probed = (self.load(way, 2 * self.short, 1, 2)["ttft_s"] for way in ("sparse75", "probed75"))
            extra.append((probed - static) * 1e3)
        self.recorder.add("vllm_probe_ms", statistics.median(extra), "ms", extra)

    def compare(self, length: int, concurrency: int) -> None:
        """Requests that arrive together, each way, with the whole KV pool; throughput counts tokens in and out."""
        found: dict[str, dict[str, float]] = {}
        for way in ("sparse75", "dense"):
            found[way] = self.load(way, length, concurrency, self.tokens)
            self.recorder.note(f"load_{label(length)}_c{concurrency}", found)
        dense, sparse = found["dense"], found["sparse75"]
        size, throughput = label(length), sparse["tokens_per_s"] / dense["tokens_per_s"]
        self.left_out.discard((length, concurrency))
        self.recorder.details["left_out"] = [f"{n}x{count}" for n, count in sorted(self.left_out)]
        if concurrency == 1:
            self.alone[length] = found
            self.recorder.add(f"vllm_ttft_{size}_q75", dense["ttft_s"] / sparse["ttft_s"], "×")
            self.recorder.add(f"vllm_tpot_{size}_q75", dense["tpot_ms"] / sparse["tpot_ms"], "×")
        self.recorder.add(f"vllm_throughput_{size}_c{concurrency}", throughput, "×")
        if concurrency > 1:
            # Of several such loads the one that comes last, which is the largest, counts.
            self.recorder.add(f"vllm_throughput_{size}_q75", throughput, "×")
            # If none ran alone: what `needs` can know is as if they had come one after the other.
            each = {way: {"ttft_s": load["seconds"] / concurrency, "tpot_ms": 0.0} for way, load in found.items()}
            self.alone.setdefault(length, each)

    def needs(self, length: int, concurrency: int) -> float:
        """Seconds that `compare` will take, from what single requests took; 0 where none has run yet."""
        known = min(self.alone, key=lambda other: (other < length, abs(other - length)), default=None)
        if known is None:
            return 0.0
        # Prefill grows faster than prompts do, in proportion to this power from 32K to 128K.
        scale = length / known if length <= known else (length / known) ** 1.6
        fit = max(1, min(concurrency, self.pool // length))
        seconds = 0.0
        for way, alone in self.alone[known].items():
            turns = math.ceil(concurrency / fit) if way == "dense" else 1
            decode = self.tokens * alone["tpot_ms"] / 1e3 * turns * fit**0.5
            seconds += concurrency * alone["ttft_s"] * scale + decode
        return 1.1 * seconds

    def run_loads(self, loads: Sequence[tuple[int, int]]) -> None:
        """What there is time for, in this order."""
        for length, concurrency in loads:
            needed = self.needs(length, concurrency)
            if needed <= self.left:
                self.compare(length, concurrency)
            else:
                say(f"no time for {concurrency} × {length} tokens: {needed:.0f} s, {self.left:.0f} s left")

    def run(self, loads: Sequence[tuple[int, int]] | None) -> None:
        """`loads` alone, or everything, the wanted figures first; what is left out is named in the results."""
        self.warm_up()
        self.compare_ranks()
        if loads is not None:
            self.left_out = set(loads)
            self.run_loads(loads)
            self.compare_ranks()
            return
        middle = self.long // 4
        if self.recorder.settings["tensor_parallel"] > 1:
            wanted = [(self.long, 1), (self.long, 4), (middle, 16), (middle, 1)]
            self.left_out = set(wanted)
            self.run_loads(wanted)
            self.compare_ranks()
            self.probe()
            self.overhead()
            say("done")
            return
        self.left_out = {(length, count) for length in (middle, self.long) for count in (1, 4, 16)}
        self.run_loads([(self.long, 1)])
        self.overhead()
        self.run_loads([(self.long, 4)])
        if (self.long, 4) in self.left_out:
            self.run_loads([(self.long, 2)])
        self.probe()
        self.run_loads([(middle, 1), (middle, 4), (middle, 16), (self.long, 16)])
        say("done")


_BEGAN = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _BEGAN:6.1f} s] {text}", flush=True)


class Checked:
    """A small model on the GPU's kernels and graphs: routed requests may err as much as dense ones, against float32.

    The cases of `exactness`, as far as bfloat16 allows them: there, greedy tokens may differ from float32's, so the
    log-probabilities of the tokens that the engine chose are compared.

    Args:
        folder: for the model and its adapter.
        ranks: more than one: a tensor parallel engine, whose ranks must decide alike.
    """

    #: Blocks of the pool: the mixed batch stays (288 if all of it ran dense), a batch at an edge does not (512).
    BLOCKS = 240

    def __init__(self, folder: Path, ranks: int) -> None:
        config = replace(harness.TINY_CONFIG, sink_tokens=128, window_tokens=128, block_tokens=128)
        self.reference = harness.tiny("qwen3", folder, head_dim=128, config=config)
        self.found: dict[str, dict[str, list[Tensor]]] = {}
        self.notes: dict[str, float] = {}
        self._ranks = ranks

    def run(self, engines: Engines) -> None:
        """Raises RuntimeError or AssertionError where anything is not as it should be."""
        llm = engines.start(
            self.reference,
            on_cpu=not torch.cuda.is_available(),
            dtype="bfloat16",
            enforce_eager=False,
            compilation_config=UNCOMPILED | {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]},
            max_num_seqs=16,
            max_num_batched_tokens=256,
            max_model_len=1024,
            enable_prefix_caching=True,
            num_gpu_blocks_override=self.BLOCKS,
            # Next to nothing: another engine follows in this process.
            kv_cache_memory_bytes=256 << 20,
            gpu_memory_utilization=0.1,
            worker_cls=WORKER,
            **parallel(self._ranks),
        )
        if self._ranks > 1:
            KEPT.append(llm)
        ids = random_ids(4000)
        asks = mixed_asks(self.reference, ids, (500, 96, 700, 300, 97, 640, 333, 257) * 2, tokens=150)
        self._compare("chunked", llm, asks)
        say(f"{len(asks)} requests answered; probes captured for {llm.collective_rpc('rank_graphs')} prompts")
        if sum(harness.preemptions(llm)):
            raise RuntimeError("the pool is too small for the mixed batch")
        self.notes["cached_tokens"] = cached_tokens(self._compare("warm_prefix_cache", llm, asks))
        abort_some(llm, asks, steps=3)
        self._compare("after_aborts", llm, asks)
        # Four tokens below a block boundary: all of them want more blocks at the same step.
        edge = [replace(ask, prompt=tuple(ids[i * 97 : i * 97 + 764])) for i, ask in enumerate(asks)]
        self._compare("preempted", llm, edge)
        self.notes["preemptions"] = preempted(llm)
        self.notes["aborted"] = harness.random_traffic(llm, requests=500)
        say(f"500 random requests, {self.notes['aborted']} of them aborted, leave nothing")
        self._compare("after_traffic", llm, asks)
        if self._ranks > 1:
            pool_tokens = self.reference.controller.config.pool_tokens
            self.notes["decisions_alike"] = ranks_agree(llm, pool_tokens, vocabulary=259)
            say(f"{self.notes['decisions_alike']} decisions are alike on all ranks")

    def errors(self) -> dict[str, float]:
        """Mean distance from float32, nat a token: of dense requests, of routed ones, and what the mask matters.

        Raises:
            RuntimeError: routed requests of a case err more than dense ones may.
        """
        kinds = ("dense", "sparse", "mask")
        together = {kind: self._mean([part for case in self.found.values() for part in case[kind]]) for kind in kinds}
        for case, parts in self.found.items():
            error = self._mean(parts["sparse"])
            self.notes[f"{case}_sparse"] = error
            if error > 2 * together["dense"]:
                raise RuntimeError(f"{case}: routed requests differ from the transformers path: {error}, {together}")
        if together["mask"] < 4 * together["sparse"]:
            raise RuntimeError(f"the check could not see a wrong mask: {together}")
        return together

    @staticmethod
    def _mean(parts: Sequence[Tensor]) -> float:
        return float(torch.cat(list(parts)).abs().mean())

    def _compare(self, case: str, llm: Any, asks: Sequence[Ask]) -> list[Any]:
        outputs = generate(llm, asks)
        found: dict[str, list[Tensor]] = {"dense": [], "sparse": [], "mask": []}
        for ask, output in zip(asks, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            chosen = torch.tensor(tokens)[:, None]
            sparse = output.kv_transfer_params["flux"]["sparse_layers"]
            expected = self.reference.logprobs(ask.prompt, tokens, sparse).gather(1, chosen)[:, 0]
            steps = zip(output.outputs[0].logprobs, tokens, strict=True)
            ours = torch.tensor([step[token].logprob for step, token in steps])
            found["sparse" if sparse else "dense"].append(ours - expected)
            if sparse and len(ask.prompt) > 256:
                # What the mask matters: with too little of it the check could not fail.
                found["mask"].append(self.reference.logprobs(ask.prompt, tokens, ()).gather(1, chosen)[:, 0] - expected)
        if free_blocks(llm)[0] != free_blocks(llm)[1]:
            raise RuntimeError(f"{case}: blocks are missing")
        self.found[case] = found
        return outputs


def gpu_check(folder: Path, ranks: int) -> tuple[dict[str, float], dict[str, float]]:
    """Runs `Checked`: its errors, and what it counted."""
    checked = Checked(folder, ranks)
    if ranks > 1:
        # Never stopped: see `KEPT`.
        checked.run(Engines())
    else:
        with Engines() as engines:
            checked.run(engines)
    return checked.errors(), checked.notes


def check(recorder: Recorder) -> None:
    """`gpu_check`, beside the figures that rest on it."""
    if (ranks := recorder.settings["tensor_parallel"]) > 1:
        errors, notes = checked_apart(ranks)
    else:
        with tempfile.TemporaryDirectory() as folder:
            errors, notes = gpu_check(Path(folder), ranks)
        # Its engine's last references; the next one is to have the device.
        gc.collect()
    recorder.note("check", notes)
    for name, value in errors.items():
        recorder.add(f"vllm_gpu_check_{name}", value, "nat")


def checked_apart(ranks: int) -> tuple[dict[str, float], dict[str, float]]:
    """`gpu_check` in a process of its own: see `KEPT`. Raises RuntimeError when it fails there."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_check_and_leave, args=(ranks, there))
    process.start()
    there.close()
    try:
        found: tuple[dict[str, float], dict[str, float]] = here.recv()
    except EOFError:
        raise RuntimeError("the check failed in its process; see above") from None
    finally:
        process.join()
    return found


def _check_and_leave(ranks: int, connection: Any) -> None:
    status = 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            connection.send(gpu_check(Path(folder), ranks))
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        connection.close()
        sys.stdout.flush()
        os._exit(status)


def gpu(options: argparse.Namespace, version: str) -> int:
    """The check, and the speeds if it is green. Returns the number of failures."""
    until = time.perf_counter() + options.seconds
    # Beyond its own clock: it may hang where it does not look at it.
    faulthandler.dump_traceback_later(options.seconds + 5, exit=True)
    ranks = options.tensor_parallel
    os.environ.update(GPU_ENVIRONMENT | (PARALLEL_ENVIRONMENT if ranks > 1 else {}))
    names = ("short", "long", "chunk", "memory", "compile", "synchronous", "tokens", "loads", "tensor_parallel")
    settings = {"vllm": version, "shape": json.loads(options.shape)} | {name: getattr(options, name) for name in names}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    suffix = f"_tp{ranks}" if ranks > 1 else ""
    program = "serving-gpu" + suffix.replace("_", "-") + ("" if options.loads is None else "-loads")
    # Figures of other shapes would bear the names of the model's.
    folder = options.out or (None if settings["shape"] else RESULTS)
    recorder = Recorder(program, device, settings, folder, options.commit, suffix=suffix)

    def speed(recorder: Recorder) -> None:
        Speed(settings, recorder, until).run(options.loads)

    if failures := run_sections([("check", check)], recorder):
        print("  no speed is measured without it", flush=True)
        return failures
    return run_sections([("speed", speed)], recorder) if options.sections is None else 0


def parse_loads(text: str) -> list[tuple[int, int]]:
    """ "32768x16,131072x4" → [(32768, 16), (131072, 4)]: tokens of a prompt, prompts at once."""
    loads = []
    for part in text.split(","):
        length, _, concurrency = part.partition("x")
        if not (length.isdecimal() and concurrency.isdecimal() and int(length) and int(concurrency)):
            raise argparse.ArgumentTypeError(f"a load is TOKENSxREQUESTS, such as 32768x16, not {part!r}")
        loads.append((int(length), int(concurrency)))
    return loads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="speed of an 8B model on the GPU")
    parser.add_argument("--sections", help="default: exactness,leaks,scheduler; with --gpu: check alone, or everything")
    parser.add_argument("--seconds", type=float, default=600, help="with --gpu: time for everything")
    parser.add_argument("--short", type=int, default=2048, help="tokens of a prompt that routing cannot help")
    parser.add_argument("--long", type=int, default=131072, help="tokens of a long prompt")
    parser.add_argument("--tokens", type=int, default=256, help="to generate per request")
    parser.add_argument(
        "--loads", type=parse_loads, help="with --gpu: these alone, as 32768x16,131072x4, in this order"
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, choices=(1, 2), help="with --gpu: GPUs of one engine")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a prefill step")
    parser.add_argument("--memory", type=float, default=0.92, help="share of the device that the engine takes")
    parser.add_argument("--compile", action="store_true", help="compile the model, as vLLM does by itself")
    parser.add_argument("--synchronous", action="store_true", help="without scheduling a step ahead")
    parser.add_argument("--shape", default="{}", help="other shapes of the model, as JSON: a rehearsal")
    parser.add_argument("--out", type=Path, help=f"folder of the results ({RESULTS}; with --shape: none)")
    parser.add_argument("--commit", help="where the checkout cannot be asked")
    options = parser.parse_args()
    if options.gpu and options.sections not in (None, "check"):
        parser.error("--gpu runs everything, or --sections check: no speed without the check")
    if options.tensor_parallel > 1 and not options.gpu:
        parser.error("--tensor-parallel goes with --gpu; without it, tests/serving/test_parallel.py compares ranks")
    from flux_attention.serving.compat import check_version

    version = check_version()
    if options.gpu:
        failures = gpu(options, version)
        if KEPT:
            sys.stdout.flush()
            os._exit(1 if failures else 0)
        return failures
    sections = {"exactness": exactness, "leaks": leaks, "scheduler": scheduler_share}
    failures, device = 0, torch.device("cpu")
    for name in (options.sections or ",".join(sections)).split(","):
        # A file each: one of them is measured again without the others.
        recorder = Recorder(f"serving-{name}", device, {"vllm": version}, options.out or RESULTS, options.commit)
        failures += run_sections([(name, sections[name])], recorder)
    return failures


if __name__ == "__main__":
    sys.exit(main())
