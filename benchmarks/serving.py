"""The vLLM plugin, measured on real engines: exactness, blocks, the scheduler's time; on a GPU, latency and throughput.

    python benchmarks/serving.py            SmolLM2 and a tiny model on the processor
    python benchmarks/serving.py --gpu      shapes of Qwen3-8B with random weights, against the stock engine

Speed on the GPU is measured by one process per engine, so that each starts with an empty device; both are asked for
the same prompts and tokens. Three quarters of the layers run sparse, whole KV groups of them: what is fixed here is
the route, so that the figures are about the engine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Recorder, run_sections
from tests.serving import harness
from tests.serving.harness import Ask, Engines, differences, free_blocks, generate, mixed_asks, random_ids, scheduler
from torch import Tensor

# Around sinks + window (640), over block boundaries, several chunks of 512 tokens.
LENGTHS = (660, 300, 641, 700, 5, 769, 897, 656, 640, 33, 650, 800, 1025, 150, 64, 1281)
Q75 = tuple(layer for layer in range(36) if layer % 4 != 3)
RESULT = "result: "
SPARSE75 = "static:" + ",".join(map(str, Q75))
BUNDLES = [*[list(Q75[i::3]) for i in range(3)], [layer for layer in range(36) if layer % 4 == 3]]


# ---------------------------------------------------------------------------------------------------- processor


def text_ids(reference: harness.Reference) -> list[int]:
    from flux_attention.data.corpus import documents

    text = "\n\n".join(document.text for document in documents("docstrings", "test"))
    ids: list[int] = reference.tokenizer(text[:40_000]).input_ids
    return ids


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
        warm = compare("warm_prefix_cache", llm, asks)
        if not sum(output.num_cached_tokens > 0 for output in warm):
            raise RuntimeError("no request found its prefix in the cache")
        engine = llm.llm_engine
        for i, ask in enumerate(asks):
            engine.add_request(f"gone-{i}", {"prompt_token_ids": list(ask.prompt[::-1])}, ask.parameters())
        engine.step()
        engine.abort_request([f"gone-{i}" for i in range(len(asks))])
        compare("after_aborts", llm, asks)
        if free_blocks(llm)[0] != free_blocks(llm)[1]:
            raise RuntimeError("blocks are missing after aborts")
        # Four tokens below a block boundary: 180 blocks each, in 30 groups, so that four requests fill the pool, and
        # all of them want more at the same step.
        edge = [replace(ask, prompt=tuple(ids[i * 500 : i * 500 + 764])) for i, ask in enumerate(asks[:8])]
        llm = engines.start(reference, max_num_batched_tokens=512, num_gpu_blocks_override=740)
        compare("preempted", llm, edge)
        recorder.note("preemptions", sum(harness.preemptions(llm)))
        if not recorder.details["preemptions"]:
            raise RuntimeError("the pool was large enough for all: nothing was preempted")
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


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """One engine in this process: seconds to first token, per token and in all, per length and concurrency."""
    from vllm import LLM
    from vllm.platforms import current_platform

    from flux_attention.serving.launch import engine_arguments

    on_cpu = current_platform.is_cpu()
    flux = settings["engine"] == "flux"
    arguments: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": settings["context"],
        "max_num_seqs": 64,
        "max_num_batched_tokens": settings["chunk"],
        "block_size": 128,
        "gpu_memory_utilization": settings.get("memory", 0.92),
        "enable_prefix_caching": False,
        "disable_cascade_attn": True,
        "seed": 0,
    }
    if flux:
        plugin = {"kv_bundle": BUNDLES}
        arguments |= engine_arguments(settings["adapter"], on_cpu=on_cpu, asynchronous=not on_cpu, flux=plugin)
    llm = LLM(settings["model"], **arguments)
    rng = random.Random(0)
    found: dict[str, Any] = {}
    policies = ["sparse75", "dense"] if flux else ["dense"]
    for policy in policies:
        options = (("flux_policy", SPARSE75 if policy == "sparse75" else "dense"),) if flux else ()
        # Kernels are compiled and chosen when they first run: chunks, and decode after them.
        _load(llm, [Ask(tuple(rng.choices(range(1000, 150_000), k=2 * settings["chunk"])), options, 16)])
        for length, concurrency, tokens in settings["loads"]:
            if policy == "dense" and flux and length > 4096:
                continue  # the stock engine's is the baseline
            asks = [
                Ask(tuple(rng.choices(range(1000, 150_000), k=length)), options, tokens) for _ in range(concurrency)
            ]
            found[f"{policy}_{length}_{concurrency}"] = _load(llm, asks)
            print(
                settings["engine"], policy, length, concurrency, found[f"{policy}_{length}_{concurrency}"], flush=True
            )
    prompt = rng.choices(range(1000, 150_000), k=3000)
    found["scheduler"] = _scheduler_seconds(llm, prompt, SPARSE75, requests=settings.get("running", 64))
    found["blocks"] = scheduler(llm).kv_cache_manager.block_pool.num_gpu_blocks
    return found


def _load(llm: Any, asks: Sequence[Ask]) -> dict[str, float]:
    """All at once; median time to first token and per token, and tokens a second of the whole."""
    engine, started = llm.llm_engine, time.perf_counter()
    for i, ask in enumerate(asks):
        engine.add_request(f"{started}-{i}", {"prompt_token_ids": list(ask.prompt)}, ask.parameters())
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            now = time.perf_counter() - started
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, now)
            last[output.request_id] = now
    per_token = [(last[name] - first[name]) / max(1, asks[0].tokens - 1) for name in first]
    whole = time.perf_counter() - started
    return {
        "ttft_s": statistics.median(first.values()),
        "tpot_ms": statistics.median(per_token) * 1e3,
        "seconds": whole,
        "tokens_per_s": sum(len(ask.prompt) + ask.tokens for ask in asks) / whole,
    }


def gpu_check(folder: Path) -> dict[str, float]:
    """A small model on the GPU's kernels and graphs: routed requests may err as much as dense ones, against float32."""
    reference = harness.tiny(
        "qwen3",
        folder,
        head_dim=128,
        config=replace(harness.TINY_CONFIG, sink_tokens=128, window_tokens=128, block_tokens=128),
    )
    ids = random_ids(4000)
    with Engines() as engines:
        llm = engines.start(
            reference,
            on_cpu=False,
            dtype="bfloat16",
            enforce_eager=False,
            max_num_batched_tokens=256,
            max_model_len=1024,
        )
        lengths = (500, 96, 700, 300, 97, 640, 333, 257) * 2
        asks = mixed_asks(reference, ids, lengths, tokens=150)
        outputs = generate(llm, asks)
        found: dict[str, list[Tensor]] = {"dense": [], "sparse": [], "mask": []}
        for ask, output in zip(asks, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            chosen = torch.tensor(tokens)[:, None]
            sparse = output.kv_transfer_params["flux"]["sparse_layers"]
            expected = reference.logprobs(ask.prompt, tokens, sparse).gather(1, chosen)[:, 0]
            steps = zip(output.outputs[0].logprobs, tokens, strict=True)
            ours = torch.tensor([step[token].logprob for step, token in steps])
            found["sparse" if sparse else "dense"].append(ours - expected)
            if sparse and len(ask.prompt) > 256:
                # What the mask matters: with too little of it the check could not fail.
                found["mask"].append(reference.logprobs(ask.prompt, tokens, ()).gather(1, chosen)[:, 0] - expected)
        if free_blocks(llm)[0] != free_blocks(llm)[1]:
            raise RuntimeError("blocks are missing")
    errors = {name: float(torch.cat(parts).abs().mean()) for name, parts in found.items()}
    if errors["sparse"] > 2 * errors["dense"] or errors["mask"] < 4 * errors["sparse"]:
        raise RuntimeError(f"routed requests differ from the transformers path: {errors}")
    return errors


def gpu(recorder: Recorder, loads: list[tuple[int, int, int]], chunk: int) -> None:
    """Routed against stock, each in a process of its own."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recorder.note("check", _child({"engine": "check", "folder": name}))
        context = max(length for length, _, _ in loads) + 2048
        model, adapter = big_model(folder, context)
        for engine in ("stock", "flux"):
            settings = {"engine": engine, "model": str(model), "adapter": str(adapter), "context": context}
            found[engine] = _child({**settings, "loads": loads, "chunk": chunk})
            recorder.note(engine, found[engine])
    stock, flux = found["stock"], found["flux"]
    for length, concurrency, _ in loads:
        dense = stock[f"dense_{length}_{concurrency}"]
        if length <= 4096:
            ours = flux[f"dense_{length}_{concurrency}"]
            recorder.add(f"vllm_overhead_{length // 1024}k_c{concurrency}", ours["seconds"] / dense["seconds"], "ratio")
            continue
        ours, size = flux[f"sparse75_{length}_{concurrency}"], length // 1024
        recorder.add(f"vllm_ttft_{size}k_c{concurrency}", dense["ttft_s"] / ours["ttft_s"], "×")
        recorder.add(f"vllm_tpot_{size}k_c{concurrency}", dense["tpot_ms"] / ours["tpot_ms"], "×")
        recorder.add(f"vllm_throughput_{size}k_c{concurrency}", ours["tokens_per_s"] / dense["tokens_per_s"], "×")
    names = recorder.figures
    for figure, unit, source in (
        ("vllm_ttft_128k_q75", "×", "vllm_ttft_128k_c1"),
        (
            "vllm_throughput_128k_q75",
            "×",
            f"vllm_throughput_128k_c{max((c for n, c, _ in loads if n == 131072), default=0)}",
        ),
        ("vllm_overhead_2k", "ratio", "vllm_overhead_2k_c1"),
    ):
        if source in names:
            recorder.add(figure, names[source].value, unit)
    extra = flux["scheduler"][0] - stock["scheduler"][0]
    recorder.add("vllm_scheduler_share", max(0.0, extra) / flux["scheduler"][1], "share")


def _child(settings: dict[str, Any]) -> Any:
    """Run one engine in a process of its own; its result is the line that says so."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(settings)], stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout[-6000:], flush=True)
    if done.returncode:
        raise RuntimeError(f"the {settings['engine']} engine failed with code {done.returncode}")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    return json.loads(line.removeprefix(RESULT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="speed of an 8B model on the GPU")
    parser.add_argument("--sections", default="exactness,leaks,scheduler", help="on the processor")
    parser.add_argument("--loads", default="2048x1,32768x1,32768x4,131072x1,131072x8", help="LENGTHxCONCURRENCY, …")
    parser.add_argument("--tokens", type=int, default=128, help="to generate per request")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a prefill step")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="where the checkout cannot be asked")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        settings = json.loads(options.child)
        result = gpu_check(Path(settings["folder"])) if settings["engine"] == "check" else measure(settings)
        print(RESULT + json.dumps(result), flush=True)
        return 0
    from flux_attention.serving.compat import check_version

    settings: dict[str, Any] = {"vllm": check_version()}
    if options.gpu:
        loads = [(*map(int, load.split("x")), options.tokens) for load in options.loads.split(",")]
        device = torch.device("cuda")
        settings |= {"loads": options.loads, "tokens": options.tokens, "chunk": options.chunk}
        recorder = Recorder("serving-gpu", device, settings, options.out, options.commit)
        return run_sections([("gpu", lambda recorder: gpu(recorder, loads, options.chunk))], recorder)
    sections = {"exactness": exactness, "leaks": leaks, "scheduler": scheduler_share}
    failures, device = 0, torch.device("cpu")
    for name in options.sections.split(","):
        # A file each: one of them is measured again without the others.
        recorder = Recorder(f"serving-{name}", device, settings, options.out, options.commit)
        failures += run_sections([(name, sections[name])], recorder)
    return failures


if __name__ == "__main__":
    sys.exit(main())
