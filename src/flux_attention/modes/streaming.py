from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.kernels.api import Packing, streaming_attention
from flux_attention.modes.base import Mode


@dataclass(frozen=True)
class Streaming(Mode):
    """Attention to the first tokens and to a block-aligned window of the latest ones. Source: arXiv 2309.17453."""

    name = "streaming"
    drops_keys = True
    sink_tokens: int
    window_tokens: int
    block_tokens: int

    @classmethod
    def from_config(cls, config: FluxConfig) -> Self:
        return cls(config.sink_tokens, config.window_tokens, config.block_tokens)

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
        return streaming_attention(
            q,
            k,
            v,
            packing,
            sink=self.sink_tokens,
            window=self.window_tokens,
            block=self.block_tokens,
            scale=scale,
            impl=impl,
        )
