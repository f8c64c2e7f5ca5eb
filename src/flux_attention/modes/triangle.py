from __future__ import annotations

from torch import Tensor

from flux_attention.kernels.api import triangle_attention
from flux_attention.modes.base import Mode, PrefillInputs


class Triangle(Mode):
    """Streaming, except that the prompt's last queries attend densely. Source: TriangleMix, arXiv 2507.21526."""

    name = "triangle"

    def prefill(self, inputs: PrefillInputs) -> Tensor:
        x, config = inputs, self.config
        return triangle_attention(
            x.q,
            x.k,
            x.v,
            x.packing,
            sink=config.sink_tokens,
            window=config.window_tokens,
            block=config.block_tokens,
            dense_from=tuple(max(0, end - config.triangle_tokens) for end in x.prompt_ends),
            scale=x.scale,
            impl=x.impl,
        )
