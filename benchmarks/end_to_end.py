"""A whole 8B model (the shapes of Qwen3-8B, random weights) with dense and with routed attention.

    python benchmarks/end_to_end.py [--sections memory,decode,routing,prefill,sweep] [--lengths N,N] [--out DIR]

Prefill speedups stand beside the speedup that the measured parts allow: linear work (a run whose attention does
nothing), and the attention kernels of one layer of each kind, chunk by chunk. The routed model has 27 of its 36 layers
sparse ("q75"). Every section writes its figures as soon as it has them. The outputs
are checked first; when that fails, figures are written under names that begin with "unchecked".
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    Recorder,
    add_run_options,
    consecutive_ms,
    label,
    median_ms,
    once_ms,
    program_name,
    run_sections,
    sync,
)
from model_8b import ForcedDensity, NoAttention, build, qwen3_8b, random_blocks, toy
from routing import routing
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from flux_attention import generation
from flux_attention.cache import FluxCache, PagePool
from flux_attention.config import FluxConfig
from flux_attention.kernels.api import Packing, dense_attention
from flux_attention.models.attach import attach, detach
from flux_attention.models.controller import FluxAttention
from flux_attention.modes import Mode, PrefillInputs
from flux_attention.route import Fixed, Interleaved, PolicyContext, Route

#: Memory a server of one 80 GB device has, and what it keeps free of weights and keys.
DEVICE_BYTES, HEADROOM_BYTES = 80e9, 4e9
#: Memory bandwidth that the roofline is drawn at, bytes a second.
ROOFLINE = 3.0e12


# ------------------------------------------------------------------------------------------------ model


@dataclass
class Setup:
    """What the command line asked for, and the model."""

    device: torch.device
    model: PreTrainedModel
    controller: FluxAttention
    lengths: tuple[int, ...]
    chunk: int
    short: int
    steps: int
    budget: float
    until: float
    """No section begins, and no prefill is repeated, after this (`time.perf_counter`)."""
    fuse: bool | None
    tiny: bool

    @property
    def layers(self) -> int:
        return len(self.controller.layers)

    def route(self, sparsity: float, rows: int = 1) -> Route:
        prompts = tuple(torch.zeros(1, dtype=torch.long) for _ in range(rows))
        return Interleaved(sparsity)(PolicyContext(self.layers, prompts))

    def prompt(self, n: int) -> Tensor:
        return torch.randint(0, self.model.config.vocab_size, (n,), device=self.device)

    def attach(self, config: FluxConfig) -> FluxAttention:
        self.controller = attach(self.model, config, fuse=self.fuse)
        return self.controller

    @property
    def graphs(self) -> bool:
        return self.device.type == "cuda"


@contextmanager
def modes(controller: FluxAttention, full: Mode | None = None, sparse: Mode | None = None) -> Iterator[None]:
    before = controller.full_mode, controller.sparse_mode
    controller.full_mode, controller.sparse_mode = full or before[0], sparse or before[1]
    try:
        yield
    finally:
        controller.full_mode, controller.sparse_mode = before


# ------------------------------------------------------------------------------------------------ helpers


def difference(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, as a share of the norm."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def free(setup: Setup) -> None:
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()


def new_cache(setup: Setup, route: Route, tokens: int, pool: PagePool | None = None) -> FluxCache:
    """An empty cache with just the pages that the route needs for rows of `tokens` tokens."""
    cache = setup.controller.new_cache(max_row_tokens=tokens)
    cache.set_route(route)
    rows = route.num_sequences
    if pool is None:
        cache.use_pools(generation._exact_pools(setup.controller, route, [tokens] * rows))
    else:
        cache.pool = pool
    return cache


def filled_cache(setup: Setup, route: Route, tokens: int, spare: int) -> FluxCache:
    """A cache that holds random keys, as if rows of `tokens` tokens had been prefilled."""
    controller, rows = setup.controller, route.num_sequences
    backbone = controller.config.backbone
    assert backbone is not None
    cache = new_cache(setup, route, tokens + spare)
    like = next(controller.decoder.parameters())
    cache.begin(rows, route, backbone.num_key_value_heads, backbone.head_dim, like)
    shape = (tokens, backbone.num_key_value_heads, backbone.head_dim)
    keys, values = (torch.randn(shape, dtype=like.dtype, device=like.device) for _ in "kv")
    for layer in range(setup.layers):
        for row in range(rows):
            cache.append(layer, row, keys, values)
    cache.advance(tokens, [tokens] * rows, decoded=False)
    return cache


def step_ms(setup: Setup, route: Route, tokens: int) -> tuple[list[float], FluxCache]:
    """Milliseconds of decode steps of rows that hold `tokens` tokens, and the cache they left."""
    spare = setup.steps + 16
    cache = filled_cache(setup, route, tokens, spare)
    if setup.graphs:
        generation.tune(setup.controller, cache)
    decoder = generation._Decoder(setup.controller, cache, setup.graphs)
    token = setup.prompt(route.num_sequences)
    for _ in range(3):
        decoder.step(token)
    times = consecutive_ms(functools.partial(decoder.step, token), setup.device, setup.steps)
    # The graph holds the memory of its pass.
    del decoder
    return times, cache


def prefill_ms(setup: Setup, route: Route, prompt: Tensor, pool: PagePool) -> float:
    cache = new_cache(setup, route, prompt.numel(), pool)

    def run() -> None:
        generation.prefill(setup.controller, [prompt], cache, chunk_tokens=setup.chunk)

    ms = once_ms(run, setup.device)
    cache.clear()
    return ms


def make_pool(setup: Setup, route: Route, tokens: int) -> PagePool:
    pool = new_cache(setup, route, tokens).pool
    assert pool is not None
    return pool


# ------------------------------------------------------------------------------------------------ sections


def checks(setup: Setup, record: Recorder) -> None:
    """Prefill and decode steps against the plain model in a wider dtype, and replayed steps against eager ones."""
    model, config, steps = setup.model, setup.controller.config, 4
    n = setup.short // 16 if not setup.tiny else 512
    prompt, tokens = setup.prompt(n), [setup.prompt(1) for _ in range(steps)]
    whole = torch.cat((prompt, *tokens))[None]
    long = setup.prompt(setup.short)
    detach(model)
    try:
        theirs = model(input_ids=whole, use_cache=False, logits_to_keep=steps + 1).logits[0]
        for _ in range(2):
            baseline = once_ms(lambda: model.model(input_ids=long[None], use_cache=False), setup.device)
        wide = copy.deepcopy(model).to(torch.float64 if theirs.dtype == torch.float32 else torch.float32)
        truth = wide(input_ids=whole, use_cache=False, logits_to_keep=steps + 1).logits[0]
        del wide
        free(setup)
    finally:
        controller = setup.attach(config)
    # As everywhere in the project: at most twice the error of the model's own code in the same dtype.
    rounding = max(difference(a, b) for a, b in zip(theirs, truth, strict=True))
    limit = max(2 * rounding, 1e-4)
    dense, q75 = setup.route(0.0), setup.route(0.75)
    found: dict[tuple[str, bool], list[Tensor]] = {}
    for name, route in (("dense", dense), ("q75", q75)):
        for graph in (False, setup.graphs):
            # Chunks, so that attention to the cache is part of what is compared.
            cache = new_cache(setup, route, n + 8)
            first = generation.prefill(controller, [prompt], cache, chunk_tokens=n // 2, max_new_tokens=8)[0]
            decoder = generation._Decoder(controller, cache, graph)
            found[name, graph] = [first, *(decoder.step(token)[0].clone() for token in tokens)]
            del decoder
    errors = [difference(a, b) for a, b in zip(found["dense", setup.graphs], truth, strict=True)]
    record.note("dense_logits", {"difference": max(errors), "transformers_difference": rounding, "tokens": n})
    assert max(errors) <= limit, f"dense logits are {max(errors):.2e} from the exact ones, limit {limit:.2e}"
    pairs = zip(found["q75", False], found["q75", setup.graphs], strict=True)
    worst = max(difference(a, b) for a, b in pairs)
    record.note("graph_logits", {"difference": worst})
    assert worst <= limit, f"replayed logits differ from eager ones by {worst:.2e}, limit {limit:.2e}"
    pool = make_pool(setup, dense, setup.short)
    ours = min(prefill_ms(setup, dense, long, pool) for _ in range(2))
    record.note("prefill_short_ms", {"tokens": setup.short, "transformers_sdpa": baseline, "ours_dense": ours})
    record.add(f"prefill_dense_{label(setup.short)}_vs_transformers_sdpa", baseline / ours, "×")
    generated(setup, record)


def generated(setup: Setup, record: Recorder) -> None:
    """`flux_attention.generate` against transformers' own generate on the attached model, under one route."""
    controller, route = setup.controller, setup.route(0.75)
    prompt, new = setup.prompt(setup.short // 16 if not setup.tiny else 512), 16
    config = GenerationConfig(do_sample=False, eos_token_id=[], max_new_tokens=new, pad_token_id=0)
    with controller.using(Fixed(route)):
        theirs = setup.model.generate(prompt[None], generation_config=config)[0, -new:].tolist()
    result = generation.generate(setup.model, prompt, generation_config=config, route=route, chunk_tokens=1024)
    result.cache.clear()
    same = next((i for i, (a, b) in enumerate(zip(result.tokens[0], theirs, strict=True)) if a != b), new)
    # In half precision two right computations may part where two tokens are about equally likely.
    record.note("generate_equals_transformers", {"tokens": new, "equal_up_to": same})
    assert same == new or setup.device.type == "cuda", f"tokens differ from transformers' at {same}"


def attention_ms(setup: Setup, n: int, mode: str, repetitions: int) -> float:
    """Attention of one layer over a prompt of n tokens, as the chunks of a prefill run it."""
    controller = setup.controller
    backbone, config = controller.config.backbone, controller.config
    assert backbone is not None
    like = next(controller.decoder.parameters())
    scale, total = backbone.head_dim**-0.5, 0.0
    for start in range(0, n, setup.chunk):
        end = min(n, start + setup.chunk)
        gap = 0
        if mode == "sparse":
            gap = max(0, start // config.block_tokens * config.block_tokens - config.window_tokens - config.sink_tokens)
        packing = Packing((end - start,), (end - gap,), (gap,))
        heads = (backbone.num_attention_heads, backbone.num_key_value_heads, backbone.num_key_value_heads)
        q, k, v = (
            torch.randn(m, h, backbone.head_dim, dtype=like.dtype, device=setup.device)
            for m, h in zip((end - start, end - gap, end - gap), heads, strict=True)
        )

        def run(q: Tensor = q, k: Tensor = k, v: Tensor = v, packing: Packing = packing, end: int = end) -> Tensor:
            if mode == "full":
                return dense_attention(q, k, v, packing, scale=scale)
            return setup.controller.sparse_mode.prefill(PrefillInputs(q, k, v, packing, (end,), scale))

        total += median_ms(run, setup.device, repetitions)
    return total


def prefill(setup: Setup, record: Recorder) -> None:
    controller = setup.controller
    nothing, forced = NoAttention(controller.config), ForcedDensity(controller.config)
    dense, q75, sparse = setup.route(0.0), setup.route(0.75), setup.route(1.0)
    kinds: dict[str, tuple[Route, Mode | None, Mode | None]] = {
        "linear": (sparse, None, nothing),
        "q75": (q75, None, None),
        "xa_ssa": (q75, forced, None),
        "dense": (dense, None, None),
    }

    def one(kind: str, prompt: Tensor, pool: PagePool) -> float:
        route, full, other = kinds[kind]
        with modes(controller, full, other):
            return prefill_ms(setup, route, prompt, pool)

    warm = setup.prompt(2 * setup.chunk)
    warm_pool = make_pool(setup, dense, warm.numel())
    for kind in kinds:
        # Two chunks: compiles kernels for a prompt's first chunk and for those with a past.
        record.note(f"warm_{kind}_ms", one(kind, warm, warm_pool))
    del warm_pool
    budget_until = min(setup.until, time.perf_counter() + setup.budget)
    for i, n in enumerate(setup.lengths):
        free(setup)
        started = time.perf_counter()
        # A longer prompt takes several times as long, and its one round is worth more than another one of this.
        allowed = (budget_until - started) * (1 if i == len(setup.lengths) - 1 else 0.25)
        parts = {"fa": attention_ms(setup, n, "full", 1), "sa": attention_ms(setup, n, "sparse", 3)}
        record.note(f"parts_{label(n)}_ms", parts)
        prompt = setup.prompt(n)
        # The dense pool holds any route.
        pool = make_pool(setup, dense, n)
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(3):
            for kind, seen in times.items():
                spent = time.perf_counter() - started
                # Every kind once, whatever it takes; a further repetition only where there is time for it.
                if not seen or spent + seen[-1] / 1e3 < allowed:
                    seen.append(one(kind, prompt, pool))
            # Published after every round: a run that is stopped keeps what it has.
            publish_prefill(setup, record, n, times, parts, q75)
        del pool
        random_blocks.cache_clear()


def publish_prefill(
    setup: Setup, record: Recorder, n: int, times: dict[str, list[float]], parts: dict[str, float], q75: Route
) -> None:
    ms = {kind: statistics.median(seen) for kind, seen in times.items()}
    record.note(f"prefill_{label(n)}_ms", {**ms, "repetitions": [len(seen) for seen in times.values()]})
    layers, full = setup.layers, int(q75.use_full.sum())
    linear = ms["linear"]
    ideal = (linear + layers * parts["fa"]) / (linear + full * parts["fa"] + (layers - full) * parts["sa"])
    speedup = ms["dense"] / ms["q75"]
    record.add(f"prefill_speedup_{label(n)}_q75", speedup, "×")
    record.add(f"prefill_speedup_{label(n)}_q75_ideal", ideal, "×")
    record.add(f"prefill_speedup_{label(n)}_q75_of_ideal", speedup / ideal, "ratio")
    record.add(f"prefill_speedup_{label(n)}_xa_ssa", ms["dense"] / ms["xa_ssa"], "×")
    for kind in ("dense", "q75", "xa_ssa"):
        record.add(f"prefill_{label(n)}_{kind}_s", ms[kind] / 1e3, "s", [t / 1e3 for t in times[kind]])


def weight_bytes(model: PreTrainedModel, *, read: bool) -> int:
    """Bytes of the weights; `read`: only those a decode step reads, which is one row of the embeddings per token."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    table = model.get_input_embeddings().weight
    return total - (table.numel() * table.element_size() if read else 0)


def decode(setup: Setup, record: Recorder) -> None:
    elements = 1 << (20 if setup.tiny else 29)
    source = torch.empty(elements, dtype=torch.bfloat16, device=setup.device)
    copy_ms = median_ms(source.clone, setup.device, 5)
    copy_rate = 4 * elements / copy_ms * 1e3
    del source
    record.note("device_copy_tbps", copy_rate / 1e12)
    for i, n in enumerate(setup.lengths):
        median = {}
        for name, route in (("dense", setup.route(0.0)), ("q75", setup.route(0.75))):
            times, cache = step_ms(setup, route, n)
            median[name] = statistics.median(times)
            record.note(f"decode_{label(n)}_{name}_ms", {"median": median[name], "min": min(times), "max": max(times)})
            if i == 0 and name == "dense":
                moved = weight_bytes(setup.model, read=True) + cache.memory().held
                share = moved / ROOFLINE / (median[name] / 1e3)
                record.add(f"decode_dense_{label(n)}_of_roofline", share, "ratio")
                record.add(f"decode_dense_{label(n)}_of_copy_bandwidth", share * ROOFLINE / copy_rate, "ratio")
            cache.clear()
            del cache
            free(setup)
        record.add(f"decode_speedup_{label(n)}_q75", median["dense"] / median["q75"], "×")
    sparse_growth(setup, record)


def sparse_growth(setup: Setup, record: Recorder) -> None:
    """A row with every layer sparse: its step must cost the same whatever it has read."""
    medians = []
    for n in (setup.short // 4, *setup.lengths):
        times, cache = step_ms(setup, setup.route(1.0), n)
        medians.append(statistics.median(times))
        record.note(f"decode_{label(n)}_sparse_ms", {"median": medians[-1], "min": min(times), "max": max(times)})
        cache.clear()
        del cache
        free(setup)
    record.add("decode_sparse_step_growth", medians[-1] / medians[0], "ratio")


def memory(setup: Setup, record: Recorder) -> None:
    """Bytes of the caches, and tokens a second at the largest batch that an 80 GB device holds."""
    n = setup.lengths[0]
    room = 3e6 if setup.tiny else DEVICE_BYTES - weight_bytes(setup.model, read=False) - HEADROOM_BYTES
    rates, held = {}, {}
    for name, sparsity in (("dense", 0.0), ("q75", 0.75)):
        cache = filled_cache(setup, setup.route(sparsity), n, setup.steps + 16)
        report, needed = cache.memory(), cache.pool.num_pages * cache.pool.page_bytes
        held[name] = report.held
        cache.clear()
        del cache
        free(setup)
        rows = max(1, int(room // needed))
        times, cache = step_ms(setup, setup.route(sparsity, rows), n)
        cache.clear()
        del cache
        free(setup)
        ms = statistics.median(times)
        rates[name] = rows / ms * 1e3
        details = {"rows": rows, "step_ms": ms, "tokens_per_s": rates[name], "kv_bytes_per_row": report.held}
        record.note(f"throughput_{label(n)}_{name}", details)
    record.add(f"kv_bytes_{label(n)}_q75_vs_dense", held["q75"] / held["dense"], "ratio")
    record.add(f"throughput_{label(n)}_q75_vs_dense", rates["q75"] / rates["dense"], "×")


#: Shares of sparse layers that the sweep takes.
SPARSITIES = (0.0, 0.25, 0.5, 0.75, 0.9)


def sweep(setup: Setup, record: Recorder) -> None:
    """Speed against length, sparsity and batch size, for the figures; single repetitions of long prefills."""
    lengths = setup.lengths if setup.tiny else (8192, 32768, 131072)
    for n in lengths:
        prompt, pool = setup.prompt(n), make_pool(setup, setup.route(0.0), n)
        prefill_ms(setup, setup.route(0.5), prompt, pool)
        for sparsity in SPARSITIES:
            route = setup.route(sparsity)
            times = [prefill_ms(setup, route, prompt, pool) for _ in range(3 if n <= 32768 else 1)]
            record.add(f"sweep_prefill_{label(n)}_{percent(sparsity)}_ms", statistics.median(times), "ms", times)
        del pool
        free(setup)
        for sparsity in SPARSITIES:
            sweep_decode(setup, record, n, sparsity, 1)
    for rows in (1, 2) if setup.tiny else (4, 16, 64):
        for sparsity in (0.0, 0.75):
            sweep_decode(setup, record, lengths[0], sparsity, rows)


def sweep_decode(setup: Setup, record: Recorder, n: int, sparsity: float, rows: int) -> None:
    one = make_pool(setup, setup.route(sparsity), n)
    needed = rows * one.num_pages * one.page_bytes
    del one
    if not setup.tiny and needed > DEVICE_BYTES - weight_bytes(setup.model, read=False) - HEADROOM_BYTES:
        return
    times, cache = step_ms(setup, setup.route(sparsity, rows), n)
    moved = weight_bytes(setup.model, read=True) + cache.memory().held
    ms = statistics.median(times)
    name = f"sweep_decode_{label(n)}_b{rows}_{percent(sparsity)}"
    record.add(f"{name}_ms", ms, "ms")
    record.add(f"{name}_of_roofline", moved / ROOFLINE / (ms / 1e3), "ratio")
    cache.clear()
    del cache
    free(setup)


def percent(sparsity: float) -> str:
    return f"q{round(100 * sparsity)}"


RUN: dict[str, Callable[[Setup, Recorder], None]] = {
    "checks": checks,
    "memory": memory,
    "decode": decode,
    "routing": routing,
    "prefill": prefill,
    "sweep": sweep,
}
#: The sweep is for the plots and records none of the figures that the project holds itself to.
DEFAULT = tuple(name for name in RUN if name != "sweep")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(DEFAULT), help=", ".join(RUN))
    parser.add_argument("--lengths", default="131072,262144", help="tokens, ascending")
    parser.add_argument("--no-fuse", action="store_true", help="leave the model's own norms, rotary embedding and MLPs")
    parser.add_argument("--budget", type=float, default=120, help="seconds for the repetitions of all prefills")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no section after that")
    parser.add_argument("--steps", type=int, default=30, help="decode steps that are timed")
    parser.add_argument("--layers", type=int, default=36, help="of the model; other than 36 writes no figures")
    add_run_options(parser, tiny="a toy model, to try the program itself")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device, tiny = torch.device(options.device), options.tiny
    if device.type != "cuda" and not tiny:
        sys.exit("an 8B model needs a CUDA device; --tiny runs a toy anywhere")
    chosen = options.sections.split(",")
    if unknown := [name for name in chosen if name not in RUN]:
        sys.exit(f"unknown section {', '.join(unknown)}; there are {', '.join(RUN)}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths = (2048, 4096) if tiny else tuple(int(n) for n in options.lengths.split(","))
    started = time.perf_counter()
    model = build(toy() if tiny else qwen3_8b(options.layers), device, dtype)
    flux = FluxConfig(sink_tokens=128, window_tokens=256 if tiny else 2048)
    sync(device)
    print(
        f"model of {weight_bytes(model, read=False) / 1e9:.1f} GB in {time.perf_counter() - started:.0f} s", flush=True
    )
    # On a CPU fusing is not the default, but a toy run is to take the code of the real one.
    fuse = False if options.no_fuse else (True if tiny else None)
    setup = Setup(
        device=device,
        model=model,
        controller=attach(model, flux, fuse=fuse),
        lengths=lengths,
        chunk=1024 if tiny else 32768,
        short=2048 if tiny else 32768,
        steps=3 if tiny else options.steps,
        budget=options.budget,
        until=started + options.seconds,
        fuse=fuse,
        tiny=tiny,
    )
    folder = options.out
    if folder is None and not tiny and options.layers == 36:
        folder = Path("benchmarks/results")
    settings: dict[str, Any] = {
        "backbone": "toy" if tiny else "Qwen3-8B shapes, random weights",
        "dtype": str(dtype).removeprefix("torch."),
        "lengths": list(lengths),
        "chunk_tokens": setup.chunk,
        "sink_tokens": flux.sink_tokens,
        "window_tokens": flux.window_tokens,
        "fused": setup.controller.fusion is not None,
    }
    name = program_name("end-to-end", chosen, DEFAULT)
    record = Recorder(name, device, settings, folder, options.commit)

    def runs(names: Sequence[str]) -> list[tuple[str, Callable[[Recorder], None]]]:
        return [(name, functools.partial(RUN[name], setup)) for name in names]

    # The checks come first, whatever was chosen: without them no figure keeps its name.
    failures = run_sections(runs(["checks"]), record)
    record.prefix = "unchecked_" if failures else ""
    return failures + run_sections(runs([name for name in chosen if name != "checks"]), record, setup.until)


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(1 if main() else 0)
