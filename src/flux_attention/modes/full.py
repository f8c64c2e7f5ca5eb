from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.kernels.api import Packing, dense_attention
from flux_attention.modes.base import Mode


@dataclass(frozen=True)
class Full(Mode):
    """Causal attention to every earlier token."""

    name = "full"

    @classmethod
    def from_config(cls, config: FluxConfig) -> Self:
        return cls()

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packing: Packing,
        prompt_ends: tuple[int, ...],
        *,
        scale: float,
        impl: str = "auto",
    ) -> Tensor:
        return dense_attention(q, k, v, packing, scale=scale, impl=impl)
