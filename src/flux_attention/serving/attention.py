"""What routed attention is on every backend: vLLM's own metadata and kernel, over compacted block tables.

A backend takes its builder and implementation from vLLM and mixes these in. The metadata of a layer is built by vLLM's
own builder from a batch of virtual sequences (`tables`), so nothing of a kernel's interface is repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index

from flux_attention.serving.kv import RoutedSpec
from flux_attention.serving.probe import ProbeMetadata
from flux_attention.serving.tables import Ints, Pattern, VirtualBatch

if TYPE_CHECKING:
    _Mixed = Any
else:
    _Mixed = object


@dataclass
class RoutedMetadata:
    """Stands for the metadata of a group's layers in a batch with routes.

    Attributes:
        builder: that made it.
        plain: vLLM's metadata of the batch as it is.
        common: what that was made from.
        dropping: bool `[rows]`, rows long enough for a sparse layer to see less than a full one.
        plans: metadata of a layer, by the rows that run sparse in it.
    """

    builder: RoutedBuilder
    plain: Any
    common: Any
    dropping: NDArray[np.bool_]
    plans: dict[bytes, Any] = field(default_factory=dict)


class RoutedBuilder(_Mixed):
    """vLLM's builder, until a worker of this plugin sets `flux`.

    Attributes:
        flux: the worker's `BatchRoutes`.
    """

    flux: Any = None

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        if self.flux is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        # Rows of different routes have no prefix that one pass could serve for all (cascade attention).
        plain = super().build(0, common_attn_metadata, fast_build)
        rows = common_attn_metadata.num_reqs
        dropping = self._pattern.drops(_ends(common_attn_metadata))
        if self.flux.is_dense(rows) or not dropping.any():
            return plain
        return RoutedMetadata(self, plain, common_attn_metadata, dropping)

    def of_layer(self, routed: RoutedMetadata, layer: int) -> Any:
        """vLLM's metadata for a decoder layer."""
        sparse = ~self.flux.use_full(routed.common.num_reqs)[:, self.flux.layers[layer]] & routed.dropping
        key = sparse.tobytes()
        if key not in routed.plans:
            routed.plans[key] = self._compact(routed.common, sparse) if sparse.any() else routed.plain
        return routed.plans[key]

    @property
    def _pattern(self) -> Pattern:
        assert isinstance(self.kv_cache_spec, RoutedSpec)
        return self.kv_cache_spec.pattern

    def _compact(self, common: Any, sparse: Any) -> Any:
        pattern, rows = self._pattern, common.num_reqs
        query_starts, ends = common.query_start_loc_cpu[: rows + 1].numpy(), _ends(common)
        batch = VirtualBatch.of(ends - (query_starts[1:] - query_starts[:-1]), ends, sparse, pattern)
        tensors = batch.tensors(common.block_table_tensor, pattern)
        virtual = replace(
            common,
            num_reqs=len(batch.rows),
            query_start_loc=tensors.query_starts,
            query_start_loc_cpu=tensors.query_starts_cpu,
            seq_lens=tensors.lengths,
            block_table_tensor=tensors.table,
            max_query_len=int((batch.query_starts[1:] - batch.query_starts[:-1]).max()),
            max_seq_len=int(batch.lengths.max()),
        )
        return super().build(0, virtual, True)


def _ends(common: Any) -> Ints:
    """Keys of each row, its queries included; exact, as nothing is speculated."""
    ends: Ints = common.seq_lens_cpu_upper_bound[: common.num_reqs].numpy()
    return ends


class RoutedImpl(_Mixed):
    """vLLM's attention, with a layer's own metadata, or the probe's dense attention."""

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
        if isinstance(attn_metadata, RoutedMetadata):
            attn_metadata = attn_metadata.builder.of_layer(attn_metadata, extract_layer_index(layer.layer_name))
        result: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        return result
