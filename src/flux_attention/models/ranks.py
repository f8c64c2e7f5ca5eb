"""A model whose heads are split over ranks (transformers' tensor parallelism): what a rank has, what ranks exchange.

Every rank runs every layer on its share of the heads. Routes must be the same everywhere, so what a router sees is the
mean over all ranks' heads, whose bits an all-reduce makes alike; the same router then decides alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadRanks:
    """The ranks that share a model's heads, `Hq / size` and `Hk / size` each.

    Attributes:
        size: number of ranks; 1 = the model is whole, and nothing is exchanged.
        group: of the ranks; None when there is one.
    """

    size: int = 1
    group: Any = None

    @classmethod
    def of(cls, attention: nn.Module, query: str, num_kv_heads: int) -> HeadRanks:
        """How the heads of an attention module are split, read from its query projection `query`.

        Raises:
            ValueError: KV heads that do not divide among the ranks.
        """
        weight = getattr(getattr(attention, query), "weight", None)
        if not dist.is_available() or weight is None:
            return cls()
        from torch.distributed.tensor import DTensor

        if not isinstance(weight, DTensor):
            return cls()
        shards = [i for i, placement in enumerate(weight.placements) if placement.is_shard()]
        if not shards:
            return cls()
        if len(shards) > 1 or not weight.placements[shards[0]].is_shard(0):
            raise ValueError(
                f"the query projection is split as {weight.placements}: routed attention takes models whose heads are "
                'split, as transformers\' tp_plan="auto" does, and no other sharding'
            )
        size = weight.device_mesh.size(shards[0])
        if num_kv_heads % size:
            raise ValueError(
                f"{num_kv_heads} key/value heads do not divide among {size} ranks; use a number that divides them"
            )
        return cls(size, weight.device_mesh.get_group(shards[0]))

    def mean(self, own: Tensor) -> Tensor:
        """Mean over all ranks of a float tensor, the same bits on every rank."""
        if self.size == 1:
            return own
        total = own.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.size

    def cat(self, own: Tensor, dim: int) -> Tensor:
        """All ranks' tensors of one shape, one behind the other in rank order."""
        if self.size == 1:
            return own
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def from_first(self, own: Tensor) -> Tensor:
        """The first rank's values, in place: for what ranks draw at random."""
        if self.size > 1:
            dist.broadcast(own, group=self.group, group_src=0)
        return own
