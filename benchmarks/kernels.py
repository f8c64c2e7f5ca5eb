"""Attention kernels at the shapes of an 8B model (32 query heads, 8 key heads, head dim 128, bfloat16).

    python benchmarks/kernels.py [--quick] [--sections context,dense,streaming,decode,xattn,fuzz] [--out DIR]

Times are medians of CUDA events, baselines run in turns with ours. Every figure's output is compared with a float64
reference in the same run, and a figure is written only when that comparison holds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    ROOT,
    Recorder,
    add_run_options,
    graphed,
    interleaved_ms,
    label,
    median_ms,
    program_name,
    run_sections,
)
from tests.kernels import fuzz
from torch import Tensor

from flux_attention.kernels import api, block_lists, paged_decode, reference
from flux_attention.kernels import streaming as _streaming
from flux_attention.kernels.api import Packing

SECTIONS = ("context", "dense", "streaming", "decode", "xattn", "fuzz")


@dataclass
class Setup:
    """What the command line asked for."""

    device: torch.device
    dtype: torch.dtype
    long: int
    short: int
    heads: tuple[int, int, int]
    sizes: dict[str, int]
    repetitions: int
    quick: bool
    tiny: bool
    fuzz_shapes: int
    fuzz_seconds: float
    fuzz_ops: tuple[str, ...] = tuple(fuzz.OPS)

    @property
    def block(self) -> int:
        return self.sizes["block"]

    @property
    def scale(self) -> float:
        return self.heads[2] ** -0.5

    def qkv(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        hq, hk, dim = self.heads
        q, k, v = (torch.randn(n, h, dim, device=self.device, dtype=self.dtype) for h in (hq, hk, hk))
        return q, k, v


def whole(n: int) -> Packing:
    return Packing((n,), (n,))


def check(
    name: str,
    output: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    op: Callable[..., Tensor],
    tile: int,
    **kwargs: Any,
) -> float:
    """Compare the first 8, two middle ones and the last block of queries with float64; returns error over limit.

    The limit is that of the fuzz: twice the error of the eager oracle in the same dtype. Raises AssertionError.
    """
    q, k, v = tensors
    n, worst = q.shape[0], 0.0
    blocks = kwargs.pop("blocks", None)
    middle = n // 2 // tile * tile
    for first, end in ((0, min(n, 8 * tile)), (middle, min(n, middle + 2 * tile)), (n - tile, n)):
        ours, parts, keys = output[first:end], (q[first:end], k[:end], v[:end]), end
        packing, rows = Packing((end - first,), (end,)), slice(first // tile, end // tile)
        extra = dict(kwargs)
        if blocks is not None:
            extra["blocks"] = [b[:, rows, : keys // tile] for b in blocks]
        case = fuzz.compare(name, "given", lambda *t, impl, ours=ours, p=packing, e=extra: (
            ours if impl == "given" else op(*t, packing=p, impl=impl, **e)
        ), parts, f"{n}")  # fmt: skip
        assert case.ok, f"{name}: error {case.error:.2e} over the limit {case.limit:.2e} (eager {case.eager:.2e})"
        worst = max(worst, case.error / case.limit)
    return worst


def bare_flash4(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """flash-attn-4 as its users call it. `window`: keys before the query's own, both ends included."""
    from flash_attn.cute import flash_attn_func

    # (left, 0) keeps keys from `query - left` to the query: left + 1 keys, no sinks.
    size = (None, None) if window is None else (window, 0)
    out = flash_attn_func(q[None], k[None], v[None], softmax_scale=scale, causal=True, window_size=size)
    return (out[0] if isinstance(out, tuple) else out)[0]


def baseline(setup: Setup, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    if setup.device.type == "cuda":
        return bare_flash4(q, k, v, setup.scale, window)
    # Toy runs only exercise the program.
    return api.dense_attention(q, k, v, whole(q.shape[0]), scale=setup.scale, impl="sdpa")


# ------------------------------------------------------------------------------------------------ sections


def context(setup: Setup, record: Recorder) -> None:
    """What the device itself reaches: the ceilings to read the other figures against."""
    elements = 1 << (20 if setup.tiny else 30)
    source = torch.empty(elements, dtype=torch.bfloat16, device=setup.device)
    target = torch.empty_like(source)

    def run(source: Tensor = source, target: Tensor = target) -> Tensor:
        return target.copy_(source)

    ms = median_ms(run, setup.device, setup.repetitions)
    record.add("device_copy_tbps", 4 * elements / ms / 1e9, "TB/s")
    del run, source, target
    n = 256 if setup.tiny else 8192
    a, b = (torch.randn(n, n, dtype=setup.dtype, device=setup.device) for _ in "ab")
    ms = median_ms(lambda: a @ b, setup.device, setup.repetitions)
    record.add("device_matmul_tflops", 2 * n**3 / ms / 1e9, "TFLOP/s")


def dense(setup: Setup, record: Recorder) -> None:
    for n in (setup.short, setup.long):
        q, k, v = setup.qkv(n)
        packing, kwargs = whole(n), {"scale": setup.scale}
        quality = check("dense", api.dense_attention(q, k, v, packing, **kwargs), (q, k, v), api.dense_attention,
                        setup.block, **kwargs)  # fmt: skip
        times = interleaved_ms(
            {
                "ours": lambda q=q, k=k, v=v, p=packing: api.dense_attention(q, k, v, p, scale=setup.scale),
                "fa4": lambda q=q, k=k, v=v: baseline(setup, q, k, v),
            },
            setup.device,
            setup.repetitions,
        )
        ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["fa4"], strict=True)]
        ours, theirs = (statistics.median(times[name]) for name in ("ours", "fa4"))
        record.note(f"dense_{label(n)}", {"ours_ms": ours, "fa4_ms": theirs, "error_over_limit": quality})
        record.add(f"prefill_full_{label(n)}_vs_fa4", theirs / ours, "ratio", ratios)
        record.add(
            f"prefill_full_{label(n)}_tflops", 2 * n * n * setup.heads[0] * setup.heads[2] / ours / 1e9, "TFLOP/s"
        )


def streaming(setup: Setup, record: Recorder) -> None:
    n = setup.long
    q, k, v = setup.qkv(n)
    packing, kwargs = whole(n), {"scale": setup.scale, **setup.sizes}
    output = api.streaming_attention(q, k, v, packing, **kwargs)
    quality = check("streaming", output, (q, k, v), api.streaming_attention, setup.block, **kwargs)
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: api.streaming_attention(q, k, v, packing, **kwargs),
        "fa4": lambda: baseline(setup, q, k, v, setup.sizes["window"]),
    }
    if setup.device.type == "cuda":
        # What training runs, for comparison: block sparsity, the own tile under a mask function.
        sizes = (setup.sizes["sink"], setup.sizes["window"], setup.block, setup.scale)
        runs["lists"] = lambda: _streaming._over_lists(block_lists.flash4_over, q, k, v, packing, *sizes)
    times = interleaved_ms(runs, setup.device, max(15, setup.repetitions))
    ours, theirs = (statistics.median(times[name]) for name in ("ours", "fa4"))
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    record.note(f"streaming_{label(n)}", {**medians, "error_over_limit": quality})
    ratios = [a / b for a, b in zip(times["ours"], times["fa4"], strict=True)]
    record.add(f"prefill_streaming_{label(n)}_vs_fa4_window", ours / theirs, "ratio", ratios)


def decode(setup: Setup, record: Recorder) -> None:
    long, short, page = setup.long, setup.short, setup.block
    sparse_pages = (setup.sizes["sink"] + setup.sizes["window"]) // page + 1
    sparse = sparse_pages * page - 7
    rates = {}
    for name, lens in (
        ("b1", [long - 7]),
        ("b8_uniform", [short - 7] * 8),
        ("b8_mixed", [short - 7] * 4 + [sparse] * 4),
        ("b8_sparse", [sparse] * 8),
    ):
        # The mixed batch's rows take turns: a scheduler would not sort them.
        lens = lens[::2] + lens[1::2]
        hq, hk, dim = setup.heads
        q, keys, values, table, lengths = fuzz.paged_input(lens, hq, hk, dim, page, setup.dtype, str(setup.device))
        arguments = (q, keys, values, table, lengths)
        out = torch.full_like(q, float("nan"))

        def run(arguments: tuple[Tensor, ...] = arguments, out: Tensor = out) -> Tensor:
            return api.paged_decode(*arguments, scale=setup.scale, out=out)

        config = None
        if setup.device.type == "cuda":
            config = paged_decode.tune(*arguments, scale=setup.scale)
            replay = graphed(run)
        else:
            replay = run
        replay()
        exact = reference.paged_decode(q.double(), keys.double(), values.double(), table, lengths, scale=setup.scale)
        eager = fuzz.relative(reference.paged_decode(q, keys, values, table, lengths, scale=setup.scale), exact)
        error, limit = fuzz.relative(out, exact), fuzz.error_limit(eager, setup.dtype)
        assert error <= limit, f"decode {name}: error {error:.2e} over the limit {limit:.2e}"
        del exact
        ms = median_ms(replay, setup.device, max(20, setup.repetitions))
        rates[name] = 2 * sum(lens) * hk * dim * q.element_size() / ms / 1e9
        record.note(
            f"decode_{name}",
            {"us": ms * 1e3, "tbps": rates[name], "error_over_limit": error / limit, "config": str(config)},
        )
        del q, keys, values, arguments, run, replay
        if name == "b1":
            record.add(f"decode_{label(long)}_b1_tbps", rates["b1"], "TB/s")
    record.add(f"decode_{label(short)}_b8_mixed_vs_uniform", rates["b8_mixed"] / rates["b8_uniform"], "ratio")


def random_blocks(n: int, block: int, heads: int, density: float, device: torch.device) -> tuple[Tensor, float]:
    """Random causal blocks, block 0 and the own one among them, and their share of all causal blocks."""
    count = n // block
    i = torch.arange(count, device=device)
    causal = i <= i[:, None]
    chosen = ((torch.rand(heads, count, count, device=device) < density) | (i == i[:, None]) | (i == 0)) & causal
    return chosen, chosen.sum().item() / (heads * causal.sum().item())


def xattn(setup: Setup, record: Recorder) -> None:
    n = setup.long
    kwargs = {"block": setup.block, "scale": setup.scale}
    selection = {**kwargs, "stride": 16, "threshold": 0.9}
    # The exact masses of a long prompt do not fit; a shorter one has the same kernels.
    q, k, v = setup.qkv(32 * setup.block)
    chosen = api.select_blocks(q, k, whole(q.shape[0]), **selection)[0]
    masses = reference.block_masses(q.double(), k.double(), 0, **kwargs, stride=16)
    error = fuzz.choice_error(masses, chosen, 0, 0.9)
    assert error <= 1e-4, f"select_blocks: the choice misses the threshold by {error:.2e} of the mass"
    del masses
    q, k, v = setup.qkv(n)
    packing = whole(n)
    blocks, density = random_blocks(n, setup.block, setup.heads[0], 0.25, setup.device)
    output = api.block_sparse_attention(q, k, v, packing, [blocks], **kwargs)
    quality = check(
        "block_sparse", output, (q, k, v), api.block_sparse_attention, setup.block, blocks=[blocks], **kwargs
    )
    times = interleaved_ms(
        {
            "dense": lambda: api.dense_attention(q, k, v, packing, scale=setup.scale),
            "select": lambda: api.select_blocks(q, k, packing, **selection),
            "attend": lambda: api.block_sparse_attention(q, k, v, packing, [blocks], **kwargs),
        },
        setup.device,
        setup.repetitions,
    )
    ms = {name: statistics.median(values) for name, values in times.items()}
    record.note(f"xattn_{label(n)}", {**ms, "density": density, "error_over_limit": quality})
    record.add(f"xattn_{label(n)}_selection_share", ms["select"] / ms["dense"], "share")
    record.add(f"xattn_{label(n)}_time_over_density", ms["attend"] / ms["dense"] / density, "ratio")


#: Seconds that a share gets to end after its time is over, in the middle of a compilation perhaps.
GRACE = 10.0


@dataclass(frozen=True)
class Share:
    """Part `index` of `of` of a kernel's random shapes: `shapes` of them, none begun after `until` (`time.time()`)."""

    op: str
    index: int
    of: int
    shapes: int
    until: float


def fuzzing(setup: Setup, record: Recorder) -> None:
    """Random shapes of every kernel against float64; the figure is the least number that any kernel passed.

    A kernel is recorded when its shares are done, whole or not. Kernels that an earlier run with the same code and
    device finished count, so that several calls can divide them.
    """
    suffix = "" if setup.fuzz_shapes >= 500 else "_quick"
    _keep_earlier(setup, record, suffix)
    until = time.time() + setup.fuzz_seconds
    of = 2
    if setup.device.type == "cuda":
        # Compilation takes most of the time, and a processor each: at most a process for every kind to compile.
        of = max(2, min(len(fuzz.GPU_KINDS), (os.cpu_count() or 1) // len(setup.fuzz_ops)))
    shares = [Share(op, i, of, -(-setup.fuzz_shapes // of), until) for op in setup.fuzz_ops for i in range(of)]
    found: dict[str, list[dict[str, Any]]] = {op: [] for op in setup.fuzz_ops}
    for share, result in _in_processes(shares) if setup.device.type == "cuda" else _in_turn(setup, shares):
        parts = found[share.op]
        parts.append(result)
        if len(parts) == of:
            failed = [text for part in parts for text in part["failed"]]
            for text in failed[:10]:
                print(f"  {text}", flush=True)
            passed = sum(part["passed"] for part in parts)
            note = {
                "passed": passed,
                "failed": len(failed),
                "worst_error_over_limit": max(part["worst_error_over_limit"] for part in parts),
                "seconds": max(part["seconds"] for part in parts),
                "processes": of,
            }
            record.note(f"fuzz_{share.op}", note)
            record.add(f"kernel_fuzz_{share.op}_shapes{suffix}", passed, "shapes")
    notes = [record.details.get(f"fuzz_{op}") for op in fuzz.OPS]
    if all(note and not note["failed"] and note["passed"] >= setup.fuzz_shapes for note in notes):
        # A quick run must not replace the figure of a long one.
        record.add(f"kernel_fuzz_shapes{suffix}", min(note["passed"] for note in notes if note), "shapes")
    wrong = []
    for op in setup.fuzz_ops:
        note = record.details[f"fuzz_{op}"]
        if note["failed"] or note["passed"] < setup.fuzz_shapes:
            wrong.append(f"{op}: {note['failed']} failed, {note['passed']} of {setup.fuzz_shapes} passed")
    assert not wrong, f"random shapes within {setup.fuzz_seconds:.0f} s: {'; '.join(wrong)}"


def _keep_earlier(setup: Setup, record: Recorder, suffix: str) -> None:
    """Take over the kernels that are not asked for from the results file."""
    if set(setup.fuzz_ops) == set(fuzz.OPS):
        return
    earlier = record.earlier()
    for entry in earlier.get("figures", ()):
        for op in set(fuzz.OPS) - set(setup.fuzz_ops):
            if entry["name"] == f"kernel_fuzz_{op}_shapes{suffix}":
                record.note(f"fuzz_{op}", earlier["details"][f"fuzz_{op}"])
                record.add(entry["name"], entry["value"], entry["unit"])


def fuzz_share(device: torch.device, share: Share) -> dict[str, Any]:
    """One share of one kernel's shapes, over its share of the kinds of kernels that there are to compile."""
    started, passed, worst = time.perf_counter(), 0, 0.0
    failed: list[str] = []
    kinds = None
    if device.type == "cuda":
        every = fuzz.WIDE_KINDS if share.op in ("select_blocks", "paged_decode") else fuzz.GPU_KINDS
        kinds = every[share.index :: share.of]
    cases = fuzz.fuzz(share.op, n_shapes=share.shapes, seed=share.index, device=str(device), kinds=kinds)
    while time.time() < share.until and (case := next(cases, None)) is not None:
        worst = max(worst, case.error / case.limit)
        if case.ok:
            passed += 1
        else:
            failed.append(str(case))
        if device.type == "cuda" and torch.cuda.memory_reserved(device) > 1 << 30:
            # The oracle of a long sequence takes gigabytes, and the other processes need theirs.
            torch.cuda.empty_cache()
    return {
        "passed": passed,
        "failed": failed,
        # An infinity is no JSON.
        "worst_error_over_limit": min(round(worst, 3), 1e9),
        "seconds": round(time.perf_counter() - started),
    }


def _in_turn(setup: Setup, shares: Sequence[Share]) -> Iterator[tuple[Share, dict[str, Any]]]:
    for share in shares:
        yield share, fuzz_share(setup.device, share)


def _in_processes(shares: Sequence[Share]) -> Iterator[tuple[Share, dict[str, Any]]]:
    """All shares at once, each in a process of its own, in the order in which they end."""
    with ThreadPoolExecutor(len(shares)) as pool:
        running = {pool.submit(_in_process, share): share for share in shares}
        for future in as_completed(running):
            yield running[future], future.result()


def _in_process(share: Share) -> dict[str, Any]:
    """`fuzz_share` in a process of its own; one that breaks or never ends is a failure with its last output."""
    spec = ":".join(str(value) for value in (share.op, share.index, share.of, share.shapes, share.until))
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--fuzz-share", spec]
    limit = max(1.0, share.until + GRACE - time.time())
    empty = {"passed": 0, "worst_error_over_limit": 0.0, "seconds": round(limit)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {**empty, "failed": [f"fuzz {share.op}, share {share.index}: no end within {limit:.0f} s"]}
    if done.returncode:
        output = (done.stdout + done.stderr)[-1500:]
        return {**empty, "failed": [f"fuzz {share.op}, share {share.index}: {output}"]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


RUN: dict[str, Callable[[Setup, Recorder], None]] = {
    "context": context,
    "dense": dense,
    "streaming": streaming,
    "decode": decode,
    "xattn": xattn,
    "fuzz": fuzzing,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, launch configurations and shapes")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=", ".join(RUN))
    parser.add_argument("--fuzz", type=int, default=None, metavar="N", help="random shapes per kernel (500)")
    parser.add_argument("--fuzz-seconds", type=float, default=240, help="no shape begins later; ends within 10 more")
    parser.add_argument(
        "--fuzz-ops",
        default=",".join(fuzz.OPS),
        help="kernels to check; of the others, results with the same code and device stay in the file",
    )
    parser.add_argument("--fuzz-share", metavar="OP:I:OF:N:UNTIL", help="check one share, print it as JSON and end")
    add_run_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    if options.fuzz_share:
        op, index, of, shapes, until = options.fuzz_share.split(":")
        print(json.dumps(fuzz_share(device, Share(op, int(index), int(of), int(shapes), float(until)))))
        return 0
    if device.type != "cuda" and not options.tiny:
        sys.exit("these shapes need a CUDA device; --tiny runs toy sizes anywhere")
    chosen = options.sections.split(",")
    if unknown := [name for name in chosen if name not in RUN]:
        sys.exit(f"unknown section {', '.join(unknown)}; there are {', '.join(RUN)}")
    fuzz_ops = tuple(options.fuzz_ops.split(","))
    if wrong := [op for op in fuzz_ops if op not in fuzz.OPS]:
        sys.exit(f"unknown kernel {', '.join(wrong)}; there are {', '.join(fuzz.OPS)}")
    torch.manual_seed(0)
    tiny = options.tiny
    setup = Setup(
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        long=4096 if tiny else 131072,
        short=1024 if tiny else 32768,
        heads=(4, 2, 64) if tiny else (32, 8, 128),
        sizes={"sink": 128, "window": 256 if tiny else 2048, "block": 128},
        repetitions=3 if options.quick or tiny else 7,
        quick=options.quick,
        tiny=tiny,
        fuzz_shapes=options.fuzz or (5 if tiny else 60 if options.quick else 500),
        fuzz_seconds=options.fuzz_seconds,
        fuzz_ops=fuzz_ops,
    )
    folder = options.out or (None if tiny else Path("benchmarks/results"))
    settings = {
        "heads": list(setup.heads),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "repetitions": setup.repetitions,
        "quick": setup.quick,
        **setup.sizes,
    }
    name = program_name("kernels", chosen, SECTIONS)
    return run_sections(
        [(name, lambda record, f=RUN[name]: f(setup, record)) for name in chosen],
        Recorder(name, device, settings, folder, options.commit),
    )


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(1 if main() else 0)
