from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.kernels.api import Packing, xattention
from flux_attention.modes.base import Mode


@dataclass(frozen=True)
class XAttention(Mode):
    """Attention to the key blocks whose antidiagonal scores hold most of the mass. Source: arXiv 2503.16428."""

    name = "xattention"
    block_tokens: int
    stride: int
    threshold: float

    @classmethod
    def from_config(cls, config: FluxConfig) -> Self:
        return cls(config.block_tokens, config.xattention_stride, config.xattention_threshold)

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
        return xattention(
            q,
            k,
            v,
            packing,
            block=self.block_tokens,
            stride=self.stride,
            threshold=self.threshold,
            scale=scale,
            impl=impl,
        )
