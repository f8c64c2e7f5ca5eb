"""A real engine against the transformers path: mixed batches, chunks, the prefix cache, preemption, aborts."""

from __future__ import annotations

import pytest

from tests.serving.harness import TOLERANCE, differences, free_blocks, generate, mixed_asks

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

# Short, around sinks + window (640), a little over block boundaries, long; more than one chunk of 512 tokens.
LENGTHS = (660, 300, 641, 700, 5, 769, 897, 656, 640, 33, 650, 800, 1025, 150, 64, 1281)


@pytest.fixture(scope="module")
def text(smollm2):
    from flux_attention.data.corpus import documents

    joined = "\n\n".join(document.text for document in documents("docstrings", "test"))
    return smollm2.tokenizer(joined[:40_000]).input_ids


@pytest.fixture(scope="module")
def llm(start, smollm2):
    return start(smollm2, max_num_batched_tokens=512, enable_prefix_caching=True)


def test_mixed_batch_cold_then_warm(llm, smollm2, text):
    asks = mixed_asks(smollm2, text, LENGTHS)
    assert len(asks) >= 16
    cold = generate(llm, asks)
    assert max(differences(smollm2, asks, cold)) < TOLERANCE
    assert all(output.num_cached_tokens == 0 for output in cold)
    # Neighbours of other routes share the prompt: only the blocks of the same route may be found.
    warm = generate(llm, asks)
    assert max(differences(smollm2, asks, warm)) < TOLERANCE
    assert sum(output.num_cached_tokens > 0 for output in warm) >= 10
    assert free_blocks(llm)[0] == free_blocks(llm)[1]
