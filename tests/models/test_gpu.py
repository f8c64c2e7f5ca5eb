"""Whole models on the GPU, float32: graphs, tuning and fused kernels give what transformers and the CPU give."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flux_attention.generation import generate
from flux_attention.models.attach import attach, detach
from flux_attention.route import Fixed
from tests.models.test_attach import opinionated
from tests.models.tiny import CONFIG, SHAPE, left_pad, make_prompts, mixed_route

pytestmark = pytest.mark.gpu

#: Head dim 64: the least that the triton kernels take.
WIDE = SHAPE | {"head_dim": 64, "hidden_size": 192, "intermediate_size": 320}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**WIDE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE)),
}


def make(family: str):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(300,), (300, 222, 97)])
def test_generate_equals_transformers(family, lengths):
    """Graph or not, fused or not, tuned or not: the tokens of transformers' own generate under the same route."""
    model = make(family).cuda()
    prompts = [p.cuda() for p in make_prompts(*lengths)]
    ids, mask = (x.cuda() for x in left_pad([p.cpu() for p in prompts]))
    new, expected = 70, None
    for fuse in (False, None):
        controller = attach(model, CONFIG, fuse=fuse)
        assert (controller.fusion is None) == (fuse is False)
        route = mixed_route(len(controller.layers), len(lengths))
        with controller.using(Fixed(route)):
            theirs = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, max(lengths) :]
        expected = theirs.tolist() if expected is None else expected
        assert theirs.tolist() == expected
        # Tuning compiles every configuration, and one family's are all of them.
        tuned: tuple[dict[str, bool], ...] = ({"tuned": True},) if family == "qwen3" else ()
        for options in ({"cuda_graph": False}, {"tuned": False}, *tuned):
            result = generate(model, prompts, max_new_tokens=new, route=route, chunk_tokens=128, **options)
            assert result.tokens == expected, (fuse, options)
            result.cache.clear()
        detach(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_graph_is_the_probe(family):
    model = make(family)
    prompts = make_prompts(150, 111, 73)
    controller = attach(model, CONFIG)
    opinionated(controller)
    expected, state = controller.route(prompts), copy.deepcopy(controller.router.state_dict())
    detach(model)
    controller = attach(model.cuda(), CONFIG)
    controller.router.load_state_dict(state)
    for _ in range(2):
        found = controller.route(prompts)
        torch.testing.assert_close(found.p_full, expected.p_full, rtol=0, atol=1e-3)
    # Every prompt alone, through another graph, and in another order, through the same one.
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(controller.route([prompt]).p_full[:, 0], expected.p_full[:, i], rtol=0, atol=1e-3)
    turned = controller.route(prompts[::-1]).p_full
    torch.testing.assert_close(turned.flip(1), expected.p_full, rtol=0, atol=1e-3)
    assert len(controller._probes._graphs) == 2


def test_inline_routes_are_the_cpus():
    model = make("qwen3")
    prompts = make_prompts(300, 222)
    controller = attach(model, replace(CONFIG, router_input="inline"))
    opinionated(controller)
    expected, state = generate(model, prompts, max_new_tokens=2), copy.deepcopy(controller.router.state_dict())
    detach(model)
    controller = attach(model.cuda(), replace(CONFIG, router_input="inline"))
    controller.router.load_state_dict(state)
    found = generate(model, [p.cuda() for p in prompts], max_new_tokens=2)
    assert 0 < found.route.sparsity.mean() < 1
    torch.testing.assert_close(found.route.p_full, expected.route.p_full, rtol=0, atol=1e-3)
    assert found.tokens == expected.tokens
