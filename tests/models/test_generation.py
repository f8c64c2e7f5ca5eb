"""The package's own generate against transformers' generate under the same route."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from flux_attention import generation
from flux_attention.cache import PagePool, PoolExhaustedError, cache_argument
from flux_attention.generation import generate
from flux_attention.models.attach import attach, attached
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
    free = generate(model, prompt, max_new_tokens=12, generation_config=GenerationConfig(eos_token_id=[]))
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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_request_that_fails_gives_its_pages_back(error):
    model = make_model("llama")
    attach(model, CONFIG)
    (prompt,) = make_prompts(80)
    pool = PagePool(16, 2, 16, torch.float32, "cpu", max_pages=60)

    def fail(row: int, token: int) -> None:
        raise error

    with pytest.raises(error):
        generate(model, prompt, max_new_tokens=4, pool=pool, on_token=fail)
    assert pool.free_pages == 60


@pytest.mark.parametrize("kind", ["streaming", "inline", "hybrid"])
def test_a_pool_too_small_for_the_answer_is_refused_before_any_work(kind):
    """… and one that is just large enough holds it: what is counted is what is used."""
    model = make_model("gemma3" if kind == "hybrid" else "llama")
    model.generation_config.eos_token_id = None
    controller = attach(model, replace(CONFIG, router_input="inline") if kind == "inline" else CONFIG)
    layers = len(controller.layers)
    # 160 tokens end with a page, where a streaming row holds one page less than just before.
    (prompt,) = make_prompts(144)
    route = None if kind == "inline" else Route(torch.zeros(layers, 1, dtype=torch.bool))
    # An inline router may choose full attention everywhere.
    enough = layers * (10 if kind == "inline" else 4)
    for pages in range(layers, enough):
        pool, seen = PagePool(16, 2, 16, torch.float32, "cpu", max_pages=pages), []
        with pytest.raises(PoolExhaustedError):
            generate(
                model, prompt, max_new_tokens=16, pool=pool, route=route, on_token=lambda *t, seen=seen: seen.append(t)
            )
        assert not seen and pool.free_pages == pages
    pool = PagePool(16, 2, 16, torch.float32, "cpu", max_pages=enough)
    assert len(generate(model, prompt, max_new_tokens=16, pool=pool, route=route).tokens[0]) == 16


@pytest.mark.parametrize("sample", [False, True])
def test_options_left_unset_are_the_models_as_in_transformers(sample):
    model = make_model("llama")
    controller = attach(model, CONFIG)
    (prompt,) = make_prompts(60)
    config = GenerationConfig(max_new_tokens=10, do_sample=sample, pad_token_id=0)

    def both(config: GenerationConfig) -> tuple[list[int], list[int]]:
        with controller.using(Fixed(mixed_route(4, 1))):
            torch.manual_seed(0)
            ours = generate(model, prompt, generation_config=config).tokens[0]
            torch.manual_seed(0)
            theirs = model.generate(prompt[None], generation_config=config)[0, 60:].tolist()
        return ours, theirs

    # Of the model: a penalty, and sampling options that count only where it samples.
    model.generation_config.update(eos_token_id=None, repetition_penalty=1.3, temperature=2.0, top_p=0.9, typical_p=1.0)
    ours, theirs = both(config)
    assert ours == theirs and len(ours) == 10
    stop = next(token for i, token in enumerate(ours) if i and token not in ours[:i])
    model.generation_config.eos_token_id = stop
    ours, theirs = both(config)
    assert ours == theirs and ours[-1] == stop and len(ours) < 10
    assert len(
        generate(model, prompt, generation_config=GenerationConfig(eos_token_id=[], max_new_tokens=10)).tokens[0]
    )
    model.generation_config.eos_token_id = None
    for length in (None, 64):
        ours, theirs = both(GenerationConfig(max_length=length, do_sample=sample, pad_token_id=0))
        assert ours == theirs and len(ours) == (20 if length is None else 4)
    with pytest.raises(ValueError, match="max_length=60 leaves no new token"):
        generate(model, prompt, generation_config=GenerationConfig(max_length=60))


def test_sampling_draws_from_transformers_default_of_50():
    model = make_model("llama")
    attach(model, CONFIG)
    (prompt,) = make_prompts(40)
    with torch.no_grad():
        best = set(model(prompt[None]).logits[0, -1].topk(50).indices.tolist())
    config = GenerationConfig(do_sample=True, temperature=4.0, max_new_tokens=1)
    generator = torch.Generator().manual_seed(0)
    drawn = generate(model, [prompt] * 200, generation_config=config, generator=generator).tokens
    assert {row[0] for row in drawn} <= best


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2, "do_sample": True},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 1},
        {"min_length": 5},
        {"suppress_tokens": [5]},
        {"begin_suppress_tokens": [5]},
        {"bad_words_ids": [[5]]},
        {"sequence_bias": {(5,): -10.0}},
        {"typical_p": 0.2, "do_sample": True},
        {"eta_cutoff": 0.1, "do_sample": True},
        {"epsilon_cutoff": 0.1, "do_sample": True},
        {"max_time": 1},
        {"guidance_scale": 1.5},
        {"forced_eos_token_id": 0},
        {"exponential_decay_length_penalty": (5, 1.5)},
        {"remove_invalid_values": True},
        {"stop_strings": ["x"]},
        {"cache_implementation": "quantized"},
        {"output_scores": True, "return_dict_in_generate": True},
        {"prefill_chunk_size": 16},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_are_not_supported_are_refused(options):
    """Of the request or of the model: transformers would heed either."""
    model = make_model("llama")
    attach(model, CONFIG)
    prompt, name = torch.full((1, 9), 5), next(iter(options))
    with pytest.raises(ValueError, match=f"{name}=.* is not supported here"):
        generate(model, prompt, generation_config=GenerationConfig(max_new_tokens=2, **options))
    for key, value in options.items():
        setattr(model.generation_config, key, value)
    with pytest.raises(ValueError, match=f"{name}=.* is not supported here"):
        generate(model, prompt, max_new_tokens=2)


def test_options_that_are_off_or_change_nothing_pass():
    model = make_model("llama")
    attach(model, CONFIG)
    # Every option at the value that transformers itself fills in, and what published models set.
    for name, value in GenerationConfig._get_default_generation_params().items():
        setattr(model.generation_config, name, value)
    model.generation_config.cache_implementation = "hybrid"
    model.generation_config.typical_p = 0.5
    model.generation_config.chat_format = "chatml"
    config = GenerationConfig(do_sample=False, eos_token_id=[], max_new_tokens=3, guidance_scale=1.0, num_beams=1)
    assert len(generate(model, torch.full((1, 9), 5), generation_config=config).tokens[0]) == 3


@pytest.mark.parametrize("late", [0, 1])
@torch.no_grad()
def test_second_turn_on_the_cache(late, monkeypatch):
    """By default the pool has just the request's pages; an end that is seen a step late leaves nothing behind it."""
    monkeypatch.setattr(generation, "_late", lambda device: late)
    model = make_model("llama")
    attach(model, CONFIG)
    route = mixed_route(4, 1)
    (turn,) = make_prompts(40, seed=5)
    for length in range(140, 157):
        (prompt,) = make_prompts(length, seed=length)
        free = generate(
            model, prompt, max_new_tokens=6, generation_config=GenerationConfig(eos_token_id=[]), route=route
        )
        for stop in ([], [free.tokens[0][3]]):
            config = GenerationConfig(eos_token_id=stop, max_new_tokens=6)
            result = generate(model, prompt, generation_config=config, route=route)
            text = torch.cat((prompt, torch.tensor(result.tokens[0]), turn))
            held = result.cache.lengths[0]
            assert length < held <= text.numel() - turn.numel()
            out = model(text[None, held:], **cache_argument(model, result.cache)).logits
            with attached(model).using(Fixed(route)):
                whole = model(text[None], use_cache=False).logits[:, held:]
            assert (out - whole).abs().max() <= 1e-4


def test_last_route_is_set():
    model = make_model("llama")
    controller = attach(model, CONFIG)
    (prompt,) = make_prompts(60)
    for route in (Route.full(4, 1), mixed_route(4, 1)):
        generate(model, prompt, max_new_tokens=2, route=route)
        assert controller.last_route is not None
        assert torch.equal(controller.last_route.use_full, route.use_full)
