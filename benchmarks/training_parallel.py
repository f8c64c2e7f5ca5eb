"""Training a router for an 8B model on several GPUs of one host, against one of them: numbers and tokens a second.

    torchrun --nproc-per-node 2 benchmarks/training_parallel.py --seconds 330 [--ways ddp,sequence,fsdp] [--out DIR]

Qwen3-8B shapes with random weights; a figure is the ratio of tokens a second to those of one GPU in the same run.
`ddp` and `fsdp` give every rank a pack of 64K tokens (two documents), `sequence` shares one document of 128K tokens.
What runs is `PackTrainer` itself, over random packs and without saving: the baseline on the first rank's GPU, as if no
launcher had started it, while the other ranks wait without using theirs. It keeps the layers' inputs in the host's
memory where they do not fit otherwise; the row says so, and what the copies take.

Each way is checked before it is timed, on a few layers of the same shapes over three steps of the same packs and noise:
the same routes on all ranks and on one GPU, the same parameters on all ranks, and losses and gradients of the router at
most twice as far from float32 as one GPU's own. That limit has to tell synchronised gradients from those of one rank's
pack, or the check fails too. Figures of a way that fails have names that begin with "unchecked".

With `--seconds`, ways in the order of their importance: one that would not be done in time is left out. Figures are on
the disk as soon as they are known. A rank that fails ends the run; where all fail alike the next way is tried.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from common import Recorder, add_run_options, label, sync
from model_8b import build, qwen3_8b, toy
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from training import (
    CHECK_LAYERS,
    DOCUMENT,
    EXPECTED_RATES,
    Setup,
    attached,
    cast_weights,
    few_layers,
    free,
    lock_memory,
    pack_of,
    set_sparsity,
    too_large,
)
from transformers import TrainerCallback

from flux_attention.config import FluxConfig
from flux_attention.models.attach import detach
from flux_attention.models.controller import FluxAttention
from flux_attention.training import parallel
from flux_attention.training.launch import rank_device
from flux_attention.training.parallel import end_together
from flux_attention.training.scale import PackTrainer, ScaleConfig

WAYS = ("ddp", "sequence", "fsdp")
#: Steps of the check, and documents of each of its packs: an odd number, so that two ranks share the middle one.
CHECK_STEPS, CHECK_DOCUMENTS = 3, 3
#: To plan with: seconds of the first check, which compiles kernels and runs in float32, and of another. What a token of
#: the longest documents takes, in tokens of the shorter. What locking memory takes, in steps.
FIRST_CHECK, NEXT_CHECK, LONGER, LOCKING = 80.0, 10.0, 2.2, 0.4
#: Names under which a launcher tells a process what rank it is.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


# ------------------------------------------------------------------------------------------------ ranks


class Meeting:
    """What ranks tell each other over the launcher's store.

    No device takes part: a rank that waits leaves its GPU idle, and no collective of its own runs out of time.
    """

    def __init__(self) -> None:
        store, self.rank, self.world = next(rendezvous("env://"))
        self._store = dist.PrefixStore("benchmark", store)
        self._number = 0

    def all(self, value: Any, seconds: float = 600.0) -> list[Any]:
        """Every rank's value, JSON; raises when one has not told its own in time. All ranks call it in one order."""
        self._number += 1
        names = [f"{self._number}/{rank}" for rank in range(self.world)]
        self._store.set(names[self.rank], json.dumps(value))
        self._store.wait(names, timedelta(seconds=seconds))
        return [json.loads(self._store.get(name)) for name in names]

    def first(self, value: Callable[[], Any]) -> Any:
        """What the first rank computes, on every rank; the others wait for it. Its error is raised on all of them."""
        found: Any = None
        if self.rank == 0:
            try:
                found = [value(), ""]
            except Exception as error:
                traceback.print_exc()
                found = [None, f"{type(error).__name__}: {str(error)[:300]}"]
        found, failed = self.all(found)[0]
        if failed:
            raise RuntimeError(f"on the first rank: {failed}")
        return found


@contextmanager
def alone() -> Iterator[None]:
    """A trainer that is made and run inside knows of no other ranks."""
    kept = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        with mock.patch.object(parallel, "_started", return_value=False):
            yield
    finally:
        os.environ.update(kept)


# ------------------------------------------------------------------------------------------------ trainer


@dataclass(frozen=True)
class Document:
    """Random tokens, in the place of a `Sample`."""

    seed: int
    tokens: int

    def __len__(self) -> int:
        return self.tokens


@dataclass
class Watch(TrainerCallback):
    """What is compared and timed of one trainer's run; `gradients`: keep the router's, too."""

    device: torch.device
    gradients: bool
    parameters: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    sparsity: list[Tensor] = field(default_factory=list)
    routes: list[Any] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    first_pack: Tensor | None = None
    seconds: list[float] = field(default_factory=list)
    _last: float = 0.0

    def _gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten().double() for p in self.parameters if p.grad is not None])

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        sync(self.device)
        self._last = time.perf_counter()

    def on_substep_end(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        if self.gradients and self.first_pack is None:
            # The Trainer has divided it by the packs of a step.
            self.first_pack = self._gradient() * args.gradient_accumulation_steps

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.gradients:
            self.steps.append(self._gradient())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        sync(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def outcome(self) -> dict[str, Any]:
        """Plain values that every rank has of its own."""
        digest = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in self.parameters)).hexdigest()
        return {"losses": [float(x) for x in self.losses], "routes": self.routes, "parameters": digest}


class WatchedTrainer(PackTrainer):
    """`PackTrainer` over packs of random documents, every token but the first of each learned."""

    def __init__(
        self,
        setup: Setup,
        controller: FluxAttention,
        config: ScaleConfig,
        documents: Sequence[Document],
        gradients: bool = False,
    ) -> None:
        self.watch = Watch(setup.device, gradients)
        self.vocabulary = setup.model.vocab_size
        with tempfile.TemporaryDirectory() as folder:
            super().__init__(controller, config, documents, folder, progress=False, callbacks=(self.watch,))  # type: ignore[arg-type]
        self.watch.parameters = list(self.objective.router.parameters())

    def _objective_of(self, controller: FluxAttention, config: Any) -> tuple[Any, Any]:
        objective: Any = super()._objective_of(controller, config)[0]
        # As `training.py`: the dearest case.
        objective.skip_full = False
        routing = objective._routing

        def noted(row: Any) -> Any:
            soft = routing(row)
            self.watch.routes.append([[int(full) for full in layer] for layer in soft.forced_exact])
            return soft

        objective._routing = noted
        return objective, self._pack

    def _pack(self, packs: Sequence[Sequence[Document]]) -> dict[str, Tensor]:
        (documents,) = packs
        ids = [
            torch.randint(0, self.vocabulary, (d.tokens,), generator=torch.Generator().manual_seed(d.seed))
            for d in documents
        ]
        return pack_of(torch.cat(ids)[None], [d.tokens for d in documents])

    def _note(self, outputs: Any) -> None:
        super()._note(outputs)
        self.watch.losses.append(outputs["task_loss"].detach())
        self.watch.sparsity.append(outputs["sparsity"].detach().mean())


def way_config(way: str, world: int) -> dict[str, Any]:
    """What a way sets, and nothing of it for one GPU."""
    return {
        "one": {},
        "ddp": {},
        "fsdp": {"shard_backbone": True},
        "sequence": {"sequence_parallel": world},
    }[way]


def own_packs(way: str, world: int) -> int:
    """Packs that the ranks have in a pass, one each or one together."""
    return world if way in ("ddp", "fsdp") else 1


# ------------------------------------------------------------------------------------------------ check


@dataclass(frozen=True)
class Checked:
    """Losses of all passes, gradients of all steps `[steps, n]`, and what is known beside them."""

    losses: Tensor
    gradients: Tensor
    outcome: dict[str, Any]
    first_pack: Tensor | None


def check_run(setup: Setup, way: str, world: int, dtype: torch.dtype, impl: str | None = None) -> Checked:
    """Three steps over `world` packs each, divided as the way divides them."""
    tokens = CHECK_DOCUMENTS * setup.check_tokens
    # Weights are drawn in float32 and then rounded: the rounding is part of what bfloat16 changes.
    model = build(few_layers(setup), setup.device, torch.float32)
    cast_weights(model, dtype)
    flux = replace(setup.flux, full_bias=0.5, window_tokens=128)
    controller = attached(replace(setup, flux=flux), model, impl)
    # Drawn on the host: the same on every device.
    torch.manual_seed(5)
    router = controller.router
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-1, 1) * parameter.shape[-1] ** -0.5)
        # Documents that decide for themselves, about as often one way as the other.
        router.weights[-1].copy_(0.3 * torch.randn(router.weights[-1].shape))
    config = ScaleConfig(
        objective=setup.objectives[0],  # type: ignore[arg-type]
        steps=CHECK_STEPS,
        accumulation=world // own_packs(way, world),
        pack_tokens=tokens,
        # The penalty has the same gradient everywhere, and would hide the rest.
        multiplier_start=0.0,
        multiplier_lr=0.0,
        clip=1e9,
        # Small: rounding must not grow into another route before the last step.
        router_lr=1e-4,
        warmup_share=0.0,
        logging_steps=0,
        **way_config(way, world),
    )
    documents = [Document(seed, setup.check_tokens) for seed in range(CHECK_DOCUMENTS * CHECK_STEPS * world)]
    trainer = WatchedTrainer(setup, controller, config, documents, gradients=True)
    trainer.train()
    watch = trainer.watch
    found = Checked(
        torch.tensor([float(x) for x in watch.losses], dtype=torch.float64),
        torch.stack(watch.steps).cpu(),
        watch.outcome(),
        None if watch.first_pack is None else watch.first_pack.cpu(),
    )
    detach(model)
    return found


def one_gpu(setup: Setup, world: int) -> tuple[Checked, Checked]:
    """The packs of all ranks on one GPU: in float32, and as it trains."""
    with alone():
        exact = check_run(setup, "one", world, torch.float32, "sdpa")
        free(setup)
        return exact, check_run(setup, "one", world, setup.dtype)


def faults(setup: Setup, way: str, exact: Checked, one: Checked, mine: Checked, ranks: Sequence[Any]) -> list[str]:
    """What is wrong with a way: `mine` on the first rank, `ranks` the outcomes of all."""
    found = []
    world = len(ranks)
    # The passes of one GPU that a rank makes, too.
    share = [
        range(r, CHECK_STEPS * world, world) if way != "sequence" else range(CHECK_STEPS * world) for r in range(world)
    ]
    for rank, outcome in enumerate(ranks):
        if outcome["routes"] != [one.outcome["routes"][i] for i in share[rank]]:
            found.append(f"rank {rank} takes other routes than one GPU")
        if outcome["parameters"] != ranks[0]["parameters"]:
            found.append(f"rank {rank} ends with other parameters than rank 0")
    # Where float32 decides otherwise, which rounding can bring about, it is no measure of one GPU's error any more.
    same = [a == b for a, b in zip(exact.outcome["routes"], one.outcome["routes"], strict=True)]
    steps = next((i // world for i, equal in enumerate(same) if not equal), CHECK_STEPS)
    if not steps:
        return [*found, "float32 takes other routes than one GPU from the first step on"]
    losses = torch.empty_like(one.losses)
    for rank, outcome in enumerate(ranks):
        losses[list(share[rank])] = torch.tensor(outcome["losses"], dtype=torch.float64)
    assert exact.first_pack is not None
    # What a mean over all tokens leaves of the rounding of each: one GPU's own error may be smaller by chance.
    least = torch.finfo(setup.dtype).eps / math.sqrt(12 * CHECK_DOCUMENTS * setup.check_tokens)
    parts = (
        # What a rank alone would have: another pack's losses, the gradient of its own.
        ("losses", *(x[: steps * world] for x in (exact.losses, one.losses, losses, exact.losses.roll(1))), least),
        (
            "gradient",
            *(x[:steps] for x in (exact.gradients, one.gradients, mine.gradients)),
            exact.first_pack,
            1e-4,
        ),
    )
    for part, expected, single, actual, broken, floor in parts:
        scale = float(expected.norm())
        own, error, apart = (
            float((a - b).norm()) / scale for a, b in ((single, expected), (actual, expected), (actual, single))
        )
        # Of the gradient, the first step's is known.
        other = expected if part == "losses" else expected[0]
        reach = float((broken - other).norm() / other.norm())
        limit = 2 * max(own, floor)
        print(
            f"  {way}, relative error of the {part}: {error:.2e} from float32 (one GPU {own:.2e}, limit {limit:.2e}), "
            f"{apart:.2e} from one GPU; one rank's pack alone {reach:.2e}; {steps} steps",
            flush=True,
        )
        if not error <= limit:
            found.append(f"the {part} differ from float32 by {error:.2e}, which is above {limit:.2e}")
        if not limit < reach / 2:
            found.append(f"the limit of the {part}, {limit:.2e}, does not tell one rank's pack, at {reach:.2e}")
    return found


# ------------------------------------------------------------------------------------------------ speed


@dataclass
class Bench:
    """One run: what was asked for, the 8B model while it is whole, and the rows so far.

    Attributes:
        record: on the first rank alone.
        rows: of the table; the same on every rank but for the baselines, which the first rank knows.
    """

    setup: Setup
    meeting: Meeting
    record: Recorder | None
    warm_up: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    controller: FluxAttention | None = None
    weights_gb: float = 0.0
    references: tuple[Checked, Checked] | None = None

    def whole(self) -> FluxAttention:
        """The attached model, made when it is wanted."""
        if self.controller is None:
            model = build(self.setup.model, self.setup.device, self.setup.dtype)
            self.controller = attached(self.setup, model)
            self.weights_gb = memory_gb(self.setup, torch.cuda.memory_allocated)
        return self.controller

    def drop(self) -> None:
        self.controller = None
        free(self.setup)

    def tokens(self, way: str) -> int:
        """Of a pack."""
        return self.setup.lengths[1 if way == "sequence" else 0]

    def row(self, way: str, tokens: int) -> dict[str, Any] | None:
        return next((row for row in self.rows if (row["way"], row["tokens"]) == (way, tokens)), None)


def memory_gb(setup: Setup, read: Callable[[torch.device], int]) -> float:
    return read(setup.device) / 1e9 if setup.device.type == "cuda" else 0.0


def timed(
    bench: Bench, way: str, tokens: int, warm_up: int, offload: bool = False, document: int | None = None
) -> dict[str, Any]:
    """Seconds of each step of this rank and its peak of memory, after steps to warm up."""
    setup, world = bench.setup, bench.meeting.world
    controller = bench.whole()
    torch.manual_seed(0)
    set_sparsity(controller, setup.sparsity)
    steps, packs = setup.steps + warm_up, own_packs(way, world)
    config = ScaleConfig(
        objective=setup.objectives[0],  # type: ignore[arg-type]
        steps=steps,
        accumulation=1,
        pack_tokens=tokens,
        offload=offload,
        logging_steps=1,
        **way_config(way, world),
    )
    # Two to a pack, or one that fills it.
    length = document or (tokens if tokens > setup.lengths[0] else tokens // 2)
    documents = [Document(seed, length) for seed in range(steps * packs * tokens // length)]
    free(setup)
    if offload and not warm_up and setup.device.type == "cuda":
        lock_memory(setup, tokens)
    trainer = WatchedTrainer(setup, controller, config, documents)
    trainer.train()
    watch = trainer.watch
    return {
        "seconds": watch.seconds[warm_up:],
        "warm_up": watch.seconds[:warm_up],
        "peak_gb": memory_gb(setup, torch.cuda.max_memory_allocated),
        "omega": float(torch.stack(watch.sparsity).mean()),
    }


def add_row(bench: Bench, row: dict[str, Any]) -> None:
    bench.rows.append(row)
    if bench.record is None:
        return
    bench.record.note("table", bench.rows)
    way, gpus = row["way"], row["gpus"]
    name = f"train_8b_{label(row['tokens'])}_{'1gpu' if way == 'one' else f'{way}{gpus}'}"
    bench.record.add(f"{name}_tokens_per_s", row["tokens_per_s"], "tokens/s", row["rates"])
    peaks = row["peak_gb"]
    bench.record.add(f"{name}_peak_gb", max(peaks), "GB", peaks)


def baseline(bench: Bench, tokens: int, warm_up: int) -> None:
    """One GPU, the first rank's: the row, on that rank."""
    setup = bench.setup
    bench.whole()
    known = [{**row, "fits": True, "peak_gb": max(row["peak_gb"])} for row in bench.rows if row["way"] == "one"]
    offload = setup.offload or too_large(setup, known, tokens, bench.weights_gb)
    with alone():
        if not warm_up and tokens > setup.lengths[0]:
            # Whatever is compiled for one long document is for a short one, too.
            short = tokens // 8
            timed(replace(bench, setup=replace(setup, steps=1)), "one", short, 0, offload, short)
        try:
            found = timed(bench, "one", tokens, warm_up, offload)
        except torch.cuda.OutOfMemoryError as error:
            if offload:
                raise
            print(f"    {tokens} tokens do not fit: {str(error)[:80]}", flush=True)
            offload = True
            error.__traceback__ = None
            free(setup)
            found = timed(bench, "one", tokens, warm_up, offload)
    rates = [tokens / s for s in found["seconds"]]
    row = {"way": "one", "gpus": 1, "tokens": tokens, "tokens_per_s": statistics.median(rates), "rates": rates}
    row |= {**found, "peak_gb": [found["peak_gb"]], "offload": offload}
    if offload:
        row["copies_s"] = copy_seconds(setup, tokens)
    add_row(bench, row)


def copy_seconds(setup: Setup, tokens: int) -> float:
    """What offloading adds to a step: a layer's input out and back, as often as there are layers."""
    if setup.device.type != "cuda":
        return 0.0
    free(setup)
    x = torch.zeros(1, tokens, setup.model.hidden_size, dtype=setup.dtype, device=setup.device)
    kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    sync(setup.device)
    started = time.perf_counter()
    for _ in range(3):
        kept.copy_(x, non_blocking=True)
        x = kept.to(setup.device, non_blocking=True)
    sync(setup.device)
    return (time.perf_counter() - started) / 3 * setup.model.num_hidden_layers


def speed(bench: Bench, way: str) -> None:
    """A way's row on every rank, and its figure."""
    meeting, tokens = bench.meeting, bench.tokens(way)
    everyone = meeting.all(timed(bench, way, tokens, bench.warm_up))
    packs = own_packs(way, meeting.world)
    # A step is done when its last rank is.
    seconds = [max(each) for each in zip(*(found["seconds"] for found in everyone), strict=True)]
    rates = [packs * tokens / s for s in seconds]
    row = {
        "way": way,
        "gpus": meeting.world,
        "tokens": tokens,
        "tokens_per_s": statistics.median(rates),
        "rates": rates,
    }
    row |= {**everyone[0], "seconds": seconds, "peak_gb": [found["peak_gb"] for found in everyone], "offload": False}
    add_row(bench, row)
    if bench.record is None:
        return
    single = bench.row("one", tokens)
    assert single is not None
    ratio = row["tokens_per_s"] / single["tokens_per_s"]
    name = f"train_8b_{label(tokens)}_{way}{meeting.world}_speedup"
    bench.record.add(name, ratio, "×", [r / single["tokens_per_s"] for r in rates])
    if single["offload"]:
        # One GPU with memory for all of its layers' inputs would not copy them.
        step = statistics.median(single["seconds"])
        bench.record.note(f"{name}_without_copies", ratio * (step - single["copies_s"]) / step)


def plan(bench: Bench, way: str, rest: Sequence[str]) -> tuple[bool, int]:
    """Whether there is time for a way, and how many steps warm its baseline up: the first rank's to say."""
    setup, world = bench.setup, bench.meeting.world

    def one(tokens: int) -> float:
        """Seconds of a step on one GPU."""
        short = bench.row("one", setup.lengths[0])
        rate = short["tokens_per_s"] if short else EXPECTED_RATES[setup.objectives[0]]
        return tokens / rate * (LONGER if tokens > setup.lengths[0] else 1)

    def seconds(way: str, warm_up: int) -> float:
        tokens = bench.tokens(way)
        step = one(tokens) * (1.05 if way in ("ddp", "fsdp") else 1.2 / world)
        found = (bench.warm_up + setup.steps) * step + (NEXT_CHECK if bench.references else FIRST_CHECK)
        if bench.row("one", tokens) is None:
            long = tokens > setup.lengths[0]
            found += (warm_up + setup.steps + (LOCKING if long else 0)) * one(tokens)
        return found

    left = setup.until - time.perf_counter()
    long = bench.tokens(way) > setup.lengths[0]
    others = sum(seconds(other, 0) for other in rest)
    # A long baseline is warmed up where nothing else has to be left out for it.
    warm_up = bench.warm_up if not long or seconds(way, bench.warm_up) + others <= left else 0
    return seconds(way, warm_up) <= left, warm_up


def one_way(bench: Bench, way: str, warm_up: int) -> list[str]:
    """Check and time a way; returns what is wrong with its numbers."""
    setup, meeting = bench.setup, bench.meeting

    def reference() -> None:
        if bench.references is None:
            bench.references = one_gpu(setup, meeting.world)
            free(setup)

    meeting.first(reference)
    mine = check_run(setup, way, meeting.world, setup.dtype)
    ranks = meeting.all(mine.outcome)
    free(setup)

    def judged() -> list[str]:
        assert bench.references is not None
        return faults(setup, way, *bench.references, mine, ranks)

    wrong: list[str] = meeting.first(judged)
    tokens = bench.tokens(way)

    def single() -> None:
        assert bench.record is not None
        bench.record.prefix = ""
        if bench.row("one", tokens) is None:
            baseline(bench, tokens, warm_up)
        for fault in wrong:
            print(f"  FAILED {way}: {fault}", flush=True)
        bench.record.prefix = "unchecked_" if wrong else ""

    meeting.first(single)
    speed(bench, way)
    return wrong


def measure(bench: Bench, ways: Sequence[str]) -> int:
    """Every way there is time for; returns how many failed."""
    meeting, failures = bench.meeting, 0
    for number, way in enumerate(ways):
        go, warm_up = meeting.first(lambda way=way, rest=ways[number + 1 :]: plan(bench, way, rest))  # type: ignore[misc]
        if meeting.rank == 0:
            print(way if go else f"    no time left for {way}", flush=True)
        if not go:
            continue
        started, error = time.perf_counter(), ""
        try:
            failures += bool(one_way(bench, way, warm_up))
        except Exception as raised:
            traceback.print_exc()
            error = f"{type(raised).__name__}: {str(raised)[:300]}"
        # A rank that waits for this one inside of the way does not come here: then this one ends, and so does the run.
        errors = meeting.all(error, 20.0)
        if any(errors):
            if not all(errors):
                raise RuntimeError(f"{way} failed on some of the ranks: {errors}")
            failures += 1
            if meeting.rank == 0:
                print(f"  FAILED {way}: {errors[0]}", flush=True)
        if way == "fsdp" or any(errors):
            bench.drop()
        free(bench.setup)
        if meeting.rank == 0:
            print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)
    return failures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS), help="in the order of their importance")
    parser.add_argument("--objective", default="lm", choices=("lm", "distill"))
    parser.add_argument("--steps", type=int, default=1, help="steps that are timed")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before them")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no way begins that would end later")
    parser.add_argument("--impl", default="auto", help="of attention")
    parser.add_argument("--layers", type=int, default=36, help="of the model; other than 36 writes no figures")
    add_run_options(parser, tiny="a toy model, to try the program itself")
    options = parser.parse_args(arguments)
    unknown = set(options.ways.split(",")) - set(WAYS)
    if unknown:
        parser.error(f"--ways knows {', '.join(WAYS)}, not {', '.join(sorted(unknown))}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    options = parse(arguments)
    tiny = options.tiny
    if "RANK" not in os.environ:
        sys.exit("start with torchrun --nproc-per-node 2: there is nothing to compare on one rank")
    if math.isfinite(options.seconds):
        faulthandler.dump_traceback_later(options.seconds + 20, exit=True)
    device = rank_device(options.device)
    if device.type != "cuda" and not tiny:
        sys.exit("an 8B model needs CUDA devices; --tiny runs a toy anywhere")
    # As `training.py`; a window that the check's short documents leave is its own.
    flux = FluxConfig(sink_tokens=128, window_tokens=128 if tiny else 2048)
    setup = Setup(
        device=device,
        dtype=torch.bfloat16,
        model=toy() if tiny else qwen3_8b(options.layers),
        flux=replace(flux, pool_tokens=20) if tiny else flux,
        lengths=(1024, 2048) if tiny else (2 * DOCUMENT, 4 * DOCUMENT),
        objectives=(options.objective,),
        documents=512 if tiny else DOCUMENT,
        check_tokens=512 if tiny else 2048,
        steps=options.steps,
        sparsity=None,
        compile=False,
        impl=options.impl,
        sparse_impl=options.impl,
        offload=False,
        until=started + options.seconds,
    )
    with end_together():
        meeting = Meeting()
        record = None
        if meeting.rank == 0:
            record = recorder(options, setup, meeting.world)
        return measure(Bench(setup, meeting, record, options.warm_up), options.ways.split(","))


def recorder(options: argparse.Namespace, setup: Setup, world: int) -> Recorder:
    folder = options.out
    if folder is None and not options.tiny and options.layers == 36:
        folder = Path("benchmarks/results")
    settings: dict[str, Any] = {
        "backbone": "toy" if options.tiny else "Qwen3-8B shapes, random weights",
        "dtype": str(setup.dtype).removeprefix("torch."),
        "gpus": world,
        "backend": "nccl" if setup.device.type == "cuda" else "gloo",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if setup.device.type == "cuda" else None,
        "torch": torch.__version__,
        "objective": setup.objectives[0],
        "documents": {label(setup.lengths[0]): setup.documents, label(setup.lengths[1]): setup.lengths[1]},
        "sink_tokens": setup.flux.sink_tokens,
        "window_tokens": setup.flux.window_tokens,
        "impl": setup.impl,
        "learned_tokens": "all",
        "check_layers": CHECK_LAYERS,
        "warm_up": options.warm_up,
        "repetitions": setup.steps,
    }
    return Recorder("training-parallel", setup.device, settings, folder, options.commit)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
