"""Norms and gating of the frozen backbone compiled for passes with gradients.

Eager, each writes its intermediates to memory, forward and backward; compiled, a norm or a gating is one pass. Passes
without gradients keep whatever the model runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flux_attention.models.controller import FluxAttention
from flux_attention.models.overrides import Forward, forward_overrides

_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


@contextmanager
def compiled_layers(controller: FluxAttention, *, backend: str = "inductor") -> Iterator[None]:
    """Compile the norms and gated MLPs of the decoder inside the block. The first passes take a minute longer.

    Args:
        backend: of `torch.compile`.
    """
    # Rounded where the model's own code rounds: a teacher's passes are not compiled, and the loss is the difference.
    options = {"emulate_precision_casts": True} if backend == "inductor" else None
    compile_ = functools.partial(torch.compile, backend=backend, options=options)
    norms: dict[type[nn.Module], Callable[..., Any]] = {}
    gatings: dict[str, Callable[..., Any]] = {}
    with forward_overrides() as override:
        for module in controller.decoder.modules():
            kind = type(module)
            if kind.__name__.endswith("RMSNorm"):
                if kind not in norms:
                    norms[kind] = compile_(kind.forward)
                override(module, functools.partial(_with_gradients, functools.partial(norms[kind], module)))
            elif all(hasattr(module, name) for name in _GATED):
                activation: Any = module.act_fn
                key = repr(activation)
                if key not in gatings:
                    gatings[key] = compile_(functools.partial(_gate, activation))
                override(module, functools.partial(_with_gradients, functools.partial(_gated, module, gatings[key])))
        yield


def _with_gradients(compiled: Forward, before: Forward) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs) if torch.is_grad_enabled() else before(*args, **kwargs)

    return forward


def _gate(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def _gated(module: Any, gating: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(gating(module.gate_proj(x), module.up_proj(x)))
    return out
