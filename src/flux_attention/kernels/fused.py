"""The work around attention with its passes over memory folded together; for inference, no gradients.

Transformers' eager norms, rotary embedding and gating write every intermediate to memory: a third of a long prefill's
linear time, and most of the launches of a decode step. Each op here is one launch.

Legend: `N` tokens, `H` hidden size, `F` width of the gated MLP, `Hq`, `Hk` query and key heads, `D` head dim (a power
of two), `B` rows with one token each. Weights are those of `nn.Linear`: `[out, in]`, contiguous.

`impl`: "triton" (CUDA), "torch" (anywhere; written from the definitions), "auto": triton on CUDA, torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_attention.kernels.capture import capture
from flux_attention.kernels.dispatch import UnsupportedKernelError, importable, triton_interprets


def _triton(x: Tensor, impl: str) -> bool:
    """Whether to run the triton version. Raises UnsupportedKernelError where it is named and cannot run."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f'impl must be "auto", "torch" or "triton", got {impl!r}')
    if impl == "auto":
        return x.is_cuda
    if impl == "triton" and not x.is_cuda and not (importable("triton") and triton_interprets()):
        raise UnsupportedKernelError(f"impl='triton' needs a CUDA device, got tensors on {x.device}; impl='torch' runs")
    return impl == "triton"


@dataclass(frozen=True)
class Norm:
    """An RMS norm: `weight [H]` and `eps`."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


# ------------------------------------------------------------------------------------------------ rows of tokens


def rms_norm(x: Tensor, norm: Norm, *, impl: str = "auto") -> Tensor:
    """Normalised rows of `x [..., H]`."""
    if not _triton(x, impl):
        return norm(x)
    return _norm_rows(x, None, norm)[0]


def add_rms_norm(x: Tensor, add: Tensor, norm: Norm, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(normalised rows of `x + add`, `x + add`), `x, add [..., H]`."""
    if not _triton(x, impl):
        total = x + add
        return norm(total), total
    return _norm_rows(x, add, norm)


def _norm_rows(x: Tensor, add: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    import triton

    from flux_attention.kernels import fused_triton as kernels

    x = x.contiguous()
    width = x.shape[-1]
    out = torch.empty_like(x)
    total = out if add is None else torch.empty_like(x)
    if x.numel():
        block = triton.next_power_of_2(width)
        kernels.rms_norm_kernel[(x.numel() // width,)](
            x,
            x if add is None else add.contiguous(),
            norm.weight,
            out,
            total,
            norm.eps,
            N=width,
            BLOCK=block,
            ADD=add is not None,
            num_warps=max(1, min(16, block // 512)),
        )
    return out, total


def silu_mul(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """`silu(gate) * up`, of one shape."""
    if not _triton(gate, impl):
        return F.silu(gate) * up
    import triton

    from flux_attention.kernels import fused_triton as kernels

    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        kernels.silu_mul_kernel[(triton.cdiv(out.numel(), 2048),)](gate, up, out, out.numel(), BLOCK=2048, num_warps=8)
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, norm: Norm | None) -> Tensor:
    """`x [N, H, D]`, `cos, sin [N, D]`."""
    if norm is not None:
        x = norm(x)
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    dim: int,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Heads normalised (both norms or none) and rotated: `q [N, Hq * D]`, `k [N, Hk * D]` → `[N, Hq, D]`, `[N, Hk, D]`.

    `cos, sin [N, D]`, whose halves a family may scale; `dim` is `D`.
    """
    if not _triton(q, impl):
        q, k = (x.unflatten(-1, (-1, dim)) for x in (q, k))
        return _rotate(q, cos, sin, q_norm), _rotate(k, cos, sin, k_norm)
    import triton

    from flux_attention.kernels import fused_triton as kernels

    # Rows may be parts of wider ones.
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    tokens, hq, hk = q.shape[0], q.shape[1] // dim, k.shape[1] // dim
    q_out, k_out = q.new_empty(tokens, hq, dim), k.new_empty(tokens, hk, dim)
    heads = min(8, triton.next_power_of_2(max(hq, hk)))
    if tokens:
        kernels.rotary_kernel[(tokens, triton.cdiv(hq, heads) + triton.cdiv(hk, heads))](
            q,
            k,
            cos,
            sin,
            q if q_norm is None else q_norm.weight,
            k if k_norm is None else k_norm.weight,
            q_out,
            k_out,
            0.0 if q_norm is None else q_norm.eps,
            q.stride(0),
            k.stride(0),
            HQ=hq,
            HK=hk,
            HALF=dim // 2,
            HEADS=heads,
            NORM=q_norm is not None,
            num_warps=2,
        )
    return q_out, k_out


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    counts: Tensor,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """One token a row: rotate its heads, and put its keys and values behind the row's `counts[b]` keys.

    `q [B, Hq * D]`, `k, v [B, Hk * D]`, `cos, sin [B, D]`, `k_pages, v_pages [P, page, Hk, D]`, `table [B, pages]`,
    `counts [B]`; the page of the new token must be in the table. Returns the queries `[B, Hq, D]`.
    """
    page, hk, dim = k_pages.shape[1:]
    if not _triton(q, impl):
        new_q, new_k = rotary(q, k, cos, sin, dim, q_norm, k_norm, impl="torch")
        at = counts.long()
        slots = table.gather(1, (at // page)[:, None])[:, 0].long() * page + at % page
        k_pages.flatten(0, 1)[slots] = new_k
        v_pages.flatten(0, 1)[slots] = v.unflatten(-1, (hk, dim))
        return new_q
    from flux_attention.kernels import fused_triton as kernels

    q, k, v, cos, sin = (x.contiguous() for x in (q, k, v, cos, sin))
    rows, hq = q.shape[0], q.shape[1] // dim
    out = q.new_empty(rows, hq, dim)
    kernels.rotary_append_kernel[(rows, hq + 2 * hk)](
        q,
        k,
        v,
        cos,
        sin,
        q if q_norm is None else q_norm.weight,
        k if k_norm is None else k_norm.weight,
        out,
        k_pages,
        v_pages,
        table,
        counts,
        0.0 if q_norm is None else q_norm.eps,
        table.stride(0),
        *k_pages.stride()[:3],
        HQ=hq,
        HK=hk,
        HALF=dim // 2,
        PAGE=page,
        NORM=q_norm is not None,
        num_warps=1,
    )
    return out


# ------------------------------------------------------------------------------------------------ router

#: Tokens that one program pools.
_POOLED = 2


def pool_queries(
    q: Tensor, index: Tensor, weight: Tensor, dim: int, norm: Norm | None = None, *, impl: str = "auto"
) -> Tensor:
    """Queries before the rotary embedding pooled over tokens and heads, in parts whose sum is the pooled query.

    `q [N, Hq * D]`; `index` int64 and `weight` float32 `[S, K]` as in a `PoolPlan`; `dim` is `D`. Returns float32
    `[S, parts, D]`.
    """
    if not _triton(q, impl):
        tokens = q[index].unflatten(-1, (-1, dim))
        mean = (tokens if norm is None else norm(tokens)).mean(2, dtype=torch.promote_types(q.dtype, torch.float32))
        return torch.einsum("sk,skd->sd", weight.to(mean.dtype), mean)[:, None]
    import triton

    from flux_attention.kernels import fused_triton as kernels

    q = q.contiguous()
    (rows, k), hq = index.shape, q.shape[1] // dim
    parts = triton.cdiv(k, _POOLED)
    out = torch.empty(rows, parts, dim, dtype=torch.float32, device=q.device)
    kernels.pool_kernel[(parts, rows)](
        q,
        index,
        weight,
        q if norm is None else norm.weight,
        out,
        k,
        0.0 if norm is None else norm.eps,
        HQ=hq,
        HEADS=triton.next_power_of_2(hq),
        D=dim,
        TOKENS=_POOLED,
        NORM=norm is not None,
        num_warps=4,
    )
    return out


def router_logits(
    parts: Tensor,
    mean: Tensor,
    scale: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    silu: Sequence[bool],
    *,
    impl: str = "auto",
) -> Tensor:
    """Routers of `L` layers on pooled queries in parts, `[L, S, parts, D]` → logits `[L, S, 2]`, float32.

    `mean, scale [L, D]` whiten the input; `weights [L, out, in]`, `biases [L, out]`, and whether SiLU follows, product
    by product: an odd number of them. Triton takes two products a launch; torch has gradients.
    """
    if not _triton(parts, impl):
        x = (parts.sum(2) - mean[:, None]) * scale[:, None]
        for weight, bias, active in zip(weights, biases, silu, strict=True):
            x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
            x = F.silu(x) if active else x
        return x
    import triton

    from flux_attention.kernels import fused_triton as kernels

    x, (layers, rows) = parts.contiguous(), parts.shape[:2]

    def reads(x: Tensor) -> dict[str, Any]:
        count, k = x.shape[2:]
        return {"parts": count, "K": k, "BK": triton.next_power_of_2(k), "PARTS": 8 * triton.cdiv(count, 8)}

    for i in range(0, len(weights) - 1, 2):
        n, m = weights[i].shape[1], weights[i + 1].shape[1]
        width = 32 if i == 0 else 16
        out = torch.empty(layers, rows, triton.cdiv(n, width), m, dtype=torch.float32, device=x.device)
        kernels.router_pair_kernel[(out.shape[2], rows, layers)](
            x,
            mean if i == 0 else biases[i - 1],
            scale,
            weights[i],
            biases[i],
            weights[i + 1],
            out,
            **reads(x),
            N=n,
            BN=width,
            M=m,
            BM=triton.next_power_of_2(m),
            WHITEN=i == 0,
            SILU_IN=i > 0 and silu[i - 1],
            SILU=silu[i],
            num_warps=4,
        )
        x = out
    logits = torch.empty(layers, rows, 2, dtype=torch.float32, device=x.device)
    kernels.router_last_kernel[(rows, layers)](
        x, biases[-2], weights[-1], biases[-1], logits, **reads(x), SILU_IN=silu[-2], num_warps=4
    )
    return logits


#: Tokens that one program of `decide` pools at most, and the most programs it takes.
_MOST_TOKENS, _MOST_PROGRAMS = 8, 128
#: Programs a sequence by head dim: more would be done sooner and take more of the device from what runs beside them;
#: of fewer, a program's share of the weights would not fit into its registers.
_PROGRAMS = {64: 32, 128: 32, 256: 128}


def decide_arrivals(device: torch.device) -> Tensor:
    """Counters that the programs of `decide` meet at. Calls that share them must follow each other on the device."""
    return torch.zeros(_MOST_PROGRAMS, 3, dtype=torch.int32, device=device)


def decides(q: Tensor, index: Tensor, dim: int) -> bool:
    """Whether `decide` takes these: on a GPU that runs all its programs at once, and heads that divide its work."""
    if not q.is_cuda or dim not in _PROGRAMS:
        return False
    (rows, k), programs = index.shape, _PROGRAMS[dim]
    at_once = min(_MOST_PROGRAMS, torch.cuda.get_device_properties(q.device).multi_processor_count)
    return 0 < rows * programs <= at_once and k <= programs * _MOST_TOKENS


def decide(
    q: Tensor,
    index: Tensor,
    weight: Tensor,
    dim: int,
    norm: Norm | None,
    mean: Tensor,
    scale: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layer: int,
    *,
    arrivals: Tensor,
    out: Tensor,
    programs: int | None = None,
) -> Tensor:
    """Pooling and router of one layer in one launch of triton: `router_logits` of `pool_queries`.

    The programs wait for each other, so all of them must be resident: see `decides`.

    Args:
        q, index, weight, dim, norm: see `pool_queries`.
        mean, scale, weights, biases: of all layers, as in `LayerRouter`; the launch reads one of them. A dozen views
            would take the host as long as the launch.
        layer: which one.
        arrivals: see `decide_arrivals`.
        out: float32 `[S, 2]` for the logits; the host's pinned memory will do, where they are once the launch is done.
        programs: a divisor of `4 * D`; in an interpreter, where programs take turns, 1.
    """
    import triton

    from flux_attention.kernels import fused_triton as kernels

    q, (rows, k), hq = q.contiguous(), index.shape, q.shape[1] // dim
    programs = programs or _PROGRAMS[dim]
    work = torch.empty(rows, programs, 4, dim, dtype=torch.float32, device=q.device)
    # Hopper and later: begin while the queries are finished, and fetch the weights meanwhile.
    overlap = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    kernels.decide_kernel[(programs, rows)](
        q,
        index,
        weight,
        q if norm is None else norm.weight,
        mean,
        scale,
        *(x for pair in zip(weights, biases, strict=True) for x in pair),
        work,
        arrivals,
        out,
        layer,
        k,
        0.0 if norm is None else norm.eps,
        HQ=hq,
        HEADS=triton.next_power_of_2(hq),
        D=dim,
        TOKENS=triton.next_power_of_2(triton.cdiv(k, programs)),
        PROGRAMS=programs,
        NORM=norm is not None,
        OVERLAP=overlap,
        num_warps=4,
        **({"launch_pdl": True} if overlap else {}),
    )
    return out


# ------------------------------------------------------------------------------------------------ one token


@dataclass(frozen=True)
class VectorConfig:
    """Launch configuration of a matrix-vector product: `rows` of the weight a program, `block` columns at a time."""

    rows: int = 4
    block: int = 1024
    warps: int = 4


#: What `tune_vectors` tries.
VECTOR_CONFIGS = (
    VectorConfig(),
    VectorConfig(2, 1024, 4),
    VectorConfig(2, 2048, 4),
    VectorConfig(4, 2048, 8),
)
#: The fastest configuration by (device, dtype, kind, in, out).
_TUNED: dict[tuple[object, ...], VectorConfig] = {}


def _key(kind: str, weight: Tensor) -> tuple[object, ...]:
    return (weight.device, weight.dtype, kind, *weight.shape)


def _launch(kind: str, weight: Tensor, config: VectorConfig | None) -> tuple[VectorConfig, dict[str, Any]]:
    import triton

    config = config or _TUNED.get(_key(kind, weight), VECTOR_CONFIGS[0])
    block = min(config.block, triton.next_power_of_2(weight.shape[1]))
    return config, {"K": weight.shape[1], "BN": config.rows, "BK": block, "num_warps": config.warps}


def vector(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    config: VectorConfig | None = None,
    impl: str = "auto",
) -> Tensor:
    """`weight @ x + bias + add` of one token: `x [H]`, `weight [n, H]` → `[n]`."""
    if not _triton(x, impl):
        out = F.linear(x, weight, bias)
        return out if add is None else out + add
    import triton

    from flux_attention.kernels import fused_triton as kernels

    config, meta = _launch("vector", weight, config)
    n = weight.shape[0]
    out = x.new_empty(n)
    kernels.vector_kernel[(triton.cdiv(n, config.rows),)](
        x,
        x,
        weight,
        x if bias is None else bias,
        x if add is None else add,
        out,
        n,
        0.0,
        NORM=False,
        BIAS=bias is not None,
        ADD=add is not None,
        **meta,
    )
    return out


def norm_three(
    x: Tensor,
    norm: Norm,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    config: VectorConfig | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Products of one normalised token `x [H]` with three weights, with biases for all of them or none."""
    if not _triton(x, impl):
        normed = norm(x)
        a, b, c = (F.linear(normed, w, bias) for w, bias in zip(weights, biases, strict=True))
        return a, b, c
    import triton

    from flux_attention.kernels import fused_triton as kernels

    config, meta = _launch("three", weights[0], config)
    a, b, c = (x.new_empty(w.shape[0]) for w in weights)
    programs = sum(triton.cdiv(w.shape[0], config.rows) for w in weights)
    kernels.three_kernel[(programs,)](
        x,
        norm.weight,
        *weights,
        *(x if bias is None else bias for bias in biases),
        a,
        b,
        c,
        *(w.shape[0] for w in weights),
        norm.eps,
        BIAS=biases[0] is not None,
        **meta,
    )
    return a, b, c


def norm_gated(
    x: Tensor, norm: Norm, gate: Tensor, up: Tensor, *, config: VectorConfig | None = None, impl: str = "auto"
) -> Tensor:
    """`silu(gate @ y) * (up @ y)` of one normalised token y: `x [H]`, `gate, up [F, H]` → `[F]`."""
    if not _triton(x, impl):
        normed = norm(x)
        return F.silu(F.linear(normed, gate)) * F.linear(normed, up)
    import triton

    from flux_attention.kernels import fused_triton as kernels

    config, meta = _launch("gated", gate, config)
    n = gate.shape[0]
    out = x.new_empty(n)
    kernels.gated_kernel[(triton.cdiv(n, config.rows),)](x, norm.weight, gate, up, out, n, norm.eps, **meta)
    return out


def tune_vectors(kind: str, weights: list[Tensor], run: Callable[[int, VectorConfig], object]) -> VectorConfig:
    """Keep the fastest configuration for a kind of product ("vector", "three", "gated") and a shape; CUDA only.

    `run(i, config)` makes the product with `weights[i]`, all of one shape; using several keeps the measurement out of
    the cache. A shape that was tuned before is not timed again.
    """
    from triton.runtime.errors import OutOfResources

    key = _key(kind, weights[0])
    if key in _TUNED:
        return _TUNED[key]
    best: tuple[float, VectorConfig] | None = None
    for config in VECTOR_CONFIGS:
        try:
            run(0, config)
        except OutOfResources:
            continue
        graph = capture(lambda c=config: [run(i, c) for i in range(len(weights))], weights[0].device)  # type: ignore[misc]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        graph.replay()
        start.record()
        for _ in range(3):
            graph.replay()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end)
        if best is None or elapsed < best[0]:
            best = (elapsed, config)
    if best is None:
        raise RuntimeError(f"no launch configuration fits the device for {key}")
    _TUNED[key] = best[1]
    return best[1]
