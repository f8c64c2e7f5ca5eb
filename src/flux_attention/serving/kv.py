"""KV-cache groups that give blocks back: one group per bundle of layers, and a manager that knows the routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from flux_attention.config import FluxConfig
from flux_attention.serving.tables import Pattern


@dataclass(frozen=True, kw_only=True)
class RoutedSpec(FullAttentionSpec):
    """KV cache of the layers of one bundle. Two bundles never merge into one group.

    Attributes:
        bundle: routable layers of the group.
        sink, window, tile: the streaming pattern, in tokens.
    """

    bundle: tuple[int, ...] = ()
    sink: int = 0
    window: int = 0
    tile: int = 0

    @classmethod
    def wrap(cls, spec: FullAttentionSpec, bundle: tuple[int, ...], config: FluxConfig) -> RoutedSpec:
        base = {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec)}
        return cls(
            **base, bundle=bundle, sink=config.sink_tokens, window=config.window_tokens, tile=config.block_tokens
        )

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.sink, self.window, self.tile, self.block_size)

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        # vLLM asks by trying: an AssertionError means "another group".
        assert all(spec == specs[0] for spec in specs), "layers of different bundles do not share a KV-cache group"
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class RoutedManager(FullAttentionManager):
    """Gives back the blocks between sinks and window of requests whose layers of this bundle all run sparse.

    Attributes:
        routes: request id → use_full per routable layer; the scheduler's own table.
    """

    def __init__(self, kv_cache_spec: RoutedSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.routes: Mapping[str, tuple[bool, ...]] = {}
        self._pattern = kv_cache_spec.pattern
        self._bundle = kv_cache_spec.bundle

    def is_sparse(self, request_id: str) -> bool:
        """Whether the request drops keys in this group."""
        route = self.routes.get(request_id)
        return route is not None and not any(route[layer] for layer in self._bundle)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        if self.is_sparse(request_id):
            first, last = self._pattern.gap(processed_computed_tokens)
            self._remove_blocks_in_range(request_id, first, last)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        if apply_admission_cap and self.is_sparse(request_id):
            # The question is whether the whole prompt will fit one day: what is given back on the way does not count.
            first, last = self._pattern.gap(num_tokens)
            num_tokens -= max(0, last - first) * self.block_size
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )


def register() -> None:
    """Tell vLLM which manager serves the spec."""
    # Without this first, vLLM would take its own specs for registered already.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(RoutedSpec, RoutedManager, uniform_type_base_spec=RoutedSpec)
