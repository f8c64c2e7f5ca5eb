"""What a mode is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.kernels.api import Packing


class Mode(ABC):
    """One way to attend at prefill.

    Attributes:
        name: in configurations and reports.
        drops_keys: whether its rows keep sinks and window only, so that their keys arrive with gaps.
    """

    name: ClassVar[str]
    drops_keys: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def from_config(cls, config: FluxConfig) -> Self: ...

    @abstractmethod
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
        """Attend from packed queries to packed keys.

        Args:
            q: `[N, Hq, D]`; k, v: `[M, Hk, D]`, rotary positions applied.
            packing: lengths of the sequences.
            prompt_ends: position after each prompt's last token (later than the last query in a chunk).
            scale: of the logits.
            impl: kernel implementation.

        Returns:
            `[N, Hq, D]`.
        """
