"""Cached features: the router's input is a prompt's pooled queries, so it can be fitted without the backbone.

Shapes: `L` routable layers, `n` prompts, `D` head dim, `B` rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flux_attention.models.controller import FluxAttention


def pooled_queries(controller: FluxAttention, prompts: Sequence[Sequence[int]], batch: int) -> Tensor:
    """Pooled queries of prompts (token ids), `[L, n, D]`, by probes of `batch` prompts."""
    parts = []
    for start in range(0, len(prompts), batch):
        parts.append(controller.probe([torch.tensor(ids) for ids in prompts[start : start + batch]]))
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class Features:
    """One row of `FeatureDataset`: pooled queries `[L, D]`, target `p_full` `[L]`, class number."""

    pooled: Tensor
    target: Tensor
    class_index: int


class FeatureDataset(Dataset[Features]):
    """Cached features for the `damage` objective.

    Args:
        pooled: `[L, n, D]`, as `FluxAttention.probe` gives them.
        target: `[n, L]` in [0, 1].
        class_index: `[n]`.
    """

    def __init__(self, pooled: Tensor, target: Tensor, class_index: Tensor) -> None:
        layers, n = pooled.shape[:2]
        if n == 0 or tuple(target.shape) != (n, layers) or tuple(class_index.shape) != (n,):
            raise ValueError(
                f"features do not fit: pooled {list(pooled.shape)} is [L, n ≥ 1, D], so target must be [n, L] and "
                f"class_index [n]; got {list(target.shape)} and {list(class_index.shape)}"
            )
        self.pooled = pooled.float().cpu().transpose(0, 1).contiguous()
        self.target, self.class_index = target.float().cpu(), class_index.cpu()

    def __len__(self) -> int:
        return self.target.shape[0]

    def __getitem__(self, index: int) -> Features:
        return Features(self.pooled[index], self.target[index], int(self.class_index[index]))


def collate_features(rows: Sequence[Features]) -> dict[str, Tensor]:
    """`pooled [B, L, D]`, `target [B, L]`, `class_index [B]`."""
    return {
        "pooled": torch.stack([row.pooled for row in rows]),
        "target": torch.stack([row.target for row in rows]),
        "class_index": torch.tensor([row.class_index for row in rows]),
    }
