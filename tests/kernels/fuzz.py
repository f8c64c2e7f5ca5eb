"""Random shapes of every op checked against the float64 oracle, for the tests and for the benchmarks.

    failures = [c for c in fuzz("paged_decode", n_shapes=500, seed=0, device="cuda") if not c.ok]

Tolerance, derived and not tuned: an implementation's error against float64 may be twice that of the eager oracle run in
the same dtype on the same input. The floor, for inputs on which eager happens to be nearly exact: one rounding of the
output in half precision, and in float32, where the order of the sums decides, eight.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flux_attention.kernels import api, reference
from flux_attention.kernels.api import Packing

#: Lengths at and around block, tile and page boundaries.
AWKWARD = (1, 15, 16, 17, 63, 64, 65, 111, 127, 128, 129, 255, 257, 511, 640, 1000)
#: (query heads, key heads)
HEADS = ((1, 1), (2, 2), (3, 1), (4, 1), (6, 2), (8, 1), (8, 2), (9, 3))


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for: query and key heads, head dim, dtype."""

    hq: int
    hk: int
    dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.hq}/{self.hk}x{self.dim} {str(self.dtype).removeprefix('torch.')}"


#: Group sizes one to eight, both half dtypes. A kind costs seconds of compilation, a shape milliseconds.
GPU_KINDS = (
    Kind(9, 3, 64, torch.bfloat16),
    Kind(8, 2, 128, torch.bfloat16),
    Kind(5, 1, 128, torch.float16),
    Kind(2, 2, 64, torch.float16),
    Kind(4, 2, 128, torch.bfloat16),
    Kind(6, 1, 64, torch.bfloat16),
    Kind(7, 1, 128, torch.bfloat16),
    Kind(8, 1, 128, torch.float16),
)
#: For the kernels that flash-attn-4 does not limit to head dim 128.
WIDE_KINDS = (*GPU_KINDS[:-1], Kind(4, 2, 256, torch.bfloat16), GPU_KINDS[-1])


@dataclass(frozen=True)
class Case:
    """One shape: what was run, its error and the eager oracle's against float64, as shares of the largest value."""

    op: str
    impl: str
    shape: str
    error: float
    eager: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


def error_limit(eager: float, dtype: torch.dtype) -> float:
    """Largest error allowed beside an eager error of `eager`, both relative to the largest value."""
    roundings = 1 if torch.finfo(dtype).bits == 16 else 8
    return max(2 * eager, roundings * torch.finfo(dtype).eps)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value; infinite when a NaN or inf is among them."""
    if not actual.numel():
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    if not torch.isfinite(actual).all():
        return float("inf")
    return difference / max(expected.abs().max().item(), 1e-30)


def fuzz(
    op: str,
    *,
    n_shapes: int,
    seed: int,
    device: str = "cpu",
    impl: str = "auto",
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    head_dims: tuple[int, ...] = (16, 64),
    kinds: Sequence[Kind] | None = None,
    max_len: int = 1200,
) -> Iterator[Case]:
    """Check `n_shapes` random shapes of `op` (a key of `OPS`), one `Case` each; the same seed gives the same shapes.

    `kinds`: heads, head dims and dtypes to draw from; None = `GPU_KINDS` on CUDA, elsewhere all `HEADS` with
    `head_dims` and `dtypes`. One sequence in twenty on CUDA has up to 5,000 tokens.
    """
    if kinds is None and torch.device(device).type == "cuda":
        kinds = WIDE_KINDS if op in ("select_blocks", "paged_decode") else GPU_KINDS
    # Text seeds hash the same in every process.
    rng = random.Random(f"{op} {seed}")
    torch.manual_seed(seed)
    for _ in range(n_shapes):
        kind = rng.choice(kinds) if kinds else Kind(*rng.choice(HEADS), rng.choice(head_dims), rng.choice(dtypes))
        yield OPS[op](rng, impl, device, kind, max_len)


def summary(cases: Iterator[Case]) -> str:
    """One line: shapes, failures, the worst ratio of error to limit, and the first failures."""
    seen = list(cases)
    bad = [c for c in seen if not c.ok]
    worst = max((c.error / c.limit for c in seen), default=0.0)
    return f"{len(seen)} shapes, {len(bad)} failures, worst error/limit {worst:.2f}" + "".join(
        f"\n  {c}" for c in bad[:5]
    )


def random_packing(rng: random.Random, max_len: int, device: str) -> Packing:
    """One to three sequences, whole or the last part of one."""
    if torch.device(device).type == "cuda" and rng.random() < 0.05:
        n = rng.randint(max_len, 5000)
        return Packing((rng.choice((n, rng.randint(1, n))),), (n,))
    k_lens = [min(max_len, rng.choice((*AWKWARD, rng.randint(1, max_len)))) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.2:
        k_lens = k_lens[:1] * len(k_lens)
    q_lens = [n if rng.random() < 0.5 else rng.randint(1, n) for n in k_lens]
    return Packing(tuple(q_lens), tuple(k_lens))


def random_qkv(packing: Packing, device: str, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Normal values."""
    n, m = packing.totals
    q = torch.randn(n, kind.hq, kind.dim, device=device).to(kind.dtype)
    k, v = (torch.randn(m, kind.hk, kind.dim, device=device).to(kind.dtype) for _ in range(2))
    return q, k, v


def compare(
    op: str, impl: str, run: Callable[..., Tensor], tensors: tuple[Tensor, ...], shape: str, **kwargs: Any
) -> Case:
    """Run `run(*tensors, impl=…)` and the oracle in the same dtype, both against the oracle in float64."""
    exact = run(*(t.double() if t.is_floating_point() else t for t in tensors), impl="reference", **kwargs)
    eager = relative(run(*tensors, impl="reference", **kwargs), exact)
    error = relative(run(*tensors, impl=impl, **kwargs), exact)
    return Case(op, impl, shape, error, eager, error_limit(eager, tensors[0].dtype))


def _streaming_sizes(rng: random.Random, device: str) -> dict[str, int]:
    # A block of two tiles is a kernel of its own, seconds to compile.
    block = rng.choice((128, 128, 128, 256) if torch.device(device).type == "cuda" else (16, 32, 128))
    return {"block": block, "sink": block * rng.randint(0, 2), "window": block * rng.randint(0, 4)}


def _dense(rng: random.Random, impl: str, device: str, kind: Kind, max_len: int) -> Case:
    packing = random_packing(rng, max_len, device)
    tensors = random_qkv(packing, device, kind)
    shape = f"{packing} {kind}"
    return compare("dense", impl, api.dense_attention, tensors, shape, packing=packing, scale=kind.dim**-0.5)


def _streaming(rng: random.Random, impl: str, device: str, kind: Kind, max_len: int) -> Case:
    sizes = _streaming_sizes(rng, device)
    block = sizes["block"]
    packing = random_packing(rng, max_len, device)
    # Half of the requests begin with a block and lack whole blocks, as those of a prefill in chunks do.
    step = rng.choice((1, block))
    starts = [start // step * step for start in packing.starts]
    q_lens = tuple(n - start for n, start in zip(packing.k_lens, starts, strict=True))
    gaps = []
    for start in starts:
        most = max(0, start // block * block - sizes["window"] - sizes["sink"])
        gaps.append(rng.choice((0, most, rng.randint(0, most) // step * step)))
    k_lens = tuple(n - g for n, g in zip(packing.k_lens, gaps, strict=True))
    packing = Packing(q_lens, k_lens, tuple(gaps))
    tensors = random_qkv(packing, device, kind)
    shape = f"{packing} {sizes} {kind}"
    kwargs = {"packing": packing, "scale": kind.dim**-0.5, **sizes}
    return compare("streaming", impl, api.streaming_attention, tensors, shape, **kwargs)


def _triangle(rng: random.Random, impl: str, device: str, kind: Kind, max_len: int) -> Case:
    sizes = _streaming_sizes(rng, device)
    packing = random_packing(rng, max_len, device)
    tensors = random_qkv(packing, device, kind)
    dense_from = tuple(rng.choice((0, n, max(0, n - 128), rng.randint(0, n))) for n in packing.k_lens)
    shape = f"{packing} {sizes} {dense_from} {kind}"
    kwargs = {"packing": packing, "scale": kind.dim**-0.5, "dense_from": dense_from, **sizes}
    return compare("triangle", impl, api.triangle_attention, tensors, shape, **kwargs)


def _block_sparse(rng: random.Random, impl: str, device: str, kind: Kind, max_len: int) -> Case:
    block = 128 if torch.device(device).type == "cuda" else rng.choice((32, 128))
    packing = random_packing(rng, max_len, device)
    tensors = random_qkv(packing, device, kind)
    density = rng.random()
    blocks = []
    for start, n in zip(packing.starts, packing.k_lens, strict=True):
        n_k = -(-n // block)
        blocks.append(torch.rand(tensors[0].shape[1], n_k - start // block, n_k, device=device) < density)
    shape = f"{packing} block {block} density {density:.2f} {kind}"
    kwargs = {"packing": packing, "scale": kind.dim**-0.5, "blocks": blocks, "block": block}
    return compare("block_sparse", impl, api.block_sparse_attention, tensors, shape, **kwargs)


def _select(rng: random.Random, impl: str, device: str, kind: Kind, max_len: int) -> Case:
    """The error of a choice is how far the mass it holds falls short of, or its smallest block lies below, the cut."""
    packing = random_packing(rng, max_len, device)
    q, k, _ = random_qkv(packing, device, kind)
    block, stride = rng.choice(((128, 16), (128, 8), (64, 16), (128, 32)))
    threshold = rng.choice((0.3, 0.6, 0.9, 0.99))
    sizes: dict[str, Any] = {"block": block, "stride": stride, "scale": kind.dim**-0.5 * rng.choice((1, 4))}
    chosen = api.select_blocks(q, k, packing, threshold=threshold, impl=impl, **sizes)
    error = 0.0
    for s in range(len(packing)):
        q_s = q[packing.q_offsets[s] : packing.q_offsets[s + 1]].double()
        k_s = k[packing.k_offsets[s] : packing.k_offsets[s + 1]].double()
        masses = reference.block_masses(q_s, k_s, packing.starts[s], **sizes)
        error = max(error, choice_error(masses, chosen[s], packing.starts[s] // block, threshold))
    shape = f"{packing} {sizes} {threshold} {kind}"
    # Masses add up to `block / stride` a query block; products of float16 are summed in float32.
    return Case("select_blocks", impl, shape, error, 0.0, 1e-4)


def choice_error(masses: Tensor, chosen: Tensor, first: int, threshold: float) -> float:
    """Largest share of mass by which a choice `[Hq, nq, nk]` misses the definition, given exact `masses`.

    A right choice holds the threshold, and would not without its smallest block; block 0 and the own block are
    forced, and a block behind the own one is never right.
    """
    j = torch.arange(masses.shape[2], device=masses.device)
    own = first + torch.arange(masses.shape[1], device=masses.device)[:, None]
    if (chosen & (j > own)).any() or not (chosen | ~((j == own) | (j == 0))).all():
        return float("inf")
    share = masses / masses.sum(-1, keepdim=True)
    free = chosen & (j != own) & (j != 0)
    smallest = share.masked_fill(~free, 2.0).amin(-1)
    # Every block that outweighs the smallest free one has to be in too …
    left_out = share.masked_fill(chosen | (j > own), -1.0).amax(-1)
    order_error = (left_out - smallest).clamp(min=0)
    # … what is chosen holds the threshold …
    short = (threshold - share.masked_fill(~chosen, 0).sum(-1)).clamp(min=0)
    # … and the blocks taken before the smallest free one do not hold it yet. Forced blocks count among those only
    # when they outweigh it.
    heavier = share > smallest[..., None]
    before = share.masked_fill(~heavier, 0).sum(-1)
    excess = torch.where(free.any(-1), (before - threshold).clamp(min=0), 0)
    return max(order_error.max().item(), short.max().item(), excess.max().item())


def _paged_decode(rng: random.Random, impl: str, device: str, kind: Kind, max_len: int) -> Case:
    page = rng.choice((16, 48, 64, 128))
    lens = [rng.choice((0, 1, page, rng.choice(AWKWARD), rng.randint(1, max_len))) for _ in range(rng.randint(1, 5))]
    lens = [min(n, max_len) for n in lens]
    if torch.device(device).type == "cuda" and rng.random() < 0.05:
        lens[0] = rng.randint(max_len, 5000)
    q, k_pages, v_pages, table, lengths = paged_input(
        lens, kind.hq, kind.hk, kind.dim, page, kind.dtype, device, spare=rng.randint(0, 3)
    )
    poisoned = torch.full_like(q, float("nan"))

    def run(q: Tensor, k_pages: Tensor, v_pages: Tensor, *, impl: str) -> Tensor:
        out = poisoned.to(q.dtype).clone()
        return api.paged_decode(q, k_pages, v_pages, table, lengths, scale=kind.dim**-0.5, impl=impl, out=out)

    shape = f"lens {lens} page {page} {kind}"
    return compare("paged_decode", impl, run, (q, k_pages, v_pages), shape)


def paged_input(
    lens: list[int],
    hq: int,
    hk: int,
    dim: int,
    page: int,
    dtype: torch.dtype,
    device: str,
    *,
    spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q, k_pages, v_pages, page_table, lengths) with shuffled pages; all memory no row holds is NaN."""
    used = [-(-n // page) for n in lens]
    n_pages = sum(used) + 1
    k_pages, v_pages = (torch.full((n_pages, page, hk, dim), float("nan"), device=device, dtype=dtype) for _ in "kv")
    # Table entries behind a row's end point at a page of NaN.
    table = torch.full((len(lens), max(used) + spare), n_pages - 1, dtype=torch.int32, device=device)
    order = torch.randperm(n_pages - 1).to(torch.int32)
    at = 0
    for s, n in enumerate(lens):
        table[s, : used[s]] = order[at : at + used[s]].to(device)
        for i in range(used[s]):
            held = min(page, n - i * page)
            for pages in (k_pages, v_pages):
                pages[int(order[at + i]), :held] = torch.randn(held, hk, dim, device=device).to(dtype)
        at += used[s]
    q = torch.randn(len(lens), hq, dim, device=device).to(dtype)
    return q, k_pages, v_pages, table, torch.tensor(lens, dtype=torch.int32, device=device)


OPS: dict[str, Callable[..., Case]] = {
    "dense": _dense,
    "streaming": _streaming,
    "triangle": _triangle,
    "block_sparse": _block_sparse,
    "select_blocks": _select,
    "paged_decode": _paged_decode,
}
