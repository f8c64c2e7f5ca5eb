"""What routing did: a report per response, and counters for Prometheus.

The scheduler runs in the engine's process and `/metrics` is served by another. prometheus_client's multi-process mode
joins them: where PROMETHEUS_MULTIPROC_DIR is set (`flux-attn serve` sets it), vLLM serves the metrics of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import REGISTRY, Counter, Histogram

_SHARES = tuple(i / 10 for i in range(11))


def report(use_full: Sequence[bool], held: int, dense: int) -> dict[str, Any]:
    """Route and saving of one request, as plain values.

    Args:
        use_full: per routable layer.
        held, dense: KV blocks that it held at its end, and that it would have held dense.
    """
    return {
        "sparse_layers": [layer for layer, full in enumerate(use_full) if not full],
        "sparsity": 1 - sum(use_full) / len(use_full),
        "kv_blocks": held,
        "kv_blocks_dense": dense,
        "kv_saved": 1 - held / dense if dense else 0.0,
    }


class Telemetry:
    """Counters of one engine; the metrics themselves are the process's."""

    def __init__(self, vllm_config: Any, layers: int) -> None:
        self._layers = layers
        names = vllm_config.model_config.served_model_name
        labels = {"model_name": names[0] if isinstance(names, list) else names}
        self._requests = _metric(Counter, "flux_requests", "Requests by how they ran.", ("model_name", "route"))
        self._labels = labels
        self._sparsity = _metric(
            Histogram, "flux_sparsity", "Share of layers running sparse, per request.", ("model_name",), buckets=_SHARES
        ).labels(**labels)
        self._held = _metric(
            Counter, "flux_kv_blocks_held", "KV blocks held by requests when they finished.", ("model_name",)
        ).labels(**labels)
        self._dense = _metric(
            Counter, "flux_kv_blocks_dense", "KV blocks that finished requests would have held dense.", ("model_name",)
        ).labels(**labels)

    def routed(self, use_full: Sequence[bool]) -> None:
        kind = "dense" if all(use_full) else "sparse"
        self._requests.labels(**self._labels, route=kind).inc()
        self._sparsity.observe(1 - sum(use_full) / self._layers)

    def finished(self, held: int, dense: int) -> None:
        self._held.inc(held)
        self._dense.inc(dense)


def _metric(kind: Any, name: str, text: str, labels: tuple[str, ...], **options: Any) -> Any:
    """A metric of this process; engines that follow one another share it."""
    found = REGISTRY._names_to_collectors.get(f"vllm:{name}")
    return kind(f"vllm:{name}", text, labels, **options) if found is None else found
