"""What finding the route costs: before the prefill (probe), and inside of it (inline). A section of `end_to_end.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from common import Recorder, graphed, interleaved_ms, sync
from torch import Tensor

from flux_attention import generation
from flux_attention.cache import PagePool
from flux_attention.config import FluxConfig
from flux_attention.models import fuse
from flux_attention.models.attach import detach
from flux_attention.models.controller import FluxAttention
from flux_attention.models.pooling import LayerPooling
from flux_attention.models.prefill import LayerPrefill
from flux_attention.models.probe import ProbeGraphs
from flux_attention.route import Route
from flux_attention.router import LayerRouter

if TYPE_CHECKING:
    from end_to_end import Setup

#: Pairs of an inline and a static prefill.
PAIRS = 24


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


def probe(setup: Setup, record: Recorder) -> None:
    # Prompts come from a tokenizer, on the host.
    host = setup.prompt(setup.short).cpu()
    controller = setup.controller
    seen = probe_wall_ms(setup, controller, host)
    record.add("routing_probe_ms", statistics.median(seen), "ms", seen)
    if setup.device.type != "cuda":
        return
    # The same in line, for comparison, and the product sizes that a probe consists of.
    before, kept = fuse.FORK, controller._probes
    try:
        fuse.FORK, controller._probes = not before, ProbeGraphs(controller)
        other = statistics.median(probe_wall_ms(setup, controller, host))
    finally:
        fuse.FORK, controller._probes = before, kept
    names = ("side_by_side_ms", "in_line_ms") if before else ("in_line_ms", "side_by_side_ms")
    record.note("routing_probe", dict(zip(names, (statistics.median(seen), other), strict=True)))
    record.note("routing_probe_products_us", product_times(setup))


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

    def once(route: Route | None) -> tuple[float, float, Route]:
        """Milliseconds on the device, from its first event to its last, and on the clock; the route."""
        cache = controller.new_cache(pool=pool, max_row_tokens=n)
        sync(device)
        started, events = time.perf_counter(), [torch.cuda.Event(enable_timing=True) for _ in "ab"] if on_gpu else []
        if on_gpu:
            events[0].record()
        generation._padded_prefill(controller, [prompt], cache, route)
        if on_gpu:
            events[1].record()
        sync(device)
        wall = (time.perf_counter() - started) * 1e3
        assert cache.route is not None
        found = cache.route
        cache.clear()
        return events[0].elapsed_time(events[1]) if on_gpu else wall, wall, found

    on_gpu = device.type == "cuda"
    route = once(None)[2]
    once(route)
    inline, static = [], []
    for i in range(3 if setup.tiny else PAIRS):
        # Turns change places, so that a drift of the clocks falls on both alike.
        if i % 2:
            b, a = once(route)[:2], once(None)[:2]
        else:
            a, b = once(None)[:2], once(route)[:2]
        inline.append(a)
        static.append(b)
    details: dict[str, Any] = {
        "inline_ms": statistics.median(a[0] for a in inline),
        "static_ms": statistics.median(b[0] for b in static),
        "sparse_layers": int((~route.use_full).sum()),
    }
    if on_gpu:
        details |= late_layers(controller, lambda: once(None))
    record.note("routing_inline", details)
    for name, of in (("routing_inline_ms", 0), ("routing_inline_wall_ms", 1)):
        pairs = [a[of] - b[of] for a, b in zip(inline, static, strict=True)]
        record.add(name, statistics.median(pairs), "ms", pairs, interval=median_interval(pairs))


def late_layers(controller: FluxAttention, run: Callable[[], Any]) -> dict[str, Any]:
    """How many layers' attention was launched only after the device had done all work before it, and the host's part.

    `late` of each side; median microseconds from a decision's arrival to the end of the launch, `launch_us`, and of
    waiting for a decision, `wait_us`, by side.
    """
    begun, arrived = torch.cuda.Event(), 0.0
    found: dict[str, list[tuple[bool, float, float]]] = {"full": [], "sparse": []}
    attend, sides, wait = controller.attend, LayerPrefill._sides, LayerPooling.wait
    waited = 0.0

    def watched_attend(*args: Any) -> Tensor:
        begun.record()
        return attend(*args)

    def watched_wait(*args: Any) -> None:
        nonlocal arrived, waited
        started = time.perf_counter()
        wait(*args)
        arrived = time.perf_counter()
        waited = arrived - started

    def watched_sides(self: LayerPrefill, layout: Any, cache: Any, use_full: list[bool], *args: Any) -> Tensor:
        out = sides(self, layout, cache, use_full, *args)
        took = time.perf_counter() - arrived
        found["full" if use_full[0] else "sparse"].append((begun.query(), took, waited))
        return out

    vars(controller)["attend"] = watched_attend
    LayerPrefill._sides, LayerPooling.wait = watched_sides, watched_wait
    try:
        run()
    finally:
        del vars(controller)["attend"]
        LayerPrefill._sides, LayerPooling.wait = sides, wait

    def median_us(side: str, column: int) -> float:
        return round(statistics.median(row[column] for row in found[side]) * 1e6)

    return {
        "late": {side: sum(row[0] for row in rows) for side, rows in found.items()},
        "launch_us": {side: median_us(side, 1) for side, rows in found.items() if rows},
        "wait_us": {side: median_us(side, 2) for side, rows in found.items() if rows},
    }


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
    cache = controller.new_cache(max_row_tokens=tokens)
    route = setup.route(0.0)
    cache.set_route(route)
    return generation._exact_pool(controller, cache, route, [tokens])
