"""Dense, streaming, triangle and block-sparse attention on the CPU: definition, gradients, chunks, packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flux_attention.kernels import api, dense, streaming
from flux_attention.kernels.api import Packing

HEADS = [(2, 2), (3, 1), (8, 2), (8, 1)]
PACKINGS = [
    Packing((1,), (1,)),
    Packing((63,), (63,)),
    Packing((129, 129), (129, 129)),
    Packing((1000,), (1000,)),
    Packing((111, 1, 0, 300), (111, 700, 40, 900)),
]
STREAMING = {"sink": 32, "window": 64, "block": 32}


def tensors(packing: Packing, hq: int, hk: int, dim: int = 16) -> list[Tensor]:
    n, m = packing.totals
    return [torch.randn(t, h, dim, dtype=torch.float64, requires_grad=True) for t, h in ((n, hq), (m, hk), (m, hk))]


def ops(packing: Packing) -> list[tuple[Any, dict[str, Any]]]:
    dense_from = tuple(max(0, n - 77) for n in packing.k_lens)
    return [
        (api.dense_attention, {}),
        (api.streaming_attention, STREAMING),
        (api.streaming_attention, {"sink": 0, "window": 128, "block": 16}),
        (api.streaming_attention, {"sink": 64, "window": 0, "block": 64}),
        (api.triangle_attention, {**STREAMING, "dense_from": dense_from}),
        (api.xattention, {"block": 32, "stride": 8, "threshold": 0.7}),
    ]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize(("hq", "hk"), HEADS)
def test_values_and_gradients_are_the_oracles(packing: Packing, hq: int, hk: int) -> None:
    torch.manual_seed(0)
    for run, kwargs in ops(packing):
        inputs = tensors(packing, hq, hk)
        exact = run(*inputs, packing, scale=0.25, impl="reference", **kwargs)
        out = run(*inputs, packing, scale=0.25, impl="sdpa", **kwargs)
        grad = torch.randn_like(exact)
        expected = (exact, *torch.autograd.grad(exact, inputs, grad))
        actual = (out, *torch.autograd.grad(out, inputs, grad))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(run(*inputs, packing, scale=0.25, **kwargs), exact, rtol=1e-9, atol=1e-9)


def test_the_oracle_is_the_definition() -> None:
    # One query at a time, in scalar Python: the oracle's own mask is checked against the sentence that defines it.
    torch.manual_seed(0)
    packing = Packing((150,), (150,))
    q, k, v = (t.detach() for t in tensors(packing, 1, 1, 4))
    out = api.streaming_attention(q, k, v, packing, scale=0.5, impl="reference", **STREAMING)
    for t in (0, 31, 32, 95, 96, 127, 128, 149):
        seen = [j for j in range(t + 1) if j < 32 or j >= 32 * (t // 32) - 64]
        weights = torch.stack([(q[t, 0] @ k[j, 0]) * 0.5 for j in seen]).softmax(0)
        torch.testing.assert_close(out[t, 0], sum(w * v[j, 0] for w, j in zip(weights, seen, strict=True)))


@pytest.mark.parametrize("cut", [1, 64, 96, 333, 640])
def test_a_chunk_is_the_whole(cut: int) -> None:
    torch.manual_seed(0)
    n = 700
    whole = Packing((n,), (n,))
    q, k, v = (t.detach() for t in tensors(whole, 4, 2))
    chunk = Packing((n - cut,), (n,))
    for run, kwargs in ops(whole):
        if run is api.xattention and cut % kwargs["block"]:
            continue
        full = run(q, k, v, whole, scale=0.25, **kwargs)
        part = run(q[cut:], k, v, chunk, scale=0.25, **kwargs)
        torch.testing.assert_close(part, full[cut:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dropped", [32, 224, 448])
def test_dropped_keys_change_nothing(dropped: int) -> None:
    torch.manual_seed(0)
    n, new = 700, 131
    q, k, v = (t.detach() for t in tensors(Packing((new,), (n,)), 4, 2))
    kept = torch.cat([torch.arange(32), torch.arange(32 + dropped, n)])
    full = api.streaming_attention(q, k, v, Packing((new,), (n,)), scale=0.25, **STREAMING)
    packing = Packing((new,), (n - dropped,), (dropped,))
    for impl in ("reference", "sdpa"):
        part = api.streaming_attention(q, k[kept], v[kept], packing, scale=0.25, impl=impl, **STREAMING)
        torch.testing.assert_close(part, full, rtol=1e-9, atol=1e-9)


def test_poison_outside_a_sequence_stays_outside() -> None:
    # The tensors are views into memory full of NaN, and the middle sequence is NaN itself.
    torch.manual_seed(0)
    packing = Packing((200, 65, 111), (200, 129, 300))
    memory = [torch.full((2000, 2 * h, 16), float("nan"), dtype=torch.float64) for h in (4, 2, 2)]
    q, k, v = (m[7 : 7 + n, :h] for m, n, h in zip(memory, (376, 629, 629), (4, 2, 2), strict=True))
    for t in (q, k, v):
        t.normal_()
    expected = {}
    for i, (run, kwargs) in enumerate(ops(packing)):
        expected[i] = run(q, k, v, packing, scale=0.25, impl="reference", **kwargs)
    q[200:265] = k[200:329] = v[200:329] = float("nan")
    keep = torch.cat([torch.arange(200), torch.arange(265, 376)])
    for i, (run, kwargs) in enumerate(ops(packing)):
        out = run(q, k, v, packing, scale=0.25, **kwargs)
        torch.testing.assert_close(out[keep], expected[i][keep], rtol=1e-9, atol=1e-9)


def test_tile_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    packing = Packing((611, 300), (1000, 300))
    q, k, v = (t.detach() for t in tensors(packing, 4, 2))
    expected = api.streaming_attention(q, k, v, packing, scale=0.25, impl="reference", **STREAMING)
    for tile, call in ((32, 1), (96, 3), (1024, 16)):
        monkeypatch.setitem(streaming._TILE, "cpu", tile)
        monkeypatch.setattr(streaming, "_TILES_A_CALL", call)
        monkeypatch.setattr(dense, "_TILE", tile)
        out = api.streaming_attention(q, k, v, packing, scale=0.25, **STREAMING)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_a_short_prompt_is_dense() -> None:
    torch.manual_seed(0)
    packing = Packing((96,), (96,))
    q, k, v = (t.detach() for t in tensors(packing, 4, 2))
    torch.testing.assert_close(
        api.streaming_attention(q, k, v, packing, scale=0.25, **STREAMING),
        api.dense_attention(q, k, v, packing, scale=0.25),
    )


@pytest.mark.parametrize("lens", [(5, 17, 200, 33), (64, 64), (300, 3, 177), (0, 5, 120), (97,) * 70])
def test_whole_prompts_share_calls(lens):
    """Packed prompts without gaps take another way than chunks; and the padded rows that CUDA uses."""
    generator = torch.Generator().manual_seed(0)
    n = sum(lens)
    q, k, v = (torch.randn(n, h, 16, generator=generator, dtype=torch.float64) for h in (6, 2, 2))
    packing = Packing(lens, lens)
    for sink, window in ((16, 32), (0, 16), (16, 0)):
        sizes = {"sink": sink, "window": window, "block": 16, "scale": 0.25}
        expected = api.streaming_attention(q, k, v, packing, **sizes, impl="reference")
        found = api.streaming_attention(q, k, v, packing, **sizes, impl="sdpa")
        assert (found - expected).abs().max() < 1e-12
    inside, to = dense._padded_rows(lens, q.device)
    rows = dense._causal(*(t[inside].transpose(1, 2) for t in (q, k, v)), 0.25).transpose(1, 2).flatten(0, 1)
    found = q.new_zeros(n + 1, 6, 16).index_copy(0, to, rows)[:-1]
    assert (found - api.dense_attention(q, k, v, packing, scale=0.25, impl="reference")).abs().max() < 1e-12
