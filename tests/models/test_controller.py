"""What a controller does with the caches that callers bring, and after passes that fail."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from flux_attention.cache import PagePool, PoolExhaustedError, cache_argument
from flux_attention.models.attach import attach
from flux_attention.route import AllSparse, Fixed, Static
from tests.models.tiny import CONFIG, make_model, make_prompts, mixed_route

TOLERANCE = 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_a_callers_empty_cache_is_kept_for_its_next_call(family):
    """transformers' ordinary loop: the caller goes on to pass the DynamicCache it made."""
    model = make_model(family)
    controller = attach(model, CONFIG)
    (prompt,) = make_prompts(150)
    with controller.using(Fixed(mixed_route(len(controller.layers), 1))):
        whole = model(prompt[None], use_cache=False).logits
        cache, parts = DynamicCache(config=model.config), []
        for a, b in ((0, 100), (100, 101), (101, 149), (149, 150)):
            parts.append(model(prompt[None, a:b], **cache_argument(model, cache)).logits)
            assert cache.get_seq_length() == b
    assert (torch.cat(parts, 1) - whole).abs().max() <= TOLERANCE
    with pytest.raises(NotImplementedError, match="reset the whole FluxCache"):
        cache.reset()


@torch.no_grad()
def test_two_answers_of_transformers_on_a_callers_cache():
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    attach(model, CONFIG).policy = Static((1, 3))
    first, second = make_prompts(100, 30)
    cache = DynamicCache(config=model.config)
    options = {"max_new_tokens": 6, "do_sample": False}
    text = model.generate(first[None], **options, **cache_argument(model, cache))
    text = torch.cat((text, second[None]), 1)
    # transformers feeds only what the cache does not hold: with another length it would feed the wrong tokens.
    again = model.generate(text, **options, **cache_argument(model, cache))
    assert torch.equal(again, model.generate(text, **options))


def _fail(model, ids: Tensor, cache, error: type[BaseException]) -> None:
    def fail(*_: object) -> None:
        raise error

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(ids, **cache_argument(model, cache))
    handle.remove()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_a_failed_turn_is_told(error):
    """Part of its layers hold the turn: neither going on nor beginning anew in silence would be the conversation."""
    model = make_model("llama")
    controller = attach(model, CONFIG)
    controller.policy = Static((1, 3))
    first, second = make_prompts(150, 60)
    expected = model(first[None]).logits
    pool = PagePool(16, 2, 16, torch.float32, "cpu", max_pages=60)
    cache = controller.new_cache(pool=pool)
    kept = cache_argument(model, cache)
    # At the first turn nothing was held that could be lost.
    _fail(model, first[None], cache, error)
    assert torch.equal(model(first[None], **kept).logits, expected)
    _fail(model, second[None], cache, error)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"failed half way.*controller\.new_cache"):
            model(second[None], **kept)
    assert controller._step is None and pool.free_pages == 60
    cache.clear()
    assert torch.equal(model(first[None], **kept).logits, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_a_failed_decode_step_can_be_fed_again(error):
    model = make_model("llama")
    controller = attach(model, CONFIG)
    controller.policy = Static((1, 3))
    (prompt,) = make_prompts(161)
    cache = controller.new_cache()
    model(prompt[None, :160], **cache_argument(model, cache))
    expected = model(prompt[None, 160:], **cache_argument(model, copy.deepcopy(cache))).logits
    _fail(model, prompt[None, 160:], cache, error)
    assert torch.equal(model(prompt[None, 160:], **cache_argument(model, cache)).logits, expected)


@torch.no_grad()
def test_a_failed_decode_step_of_a_hybrid_is_told():
    """Its sliding layers have appended the token already."""
    model = make_model("gemma3")
    controller = attach(model, CONFIG)
    (prompt,) = make_prompts(61)
    cache = controller.new_cache()
    model(prompt[None, :60], **cache_argument(model, cache))
    _fail(model, prompt[None, 60:], cache, RuntimeError)
    with pytest.raises(RuntimeError, match="failed half way"):
        model(prompt[None, 60:], **cache_argument(model, cache))


@torch.no_grad()
def test_a_refused_cache_is_as_before():
    model = make_model("llama")
    controller = attach(model, CONFIG)
    long, short = make_prompts(200, 20)
    pool = PagePool(16, 2, 16, torch.float32, "cpu", max_pages=20)
    cache = controller.new_cache(pool=pool)
    kept = cache_argument(model, cache)
    with pytest.raises(PoolExhaustedError):
        model(long[None], **kept)
    out = model(short[None], **kept)
    with pytest.raises(PoolExhaustedError):
        model(long[None], **kept)
    assert out.logits.shape[1] == 20 and cache.lengths == [20]
    # Refused before it began, a second turn leaves the first one's state.
    whole = model(torch.cat((short, short))[None], use_cache=False).logits[:, 20:]
    assert (model(short[None], **kept).logits - whole).abs().max() <= TOLERANCE


def test_pages_keep_no_graph():
    """A pool shared by requests would else tie each to all before it."""
    model = make_model("llama")
    controller = attach(model, CONFIG)
    controller.policy = AllSparse()
    (prompt,) = make_prompts(100)
    pool = PagePool(16, 2, 16, torch.float32, "cpu")
    cache = controller.new_cache(pool=pool)
    model(prompt[None], **cache_argument(model, cache))
    model(prompt[None, :1], **cache_argument(model, cache))
    assert not pool.keys.requires_grad and not pool.values.requires_grad
