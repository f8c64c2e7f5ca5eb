from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from flux_attention.kernels.api import dense_attention, prepare
from flux_attention.modes.base import Mode, PrefillInputs


class Full(Mode):
    """Causal attention to every earlier token."""

    name = "full"

    def prefill(self, inputs: PrefillInputs) -> Tensor:
        x = inputs
        return dense_attention(x.q, x.k, x.v, x.packing, scale=x.scale, impl=x.impl)

    def prepare(self, inputs: PrefillInputs) -> Callable[[], Tensor]:
        x, run = inputs, functools.partial(self.prefill, inputs)
        return prepare("dense_attention", run, x.q, x.k, x.v, x.packing, impl=x.impl)
