"""The shapes that models have, on the GPU: 4,096 tokens and odd lengths, three query heads a key head, packed rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flux_attention.kernels import api, block_lists, streaming
from flux_attention.kernels.api import Packing
from tests.kernels import fuzz

pytestmark = pytest.mark.gpu

#: SmolLM2-135M's heads, half of Qwen3-8B's (its group of four), and the widest group.
HEADS = ((9, 3, 64), (16, 4, 128), (8, 1, 128))
#: One row, a short one, odd ones, and several of them packed: whole, or as the last part of a longer sequence.
PACKINGS = (
    Packing((4096,), (4096,)),
    Packing((1000,), (1000,)),
    Packing((4095, 333, 1), (4095, 333, 1)),
    Packing((2048, 77, 4096), (4096, 1000, 4096)),
)
SIZES = {"sink": 128, "window": 512, "block": 128}


def chosen(packing: Packing, heads: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [
        torch.rand(heads, -(-n // 128) - start // 128, -(-n // 128), device="cuda") < 0.4
        for start, n in zip(packing.starts, packing.k_lens, strict=True)
    ]


@pytest.fixture(autouse=True)
def hopper() -> None:
    reason = api.why_unusable("streaming_attention", "flash4", torch.empty(1, 1, 64, dtype=torch.bfloat16).cuda())
    if reason is not None:
        pytest.skip(reason)


def run(op: str, packing: Packing, heads: int, dim: int) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    kwargs: dict[str, Any] = {"packing": packing, "scale": dim**-0.5}
    if op == "dense":
        return api.dense_attention, kwargs
    if op == "streaming":
        return api.streaming_attention, kwargs | SIZES
    if op == "triangle":
        return api.triangle_attention, kwargs | SIZES | {"dense_from": tuple(max(0, n - 128) for n in packing.k_lens)}
    return api.block_sparse_attention, kwargs | {"blocks": chosen(packing, heads), "block": 128}


def test_prepared() -> None:
    """A launch that was held back gives what it gives at once."""
    for (hq, hk, dim), packing in itertools.product(HEADS[1:], PACKINGS[:3]):
        torch.manual_seed(0)
        n, m = packing.totals
        q = torch.randn(n, hq, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(m, hk, dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        for op, sizes in (("dense", {}), ("streaming", SIZES)):
            function, kwargs = run(op, packing, hq, dim)
            attend = functools.partial(function, q, k, v, impl="flash4", **kwargs)
            launch = api.prepare(f"{op}_attention", attend, q, k, v, packing, impl="flash4", block=sizes.get("block"))
            assert launch is not attend
            out = launch()
            assert torch.equal(out, attend()), (op, packing)
            # It was this call that wrote them.
            out.fill_(7)
            assert torch.equal(launch(), attend()), (op, packing)


@pytest.mark.parametrize("shape", HEADS, ids=lambda s: "x".join(map(str, s)))
def test_flash4(shape: tuple[int, int, int]) -> None:
    # All ops in one test, which is one process: they share kernels, and those take seconds to compile.
    hq, hk, dim = shape
    for op, packing in itertools.product(("dense", "streaming", "triangle", "block_sparse"), PACKINGS):
        torch.manual_seed(0)
        n, m = packing.totals
        q = torch.randn(n, hq, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(m, hk, dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        function, kwargs = run(op, packing, hq, dim)
        case = fuzz.compare(op, "flash4", function, (q, k, v), str(packing), **kwargs)
        assert case.ok, case
        # The layout that a model's projections have after the rotary embedding: heads outside, tokens inside.
        turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
        same = torch.equal(function(*turned, impl="flash4", **kwargs), function(q, k, v, impl="flash4", **kwargs))
        assert same, (op, packing)


@pytest.mark.parametrize("op", ["dense", "streaming", "triangle", "block_sparse"])
def test_a_spoiled_sequence_stays_alone(op: str) -> None:
    """Tiles reach behind a sequence's end: what another request overflowed to must not come in with them."""
    hq, hk, dim = HEADS[0]
    for packing in (Packing((1000, 333, 800), (1000, 333, 800)), Packing((500,) * 3, (900,) * 3)):
        n, m = packing.totals
        torch.manual_seed(0)
        q = torch.randn(n, hq, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(m, hk, dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        function, kwargs = run(op, packing, hq, dim)
        expected = function(q, k, v, impl="flash4", **kwargs)
        _, queries, keys = list(packing.slices())[1]
        q[queries] = k[keys] = v[keys] = float("nan")
        out = function(q, k, v, impl="flash4", **kwargs)
        for other in (slice(0, queries.start), slice(queries.stop, n)):
            assert torch.equal(out[other], expected[other]), (op, packing)


@pytest.mark.parametrize("shape", HEADS[:2], ids=lambda s: "x".join(map(str, s)))
def test_streaming_over_lists(shape: tuple[int, int, int]) -> None:
    """What training runs: flash-attn-4's block sparsity with the own tile under a mask function."""
    hq, hk, dim = shape
    for packing in PACKINGS:
        torch.manual_seed(0)
        n, m = packing.totals
        q = torch.randn(n, hq, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(m, hk, dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")

        def over(q: Tensor, k: Tensor, v: Tensor, *, impl: str, packing: Packing = packing) -> Tensor:
            if impl == "reference":
                return api.streaming_attention(q, k, v, packing, scale=q.shape[2] ** -0.5, impl=impl, **SIZES)
            return streaming._over_lists(block_lists.flash4_over, q, k, v, packing, *SIZES.values(), q.shape[2] ** -0.5)

        case = fuzz.compare("streaming", "lists", over, (q, k, v), str(packing))
        assert case.ok, case


# The other group's dense and streaming gradients: `test_fuzz.py`. Backward kernels take longest to compile.
@pytest.mark.parametrize(
    ("op", "shape"), [("dense", HEADS[0]), ("streaming", HEADS[0]), ("block_sparse", HEADS[1])], ids=str
)
def test_gradients(op: str, shape: tuple[int, int, int]) -> None:
    hq, hk, dim = shape
    packing = Packing((2048, 333), (2048, 333))
    torch.manual_seed(0)
    n = packing.totals[0]
    tensors = [torch.randn(n, h, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (hq, hk, hk)]
    function, kwargs = run(op, packing, hq, dim)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    out = function(*wide, impl="reference", **kwargs)
    grad = torch.randn_like(out)
    exact = torch.autograd.grad(out, wide, grad)
    half = grad.bfloat16()
    eager = torch.autograd.grad(function(*tensors, impl="reference", **kwargs), tensors, half)
    ours = torch.autograd.grad(function(*tensors, impl="flash4", **kwargs), tensors, half)
    for name, a, e, x in zip("qkv", ours, eager, exact, strict=True):
        error, limit = fuzz.relative(a, x), fuzz.error_limit(fuzz.relative(e, x), torch.bfloat16)
        assert error <= limit, (name, error, limit)


@pytest.mark.parametrize("shape", HEADS, ids=lambda s: "x".join(map(str, s)))
def test_decode(shape: tuple[int, int, int]) -> None:
    """Rows of 4,096 tokens and odd ones, full and compacted tables in one launch."""
    hq, hk, dim = shape
    lens = [4096, 641, 1, 1000, 0, 4001]
    arguments = fuzz.paged_input(lens, hq, hk, dim, 128, torch.bfloat16, "cuda", spare=2)

    def decode(q: Tensor, k: Tensor, v: Tensor, *, impl: str) -> Tensor:
        out = torch.full_like(q, float("nan"))
        return api.paged_decode(q, k, v, *arguments[3:], scale=dim**-0.5, impl=impl, out=out)

    case = fuzz.compare("paged_decode", "triton", decode, arguments[:3], str(lens))
    assert case.ok, case


@pytest.mark.parametrize("shape", HEADS[:2], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("op", ["dense", "streaming"])
def test_sdpa_of_packed_prompts(op: str, shape: tuple[int, int, int]) -> None:
    """Whole prompts share calls: padded rows for dense, blocks with bottom-right causality for streaming."""
    hq, hk, dim = shape
    for lens in ((4095, 333, 1), (4096, 4000, 3901), (700,) * 5, (2048, 2048)):
        torch.manual_seed(0)
        q = torch.randn(sum(lens), hq, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(sum(lens), hk, dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        function, kwargs = run(op, Packing(lens, lens), hq, dim)
        with torch.no_grad():
            case = fuzz.compare(op, "sdpa", function, (q, k, v), str(lens), **kwargs)
        assert case.ok, case
