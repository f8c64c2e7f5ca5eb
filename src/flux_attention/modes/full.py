from __future__ import annotations

from torch import Tensor

from flux_attention.kernels.api import dense_attention
from flux_attention.modes.base import Mode, PrefillInputs


class Full(Mode):
    """Causal attention to every earlier token."""

    name = "full"

    def prefill(self, inputs: PrefillInputs) -> Tensor:
        x = inputs
        return dense_attention(x.q, x.k, x.v, x.packing, scale=x.scale, impl=x.impl)
