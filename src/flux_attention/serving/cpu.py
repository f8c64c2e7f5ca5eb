"""Routed attention on a CPU: vLLM's own kernel over compacted block tables."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from flux_attention.serving.kv import RoutedSpec
from flux_attention.serving.probe import ProbeMetadata
from flux_attention.serving.tables import VirtualBatch


@dataclass
class RoutedCPUMetadata(CPUAttentionMetadata):
    """A batch with sparse rows: the engine's metadata, and one version of it per set of rows that run sparse."""

    builder: Any = None
    plans: dict[bytes, CPUAttentionMetadata] = field(default_factory=dict)


class RoutedCPUBuilder(CPUAttentionMetadataBuilder):
    """The engine's builder, until a worker of this plugin sets `flux`.

    Attributes:
        flux: the worker's `BatchRoutes`.
    """

    flux: Any = None

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.flux is None or self.flux.is_dense(common_attn_metadata.num_reqs):
            return metadata
        plain = {f.name: getattr(metadata, f.name) for f in fields(CPUAttentionMetadata)}
        return RoutedCPUMetadata(**plain, builder=self)

    def plan(self, metadata: RoutedCPUMetadata, layer: int) -> CPUAttentionMetadata:
        """The metadata of a decoder layer."""
        routable = self.flux.layers.get(layer)
        sparse = ~self.flux.use_full(len(metadata.seq_lens))[:, routable]
        key = sparse.tobytes()
        if key not in metadata.plans:
            metadata.plans[key] = self._compact(metadata, sparse) if sparse.any() else metadata
        return metadata.plans[key]

    def _compact(self, metadata: RoutedCPUMetadata, sparse: Any) -> CPUAttentionMetadata:
        assert isinstance(self.kv_cache_spec, RoutedSpec)
        pattern = self.kv_cache_spec.pattern
        starts, ends = metadata.query_start_loc.numpy(), metadata.seq_lens.numpy()
        batch = VirtualBatch.of(ends - (starts[1:] - starts[:-1]), ends, sparse, pattern)
        table = batch.table(metadata.block_table.numpy(), pattern)
        query_starts, lengths = torch.from_numpy(batch.query_starts), torch.from_numpy(batch.lengths)
        scheduled = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=query_starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        whole: Any = metadata
        return replace(
            whole,
            query_start_loc=query_starts,
            seq_lens=lengths,
            block_table=torch.from_numpy(table),
            scheduler_metadata=scheduled,
            max_seq_len=int(batch.lengths.max()),
        )


class RoutedCPUImpl(CPUAttentionBackendImpl):
    """Chooses a layer's plan, or the probe's dense attention."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if isinstance(attn_metadata, ProbeMetadata):
            return attn_metadata.attend(query, key, value, output, self.scale)
        if isinstance(attn_metadata, RoutedCPUMetadata):
            attn_metadata = attn_metadata.builder.plan(attn_metadata, extract_layer_index(layer.layer_name))
        result: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        return result


class RoutedCPUBackend(CPUAttentionBackend):
    """Takes the place of vLLM's CPU backend, whose name the platform hard-codes."""

    @staticmethod
    def get_impl_cls() -> type[RoutedCPUImpl]:
        return RoutedCPUImpl

    @staticmethod
    def get_builder_cls() -> type[RoutedCPUBuilder]:
        return RoutedCPUBuilder
