"""The Layer Router: prefix–suffix pooling of a layer's queries, and the MLPs that turn it into a decision.

There is one pooling function. Plain, left- or right-padded, packed and chunked inputs differ only in where their
sequences start in the flat token axis, which is what a `PoolPlan` holds.

Shapes: `S` sequences, `K ≤ 2·pool_tokens` pooled tokens, `L` routable layers, `H` query heads, `D` head dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flux_attention.kernels.fused import Norm, decide, router_logits
from flux_attention.kernels.transfer import upload


@dataclass(frozen=True)
class PoolPlan:
    """Which tokens of a flat token axis `[N]` are pooled, and with what weight.

    Attributes:
        index: int64 `[S, K]`, positions in the flat token axis (0 where there is nothing to pool).
        weight: float32 `[S, K]`; sums to 1 over a sequence's chunks.
    """

    index: Tensor
    weight: Tensor

    @classmethod
    def build(
        cls,
        starts: Sequence[int],
        lengths: Sequence[int],
        pool_tokens: int,
        *,
        tail_tokens: int = 0,
        past: Sequence[int] | None = None,
        totals: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> PoolPlan:
        """The plan for sequences that start at `starts` in the flat axis and hold `lengths` tokens there.

        A chunk of a longer prompt also gives `past` (its tokens seen before) and `totals` (the prompt's length):
        each chunk then pools only its own part, and the parts add up to the pooled query of the whole prompt.
        A prompt shorter than `2·pool_tokens` counts the overlap of prefix and suffix twice. With `tail_tokens`, at
        most `pool_tokens`, the last so many tokens are half of the mean, and both ends, these included, the other.
        """
        past = [0] * len(starts) if past is None else past
        totals = [p + n for p, n in zip(past, lengths, strict=True)] if totals is None else totals
        rows: list[list[int]] = []
        weights: list[list[float]] = []
        for start, length, before, total in zip(starts, lengths, past, totals, strict=True):
            if total < 1:
                raise ValueError(f"cannot pool an empty prompt (total length {total})")
            n = min(pool_tokens, total)
            wanted = (*range(n), *range(total - n, total))
            shares = [1.0 / (2 * n)] * len(wanted)
            if tail := min(tail_tokens, n):
                shares = [share / 2 + (0.5 / tail if i >= 2 * n - tail else 0.0) for i, share in enumerate(shares)]
            here = [i for i, t in enumerate(wanted) if before <= t < before + length]
            rows.append([start + wanted[i] - before for i in here])
            weights.append([shares[i] for i in here])
        width = max((len(r) for r in rows), default=0)
        index = torch.tensor([r + [0] * (width - len(r)) for r in rows], dtype=torch.long)
        weight = torch.tensor([w + [0.0] * (width - len(w)) for w in weights])
        plan = cls(index.view(len(rows), width), weight.view(len(rows), width))
        return plan if device is None else plan.to(torch.device(device))

    def to(self, device: torch.device) -> PoolPlan:
        """The same plan on another device; from the host to a GPU without waiting for what the GPU still has to do."""
        if self.index.device == device:
            return self
        if self.index.device.type != "cpu":
            return PoolPlan(self.index.to(device), self.weight.to(device))
        return PoolPlan(upload(self.index, device), upload(self.weight, device))

    def gather(self, tokens: Tensor) -> Tensor:
        """`tokens [N, …]` → `[S, K, …]`."""
        return tokens[self.index]

    def mean(self, queries: Tensor) -> Tensor:
        """`queries [S, K, H, D]` before RoPE → their mean over tokens and heads, float32 `[S, D]`."""
        return torch.einsum("sk,skd->sd", self.weight, queries.mean(2, dtype=torch.float32))


def pool_queries(queries: Tensor, plan: PoolPlan) -> Tensor:
    """Mean of a prompt's first and last queries over tokens and heads, weighted as the plan says.

    Args:
        queries: `[N, H, D]` on the flat token axis, before RoPE and after q-norm where the model has one.
        plan: where each sequence's first and last tokens are.

    Returns:
        float32 `[S, D]`. For chunked input, the sum of the chunks' results is the result of the whole.
    """
    return plan.mean(plan.gather(queries))


class LayerRouter(nn.Module):
    """One small MLP per routable layer, all layers in one set of stacked weights.

    Context encoder: Linear D→8D, SiLU, Linear 8D→2D. Head: Linear 2D→4D, SiLU, Linear 4D→D, SiLU, Linear D→2
    (logit 1 = full). Stacking lets the probe decide all layers in five batched products, and one layer alone is a
    slice. Source: Flux Attention (arXiv 2604.07394), section on the Layer Router.

    Args:
        num_layers: routable layers `L`.
        head_dim: `D` of the pooled queries.
        full_bias: initial bias of the "full" logit; the last weight starts at 0, so training starts dense.
    """

    #: Where a SiLU follows: the encoder ends without one, and the head starts on its output.
    ACTIVE = (True, False, True, True, False)

    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, num_layers: int, head_dim: int, full_bias: float = 4.5) -> None:
        super().__init__()
        if num_layers < 1 or head_dim < 1:
            raise ValueError(
                f"a router needs at least one layer and one dimension, got num_layers={num_layers}, head_dim={head_dim}"
            )
        self.num_layers, self.head_dim, self.full_bias = num_layers, head_dim, full_bias
        d = head_dim
        sizes = (d, 8 * d, 2 * d, 4 * d, d, 2)
        # Whitening of the input: queries of different layers differ in scale by orders of magnitude, and raw they
        # leave some layers' routers blind at any one learning rate. Identity until `fit_input_scale` sets it.
        self.register_buffer("input_mean", torch.zeros(num_layers, d))
        self.register_buffer("input_scale", torch.ones(num_layers, d))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_layers, o, i)) for i, o in self._pairs(sizes))
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_layers, o)) for o in sizes[1:])
        self.reset_parameters()

    @staticmethod
    def _pairs(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        return list(itertools.pairwise(sizes))

    def reset_parameters(self) -> None:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            # nn.Linear's own initialisation, written out because the weights carry a layer axis.
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)
        nn.init.zeros_(self.weights[-1])
        nn.init.zeros_(self.biases[-1])
        with torch.no_grad():
            self.biases[-1][:, 1] = self.full_bias

    @torch.no_grad()
    def fit_input_scale(self, pooled: Tensor) -> None:
        """Set the input whitening from pooled queries of calibration prompts, `[L, n, D]`, n ≥ 2."""
        if pooled.ndim != 3 or pooled.shape[1] < 2:
            raise ValueError(f"expected pooled queries [layers, n ≥ 2, head_dim], got {tuple(pooled.shape)}")
        self.input_mean.copy_(pooled.float().mean(1))
        self.input_scale.copy_(1 / pooled.float().std(1).clamp_min(1e-3))

    def forward(self, pooled: Tensor, layer: int | None = None) -> Tensor:
        """Logits of every layer, or of one.

        Args:
            pooled: float32 `[L, S, D]`, or `[S, D]` with `layer`.
            layer: index among the routable layers.

        Returns:
            float32 `[L, S, 2]`, or `[S, 2]` with `layer`; index 1 = full.
        """
        rows = slice(None) if layer is None else slice(layer, layer + 1)
        x = pooled if layer is None else pooled[None]
        if x.shape[0] != self.input_mean[rows].shape[0] or x.shape[-1] != self.head_dim:
            raise ValueError(
                f"pooled queries {tuple(pooled.shape)} do not fit a router of {self.num_layers} layers, "
                f"head dim {self.head_dim}"
            )
        logits = self._logits(x.to(self.input_mean.dtype)[:, :, None], rows, impl="torch")
        return logits if layer is None else logits[0]

    def from_parts(self, parts: Tensor, layer: int | None = None) -> Tensor:
        """Logits as `forward` gives them, from pooled queries in parts: `[L, S, parts, D]`, or `[S, parts, D]` with
        `layer`. Inference, in few launches.
        """
        rows = slice(None) if layer is None else slice(layer, layer + 1)
        logits = self._logits(parts if layer is None else parts[None], rows, impl="auto")
        return logits if layer is None else logits[0]

    def decide(
        self, queries: Tensor, plan: PoolPlan, norm: Norm | None, layer: int, *, arrivals: Tensor, out: Tensor
    ) -> Tensor:
        """Logits `[S, 2]` of one layer from its queries `[N, Hq * D]` on a GPU, in one launch: see `fused.decide`."""
        return decide(
            queries,
            plan.index,
            plan.weight,
            self.head_dim,
            norm,
            self.input_mean,
            self.input_scale,
            tuple(self.weights),
            tuple(self.biases),
            layer,
            arrivals=arrivals,
            out=out,
        )

    def _logits(self, parts: Tensor, rows: slice, impl: str) -> Tensor:
        """`router_logits` of some layers."""
        return router_logits(
            parts,
            self.input_mean[rows],
            self.input_scale[rows],
            [weight[rows] for weight in self.weights],
            [bias[rows] for bias in self.biases],
            self.ACTIVE,
            impl=impl,
        )

    def p_full(self, pooled: Tensor, layer: int | None = None) -> Tensor:
        """Probability of full attention, `[L, S]` or `[S]`."""
        return self(pooled, layer).softmax(-1)[..., 1]


def gumbel_noise(shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise, float32."""
    uniform = torch.rand(*shape, device=device, generator=generator).clamp_(1e-20, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))


def straight_through_gate(logits: Tensor, temperature: float, noise: Tensor | None = None) -> Tensor:
    """Hard gate z ∈ {0, 1} in the forward pass, Gumbel-softmax gradient in the backward pass.

    Args:
        logits: `[…, 2]`, index 1 = full.
        temperature: τ > 0; lower is closer to the hard choice.
        noise: Gumbel noise of the shape of `logits`; None takes the argmax (the noise-free gate).

    Returns:
        `[…]`, 1 = full. Source: Jang et al., arXiv 1611.01144.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    soft = ((logits if noise is None else logits + noise) / temperature).softmax(-1)[..., 1]
    hard = (soft > 0.5).to(soft.dtype)
    # Bracketed so that the forward value is exactly 0 or 1.
    return hard + (soft - soft.detach())
