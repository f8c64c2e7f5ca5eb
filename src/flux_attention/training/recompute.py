"""Activation checkpointing of decoder layers under routed training.

A layer's first pass keeps its input and its gate and nothing else; the backward pass runs the layer again. Because the
gate is an input of the layer here, decided outside of what is run twice, the first pass computes the chosen side of the
attention alone (`models.blend`), and every rank and both passes decide alike.

The second pass is run for what its gradient needs, which is everything but the layer's last product: its value is only
added to the residual, so it is not computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flux_attention.models.controller import FluxAttention
from flux_attention.models.overrides import Forward, forward_overrides
from flux_attention.models.step import Step

Run = Callable[..., Tensor]
"""`(hidden, gate, last_product=True)` → the layer's output."""


class _Recomputed(torch.autograd.Function):
    """`run(hidden, gate)` without a graph; the backward pass runs it once more with one."""

    @staticmethod
    def forward(ctx: Any, run: Run, hidden: Tensor, gate: Tensor | None, offload: bool) -> Tensor:
        ctx.run, ctx.device = run, hidden.device
        if offload and hidden.is_cuda:
            kept = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
            # In the order of the stream: whatever overwrites `hidden` later waits for this copy.
            kept.copy_(hidden, non_blocking=True)
        else:
            kept = hidden
        ctx.save_for_backward(kept, gate)
        with torch.no_grad():
            return run(hidden, gate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # The first layer's input comes from the frozen embedding: nothing below its gate wants a gradient.
        wanted = ctx.needs_input_grad[1:3]
        kept, gate = ctx.saved_tensors
        hidden = kept.to(ctx.device, non_blocking=True).detach().requires_grad_(wanted[0])
        gate = None if gate is None else gate.detach().requires_grad_(wanted[1])
        with torch.enable_grad():
            out = ctx.run(hidden, gate, last_product=False)
        ctx.run = None
        leaves = [x for x in (hidden, gate) if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(out, leaves, gradients))
        return None, *(next(found) if w else None for w in wanted), None


@contextmanager
def recomputed_layers(controller: FluxAttention, *, offload: bool = False) -> Iterator[None]:
    """Training passes inside the block keep one tensor a layer; the layers are as before afterwards.

    The backward pass has to run inside the block, too.

    Args:
        offload: keep these tensors in the host's memory: `T·E` values a layer less on the device, for two copies of
            them over the bus.
    """
    routed = {layer: index for index, layer in enumerate(controller.layers)}
    with forward_overrides() as override:
        for number, module in enumerate(controller.decoder.layers):
            override(module, functools.partial(_bound, controller, routed.get(number), module, offload))
        yield


def _bound(controller: FluxAttention, index: int | None, module: Any, offload: bool, original: Forward) -> Forward:
    return functools.partial(_forward, controller, index, module, original, offload)


def _forward(
    controller: FluxAttention,
    index: int | None,
    module: Any,
    original: Forward,
    offload: bool,
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    step = controller._step
    if step is None or step.soft is None or step.collect or not torch.is_grad_enabled():
        return original(hidden_states, *args, **kwargs)
    gate = None
    if index is not None:
        attention = getattr(module, controller.family.attention)
        norm = getattr(module, controller.family.input_norm)
        # Only the pooled tokens go through the norm here; a norm sees one token at a time.
        gate = controller.pooling.gate(
            step, index, hidden_states, lambda tokens: controller.family.queries(attention, norm(tokens))
        )

    last = controller.family.last_product(module)

    def run(hidden: Tensor, own: Tensor | None, last_product: bool = True) -> Tensor:
        with _as_current(controller, step, index, own), forward_overrides() as override:
            if last is not None and not last_product:
                override(last, lambda before: lambda x: _NoValue.apply(x, last.weight))
            return original(hidden, *args, **kwargs)

    out: Tensor = _Recomputed.apply(run, hidden_states, gate, offload)
    return out


class _NoValue(torch.autograd.Function):
    """The gradient of `x·weightᵀ` for a frozen weight, without its value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None


@contextmanager
def _as_current(controller: FluxAttention, step: Step, index: int | None, gate: Tensor | None) -> Iterator[None]:
    """The step that a layer belonged to, with `gate` in the place of the layer's own."""
    before, controller._step = controller._step, step
    if gate is not None:
        step.packings["input", index] = gate
    try:
        yield
    finally:
        step.packings.pop(("input", index), None)
        controller._step = before
