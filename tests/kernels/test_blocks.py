"""The choice of blocks, and the block lists that the GPU implementations run over."""

from __future__ import annotations

import random
import sys
import types

import pytest
import torch
from torch import Tensor

from flux_attention.kernels import api, block_lists, block_score, block_sparse, reference, streaming, streaming_tiles
from flux_attention.kernels.api import Packing
from flux_attention.kernels.block_lists import TILE, BlockLists
from tests.kernels.fuzz import choice_error

SIZES = {"block": 32, "stride": 8, "threshold": 0.6, "scale": 1.0}


def qk(packing: Packing, hq: int = 4, hk: int = 2) -> tuple[Tensor, Tensor]:
    n, m = packing.totals
    return torch.randn(n, hq, 16, dtype=torch.float64), torch.randn(m, hk, 16, dtype=torch.float64)


@pytest.mark.parametrize("threshold", [0.3, 0.9, 0.999])
def test_choice_is_the_oracles(threshold: float) -> None:
    torch.manual_seed(0)
    packing = Packing((1, 129, 0, 300, 1000), (1, 129, 40, 500, 1000))
    q, k = qk(packing)
    sizes = SIZES | {"threshold": threshold}
    expected = api.select_blocks(q, k, packing, impl="reference", **sizes)
    for a, e in zip(api.select_blocks(q, k, packing, impl="torch", **sizes), expected, strict=True):
        assert torch.equal(a, e)


def test_scores_are_the_definition() -> None:
    torch.manual_seed(0)
    n = 96
    q, k = torch.randn(n, 1, 4, dtype=torch.float64), torch.randn(n, 1, 4, dtype=torch.float64)
    masses = reference.block_masses(q, k, 0, block=32, stride=8, scale=0.5)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for a in range(n // 8):
        row = [sum(q[8 * a + s, 0] @ k[8 * b + 7 - s, 0] for s in range(8)) * 0.5 / 8 for b in range(a + 1)]
        for b, w in enumerate(torch.stack(row).softmax(0)):  # type: ignore[arg-type]
            expected[a // 4, b // 4] += w
    torch.testing.assert_close(masses[0], expected)


def test_a_chunk_on_a_boundary_chooses_as_the_whole() -> None:
    torch.manual_seed(0)
    n = 512
    q, k = qk(Packing((n,), (n,)))
    (whole,) = api.select_blocks(q, k, Packing((n,), (n,)), **SIZES)
    for cut in (32, 256, 480):
        (part,) = api.select_blocks(q[cut:], k, Packing((n - cut,), (n,)), **SIZES)
        assert torch.equal(part, whole[:, cut // 32 :])
        (front,) = api.select_blocks(q[:cut], k[:cut], Packing((cut,), (cut,)), **SIZES)
        assert torch.equal(front, whole[:, : cut // 32, : cut // 32])


def test_stretches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    packing = Packing((700,), (900,))
    q, k = qk(packing)
    expected = api.select_blocks(q, k, packing, **SIZES)
    monkeypatch.setattr(block_score, "_BLOCKS_A_CALL", 3)
    assert torch.equal(api.select_blocks(q, k, packing, **SIZES)[0], expected[0])


def test_the_whole_mass_takes_every_block_and_structure_is_found() -> None:
    torch.manual_seed(0)
    n = 512
    q, k = torch.randn(n, 1, 16), torch.randn(n, 1, 16) * 0.01
    # Block 3 holds keys along a direction that all queries share.
    q += 4
    k[96:128] += 1
    (chosen,) = api.select_blocks(q, k, Packing((n,), (n,)), **SIZES)
    own = torch.arange(16)
    assert chosen[0, 4:, 3].all()
    assert chosen[0, own, own].all()
    assert chosen[0, :, 0].all()
    assert chosen[0, 8:].sum(-1).max() <= 4
    (every,) = api.select_blocks(q, k, Packing((n,), (n,)), **(SIZES | {"threshold": 1.0}))
    assert not every.triu(1).any()


def test_choice_error_sees_wrong_choices() -> None:
    masses = torch.tensor([[[0.1, 0.5, 0.2, 0.1, 0.1]]])
    right = torch.tensor([[[True, True, True, False, True]]])
    assert choice_error(masses, right, 4, 0.65) == 0
    for wrong in ([1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [0, 1, 1, 0, 1], [1, 1, 1, 1, 0]):
        if wrong == [1, 1, 0, 0, 1]:
            continue  # 0.7 of the mass: the forced blocks make up for block 2
        assert choice_error(masses, torch.tensor([[wrong]], dtype=torch.bool), 4, 0.65) > 0.01


def _over(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, *, scale: float) -> Tensor:
    """What a GPU kernel computes from block lists, written out as a token mask; checks `back` against the rest."""
    heads = q.shape[1]
    n_q, n_k = -(-q.shape[0] // TILE), -(-k.shape[0] // TILE)
    own_tile = torch.ones(TILE, TILE, dtype=torch.bool).tril()
    mask = torch.zeros(heads, n_q, n_k, TILE, TILE, dtype=torch.bool)
    back = torch.zeros_like(mask)
    assert lists.back is not None
    for h in range(heads):
        own_n, own, full_n, full = (
            t[0, min(h, t.shape[1] - 1)].tolist()
            for t in (lists.own_count, lists.own_index, lists.full_count, lists.full_index)
        )
        for i in range(n_q):
            for c in range(full_n[i]):
                mask[h, i, full[i][c]] = True
            assert own_n[i] == 1
            assert full[i][: full_n[i]] == sorted(set(full[i][: full_n[i]]))
            mask[h, i, own[i][0]] = own_tile
        own_n, own, full_n, full = (t[0, min(h, t.shape[1] - 1)].tolist() for t in lists.back)
        for j in range(n_k):
            for c in range(full_n[j]):
                back[h, full[j][c], j] = True
            if own_n[j]:
                back[h, own[j][0], j] = own_tile
    assert torch.equal(mask, back)
    token = mask.transpose(2, 3).reshape(heads, n_q * TILE, n_k * TILE)[:, : q.shape[0], : k.shape[0]]
    return reference._attend(q, k, v, token, scale)


def test_lists_say_what_the_definition_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_lists, "flash4_over", _over)
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(25):
        block = rng.choice((128, 256))
        sizes = {"sink": block * rng.randint(0, 2), "window": block * rng.randint(0, 3), "block": block}
        lens = [rng.randint(1, 1300) for _ in range(rng.randint(1, 2))]
        new = [rng.choice((n, rng.randint(1, n))) for n in lens]
        gaps = []
        for n, q_len in zip(lens, new, strict=True):
            most = max(0, (n - q_len) // block * block - sizes["window"] - sizes["sink"])
            gaps.append(rng.choice((0, most, rng.randint(0, most))))
        kept = tuple(n - g for n, g in zip(lens, gaps, strict=True))
        packing = Packing(tuple(new), kept, tuple(gaps))
        q, k = (t.requires_grad_() for t in qk(packing))
        v = torch.randn_like(k)
        expected = api.streaming_attention(q, k, v, packing, scale=0.25, impl="reference", **sizes)
        out = streaming.streaming_flash4(q, k, v, packing, scale=0.25, **sizes)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)

        packing = Packing(tuple(new), tuple(lens))
        q, k = (t.requires_grad_() for t in qk(packing))
        v = torch.randn_like(k)
        blocks = [
            torch.rand(4, -(-n // 128) - (n - q_len) // 128, -(-n // 128)) < 0.4
            for n, q_len in zip(lens, new, strict=True)
        ]
        expected = api.block_sparse_attention(q, k, v, packing, blocks, block=128, scale=0.25, impl="reference")
        out = block_sparse.block_sparse_flash4(q, k, v, packing, blocks, block=128, scale=0.25)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_compact() -> None:
    torch.manual_seed(0)
    mask = torch.rand(3, 5, 17) < 0.4
    mask[0, 0], mask[1, 1] = False, True
    count, index = block_lists.compact(mask)
    for a in range(3):
        for b in range(5):
            columns = mask[a, b].nonzero()[:, 0].tolist()
            assert index[a, b, : count[a, b]].tolist() == columns
            assert not index[a, b, count[a, b] :].any()


def _launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, sink: int, window: int, block: int, scale: float) -> None:
    """What the kernel computes: streaming attention by its own definition of tiles, row by row."""
    for q_s, k_s, v_s, out_s in zip(q, k, v, out, strict=True):
        before = k_s.shape[0] - q_s.shape[0]
        assert before % 128 == 0
        for first in range(0, q_s.shape[0], 128):
            own = (before + first) // 128
            start = own // block * block - window
            tiles = range(own + 1) if start <= sink else [*range(sink), *range(start, own + 1)]
            seen = torch.cat([torch.arange(t * 128, min(t * 128 + 128, k_s.shape[0])) for t in tiles])
            queries = q_s[first : first + 128]
            seen = seen[seen < before + first + queries.shape[0]]
            packing = Packing((queries.shape[0],), (len(seen),))
            out_s[first : first + 128] = reference.dense_attention(queries, k_s[seen], v_s[seen], packing, scale=scale)


def test_tiles_say_what_the_definition_says(monkeypatch: pytest.MonkeyPatch) -> None:
    cute = types.ModuleType("streaming_tiles_cute")
    cute.launch = _launch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flux_attention.kernels.streaming_tiles_cute", cute)
    rng = random.Random(1)
    torch.manual_seed(0)
    for _ in range(40):
        block = rng.choice((128, 128, 256))
        sizes = {"sink": block * rng.randint(0, 2), "window": block * rng.randint(0, 3), "block": block}
        lens = [rng.randint(1, 1300) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.3:
            lens = lens[:1] * 2
        starts = [rng.choice((0, rng.randrange(n) // 128 * 128)) for n in lens]
        most = [max(0, start // block * block - sizes["window"] - sizes["sink"]) // block for start in starts]
        gaps = tuple(block * rng.choice((0, m, rng.randint(0, m))) for m in most)
        packing = Packing(
            tuple(n - start for n, start in zip(lens, starts, strict=True)),
            tuple(n - gap for n, gap in zip(lens, gaps, strict=True)),
            gaps,
        )
        q, k = qk(packing)
        v = torch.randn_like(k)
        assert streaming_tiles.serves(q, k, v, packing, block)
        expected = api.streaming_attention(q, k, v, packing, scale=0.25, impl="reference", **sizes)
        out = streaming.streaming_flash4(q, k, v, packing, scale=0.25, **sizes)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_tiles_serve_whole_blocks_without_gradients() -> None:
    q, k = qk(Packing((300,), (300,)))

    def serves(q: Tensor, packing: Packing, block: int) -> bool:
        return streaming_tiles.serves(q, k, k, packing, block)

    assert serves(q, Packing((300,), (300,)), 128) and serves(q, Packing((300,), (300,)), 256)
    assert not serves(q, Packing((300,), (300,)), 64)
    assert not serves(q, Packing((299,), (300,)), 128)
    assert serves(q, Packing((172,), (300,), (128,)), 128) and not serves(q, Packing((172,), (300,), (128,)), 256)
    assert not serves(q.requires_grad_(), Packing((300,), (300,)), 128)


def test_heads_are_packed_where_tokens_fill_a_tile() -> None:
    assert block_lists.packs_heads(32, 8, 128) and block_lists.packs_heads(4, 4, 128)
    assert not block_lists.packs_heads(9, 3, 128) and block_lists.packs_heads(9, 3, 192)


def test_no_length_is_compiled_for() -> None:
    """Triton compiles anew for a number that is 1 or a multiple of 16, unless told not to: a second per prompt."""
    pytest.importorskip("triton")
    from flux_attention.kernels import block_score_triton as kernels

    for kernel in (kernels.score_kernel, kernels.choose_kernel):
        free = {p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)}
        # Pointers and strides are a model's, the rest are fractions.
        assert all(name.startswith(("p_", "stride_")) or name in ("scale2", "threshold") for name in free), free
