"""The paged cache against a plain record of what was stored."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import pytest
import torch

from flux_attention.cache import FluxCache, PagePool, PoolExhaustedError, append_token
from flux_attention.config import FluxConfig
from flux_attention.route import Route

A, SINK, WINDOW, HK, D = 4, 8, 12, 2, 3
CONFIG = FluxConfig(sink_tokens=SINK, window_tokens=WINDOW, block_tokens=A, xattention_stride=4)
ROUTE = Route(torch.tensor([[True, False, True], [False, False, True]]))


def make(max_pages: int | None = None, route: Route = ROUTE, config: FluxConfig = CONFIG) -> FluxCache:
    pool = PagePool(A, HK, D, torch.float64, "cpu", max_pages=max_pages)
    # Poison: a slot that is read before it is written shows.
    pool.keys.fill_(float("nan"))
    pool.values.fill_(float("nan"))
    cache = FluxCache(config, range(route.num_layers), route.num_layers, pool=pool)
    cache.begin(route.num_sequences, route, HK, D, pool.keys)
    return cache


def kept(n: int, sparse: bool) -> list[int]:
    """Positions that the next query of a row of n tokens may see."""
    return [k for k in range(n) if not sparse or k < SINK or k >= n // A * A - WINDOW]


def check(cache: FluxCache, keys: list[list[torch.Tensor]]) -> None:
    used = []
    for layer in range(2):
        for row in range(3):
            n = cache.lengths[row]
            sparse = not bool(ROUTE.use_full[layer, row])
            held, values = cache.gather(layer, row)
            positions = [p if p < SINK else p + cache.gap(layer, row) for p in range(held.shape[0])]
            assert set(kept(n, sparse)) <= set(positions)
            assert torch.equal(held, keys[layer][row][positions]) and torch.equal(values, -held)
            table = cache.page_table[layer, row].tolist()
            pages = -(-held.shape[0] // A)
            used += table[:pages]
            assert int(cache.key_counts[layer, row]) == held.shape[0]
            if sparse:
                assert pages <= SINK // A + WINDOW // A + 1
            else:
                assert pages == -(-n // A)
    assert len(set(used)) == len(used), "two rows share a page"
    assert cache.pool is not None
    assert cache.pool.free_pages == cache.pool.num_pages - len(used), "a page is lost"
    assert cache.memory().held == len(used) * cache.pool.page_bytes


@pytest.mark.parametrize("seed", range(8))
def test_random_life_of_rows(seed):
    """Chunks of any size and decode steps in any order: what a query may see is there, the rest is given back."""
    rng = random.Random(seed)
    total = 90
    keys = [[torch.randn(total, HK, D, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    cache = make()
    while max(cache.lengths) < total - 20:
        if rng.random() < 0.4 or not all(cache.lengths):
            counts = [rng.randint(1, 15) for _ in range(3)]
            for layer in range(2):
                for row, n in enumerate(counts):
                    chunk = keys[layer][row][cache.lengths[row] : cache.lengths[row] + n]
                    cache.append(layer, row, chunk, -chunk)
            cache.advance(max(counts), counts, decoded=False)
        else:
            cache.plan_decode()
            for layer in range(2):
                new = torch.stack([keys[layer][row][cache.lengths[row]] for row in range(3)])
                assert cache.pool is not None
                table, counts = cache.decode_table(layer), cache.key_counts[layer]
                append_token(cache.pool.keys, cache.pool.values, table, counts, new, -new)
                assert counts.tolist() == [cache.keys_held(layer, row) for row in range(3)]
                assert table.shape[0] == 3
            cache.advance(1, [1] * 3, decoded=True)
        # After a plan the pages match the length; a row exactly at a page's end drops its page with the next token.
        cache.plan_decode() if all(n % A for n in cache.lengths) else None
        check(cache, keys)
    cache.clear()
    assert cache.pool is not None and cache.pool.free_pages == cache.pool.num_pages


@pytest.mark.parametrize("indices", [[0, 0, 0], [2, 1, 0], [1, 1, 2], [0]])
def test_reorder_copies_what_is_shared(indices):
    cache = make()
    keys = [[torch.randn(40, HK, D, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    for layer in range(2):
        for row, n in enumerate((40, 33, 7)):
            cache.append(layer, row, keys[layer][row][:n], -keys[layer][row][:n])
    cache.advance(40, [40, 33, 7], decoded=False)
    before = [[cache.gather(layer, row)[0].clone() for row in range(3)] for layer in range(2)]
    cache.reorder_cache(torch.tensor(indices))
    assert cache.num_rows == len(indices) and cache.route is not None
    pages = []
    for layer in range(2):
        for row, source in enumerate(indices):
            held, values = cache.gather(layer, row)
            assert torch.equal(held, before[layer][source]) and torch.equal(values, -held)
            pages += cache.page_table[layer, row, : -(-held.shape[0] // A)].tolist()
    assert len(set(pages)) == len(pages)
    assert cache.pool is not None and cache.pool.free_pages == cache.pool.num_pages - len(pages)


def test_triangle_and_xattention_keep_everything():
    from dataclasses import replace

    for mode in ("triangle", "xattention"):
        cache = make(config=replace(CONFIG, sparse_mode=mode))
        key = torch.randn(50, HK, D, dtype=torch.float64)
        for layer in range(2):
            for row in range(3):
                cache.append(layer, row, key, key)
        cache.advance(50, [50] * 3, decoded=False)
        assert cache.memory().share == 1.0


def test_pool_too_small_says_so_and_changes_nothing():
    cache = make(max_pages=10)
    with pytest.raises(PoolExhaustedError, match=r"needs [\d,]+ bytes \(\d+ pages of 4 tokens\) and has"):
        cache.reserve([40, 40, 40])
    assert cache.pool is not None and cache.pool.free_pages == 10
    cache.reserve([4, 4, 4])


def test_growing_pool_keeps_what_it_holds():
    pool = PagePool(A, HK, D, torch.float32, "cpu")
    first = pool.allocate(3)
    pool.keys[first] = 7.0
    more = pool.allocate(20)
    assert set(first).isdisjoint(more) and bool((pool.keys[first] == 7.0).all())
    pool.release(more)
    assert pool.free_pages == pool.num_pages - 3
    assert pool.page_bytes == 2 * A * HK * D * 4


def test_crop_and_double_begin_are_refused():
    cache = make()
    with pytest.raises(NotImplementedError, match="Assisted"):
        cache.crop(-1)
    with pytest.raises(RuntimeError, match="already holds rows"):
        cache.begin(3, ROUTE, HK, D, torch.zeros(1))
    assert cache.get_seq_length() == 0 and len(cache) == 2


def test_reserve_counts_the_most_a_row_holds_on_its_way():
    """A streaming row that ends with a page held one page more just before."""
    route = Route(torch.zeros(1, 1, dtype=torch.bool))
    for start in (10, 20, 24):
        for tokens in range(1, 40):
            cache = make(route=route)
            assert cache.pool is not None
            key = torch.randn(start, HK, D, dtype=torch.float64)
            cache.append(0, 0, key, key)
            cache.advance(start, [start], decoded=False)
            held = most = cache.pool.num_pages - cache.pool.free_pages
            needed = cache.pages_needed(0, 0, tokens)
            for _ in range(tokens):
                cache.plan_decode()
                cache.advance(1, [1], decoded=True)
                most = max(most, cache.pool.num_pages - cache.pool.free_pages)
            assert most == max(held, needed), (start, tokens)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (PagePool(A * 2, HK, D, torch.float64, "cpu"), "page_tokens 8 where the model's cache has 4"),
        (PagePool(A, 1, D, torch.float64, "cpu"), "num_kv_heads 1 where the model's cache has 2"),
        (PagePool(A, HK, 4, torch.float64, "cpu"), "head_dim 4 where the model's cache has 3"),
        (PagePool(A, HK, D, torch.bfloat16, "cpu"), r"dtype torch\.bfloat16 where .* torch\.float64"),
        (PagePool(A, HK, D, torch.float64, "meta"), "device meta where the model's cache has cpu"),
    ],
)
def test_a_pool_of_other_pages_is_refused(pool, message):
    cache = FluxCache(CONFIG, range(2), 2, pool=pool)
    with pytest.raises(ValueError, match=message):
        cache.begin(3, ROUTE, HK, D, torch.zeros(1, dtype=torch.float64))
    assert cache.is_empty and cache.route is None


def test_a_dropped_cache_frees_its_pages_at_once():
    pool = PagePool(A, HK, D, torch.float64, "cpu", max_pages=4)
    gone = weakref.ref(pool)
    gc.disable()
    try:
        cache = FluxCache(CONFIG, range(2), 2, pool=pool)
        cache.begin(3, ROUTE, HK, D, pool.keys)
        del cache, pool
        assert gone() is None
    finally:
        gc.enable()


def test_a_copied_cache_counts_for_itself():
    cache = make()
    cache.advance(5, [5, 5, 5], decoded=False)
    copied = copy.deepcopy(cache)
    copied.advance(2, [2, 2, 2], decoded=False)
    assert (cache.get_seq_length(), copied.get_seq_length()) == (5, 7)
