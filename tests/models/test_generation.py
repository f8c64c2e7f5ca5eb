"""The package's own generate against transformers' generate under the same route."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from flux_attention import generation
from flux_attention.cache import PagePool, PoolExhaustedError
from flux_attention.generation import generate
from flux_attention.models.attach import attach
from flux_attention.route import Dial, Fixed, Route
from tests.models.test_attach import opinionated
from tests.models.tiny import CONFIG, FAMILIES, left_pad, make_model, make_prompts, mixed_route

LENGTHS = (150, 111, 73)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("sparse", ["streaming", "triangle", "xattention"])
def test_equals_transformers(family, sparse):
    model = make_model(family)
    model.generation_config.eos_token_id = None
    controller = attach(model, replace(CONFIG, sparse_mode=sparse))
    prompts = make_prompts(*LENGTHS)
    ids, mask = left_pad(prompts)
    route = mixed_route(len(controller.layers), 3)
    with controller.using(Fixed(route)):
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)[:, 150:].tolist()
    for chunk in (10_000, 64, 16):
        result = generate(model, prompts, max_new_tokens=30, route=route, chunk_tokens=chunk)
        assert result.tokens == expected
        assert torch.equal(result.route.use_full, route.use_full)
    result.cache.clear()
    pool = result.cache.pool
    assert pool is not None and pool.free_pages == pool.num_pages


def test_tokens_looked_at_a_step_late_are_all_there(monkeypatch):
    model = make_model("llama")
    attach(model, CONFIG)
    prompts = make_prompts(40, 33)
    expected = [generate(model, prompts, max_new_tokens=n).tokens for n in (1, 2, 5)]
    stop = expected[2][0][1]
    stopped = generate(model, prompts, generation_config=GenerationConfig(eos_token_id=stop, max_new_tokens=5)).tokens
    monkeypatch.setattr(generation, "_late", lambda device: 1)
    assert [generate(model, prompts, max_new_tokens=n).tokens for n in (1, 2, 5)] == expected
    late = generate(model, prompts, generation_config=GenerationConfig(eos_token_id=stop, max_new_tokens=5))
    assert late.tokens == stopped and len(stopped[0]) == 2


def test_padded_and_listed_prompts_agree():
    model = make_model("llama")
    controller = attach(model, CONFIG)
    opinionated(controller)
    prompts = make_prompts(*LENGTHS)
    ids, mask = left_pad(prompts)
    listed = generate(model, prompts, max_new_tokens=10)
    padded = generate(model, ids, mask, max_new_tokens=10)
    assert listed.tokens == padded.tokens and torch.equal(listed.route.use_full, padded.route.use_full)
    with controller.using(None, Dial(min_sparsity=1.0)):
        assert generate(model, prompts, max_new_tokens=2).route.sparsity.tolist() == [1.0, 1.0, 1.0]


def test_stops_samples_and_reports():
    model = make_model("llama")
    attach(model, CONFIG)
    (prompt,) = make_prompts(80)
    free = generate(model, prompt, max_new_tokens=12, generation_config=GenerationConfig(eos_token_id=None))
    stop = free.tokens[0][5]
    seen: list[tuple[int, int]] = []
    config = GenerationConfig(eos_token_id=[stop, 96])
    short = generate(
        model, prompt, max_new_tokens=12, generation_config=config, on_token=lambda row, t: seen.append((row, t))
    )
    assert short.tokens[0] == free.tokens[0][: free.tokens[0].index(stop) + 1]
    assert [t for _, t in seen] == short.tokens[0]
    sampling = GenerationConfig(do_sample=True, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2)
    draws = [
        generate(
            model,
            prompt,
            max_new_tokens=8,
            generation_config=sampling,
            generator=torch.Generator().manual_seed(seed),
        ).tokens
        for seed in (0, 0, 1, 2)
    ]
    assert draws[0] == draws[1] and (draws[0] != draws[2] or draws[0] != draws[3])
    assert short.prefill_seconds > 0 and short.memory.held <= short.memory.dense


def test_small_pool_is_refused_before_any_work():
    model = make_model("llama")
    attach(model, CONFIG)
    prompts = make_prompts(*LENGTHS)
    pool = PagePool(16, 2, 16, torch.float32, "cpu", max_pages=20)
    with pytest.raises(PoolExhaustedError, match=r"needs [\d,]+ bytes .* has [\d,]+ free"):
        generate(model, prompts, max_new_tokens=4, pool=pool, route=Route.full(4, 3))
    assert pool.free_pages == 20
    # A request that fits is unharmed, and gives its pages back.
    result = generate(model, prompts[2:], max_new_tokens=4, pool=pool, route=Route.full(4, 1))
    result.cache.clear()
    assert pool.free_pages == 20


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_ids": []}, "no prompt"),
        ({"input_ids": [torch.zeros(0, dtype=torch.long)]}, "prompt 0 is empty"),
        ({"input_ids": torch.tensor([[0, 5, 6], [4, 5, 6]])}, "padding token 0 and has no attention_mask"),
        ({"input_ids": torch.full((1, 1020), 5), "max_new_tokens": 10}, "context of 1024"),
        ({"input_ids": torch.full((1, 9), 5), "max_new_tokens": 0}, "at least 1"),
        ({"input_ids": torch.full((1, 9), 5), "generation_config": GenerationConfig(num_beams=4)}, "num_beams=4"),
        ({"input_ids": torch.full((1, 9), 5), "cuda_graph": True}, "CUDA"),
        ({"input_ids": torch.full((1, 9), 5), "tuned": True}, "CUDA graph"),
        ({"input_ids": torch.full((2, 9), 5), "attention_mask": torch.ones(2, 8)}, "does not match"),
    ],
)
def test_bad_requests(kwargs, message):
    model = make_model("llama")
    attach(model, CONFIG)
    with pytest.raises(ValueError, match=message):
        generate(model, **kwargs)


def test_inline_router_needs_whole_prompts():
    model = make_model("llama")
    controller = attach(model, replace(CONFIG, router_input="inline"))
    opinionated(controller)
    prompts = make_prompts(*LENGTHS)
    result = generate(model, prompts, max_new_tokens=3)
    assert 0 < result.route.sparsity.mean() < 1
    with pytest.raises(ValueError, match="sees a prompt whole"):
        generate(model, prompts, chunk_tokens=64)
