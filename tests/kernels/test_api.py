"""Validation and dispatch: every refusal names the argument, what was expected and what came."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from flux_attention.kernels import api
from flux_attention.kernels.api import Packing, UnsupportedKernelError

STREAMING = {"sink": 32, "window": 64, "block": 32, "scale": 1.0}


def qkv(n: int = 64, hq: int = 4, hk: int = 2, dim: int = 64) -> tuple[torch.Tensor, ...]:
    return torch.randn(n, hq, dim), torch.randn(n, hk, dim), torch.randn(n, hk, dim)


def test_packing() -> None:
    packing = Packing((3, 1), (5, 4), (0, 32))
    assert packing.totals == (4, 9)
    assert packing.starts == (2, 35)
    assert (packing.max_q, packing.max_k) == (3, 5)
    assert packing.q_offsets == (0, 3, 4)
    assert packing.cu_k("cpu").tolist() == [0, 5, 9]
    assert packing.cu_q("cpu").dtype == torch.int32
    assert packing.cu_q("cpu") is packing.cu_q("cpu")
    assert not packing.uniform
    assert Packing((2, 2), (3, 3)).uniform
    assert packing == Packing((3, 1), (5, 4), (0, 32))
    assert hash(packing) == hash(Packing((3, 1), (5, 4), (0, 32)))
    assert Packing((), ()).totals == (0, 0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (((1, 2), (3,)), "one entry per sequence"),
        (((4,), (3,)), "q_len=4, k_len=3"),
        (((-1,), (3,)), "q_len=-1"),
        (((1,), (3,), (-2,)), r"gaps\[0\] must be >= 0, got -2"),
    ],
)
def test_bad_packings(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Packing(*args)


def test_bad_tensors() -> None:
    q, k, v = qkv()
    packing = Packing((64,), (64,))
    cases = [
        ((q[None], k, v), r"expected q \[N, Hq, D\]"),
        ((q, k, v[:5]), r"expected q \[N, Hq, D\]"),
        ((q[:5], k, v), "64 query and 64 key tokens, got q with 5"),
        ((q, k[..., :8], v[..., :8]), "head dim, got 64 and 8"),
        ((torch.randn(64, 3, 64), k, v), "multiple of key heads, got 3 and 2"),
        ((q, k.half(), v), "share a floating dtype"),
        ((q.int(), k.int(), v.int()), "share a floating dtype"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            api.dense_attention(*bad, packing, scale=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 65}, "window must be a non-negative multiple of block=32, got 65"),
        ({"sink": -32}, "sink must be a non-negative multiple of block=32, got -32"),
        ({"block": 0}, "block must be >= 1, got 0"),
        ({"impl": "fast"}, r'"auto" or one of reference, sdpa, flash4, flex, got \'fast\''),
    ],
)
def test_bad_streaming(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        api.streaming_attention(*qkv(), Packing((64,), (64,)), **(STREAMING | change))


def test_gaps() -> None:
    q, k, v = qkv(64)
    packing = Packing((64,), (64,), (32,))
    for run, kwargs in (
        (api.dense_attention, {"scale": 1.0}),
        (api.triangle_attention, STREAMING | {"dense_from": (0,)}),
        (api.xattention, {"block": 32, "stride": 8, "threshold": 0.9, "scale": 1.0}),
    ):
        with pytest.raises(ValueError, match=r"needs every key .* gaps \(32,\)"):
            run(q, k, v, packing, **kwargs)
    with pytest.raises(ValueError, match=r"dropped keys \[32, 64\).*gaps\[0\] may be at most 0"):
        api.streaming_attention(q, k, v, packing, **STREAMING)


def test_bad_selection_and_blocks() -> None:
    q, k, v = qkv()
    packing = Packing((64,), (64,))
    sizes = {"block": 32, "stride": 8, "threshold": 0.9, "scale": 1.0}
    with pytest.raises(ValueError, match="stride must be a positive divisor of block=32, got 12"):
        api.select_blocks(q, k, packing, **(sizes | {"stride": 12}))
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], got 0"):
        api.select_blocks(q, k, packing, **(sizes | {"threshold": 0.0}))
    with pytest.raises(ValueError, match="one tensor per sequence"):
        api.block_sparse_attention(q, k, v, packing, [], block=32, scale=1.0)
    with pytest.raises(ValueError, match=r"blocks\[0\] must be bool \[4, 2, 2\]"):
        api.block_sparse_attention(q, k, v, packing, [torch.ones(4, 2, 3, dtype=torch.bool)], block=32, scale=1.0)
    with pytest.raises(ValueError, match="dense_from needs one position per sequence"):
        api.triangle_attention(q, k, v, packing, dense_from=(), **STREAMING)


def test_bad_decode() -> None:
    q, pages = torch.randn(2, 4, 64), torch.randn(5, 16, 2, 64)
    table, lengths = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    good: dict[str, Any] = {"q": q, "k_pages": pages, "v_pages": pages, "page_table": table, "lengths": lengths}
    cases = [
        ({"q": q[0]}, r"expected q \[S, Hq, D\]"),
        ({"q": q[:, :3]}, "multiple of the key heads"),
        ({"k_pages": pages[:, :9], "v_pages": pages[:, :9]}, "multiple of 16, got 9"),
        ({"lengths": lengths[:1]}, r"lengths \[2\]"),
        ({"lengths": lengths.long()}, "lengths must be int32, got torch.int64"),
        ({"page_table": table.long()}, "page_table must be int32"),
        ({"q": q.half()}, "share a floating dtype"),
        ({"out": q[:, :2]}, "out must be"),
        ({"impl": "flash4"}, "one of reference, sdpa, triton, got 'flash4'"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            api.paged_decode(**(good | change), scale=1.0)


def test_unusable_implementations_name_usable_ones() -> None:
    q, k, v = qkv()
    packing = Packing((64,), (64,))
    for impl in ("flash4", "flex"):
        with pytest.raises(UnsupportedKernelError, match=r"CUDA device, got tensors on cpu\. .*: reference, sdpa"):
            api.streaming_attention(q, k, v, packing, impl=impl, **STREAMING)
    with pytest.raises(UnsupportedKernelError, match=r"triton.*These can: reference, torch"):
        api.select_blocks(q, k, packing, block=32, stride=8, threshold=0.9, scale=1.0, impl="triton")


def test_optional_packages_stay_unloaded() -> None:
    code = """
import sys, torch
from flux_attention.kernels import api
p = api.Packing((200,), (200,))
q, k = torch.randn(200, 4, 64), torch.randn(200, 2, 64)
s = dict(sink=32, window=32, block=32, scale=1.0)
api.dense_attention(q, k, k, p, scale=1.0)
api.streaming_attention(q, k, k, p, **s)
api.xattention(q, k, k, p, block=32, stride=8, threshold=0.9, scale=1.0)
loaded = [m for m in ("triton", "flash_attn", "cutlass", "flux_attention.kernels.reference") if m in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_empty_sequences() -> None:
    packing = Packing((0, 0), (0, 5))
    q, k, v = torch.randn(0, 4, 64), torch.randn(5, 2, 64), torch.randn(5, 2, 64)
    assert api.dense_attention(q, k, v, packing, scale=1.0).shape == (0, 4, 64)
    assert api.streaming_attention(q, k, v, packing, **STREAMING).shape == (0, 4, 64)
    assert api.xattention(q, k, v, packing, block=32, stride=8, threshold=0.9, scale=1.0).shape == (0, 4, 64)
