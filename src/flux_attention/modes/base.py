"""What a mode is, and what it is given."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.kernels.api import Packing


@dataclass(frozen=True, slots=True, eq=False)
class PrefillInputs:
    """One prefill of one layer: packed queries and the packed keys that they attend to.

    Attributes:
        q: `[N, Hq, D]`; k, v: `[M, Hk, D]`, rotary positions applied.
        packing: lengths of the sequences.
        prompt_ends: position after each prompt's last token (later than the last query in a chunk).
        scale: of the logits.
        impl: kernel implementation, "auto" or a name of `kernels.api`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    packing: Packing
    prompt_ends: tuple[int, ...]
    scale: float
    impl: str = "auto"


@dataclass(frozen=True)
class Mode(ABC):
    """One way to attend at prefill.

    Attributes:
        name: in configurations and reports.
        drops_keys: whether its rows keep sinks and window only, so that their keys arrive with gaps.
        config: of the adapter; a mode reads the lengths that concern it.
    """

    name: ClassVar[str]
    drops_keys: ClassVar[bool] = False
    config: FluxConfig

    @abstractmethod
    def prefill(self, inputs: PrefillInputs) -> Tensor:
        """Attend from the packed queries to the packed keys; `[N, Hq, D]`."""

    def prepare(self, inputs: PrefillInputs) -> Callable[[], Tensor]:
        """`prefill`, as a function to call once this side is known to be taken.

        Modes that only launch attention do everything else right away, so that a device that waits for the decision
        waits for a launch and no more.
        """
        return functools.partial(self.prefill, inputs)
