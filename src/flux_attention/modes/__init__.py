"""Attention modes: what a layer on one side of the route computes at prefill.

To add a mode: write its class in a file of its own, list it in `REGISTRY`, name it in `config.MODES`, and give its
kernel an oracle. Decode needs nothing: every mode decodes over the keys that its cache keeps.
"""

from __future__ import annotations

from flux_attention.config import FluxConfig
from flux_attention.modes.base import Mode, PrefillInputs
from flux_attention.modes.full import Full
from flux_attention.modes.streaming import Streaming
from flux_attention.modes.triangle import Triangle
from flux_attention.modes.xattention import XAttention

REGISTRY: dict[str, type[Mode]] = {mode.name: mode for mode in (Full, Streaming, Triangle, XAttention)}

__all__ = ["REGISTRY", "Full", "Mode", "PrefillInputs", "Streaming", "Triangle", "XAttention", "make_mode"]


def make_mode(name: str, config: FluxConfig) -> Mode:
    """The mode `name` with the lengths of `config`. Raises ValueError for an unknown name."""
    if name not in REGISTRY:
        raise ValueError(f"unknown attention mode {name!r}; expected one of {', '.join(REGISTRY)}")
    return REGISTRY[name](config)
