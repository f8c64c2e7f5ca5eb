from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from flux_attention.kernels.api import prepare, streaming_attention
from flux_attention.modes.base import Mode, PrefillInputs


class Streaming(Mode):
    """Attention to the first tokens and to a block-aligned window of the latest ones. Source: arXiv 2309.17453."""

    name = "streaming"
    drops_keys = True

    def prefill(self, inputs: PrefillInputs) -> Tensor:
        x, config = inputs, self.config
        return streaming_attention(
            x.q,
            x.k,
            x.v,
            x.packing,
            sink=config.sink_tokens,
            window=config.window_tokens,
            block=config.block_tokens,
            scale=x.scale,
            impl=x.impl,
        )

    def prepare(self, inputs: PrefillInputs) -> Callable[[], Tensor]:
        x, run = inputs, functools.partial(self.prefill, inputs)
        return prepare(
            "streaming_attention", run, x.q, x.k, x.v, x.packing, impl=x.impl, block=self.config.block_tokens
        )
