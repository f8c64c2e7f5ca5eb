"""Training a router for an 8B model (the shapes of Qwen3-8B, random weights) on one device: tokens a second and memory.

    python benchmarks/training.py [--lengths 65536] [--objectives lm,distill] [--compile] [--out DIR]
    python benchmarks/training.py --lengths 8192,16384,32768,131072 --steps 1 --seconds 90    # the rest of the table

A step is one pack: forward, backward, clipping and AdamW, as the Trainer does them. Packs hold documents of 32K tokens
(two of half the pack where it is shorter), and every token is learned, which is the dearest case for the loss. The
figures are of a router as training starts: nearly every layer full, the dearest case for attention, and documents that
distillation could leave out because all of their layers are full are not left out. `--sparsity` gives a share of the
layers to the sparse side instead.

With `--seconds`, lengths in the order of their importance: a row that would not be done in time is left out, and only
the first row of each objective is warmed up when there is no time for more. Rows are on the disk as they end, and
another run of the same commit and settings adds its rows to them.

Checked first, on eight layers of the same shapes: the gradient of the gates against one in float32, within twice the
error of plain bfloat16 attention. When that fails, figures are written under names that begin with "unchecked".
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import Figure, Recorder, add_run_options, label, run_sections, sync
from end_to_end import build, qwen3_8b, toy
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config

from flux_attention.config import FluxConfig
from flux_attention.data.sample import HOLISTIC, RETRIEVAL, TASK_CLASSES
from flux_attention.models.attach import attach, detach
from flux_attention.models.controller import FluxAttention
from flux_attention.models.step import SoftRouting
from flux_attention.modes import Mode, PrefillInputs
from flux_attention.training.chunked_loss import chunked_cross_entropy
from flux_attention.training.compiled import compiled_layers
from flux_attention.training.packed_objective import PackedObjective, pack_layout
from flux_attention.training.recompute import recomputed_layers

DOCUMENT = 32768
#: Tokens at a document's end that count as its answer for the router's pooling.
ANSWER = 256
#: Enough gates that the norm of their error is no chance.
CHECK_LAYERS, CHECK_DOCUMENTS = 8, 4
#: Tokens a second to plan with, until an objective has been measured.
EXPECTED_RATES = {"lm": 5000.0, "distill": 4000.0}
#: Share of the device's memory that a row may be expected to take before the layers' inputs go to the host.
MOST_MEMORY = 0.95


@dataclass(frozen=True)
class Setup:
    """What the command line asked for."""

    device: torch.device
    dtype: torch.dtype
    model: Qwen3Config
    flux: FluxConfig
    lengths: tuple[int, ...]
    objectives: tuple[str, ...]
    documents: int
    check_tokens: int
    steps: int
    sparsity: float | None
    compile: bool
    impl: str
    sparse_impl: str
    offload: bool
    until: float


@dataclass(frozen=True)
class With(Mode):
    """A mode that always runs one implementation."""

    mode: Mode
    implementation: str
    name = "with"

    def prefill(self, inputs: PrefillInputs) -> Tensor:
        return self.mode.prefill(replace(inputs, impl=self.implementation))


def attached(setup: Setup, model: PreTrainedModel, impl: str | None = None) -> FluxAttention:
    # A named implementation is the reference: nothing else may differ from the model's own code either. A toy run on a
    # CPU takes the code of the real one, which is fused.
    fuse = (True if setup.device.type == "cpu" else None) if impl is None else False
    controller = attach(model, setup.flux, fuse=fuse)
    controller.impl = impl or setup.impl
    if impl is None and setup.sparse_impl != setup.impl:
        controller.sparse_mode = With(controller.config, controller.sparse_mode, setup.sparse_impl)
    return controller


def make_pack(setup: Setup, tokens: int, document: int) -> dict[str, Tensor]:
    """Random documents back to back, every token but the first of each learned."""
    lengths = [document] * (tokens // document) if tokens >= 2 * document else [tokens // 2, tokens - tokens // 2]
    pack = pack_of(torch.randint(0, setup.model.vocab_size, (1, tokens)), lengths)
    return {name: value.to(setup.device) for name, value in pack.items()}


def pack_of(ids: Tensor, lengths: Sequence[int]) -> dict[str, Tensor]:
    """The tokens `[1, T]` as documents of these lengths, in the form of a `packing.Pack`."""
    count = len(lengths)
    weight = torch.cat([torch.full((n,), 1.0 / ((n - 1) * count)) for n in lengths])
    ends = torch.tensor(lengths).cumsum(0) - 1
    weight[ends] = 0.0
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "targets": ids.roll(-1, 1),
        "token_weight": weight[None],
        "lengths": torch.tensor(lengths),
        "prompt_lens": torch.tensor([n - min(ANSWER, n // 2) for n in lengths]),
        "class_index": torch.arange(count) % len(TASK_CLASSES),
    }


# ------------------------------------------------------------------------------------------------ check


def gate_gradient(
    controller: FluxAttention, pack: dict[str, Tensor], gates: Tensor, *, blended: bool, recompute: bool
) -> dict[str, Tensor]:
    """Loss and the gates' gradient `[L, S]` of the cross entropy over a pack, under fixed gates of 0 and 1.

    `blended`: both sides with a graph, whatever the gates say, as the formula is written.
    """
    gates = gates.clone().requires_grad_()
    full = tuple(tuple(v > 0.5 for v in row) for row in gates.tolist()) if not blended else None
    lengths = tuple(pack["lengths"].tolist())
    soft = SoftRouting(forced=gates, forced_exact=full, layout=pack_layout(pack["input_ids"].shape[1], lengths))
    head = controller.model.get_output_embeddings().weight

    def loss() -> Tensor:
        with controller.soft_routing(soft):
            hidden = controller.decoder(
                input_ids=pack["input_ids"], position_ids=pack["position_ids"], use_cache=False
            ).last_hidden_state
        return chunked_cross_entropy(hidden[0], head, pack["targets"][0], pack["token_weight"][0])

    if recompute:
        with recomputed_layers(controller):
            found = loss()
            found.backward()
    else:
        found = loss()
        found.backward()
    assert gates.grad is not None
    return {"loss": found.detach().double(), "gradient": gates.grad.double()}


def few_layers(setup: Setup) -> Qwen3Config:
    """The model with so few layers that it can be run in float32."""
    shape = {name: value for name, value in setup.model.to_dict().items() if name != "layer_types"}
    return type(setup.model)(**{**shape, "num_hidden_layers": CHECK_LAYERS})


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Not `model.to`: it would round the rotary frequencies, too, and hide what is compared."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def checks(setup: Setup, record: Recorder) -> None:
    config = few_layers(setup)
    torch.manual_seed(1)
    pack = make_pack(setup, CHECK_DOCUMENTS * setup.check_tokens, setup.check_tokens)
    gates = torch.tensor(
        [[float((layer + s) % 2) for s in range(CHECK_DOCUMENTS)] for layer in range(CHECK_LAYERS)], device=setup.device
    )
    found: dict[str, dict[str, Tensor]] = {}
    model = build(config, setup.device, torch.float32)
    runs: tuple[tuple[str, torch.dtype, str | None], ...] = (
        ("float32", torch.float32, "sdpa"),
        ("plain", setup.dtype, "sdpa"),
        ("ours", setup.dtype, None),
    )
    for name, dtype, impl in runs:
        cast_weights(model, dtype)
        controller = attached(setup, model, impl)
        ours = name == "ours"
        try:
            with compiled_layers(controller) if ours and setup.compile else nullcontext():
                # In float32 whole score matrices are kept: too much for all layers at a time.
                found[name] = gate_gradient(controller, pack, gates, blended=not ours, recompute=name != "plain")
        finally:
            detach(model)
    del model, controller
    free(setup)
    for part, exact in found["float32"].items():
        plain, ours = (float((found[name][part] - exact).norm() / exact.norm()) for name in ("plain", "ours"))
        print(f"  relative error of the {part}: plain {plain:.2e}, ours {ours:.2e}", flush=True)
        # In float32 both only reorder sums.
        if not ours <= 2 * max(plain, 1e-4):
            raise AssertionError(f"{part} differs by {ours:.2e}, plain attention by {plain:.2e}")


# ------------------------------------------------------------------------------------------------ steps


def free(setup: Setup) -> None:
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.device)


def lock_memory(setup: Setup, tokens: int) -> None:
    """Locked memory of the host is slow to get and stays with the process: have it as a step before would leave it."""
    shape = (1, tokens, setup.model.hidden_size)
    held = [torch.empty(shape, dtype=setup.dtype, pin_memory=True) for _ in range(setup.model.num_hidden_layers)]
    del held


def set_sparsity(controller: FluxAttention, sparsity: float | None) -> None:
    """The router as it starts, or one that gives a share of the layers, evenly spread, to the sparse side."""
    router = controller.router
    router.reset_parameters()
    if sparsity is None:
        return
    layers = router.num_layers
    with torch.no_grad():
        for layer in range(layers):
            sparse = int((layer + 1) * sparsity) > int(layer * sparsity)
            router.biases[-1][layer, 1] = -20.0 if sparse else 20.0


def run_steps(setup: Setup, controller: FluxAttention, kind: str, tokens: int, warm_up: bool) -> dict[str, Any]:
    """Seconds of each step and the peak of memory, after one step to warm up where that is wanted."""
    torch.manual_seed(0)
    set_sparsity(controller, setup.sparsity)
    objective = PackedObjective(controller, kind, {RETRIEVAL: 0.7, HOLISTIC: 1.0}, skip_full=False).to(setup.device)  # type: ignore[arg-type]
    objective.temperature = 1.5
    objective.generator = torch.Generator(setup.device).manual_seed(0)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4)
    seconds, omega = [], 0.0
    free(setup)
    if setup.offload and not warm_up and setup.device.type == "cuda":
        lock_memory(setup, tokens)
    with recomputed_layers(controller, offload=setup.offload):
        for number in range(setup.steps + warm_up):
            pack = make_pack(setup, tokens, setup.documents)
            sync(setup.device)
            started = time.perf_counter()
            found = objective(**pack)
            found["loss"].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            optimizer.zero_grad()
            sync(setup.device)
            seconds.append(time.perf_counter() - started)
            omega = float(found["sparsity"].mean())
            print(
                f"    step {number}: {seconds[-1]:.2f} s, Ω {omega:.2f}, loss {float(found['task_loss']):.3f}",
                flush=True,
            )
    peak = torch.cuda.max_memory_allocated(setup.device) / 1e9 if setup.device.type == "cuda" else 0.0
    return {"seconds": seconds[warm_up:], "peak_gb": peak, "omega": omega, "warm_up": warm_up}


def fitting(setup: Setup, controller: FluxAttention, kind: str, tokens: int, warm_up: bool) -> dict[str, Any] | None:
    """`run_steps`, with the layers' inputs in the host's memory where it does not fit otherwise; None = not at all."""
    for offload in dict.fromkeys((setup.offload, True)):
        try:
            found = run_steps(replace(setup, offload=offload), controller, kind, tokens, warm_up)
            return {**found, "offload": offload}
        except torch.cuda.OutOfMemoryError as error:
            print(f"    {tokens} tokens do not fit (offload={offload}): {str(error)[:80]}", flush=True)
        free(setup)
    return None


def too_large(setup: Setup, rows: Sequence[dict[str, Any]], tokens: int, weights_gb: float) -> bool:
    """Whether a row is expected not to fit, by the peak of the longest one that did: beyond the weights memory grows
    with the tokens. Saves the time of finding out."""
    known = [row for row in rows if row["fits"] and not row["offload"] and row["tokens"] < tokens]
    if setup.device.type != "cuda" or not known:
        return False
    longest = max(known, key=lambda row: int(row["tokens"]))
    expected = weights_gb + (longest["peak_gb"] - weights_gb) * tokens / longest["tokens"]
    return bool(expected > MOST_MEMORY * torch.cuda.get_device_properties(setup.device).total_memory / 1e9)


def training(setup: Setup, record: Recorder) -> None:
    model = build(setup.model, setup.device, setup.dtype)
    controller = attached(setup, model)
    weights_gb = torch.cuda.memory_allocated(setup.device) / 1e9 if setup.device.type == "cuda" else 0.0
    suffix = "" if setup.sparsity is None else f"_sparse{round(100 * setup.sparsity)}"
    earlier = record.earlier()
    table: list[dict[str, Any]] = list(earlier.get("details", {}).get("table", ()))
    for entry in earlier.get("figures", ()):
        # Under the names they have: whether this run was checked is nothing about them.
        found = tuple(entry.get("repetitions", ()))
        record.figures[entry["name"]] = Figure(entry["name"], entry["value"], entry["unit"], repetitions=found)
    wanted = [(tokens, kind) for tokens in setup.lengths for kind in setup.objectives]
    rates = dict(EXPECTED_RATES)
    planned = sum(tokens / rates[kind] for tokens, kind in wanted) * (setup.steps + 1)
    warm_all = time.perf_counter() + planned <= setup.until
    warmed: set[str] = set()
    with compiled_layers(controller) if setup.compile else nullcontext():
        for tokens, kind in wanted:
            warm_up = warm_all or kind not in warmed
            if time.perf_counter() + (setup.steps + warm_up) * tokens / rates[kind] > setup.until:
                print(f"    no time left for {tokens} tokens of {kind}", flush=True)
                continue
            offload = setup.offload or too_large(setup, table, tokens, weights_gb)
            row = fitting(replace(setup, offload=offload), controller, kind, tokens, warm_up)
            table = [r for r in table if (r["tokens"], r["objective"]) != (tokens, kind)]
            if row is None:
                table.append({"tokens": tokens, "objective": kind, "fits": False})
                record.note("table", table)
                continue
            warmed.add(kind)
            found = [tokens / s for s in row.pop("seconds")]
            rates[kind] = statistics.median(found)
            table.append({"tokens": tokens, "objective": kind, "tokens_per_s": rates[kind], "fits": True, **row})
            record.note("table", table)
            name = f"train_8b_{label(tokens)}"
            record.add(f"{name}_{kind}{suffix}_tokens_per_s", rates[kind], "tokens/s", found)
            peak = max(r["peak_gb"] for r in table if r["fits"] and r["tokens"] == tokens)
            record.add(f"{name}_peak_gb{suffix}", peak, "GB")
    detach(model)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", default=None, help="tokens of a pack, with commas (65536); the table: 8192 … 131072"
    )
    parser.add_argument("--objectives", default="lm,distill")
    parser.add_argument("--steps", type=int, default=2, help="steps that are timed, after one to warm up")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no row begins that would end later")
    parser.add_argument("--sparsity", type=float, default=None, help="share of layers that run sparse")
    parser.add_argument("--compile", action="store_true", help="compile norms and gating for passes with gradients")
    parser.add_argument("--impl", default="auto", help="of attention")
    parser.add_argument("--sparse-impl", default=None, help="of the sparse side alone")
    parser.add_argument("--offload", action="store_true", help="keep the layers' inputs in the host's memory")
    parser.add_argument("--layers", type=int, default=36, help="of the model; other than 36 writes no figures")
    add_run_options(parser, tiny="a toy model, to try the program itself")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    options = parse(arguments)
    device, tiny = torch.device(options.device), options.tiny
    if device.type != "cuda" and not tiny:
        sys.exit("an 8B model needs a CUDA device; --tiny runs a toy anywhere")
    lengths = tuple(int(n) for n in (options.lengths or ("1024" if tiny else "65536")).split(","))
    flux = FluxConfig(sink_tokens=128, window_tokens=128 if tiny else 2048)
    setup = Setup(
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        model=toy() if tiny else qwen3_8b(options.layers),
        flux=replace(flux, pool_tokens=20) if tiny else flux,
        lengths=lengths,
        objectives=tuple(options.objectives.split(",")),
        documents=512 if tiny else DOCUMENT,
        check_tokens=512 if tiny else 3072,
        steps=1 if tiny else options.steps,
        sparsity=options.sparsity,
        compile=options.compile,
        impl=options.impl,
        sparse_impl=options.sparse_impl or options.impl,
        offload=options.offload,
        until=started + options.seconds,
    )
    folder = options.out
    if folder is None and not tiny and options.layers == 36:
        folder = Path("benchmarks/results")
    settings: dict[str, Any] = {
        "backbone": "toy" if tiny else "Qwen3-8B shapes, random weights",
        "dtype": str(setup.dtype).removeprefix("torch."),
        "documents": setup.documents,
        "sink_tokens": flux.sink_tokens,
        "window_tokens": flux.window_tokens,
        "sparsity": setup.sparsity,
        "compile": setup.compile,
        "impl": setup.impl,
        "sparse_impl": setup.sparse_impl,
        "offload": setup.offload,
        "learned_tokens": "all",
        "repetitions": setup.steps,
    }
    name = "training" if setup.sparsity is None else f"training-sparse{round(100 * setup.sparsity)}"
    if lengths != (65536,) and not tiny:
        # A file is replaced by the next of its name: the table must not take the figures with it.
        name += "-table"
    record = Recorder(name, device, settings, folder, options.commit)

    def section(run: Callable[[Setup, Recorder], None]) -> Callable[[Recorder], None]:
        return functools.partial(run, setup)

    failures = run_sections([("checks", section(checks))], record)
    record.prefix = "unchecked_" if failures else ""
    return failures + run_sections([("training", section(training))], record)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
