"""Routed attention on GPUs: vLLM's FlashAttention kernels.

Decode batches run in full CUDA graphs: one small kernel per bundle of layers writes the tables inside the graph
(`compact_triton`), from the routes in a buffer that the worker fills before replay. Batches with prompts run eagerly,
as piecewise graphs have them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from flux_attention.serving.attention import RoutedBuilder, RoutedImpl, RoutedMetadata
from flux_attention.serving.compact_triton import compact_decode
from flux_attention.serving.kv import RoutedSpec


class RoutedFlashBuilder(RoutedBuilder, FlashAttentionMetadataBuilder):
    """Plans prompts on the host and decode on the device."""

    # A graph holds one query token per row: the tiles of prompts differ in number from batch to batch.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    # Groups differ in more than their tables.
    supports_update_block_table = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # It would be scheduled for the batch's lengths, and into one buffer; a layer's lengths are its own.
        self.aot_schedule = False
        self._tables: Tensor | None = None

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        if self.flux is None or common_attn_metadata.max_query_len > 1:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        rows = common_attn_metadata.num_reqs
        self.flux.upload(rows)
        # Even where all rows are dense: a graph that is captured now is replayed for other batches.
        plain = FlashAttentionMetadataBuilder.build(self, 0, common_attn_metadata, fast_build)
        return RoutedMetadata(self, plain, common_attn_metadata, np.ones(rows, bool))

    def of_layer(self, routed: RoutedMetadata, layer: int) -> Any:
        if routed.common.max_query_len > 1:
            return super().of_layer(routed, layer)
        spec, plain = self.kv_cache_spec, routed.plain
        assert isinstance(spec, RoutedSpec)
        if self._tables is None:
            shape = len(spec.bundle), self.flux.max_rows
            width = plain.block_table.shape[1]
            self._tables = torch.zeros(*shape, width, dtype=torch.int32, device=self.device)
            self._lengths = torch.zeros(*shape, dtype=torch.int32, device=self.device)
        index = spec.bundle.index(self.flux.layers[layer])
        if index == 0:
            # The first layer of a bundle to run writes for all of them: within a step nothing of it changes.
            compact_decode(
                plain.block_table,
                plain.seq_lens,
                self.flux.sparse_of(spec.bundle),
                self._tables,
                self._lengths,
                sink=spec.sink,
                window=spec.window,
                tile=spec.tile,
                block_size=spec.block_size,
            )
        rows = len(plain.seq_lens)
        return replace(plain, block_table=self._tables[index, :rows], seq_lens=self._lengths[index, :rows])


class RoutedFlashImpl(RoutedImpl, FlashAttentionImpl):
    """FlashAttention's paged kernel."""


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
