"""Paged decode on the CPU: page tables, lengths, poison, compacted tables."""

from __future__ import annotations

import pytest
import torch

from flux_attention.kernels import api, paged_decode
from flux_attention.kernels.api import Packing
from tests.kernels.fuzz import paged_input


@pytest.mark.parametrize(("hq", "hk"), [(1, 1), (3, 1), (8, 2), (8, 1), (9, 3)])
@pytest.mark.parametrize("page", [16, 48, 128])
def test_rows_are_the_oracles(hq: int, hk: int, page: int) -> None:
    torch.manual_seed(0)
    lens = [1, 0, 63, 111, page, 129, 1000, 0]
    args = paged_input(lens, hq, hk, 64, page, torch.float64, "cpu", spare=2)
    expected = api.paged_decode(*args, scale=0.1, impl="reference")
    out = torch.full_like(args[0], float("nan"))
    assert api.paged_decode(*args, scale=0.1, out=out) is out
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert not out[[1, 7]].any()
    # What the sdpa implementation does away from the CPU.
    gathered = paged_decode._gathered(*args, 0.1, torch.empty_like(out))
    torch.testing.assert_close(gathered, expected, rtol=1e-10, atol=1e-10)


def test_a_row_does_not_see_its_neighbours() -> None:
    torch.manual_seed(0)
    q, k_pages, v_pages, table, lengths = paged_input([200, 35, 700], 4, 2, 64, 16, torch.float32, "cpu")
    together = api.paged_decode(q, k_pages, v_pages, table, lengths, scale=0.1)
    for s in range(3):
        row = slice(s, s + 1)
        alone = api.paged_decode(q[row], k_pages, v_pages, table[row], lengths[row], scale=0.1)
        assert torch.equal(alone, together[row])


def test_pages_side_by_side_are_read_in_place() -> None:
    torch.manual_seed(0)
    pages = torch.randn(8, 16, 2, 64)
    table = torch.tensor([[2, 3, 4]], dtype=torch.int32)
    rows = paged_decode._rows(pages, table[0], 40)
    assert rows.data_ptr() == pages[2].data_ptr()
    assert torch.equal(rows, pages[2:5].flatten(0, 1)[:40])


def test_a_compacted_table_is_streaming_attention() -> None:
    # Sinks and window of a row at position n - 1, taken as whole pages, decode to what prefill gives that position.
    torch.manual_seed(0)
    page, sink, window, n = 32, 32, 64, 300
    q, k, v = torch.randn(1, 4, 64), torch.randn(n, 2, 64), torch.randn(n, 2, 64)
    expected = api.streaming_attention(
        q, k, v, Packing((1,), (n,)), sink=sink, window=window, block=page, scale=0.1, impl="reference"
    )
    k_pages, v_pages = (torch.full((12, page, 2, 64), float("nan")) for _ in "kv")
    for pages, x in ((k_pages, k), (v_pages, v)):
        pages.flatten(0, 1)[:n] = x
    first = (n - 1) // page - window // page
    seen = [0, *range(first, -(-n // page))]
    length = page + n - first * page
    out = api.paged_decode(
        q,
        k_pages,
        v_pages,
        torch.tensor([seen], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        scale=0.1,
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_heuristic_configs_fit() -> None:
    for dim in (64, 128, 256):
        for rows, pages in ((1, 1), (1, 1024), (8, 256), (64, 2048)):
            q = torch.empty(rows, 32, dim, dtype=torch.bfloat16)
            table = torch.empty(rows, pages, dtype=torch.int32)
            config = paged_decode.heuristic(q, torch.empty(1, 128, 8, dim), table)
            assert config.split % config.block == 0
            assert all(c.split % c.block == 0 for c in paged_decode.candidates(q))
