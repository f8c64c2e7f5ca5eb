"""Tensor parallel engines: every rank holds some of the heads, and all must decide alike."""

from __future__ import annotations

import pytest

from tests.serving.harness import TOLERANCE, differences, generate, mixed_asks, random_ids

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.mark.parametrize("inline", [False, True], ids=["probe", "inline"])
def test_two_ranks(start, tiny, inline):
    arguments = {"tensor_parallel_size": 2, "max_model_len": 1024, "distributed_executor_backend": "mp"}
    lengths = (5, 96, 97, 128, 160, 161, 200, 255, 257, 300, 333, 400, 511, 640, 700, 129)
    asks = mixed_asks(tiny, random_ids(4000), lengths, tokens=24)
    if inline:
        plain = {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048}
        llm = start(tiny, flux={"router_input": "inline"}, **plain, **arguments)
        asks = [ask for ask in asks if "flux_policy" in dict(ask.options)] + asks[4:5]
    else:
        llm = start(tiny, max_num_batched_tokens=128, enable_prefix_caching=True, **arguments)
    cold = generate(llm, asks)
    if inline:
        asks = asks[:-1]  # the reference routes by the probe; that all ranks went the same way shows in the rest
    assert max(differences(tiny, asks, cold[: len(asks)])) < TOLERANCE
    if not inline:
        assert max(differences(tiny, asks, generate(llm, asks))) < TOLERANCE
