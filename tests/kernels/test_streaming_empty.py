"""Streaming attention by SDPA: sequences without tokens, and what its index tensors may hold on to."""

from __future__ import annotations

import pytest
import torch

from flux_attention.kernels import api, streaming
from flux_attention.kernels.packing import Packing

SHAPE = {"sink": 16, "window": 16, "block": 16, "scale": 0.3}


@pytest.mark.parametrize("lens", [(0,), (0, 0), (0, 0, 0), (0, 5), (0, 70, 0)])
def test_empty_sequences(lens):
    packing, total = Packing(lens, lens), sum(lens)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(total, heads, 8, generator=generator) for heads in (4, 2, 2))
    found = api.streaming_attention(q, k, v, packing, impl="sdpa", **SHAPE)
    expected = api.streaming_attention(q, k, v, packing, impl="reference", **SHAPE)
    assert found.shape == (total, 4, 8)
    torch.testing.assert_close(found, expected)


def test_few_index_tensors_are_kept():
    """They lie on the device, and no later pass has the same lengths."""
    for n in range(40):
        lens = (100 + n, 50)
        q, k = torch.randn(sum(lens), 2, 8), torch.randn(sum(lens), 1, 8)
        api.streaming_attention(q, k, k, Packing(lens, lens), impl="sdpa", **SHAPE)
    assert streaming._prompt_calls.cache_info().currsize <= 8
