"""Prompts whose last prefill chunk is a single token: a chunk like any other, not a decode step."""

from __future__ import annotations

import pytest

from flux_attention.generation import generate
from flux_attention.models.attach import attach
from flux_attention.models.layout import Layout
from flux_attention.route import AllSparse, Dense, Static
from tests.models.tiny import CONFIG, make_model, make_prompts


@pytest.mark.parametrize(
    ("lengths", "chunk"), [((65,), 64), ((129,), 64), ((33,), 16), ((17,), 16), ((97,), 32), ((64, 65), 64)]
)
@pytest.mark.parametrize("policy", [Dense(), AllSparse(), Static((1, 3))], ids=["full", "sparse", "mixed"])
@pytest.mark.parametrize("fuse", [False, True])
def test_a_chunk_of_one_token(lengths, chunk, policy, fuse):
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    prompts = make_prompts(*lengths)
    controller = attach(model, CONFIG, fuse=fuse)
    controller.policy = policy
    chunked = generate(model, prompts, max_new_tokens=8, chunk_tokens=chunk)
    whole = generate(model, prompts, max_new_tokens=8)
    assert chunked.tokens == whole.tokens
    assert chunked.cache.lengths == whole.cache.lengths
    assert chunked.cache.key_counts.tolist() == whole.cache.key_counts.tolist()


def test_a_packed_token_is_no_decode_step():
    assert not Layout.pack((0,), (1,), (64,)).is_decode
    assert Layout.decode((64,)).is_decode
    assert Layout.decode((64, 3)).is_decode
