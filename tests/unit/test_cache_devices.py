"""A cache whose layers lie on two devices: pages and tables of their own on each, and what one device's cache holds."""

from __future__ import annotations

import pytest
import torch

from flux_attention.cache import FluxCache, PagePool, PoolExhaustedError
from flux_attention.config import FluxConfig
from flux_attention.route import Route

CONFIG = FluxConfig(sink_tokens=16, window_tokens=32, block_tokens=16)
# One processor under two names: what differs is who owns the pages.
DEVICES = (torch.device("cpu"), torch.device("cpu"), torch.device("cpu", 0))
LIKE = torch.zeros(1)


def filled(devices, keys, route):
    cache = FluxCache(CONFIG, (0, 1, 2), 3, devices=devices)
    cache.begin(2, route, 2, 8, LIKE)
    for layer in range(3):
        for row in range(2):
            cache.append(layer, row, keys[layer, row], -keys[layer, row])
    cache.advance(100, [100, 100], decoded=False)
    for _ in range(40):
        cache.plan_decode()
        cache.advance(1, [1, 1], decoded=True)
    return cache


def test_same_keys_in_two_pools():
    keys = torch.randn(3, 2, 100, 2, 8)
    route = Route(torch.tensor([[True, False], [False, False], [False, True]]))
    one, two = filled(None, keys, route), filled(DEVICES, keys, route)
    assert two.pool_of(0) is two.pool_of(1) is two.pool and two.pool_of(2) is not two.pool
    for cache in (one, two):
        cache.batch_select_indices(torch.tensor([1, 1]))
    for layer in range(3):
        assert torch.equal(one.tables_of(layer).counts[layer], two.tables_of(layer).counts[layer])
        for row in range(2):
            known = int(100 - one.gap(layer, row))
            for a, b in zip(one.gather(layer, row), two.gather(layer, row), strict=True):
                assert torch.equal(a[:known], b[:known])
    assert one.memory().held == two.memory().held
    two.clear()
    assert all(pool.free_pages == pool.num_pages for pool in (two.pool_of(0), two.pool_of(2)))


def test_either_pool_may_be_too_small():
    route = Route.full(3, 1)
    for sizes in ((14, 6), (13, 7)):
        cache = FluxCache(CONFIG, (0, 1, 2), 3, devices=DEVICES)
        every = dict.fromkeys(DEVICES)
        cache.use_pools({d: PagePool(16, 2, 8, torch.float32, d, n) for d, n in zip(every, sizes, strict=True)})
        cache.begin(1, route, 2, 8, LIKE)
        with pytest.raises(PoolExhaustedError):
            cache.reserve([100])
    with pytest.raises(ValueError, match="pass none"):
        FluxCache(CONFIG, (0, 1, 2), 3, devices=DEVICES, pool=PagePool(16, 2, 8, torch.float32, "cpu"))
