from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.kernels.api import Packing, triangle_attention
from flux_attention.modes.base import Mode


@dataclass(frozen=True)
class Triangle(Mode):
    """Streaming, except that the prompt's last queries attend densely. Source: TriangleMix, arXiv 2507.21526."""

    name = "triangle"
    sink_tokens: int
    window_tokens: int
    block_tokens: int
    triangle_tokens: int

    @classmethod
    def from_config(cls, config: FluxConfig) -> Self:
        return cls(config.sink_tokens, config.window_tokens, config.block_tokens, config.triangle_tokens)

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
        return triangle_attention(
            q,
            k,
            v,
            packing,
            sink=self.sink_tokens,
            window=self.window_tokens,
            block=self.block_tokens,
            dense_from=tuple(max(0, end - self.triangle_tokens) for end in prompt_ends),
            scale=scale,
            impl=impl,
        )
