"""Routed attention on GPUs: vLLM's FlashAttention kernels over compacted block tables.

Decode batches run in full CUDA graphs: one small kernel per bundle of layers writes the tables inside the graph
(`compact_triton`), from the routes in a buffer that the worker fills before replay. Batches with prompts run eagerly,
over tables made per set of sparse rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from flux_attention.serving.compact_triton import compact_decode
from flux_attention.serving.kv import RoutedSpec
from flux_attention.serving.probe import ProbeMetadata
from flux_attention.serving.tables import VirtualBatch


@dataclass
class RoutedFlashMetadata(FlashAttentionMetadata):
    """The engine's metadata, from which a layer makes its own.

    Attributes:
        builder: that made it.
        starts, ends: on the host, int `[R]`, query positions of each row; None in a decode batch.
        plans: metadata per set of rows that run sparse.
    """

    builder: Any = None
    starts: Any = None
    ends: Any = None
    plans: dict[Any, FlashAttentionMetadata] = field(default_factory=dict)


class RoutedFlashBuilder(FlashAttentionMetadataBuilder):
    """The engine's builder, until a worker of this plugin sets `flux`.

    Attributes:
        flux: the worker's `BatchRoutes`.
    """

    # A graph holds one query token per row: tiles of prompts differ in number from batch to batch.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    # Groups differ in more than their tables.
    supports_update_block_table = False
    flux: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Scheduled for the engine's lengths; a layer's are its own.
        self.aot_schedule = False
        self._tables: Tensor | None = None

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        if self.flux is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        # Rows of different routes share no prefix that one pass over it could serve.
        metadata = super().build(0, common_attn_metadata, fast_build)
        plain = {f.name: getattr(metadata, f.name) for f in fields(FlashAttentionMetadata)}
        if metadata.max_query_len == 1:
            self.flux.upload(common_attn_metadata.num_reqs)
            return RoutedFlashMetadata(**plain, builder=self)
        if self.flux.is_dense(common_attn_metadata.num_reqs):
            return metadata
        starts = common_attn_metadata.query_start_loc_cpu.numpy()
        ends = common_attn_metadata.seq_lens_cpu_upper_bound.numpy()[: common_attn_metadata.num_reqs]
        return RoutedFlashMetadata(**plain, builder=self, starts=ends - (starts[1:] - starts[:-1]), ends=ends)

    def of_layer(self, metadata: RoutedFlashMetadata, layer: int) -> FlashAttentionMetadata:
        """The metadata of a decoder layer."""
        routable = self.flux.layers[layer]
        if metadata.starts is None:
            return self._decode(metadata, routable)
        sparse = ~self.flux.use_full(len(metadata.ends))[:, routable]
        key = sparse.tobytes()
        if key not in metadata.plans:
            metadata.plans[key] = self._prefill(metadata, sparse) if sparse.any() else metadata
        return metadata.plans[key]

    def _decode(self, metadata: RoutedFlashMetadata, routable: int) -> FlashAttentionMetadata:
        spec, rows = self.kv_cache_spec, len(metadata.seq_lens)
        assert isinstance(spec, RoutedSpec)
        if self._tables is None:
            shape = len(spec.bundle), self.flux.max_rows
            width = metadata.block_table.shape[1]
            self._tables = torch.zeros(*shape, width, dtype=torch.int32, device=self.device)
            self._lengths = torch.zeros(*shape, dtype=torch.int32, device=self.device)
        index = spec.bundle.index(routable)
        if index == 0:
            # The first layer of a bundle to run writes for all of them: within a step nothing of it changes.
            compact_decode(
                metadata.block_table,
                metadata.seq_lens,
                self.flux.sparse_of(spec.bundle),
                self._tables,
                self._lengths,
                sink=spec.sink,
                window=spec.window,
                tile=spec.tile,
                block_size=spec.block_size,
            )
        whole: Any = metadata
        return replace(whole, block_table=self._tables[index, :rows], seq_lens=self._lengths[index, :rows])

    def _prefill(self, metadata: RoutedFlashMetadata, sparse: Any) -> FlashAttentionMetadata:
        assert isinstance(self.kv_cache_spec, RoutedSpec)
        pattern = self.kv_cache_spec.pattern
        batch = VirtualBatch.of(metadata.starts, metadata.ends, sparse, pattern)
        size, sinks, count = pattern.block_size, pattern.sink // pattern.block_size, len(batch.rows)
        # One copy for all that the device needs to know.
        host = np.concatenate([batch.query_starts, batch.lengths, batch.rows, batch.gaps]).astype(np.int32)
        packed = torch.from_numpy(host).pin_memory().to(self.device, non_blocking=True)
        query_starts, lengths, rows, gaps = packed.split([count + 1, count, count, count])
        width = -(-int(batch.lengths.max()) // size)
        column = torch.arange(width, device=self.device)
        source = column + torch.where(column < sinks, 0, gaps[:, None])
        # Behind a row's last block lies whatever the clamp finds; the kernel stops at the length.
        source = source.clamp_(max=metadata.block_table.shape[1] - 1)
        table = metadata.block_table[rows.long()[:, None], source]
        whole: Any = metadata
        return replace(
            whole,
            query_start_loc=query_starts.contiguous(),
            seq_lens=lengths.contiguous(),
            block_table=table,
            max_query_len=int(np.diff(batch.query_starts).max()),
            max_seq_len=int(batch.lengths.max()),
            # Buffers for splits are sized for decode batches in graphs.
            max_num_splits=0,
        )


class RoutedFlashImpl(FlashAttentionImpl):
    """Chooses a layer's metadata, or the probe's dense attention."""

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
        if isinstance(attn_metadata, RoutedFlashMetadata):
            attn_metadata = attn_metadata.builder.of_layer(attn_metadata, extract_layer_index(layer.layer_name))
        result: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        return result


class RoutedFlashBackend(FlashAttentionBackend):
    """`--attention-backend CUSTOM`."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[RoutedFlashImpl]:
        return RoutedFlashImpl

    @staticmethod
    def get_builder_cls() -> type[RoutedFlashBuilder]:
        return RoutedFlashBuilder
