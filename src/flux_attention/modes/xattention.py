from __future__ import annotations

from torch import Tensor

from flux_attention.kernels.api import xattention
from flux_attention.modes.base import Mode, PrefillInputs


class XAttention(Mode):
    """Attention to the key blocks whose antidiagonal scores hold most of the mass. Source: arXiv 2503.16428."""

    name = "xattention"

    def prefill(self, inputs: PrefillInputs) -> Tensor:
        x, config = inputs, self.config
        return xattention(
            x.q,
            x.k,
            x.v,
            x.packing,
            block=config.block_tokens,
            stride=config.xattention_stride,
            threshold=config.xattention_threshold,
            scale=x.scale,
            impl=x.impl,
        )
