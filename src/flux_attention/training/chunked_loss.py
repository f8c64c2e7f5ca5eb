"""Cross entropy and KL over a large vocabulary without the `[n, V]` logits.

Logits of a chunk of rows are made, turned into the loss and its gradient with respect to the hidden states, and thrown
away; a chunk has fewer rows the larger the vocabulary is. The output layer is frozen, so its weight has no gradient.

Shapes: `n` rows, `E` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Logits that exist at a time: 2**27 take 256 MiB in bfloat16 and 512 MiB more in float32.
CHUNK_ELEMENTS = 1 << 27


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    *,
    softcap: float | None = None,
    elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """`Σ row_weight · (−log softmax(hidden·weightᵀ)[target])`, differentiable in `hidden`.

    Args:
        hidden: `[n, E]`.
        weight: of the frozen output layer, `[V, E]`.
        targets: int64 `[n]`.
        row_weight: float32 `[n]`.
        softcap: logits are `softcap·tanh(logits / softcap)` where the model has one.
        elements: most logits that exist at a time.
    """
    loss: Tensor = _ChunkedLoss.apply(hidden, weight, targets, None, row_weight, softcap, elements)
    return loss


def chunked_kl(
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    *,
    softcap: float | None = None,
    elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """`Σ row_weight · KL(teacher ‖ student)` in nats, differentiable in `hidden`; arguments as above.

    Both come as hidden states `[n, E]` of the same output layer, so the teacher costs no logits either.
    """
    loss: Tensor = _ChunkedLoss.apply(hidden, weight, None, teacher_hidden, row_weight, softcap, elements)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor | None,
        teacher_hidden: Tensor | None,
        row_weight: Tensor,
        softcap: float | None,
        elements: int,
    ) -> Tensor:
        rows = max(1, elements // weight.shape[0])
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, softcap)
            log_q = logits.log_softmax(-1)
            scale = row_weight[part, None]
            if targets is not None:
                picked = log_q.gather(-1, targets[part, None])
                total = total - (picked * scale).sum()
            else:
                assert teacher_hidden is not None
                log_p = _logits(teacher_hidden[part], weight, softcap).log_softmax(-1)
                p = log_p.exp()
                total = total + (torch.sub(log_p, log_q).mul_(p).sum(-1, keepdim=True) * scale).sum()
                del log_p
            if gradient is None:
                continue
            # softmax(student) minus what it should be.
            slope = log_q.exp_()
            if targets is not None:
                slope.scatter_add_(-1, targets[part, None], slope.new_full((), -1.0).expand_as(picked))
            else:
                slope.sub_(p)
            slope.mul_(scale)
            if softcap is not None:
                slope.mul_(1 - (logits / softcap) ** 2)
            gradient[part] = slope.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(gradient.dtype), None, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """float32 `[rows, V]`."""
    logits = (hidden @ weight.T).float()
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
