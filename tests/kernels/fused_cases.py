"""Every fused op on shapes that models have, against float64 definitions; for triton's interpreter and the GPU.

Tolerance as in `fuzz`: twice the error of the eager version (impl "torch") in the same dtype, or one rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from flux_attention.kernels import fused
from flux_attention.kernels.fused import Norm, VectorConfig
from tests.kernels.fuzz import Case, error_limit, relative

#: (query heads, key heads, head dim, hidden size, MLP width): small ones, which triton's interpreter can do.
SHAPES = ((3, 1, 16, 130, 33), (2, 2, 32, 96, 20))


def cases(
    impl: str, device: str, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> Iterator[Case]:
    torch.manual_seed(0)
    for shape in shapes:
        for dtype in dtypes:
            yield from _rows(impl, device, dtype, *shape)
            yield from _append(impl, device, dtype, *shape)
            yield from _router(impl, device, dtype, *shape)
            yield from _one_token(impl, device, dtype, *shape)


def _random(*size: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size, device=device).to(dtype)


def _compare(name: str, impl: str, run, tensors: dict[str, Tensor], shape: str) -> Iterator[Case]:  # type: ignore[no-untyped-def]
    exact = run("torch", {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()})
    eager = run("torch", {k: t.clone() for k, t in tensors.items()})
    ours = run(impl, {k: t.clone() for k, t in tensors.items()})
    dtype = next(iter(tensors.values())).dtype
    for i, (a, e, x) in enumerate(zip(ours, eager, exact, strict=True)):
        error = relative(e, x)
        yield Case(f"{name}[{i}]", impl, shape, relative(a, x), error, error_limit(error, dtype))


def _norm(t: dict[str, Tensor], name: str) -> Norm:
    return Norm(t[name], 1e-6)


def _rows(impl: str, device: str, dtype: torch.dtype, hq: int, hk: int, dim: int, h: int, f: int) -> Iterator[Case]:
    made = {"device": device, "dtype": dtype}
    shape = f"{hq}/{hk}x{dim} h {h} f {f} {dtype}"
    x = {"x": _random(5, h, **made), "add": _random(5, h, **made), "w": _random(h, **made)}
    yield from _compare("rms_norm", impl, lambda i, t: [fused.rms_norm(t["x"], _norm(t, "w"), impl=i)], x, shape)
    yield from _compare(
        "add_rms_norm", impl, lambda i, t: fused.add_rms_norm(t["x"], t["add"], _norm(t, "w"), impl=i), x, shape
    )
    x = {"gate": _random(5, f, **made), "up": _random(5, f, **made)}
    yield from _compare("silu_mul", impl, lambda i, t: [fused.silu_mul(t["gate"], t["up"], impl=i)], x, shape)
    for normed in (True, False):
        x = _heads(hq, hk, dim, 5, device, dtype)

        def rotate(i: str, t: dict[str, Tensor], normed: bool = normed) -> tuple[Tensor, Tensor]:
            norms = (_norm(t, "wq"), _norm(t, "wk")) if normed else (None, None)
            return fused.rotary(t["q"], t["k"], t["cos"], t["sin"], dim, *norms, impl=i)

        yield from _compare(f"rotary norm={normed}", impl, rotate, x, shape)

        def rotate_parts(i: str, t: dict[str, Tensor], normed: bool = normed) -> tuple[Tensor, Tensor]:
            # Keys beside values, queries beside something else: rows of a joint product.
            k, q = (torch.cat((t[a], t[b]), -1)[:, : t[a].shape[1]] for a, b in ("kv", "qv"))
            return rotate(i, t | {"q": q, "k": k}, normed)

        yield from _compare(f"rotary of parts, norm={normed}", impl, rotate_parts, x, shape)


def _heads(hq: int, hk: int, dim: int, n: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    angle = torch.rand(n, dim, device=device) * 6
    made = {"device": device, "dtype": dtype}
    return {
        "q": _random(n, hq * dim, **made),
        "k": _random(n, hk * dim, **made),
        "v": _random(n, hk * dim, **made),
        "cos": angle.cos().to(dtype),
        "sin": angle.sin().to(dtype),
        "wq": _random(dim, **made),
        "wk": _random(dim, **made),
    }


def _router(impl: str, device: str, dtype: torch.dtype, hq: int, hk: int, dim: int, h: int, f: int) -> Iterator[Case]:
    x = {"q": _random(40, hq * dim, device=device, dtype=dtype), "w": _random(dim, device=device, dtype=dtype)}
    x["index"] = torch.randint(0, 40, (2, 19), device=device)
    x["weight"] = torch.rand(2, 19, device=device)
    for normed in (True, False):

        def pool(i: str, t: dict[str, Tensor], normed: bool = normed) -> list[Tensor]:
            norm = _norm(t, "w") if normed else None
            parts = fused.pool_queries(t["q"], t["index"], t["weight"], dim, norm, impl=i)
            return [parts.sum(1)]

        yield from _compare(f"pool norm={normed}", impl, pool, x, f"{hq}x{dim} {dtype}")
    made = {"device": device, "dtype": torch.float32}
    sizes = (dim, 8 * dim, 2 * dim, 4 * dim, dim, 2)
    # Three layers, two sequences; more parts than one load takes.
    x = {"parts": _random(3, 2, 11, dim, **made), "mean": _random(3, dim, **made), "scale": _random(3, dim, **made)}
    for i, (k, n) in enumerate(itertools.pairwise(sizes)):
        x[f"w{i}"], x[f"b{i}"] = _random(3, n, k, **made) / k**0.5, _random(3, n, **made)

    def logits(i: str, t: dict[str, Tensor]) -> list[Tensor]:
        weights, biases = ([t[f"{name}{j}"] for j in range(5)] for name in "wb")
        silu = (True, False, True, True, False)
        return [fused.router_logits(t["parts"], t["mean"], t["scale"], weights, biases, silu, impl=i)]

    yield from _compare("router", impl, logits, x, f"{dim}")
    # Programs of the interpreter take turns, so there one does all the work.
    programs = 1 if device == "cpu" else fused._PROGRAMS.get(dim, dim // 2)
    x = {"q": _random(40, hq * dim, device=device, dtype=dtype), **{n: t for n, t in x.items() if n != "parts"}}
    x |= {"index": torch.randint(0, 40, (2, 19), device=device), "weight": torch.rand(2, 19, device=device)}
    x["w"], arrivals = _random(dim, device=device, dtype=dtype), fused.decide_arrivals(torch.device(device))
    for normed in (True, False):

        def decide(i: str, t: dict[str, Tensor], normed: bool = normed) -> list[Tensor]:
            norm = _norm(t, "w") if normed else None
            weights, biases = ([t[f"{name}{j}"] for j in range(5)] for name in "wb")
            if i == "torch":
                parts = fused.pool_queries(t["q"], t["index"], t["weight"], dim, norm, impl=i).to(t["mean"].dtype)
                one = [[x[2:] for x in group] for group in (weights, biases)]
                silu = (True, False, True, True, False)
                return [fused.router_logits(parts[None], t["mean"][2:], t["scale"][2:], *one, silu, impl=i)[0]]
            rest = {"arrivals": arrivals, "out": torch.full((2, 2), torch.nan, device=device), "programs": programs}
            # A second time: the counters are as they were.
            for _ in range(2):
                found = fused.decide(
                    t["q"], t["index"], t["weight"], dim, norm, t["mean"], t["scale"], weights, biases, 2, **rest
                )
            return [found]

        yield from _compare(f"decide norm={normed}", impl, decide, x, f"{hq}x{dim} {dtype}")


def _append(impl: str, device: str, dtype: torch.dtype, hq: int, hk: int, dim: int, h: int, f: int) -> Iterator[Case]:
    page, rows = 16, 3
    x = _heads(hq, hk, dim, rows, device, dtype)
    x["keys"], x["values"] = (torch.zeros(8, page, hk, dim, device=device, dtype=dtype) for _ in "kv")
    x["table"] = torch.tensor([[3, 1, 0], [7, 0, 0], [2, 6, 5]], dtype=torch.int32, device=device)
    x["counts"] = torch.tensor([17, 0, 47], dtype=torch.int32, device=device)
    for normed in (True, False):

        def append(i: str, t: dict[str, Tensor], normed: bool = normed) -> list[Tensor]:
            norms = (_norm(t, "wq"), _norm(t, "wk")) if normed else (None, None)
            names = ("q", "k", "v", "cos", "sin", "keys", "values", "table", "counts")
            q = fused.rotary_append(*(t[name] for name in names), *norms, impl=i)
            # Whole pages: what must not be touched is compared as well.
            return [q, t["keys"], t["values"]]

        yield from _compare(f"rotary_append norm={normed}", impl, append, x, f"{hq}/{hk}x{dim} {dtype}")


def _one_token(
    impl: str, device: str, dtype: torch.dtype, hq: int, hk: int, dim: int, h: int, f: int
) -> Iterator[Case]:
    made = {"device": device, "dtype": dtype}
    sizes = {"a": hq * dim, "b": hk * dim, "c": hk * dim, "gate": f, "up": f}
    x = {"x": _random(h, **made), "w": _random(h, **made), "add": _random(f, **made)}
    for name, n in sizes.items():
        x[name], x["bias_" + name] = _random(n, h, **made) / h**0.5, _random(n, **made)
    shape = f"{sizes} h {h} {dtype}"
    for config in (VectorConfig(), VectorConfig(2, 64, 4)):

        def vector(i: str, t: dict[str, Tensor], c: VectorConfig = config) -> list[Tensor]:
            plain = fused.vector(t["x"], t["gate"], config=c, impl=i)
            return [plain, fused.vector(t["x"], t["gate"], bias=t["bias_gate"], add=t["add"], config=c, impl=i)]

        def three(i: str, t: dict[str, Tensor], c: VectorConfig = config) -> list[Tensor]:
            weights, biases = (t["a"], t["b"], t["c"]), (t["bias_a"], t["bias_b"], t["bias_c"])
            norm = _norm(t, "w")
            found = fused.norm_three(t["x"], norm, weights, biases, config=c, impl=i)
            return [*found, *fused.norm_three(t["x"], norm, weights, (None, None, None), config=c, impl=i)]

        def gated(i: str, t: dict[str, Tensor], c: VectorConfig = config) -> list[Tensor]:
            return [fused.norm_gated(t["x"], _norm(t, "w"), t["gate"], t["up"], config=c, impl=i)]

        for name, run in (("vector", vector), ("norm_three", three), ("norm_gated", gated)):
            yield from _compare(name, impl, run, x, shape)
