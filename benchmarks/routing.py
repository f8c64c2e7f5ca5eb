"""What finding the route costs: before the prefill (probe), and inside of it (inline). A section of `end_to_end.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from common import Recorder, graphed, interleaved_ms, sync
from torch import Tensor

from flux_attention import generation
from flux_attention.cache import PagePool
from flux_attention.config import FluxConfig
from flux_attention.models.attach import detach
from flux_attention.models.controller import FluxAttention
from flux_attention.models.pooling import LayerPooling
from flux_attention.models.prefill import LayerPrefill
from flux_attention.route import Route
from flux_attention.router import LayerRouter

if TYPE_CHECKING:
    from end_to_end import Setup

#: Pairs of an inline and a static prefill: timed as a whole, and watched layer by layer.
PAIRS, WATCHED = 24, 12


def routing(setup: Setup, record: Recorder) -> None:
    probe(setup, record)
    config = setup.controller.config
    detach(setup.model)
    inline = setup.attach(FluxConfig(**{**vars(config), "backbone": None, "router_input": "inline"}))
    try:
        # Half of the layers sparse, by the router itself: both kinds of layers wait for a decision.
        bias_layers(inline.router)
        above_static(setup, inline, record)
    finally:
        detach(setup.model)
        setup.attach(config)
    if setup.device.type == "cuda":
        explain_probe(setup, record)


def probe(setup: Setup, record: Recorder) -> None:
    # Prompts come from a tokenizer, on the host.
    host = setup.prompt(setup.short).cpu()
    controller = setup.controller
    seen = probe_wall_ms(setup, controller, host)
    record.add("routing_probe_ms", statistics.median(seen), "ms", seen)


def explain_probe(setup: Setup, record: Recorder) -> None:
    """What a probe's time consists of."""
    host = setup.prompt(setup.short).cpu()
    record.note("routing_probe_kernels_us", kernel_times(lambda: setup.controller.route([host])))
    record.note("routing_probe_products_us", product_times(setup))


def kernel_times(run: Callable[[], Any]) -> dict[str, list[float]]:
    """Of every kernel that a run launches: microseconds in all, and how many of it; the dearest first."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    return {e.key[:80]: [round(e.self_device_time_total, 1), e.count] for e in kernels}


def probe_wall_ms(setup: Setup, controller: FluxAttention, prompt: Tensor) -> list[float]:
    wall = []
    for i in range(25):
        sync(setup.device)
        started = time.perf_counter()
        controller.route([prompt])
        # A route is host data, so nothing is left to wait for.
        if i >= 5:
            wall.append((time.perf_counter() - started) * 1e3)
    return wall


def product_times(setup: Setup) -> dict[str, float]:
    """Microseconds of a layer's products with a probe's tokens, and with as many as fill the device's tiles."""
    layers, found = setup.controller.decoder.layers, {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        weights = [layer.get_submodule(name).weight for layer in layers[:8]]
        runs: dict[str, Callable[[], Any]] = {}
        # A captured graph reads the memory of its inputs, so they live as long as it does.
        inputs = []
        for tokens in (192, 2 * setup.controller.config.pool_tokens, 208, 256):
            x = torch.randn(tokens, weights[0].shape[1], dtype=weights[0].dtype, device=setup.device)
            inputs.append(x)

            # Eight layers in turn: what one has left in the cache is gone before it comes again.
            def products(x: Tensor = x, weights: list[Tensor] = weights) -> list[Tensor]:
                return [torch.nn.functional.linear(x, weight) for weight in weights]

            runs[f"{name.split('.')[1]}_{tokens}"] = graphed(products)
        for key, times in interleaved_ms(runs, setup.device, 5).items():
            found[key] = round(statistics.median(times) * 1e3 / len(weights), 2)
    return found


def above_static(setup: Setup, controller: FluxAttention, record: Recorder) -> None:
    """Prefills that find their route, in pairs with prefills that are given it."""
    n, device = setup.short, setup.device
    prompt, pool = setup.prompt(n), dense_pool(setup, controller, n)

    def once(route: Route | None) -> Pass:
        cache = controller.new_cache(pool=pool, max_row_tokens=n)
        sync(device)
        started, events = time.perf_counter(), [torch.cuda.Event(enable_timing=True) for _ in "ab"] if on_gpu else []
        if on_gpu:
            events[0].record()
        logits = generation._padded_prefill(controller, [prompt], cache, route)
        if on_gpu:
            events[1].record()
        sync(device)
        wall = (time.perf_counter() - started) * 1e3
        assert cache.route is not None
        found = cache.route
        cache.clear()
        return Pass(events[0].elapsed_time(events[1]) if on_gpu else wall, wall, found, logits, tuple(events))

    on_gpu = device.type == "cuda"
    first = once(None)
    route, logits = first.route, first.logits
    given = once(route).logits
    error = ((logits - given).float().norm() / given.float().norm()).item()
    # The same kernels on the same inputs, but for the moment at which attention is launched.
    assert error < 1e-3, f"a prefill that finds its route gives other logits than one that is given it: {error:.1e}"
    inline, static = [], []
    for i in range(3 if setup.tiny else PAIRS):
        # Turns change places, so that a drift of the clocks falls on both alike.
        if i % 2:
            b, a = once(route), once(None)
        else:
            a, b = once(None), once(route)
        inline.append((a.ms, a.wall_ms))
        static.append((b.ms, b.wall_ms))
    record.note(
        "routing_inline",
        {
            "inline_ms": statistics.median(a[0] for a in inline),
            "static_ms": statistics.median(b[0] for b in static),
            "logits_difference": error,
            "sparse_layers": int((~route.use_full).sum()),
        },
    )
    watched = on_gpu and controller.fusion is not None
    # Of whole passes, and where there is nothing better, the figure itself: see `watched_layers`.
    names = ("routing_inline_pass_ms" if watched else "routing_inline_ms", "routing_inline_wall_ms")
    for of, name in enumerate(names):
        pairs = [a[of] - b[of] for a, b in zip(inline, static, strict=True)]
        record.add(name, statistics.median(pairs), "ms", pairs, interval=median_interval(pairs))
    if watched:
        watched_layers(controller, lambda: once(None), lambda: once(route), record)


@dataclass(frozen=True)
class Pass:
    """A prefill: milliseconds on the device, from its first event to its last, and on the clock."""

    ms: float
    wall_ms: float
    route: Route
    logits: Tensor
    events: tuple[torch.cuda.Event, ...]


def watched_layers(
    controller: FluxAttention, inline: Callable[[], Pass], static: Callable[[], Pass], record: Recorder
) -> None:
    """The same difference where it arises: before the first queries, between each layer's queries and its attention,
    and behind the last layer.

    What a whole pass takes moves by several milliseconds with the device's clocks, these parts of it do not. The rest,
    from a layer's attention to its end and the next one's queries, is the same launches in both passes. Only a host
    that is behind could make it longer: `dry_after` counts the layers after which the device has nothing to do yet.
    """
    watches = [(watch_layers(controller, inline), watch_layers(controller, static)) for _ in range(WATCHED)]
    pairs = [a.own_ms - b.own_ms for a, b in watches]
    record.add("routing_inline_ms", statistics.median(pairs), "ms", pairs, interval=median_interval(pairs))
    parts = {
        "layers": [a.before_attention_ms - b.before_attention_ms for a, b in watches],
        "before": [a.before_first - b.before_first for a, b in watches],
        "behind": [a.behind_last - b.behind_last for a, b in watches],
        "static": [b.own_ms for _, b in watches],
    }
    record.note("routing_inline_parts_ms", {name: round(statistics.median(x), 3) for name, x in parts.items()})
    record.note("routing_inline_watched", [a.summary() for a, _ in watches])


@dataclass
class LayerWatch:
    """What a pass does before its layers' attention, layer by layer.

    Attributes:
        before_attention: milliseconds of the device from a layer's queries to its attention.
        decide: milliseconds of the layer's own stream from its queries to its next product.
        idle: milliseconds of the device between a layer's rotary embedding and its attention.
        before_first, behind_last: milliseconds of the device before the first queries, and behind the last layer.
        sparse: whether the layer is.
        waited, launched: seconds that the host waits for a decision, and from its arrival to the end of the launch.
            Of a pass that routes inline, as is what follows.
        late: whether the device had done all work before the launch by then.
        dry: whether it had done the attention, too, by the time that the host is past writing the cache.
    """

    before_attention: list[float] = field(default_factory=list)
    decide: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    sparse: list[bool] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    launched: list[float] = field(default_factory=list)
    late: list[bool] = field(default_factory=list)
    dry: list[bool] = field(default_factory=list)
    before_first: float = 0.0
    behind_last: float = 0.0

    @property
    def before_attention_ms(self) -> float:
        return sum(self.before_attention)

    @property
    def own_ms(self) -> float:
        """All that a route could make longer."""
        return self.before_first + self.before_attention_ms + self.behind_last

    def summary(self) -> dict[str, Any]:
        def of(sparse: bool, values: Sequence[float]) -> list[float]:
            return [value for value, s in zip(values, self.sparse, strict=True) if s is sparse]

        found: dict[str, Any] = {"decide_ms": round(sum(self.decide), 3), "idle_ms": round(sum(self.idle), 3)}
        for name, sparse in (("full", False), ("sparse", True)):
            if sparse not in self.sparse:
                continue
            found[name] = {
                "late": sum(of(sparse, self.late)),
                "dry_after": sum(of(sparse, self.dry)),
                "longest_idle_us": round(max(of(sparse, self.idle)) * 1e3, 1),
                "wait_us": round(statistics.median(of(sparse, self.waited)) * 1e6),
                "launch_us": round(statistics.median(of(sparse, self.launched)) * 1e6),
            }
        return found


def watch_layers(controller: FluxAttention, run: Callable[[], Pass]) -> LayerWatch:
    """A pass with events around what routing inline adds to a layer."""
    watch, events = LayerWatch(), []
    pool, decide, decided = LayerPooling.pool, LayerPooling.decide, LayerPrefill._decided
    attend, routed, sides = controller.attend, LayerPrefill.routed, LayerPrefill._sides
    arrived = 0.0

    def record_event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watched_pool(*args: Any) -> None:
        before = record_event()
        pool(*args)
        events.append([before, record_event()])

    def watched_attend(*args: Any) -> Tensor:
        events[-1].append(record_event())
        return attend(*args)

    def watched_decide(*args: Any) -> list[bool]:
        nonlocal arrived
        started = time.perf_counter()
        use_full = decide(*args)
        arrived = time.perf_counter()
        watch.waited.append(arrived - started)
        watch.sparse.append(not use_full[0])
        # In front of the launch: what it waits for the host, the device idles between this event and the one before.
        events[-1].append(record_event())
        return use_full

    def watched_decided(*args: Any) -> Tensor:
        out = decided(*args)
        watch.launched.append(time.perf_counter() - arrived)
        watch.late.append(events[-1][2].query())
        events[-1].append(record_event())
        return out

    def watched_sides(*args: Any) -> Tensor:
        # Of a pass that is given its route.
        events[-1].append(record_event())
        return sides(*args)

    def watched_routed(*args: Any) -> Tensor:
        out = routed(*args)
        if len(events[-1]) == 5:
            watch.dry.append(events[-1][4].query())
        return out

    ends: list[torch.cuda.Event] = []
    hook = controller.decoder.norm.register_forward_pre_hook(lambda *_: ends.append(record_event()))
    vars(controller)["attend"] = watched_attend
    LayerPooling.pool, LayerPooling.decide = watched_pool, watched_decide
    LayerPrefill._decided, LayerPrefill.routed, LayerPrefill._sides = watched_decided, watched_routed, watched_sides
    try:
        whole = run()
    finally:
        hook.remove()
        del vars(controller)["attend"]
        LayerPooling.pool, LayerPooling.decide = pool, decide
        LayerPrefill._decided, LayerPrefill.routed, LayerPrefill._sides = decided, routed, sides
    for queries, logits, rotary, launch, *_ in events:
        watch.before_attention.append(queries.elapsed_time(launch))
        watch.decide.append(queries.elapsed_time(logits))
        watch.idle.append(rotary.elapsed_time(launch))
    watch.before_first = whole.events[0].elapsed_time(events[0][0])
    watch.behind_last = ends[0].elapsed_time(whole.events[1])
    return watch


def median_interval(values: list[float], resamples: int = 10000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (resamples, len(values)))
    low, high = np.quantile(np.median(draws, 1), (0.025, 0.975))
    return float(low), float(high)


def bias_layers(router: LayerRouter) -> None:
    """Send every second layer of an untrained router to the sparse side."""
    with torch.no_grad():
        router.biases[-1][::2, 1] = -router.full_bias


def dense_pool(setup: Setup, controller: FluxAttention, tokens: int) -> PagePool:
    (pool,) = generation._exact_pools(controller, setup.route(0.0), [tokens]).values()
    return pool
