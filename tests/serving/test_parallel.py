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


def test_probes_are_captured_on_all_ranks_or_none(start, tiny):
    """A rank that replays beside one that does not would meet its exchanges with others; a graph is a call here."""
    llm = start(tiny, tensor_parallel_size=2, max_model_len=1024, distributed_executor_backend="mp")
    ends = [random_ids(16, seed) for seed in range(3)]

    # Functions of a function travel to the ranks by value.
    def capture(worker, failing):
        import torch

        from flux_attention.serving import probe

        def captured(run, device):
            if torch.distributed.get_rank() == failing:
                raise RuntimeError("operation not permitted when stream is capturing")
            return run

        real, probe.captured = probe.captured, captured
        try:
            worker._probe.capture(4)
        finally:
            probe.captured = real
        return [rows for rows, _ in worker._probe._replays]

    def scores(worker):
        return worker._probe.scores(ends)

    eager = llm.collective_rpc(scores)
    assert eager[0] == eager[1]
    assert llm.collective_rpc(capture, args=(1,)) == [[], []]
    assert llm.collective_rpc(capture, args=(None,)) == [[1, 2, 4]] * 2
    replayed = llm.collective_rpc(scores)
    assert replayed[0] == replayed[1]
    for found, expected in zip(replayed[0], eager[0], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
