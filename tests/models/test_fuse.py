"""Fused layers against the model's own: the same logits, the same tokens, and nothing left behind."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from flux_attention.generation import generate
from flux_attention.models import fuse as fuse_module
from flux_attention.models.attach import attach, attached, detach
from flux_attention.models.families import FAMILIES as ROWS
from flux_attention.route import Dense, Fixed
from tests.models.test_attach import logits_of, opinionated, worst
from tests.models.tiny import CONFIG, FAMILIES, SHAPE, VOCABULARY, left_pad, make_model, make_prompts, mixed_route

FUSABLE = [name for name in FAMILIES if name in ROWS and ROWS[name].fusable]
LENGTHS = (150, 111, 73)
TOLERANCE = 1e-4


def biased(model: nn.Module) -> nn.Module:
    """Biases and norms start at values that hide their absence."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("family", FUSABLE)
@torch.no_grad()
def test_logits_are_the_models(family):
    model = biased(make_model(family))
    ids, mask = left_pad(make_prompts(*LENGTHS))
    expected = logits_of(model, ids, mask)
    controller = attach(model, CONFIG, fuse=True)
    with controller.using(Dense()):
        assert worst(logits_of(model, ids, mask), expected, mask) <= TOLERANCE
    detach(model)
    assert torch.equal(logits_of(model, ids, mask), expected)


@pytest.mark.parametrize("family", FUSABLE)
@pytest.mark.parametrize("lengths", [(150,), LENGTHS])
def test_tokens_are_the_models(family, lengths):
    """One row takes the one-token path, several rows the other."""
    model = biased(make_model(family))
    model.generation_config.eos_token_id = None
    prompts = make_prompts(*lengths)
    found = []
    for fuse in (False, True):
        controller = attach(model, CONFIG, fuse=fuse)
        assert (controller.fusion is not None) == fuse
        route = mixed_route(len(controller.layers), len(lengths))
        found.append(generate(model, prompts, max_new_tokens=40, route=route, chunk_tokens=64).tokens)
        ids, mask = left_pad(prompts)
        with controller.using(Fixed(route)):
            again = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
        assert again[:, max(lengths) :].tolist() == found[-1]
        detach(model)
    assert found[0] == found[1]


def test_nothing_is_left_behind():
    model = make_model("qwen3")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    attach(model, CONFIG, fuse=True)
    assert any("forward" in vars(module) for module in model.modules())
    detach(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_a_probe_takes_keys_and_values_in_one_product(family, monkeypatch):
    """Where their weights lie together: from attach to detach, unless somebody moves them."""

    def adjacent() -> list[bool]:
        modules = [layer.self_attn for layer in model.model.layers]
        return [
            a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
            for m in modules
            for a, b in zip(m.k_proj.parameters(), m.v_proj.parameters(), strict=True)
        ]

    products, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: products.append(w.shape[0]) or linear(x, w, b))
    model, prompts = biased(make_model(family)), make_prompts(*LENGTHS)
    controller = attach(model, CONFIG, fuse=False)
    opinionated(controller)
    state, expected = controller.router.state_dict(), controller.route(prompts).p_full
    detach(model)
    controller = attach(model, CONFIG, fuse=True)
    controller.router.load_state_dict(state)
    layers = len(controller.layers)
    wide = 2 * model.model.layers[0].self_attn.k_proj.out_features

    def probe() -> int:
        products.clear()
        torch.testing.assert_close(controller.route(prompts).p_full, expected, rtol=0, atol=1e-4)
        return products.count(wide)

    # The last layer's are never needed.
    assert all(adjacent()) and probe() == layers - 1
    model.model.layers[1].self_attn.v_proj.weight.data = model.model.layers[1].self_attn.v_proj.weight.data.clone()
    assert probe() == layers - 2
    # Whole prompts are read as a prefill runs.
    products.clear()
    controller.read(prompts, mixed_route(layers, len(prompts)))
    assert products.count(wide) == 0
    detach(model)
    assert not any(adjacent())


def test_gradients_and_hooks_take_the_models_own_code(monkeypatch):
    model = make_model("qwen3")
    controller = attach(model, CONFIG, fuse=True)
    assert controller.fusion is not None

    def refuse(*args, **kwargs):
        raise AssertionError("fused code ran")

    for name in ("rms_norm", "add_rms_norm", "silu_mul", "rotary"):
        monkeypatch.setattr(f"flux_attention.kernels.fused.{name}", refuse)
    ids = make_prompts(40)[0][None]
    model(ids, use_cache=False).logits.sum().backward()
    with torch.no_grad(), pytest.raises(AssertionError, match="fused code ran"):
        model(ids, use_cache=False)
    seen = []
    handles = [
        layer.mlp.down_proj.register_forward_hook(lambda *_: seen.append(1)) for layer in controller.decoder.layers
    ]
    monkeypatch.setattr("flux_attention.kernels.fused.rms_norm", lambda x, norm: norm(x))
    with torch.no_grad():
        model(ids, use_cache=False)
    assert len(seen) == len(controller.decoder.layers)
    for handle in handles:
        handle.remove()


def test_what_cannot_be_fused_is_refused():
    for family in ("gemma3", "qwen3_moe"):
        model = make_model(family)
        with pytest.raises(ValueError, match=r"cannot be fused.*fuse=False"):
            attach(model, CONFIG, fuse=True)
        # A refused attach leaves nothing attached.
        attach(model, CONFIG)
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.forward = model.model.layers[1].mlp.up_proj.forward
    with pytest.raises(ValueError, match="forward function of its own"):
        attach(model, CONFIG, fuse=True)
    model = make_model("llama")
    model.model.layers[2].self_attn.k_proj = nn.Sequential(model.model.layers[2].self_attn.k_proj)
    with pytest.raises(ValueError, match="Sequential, not Linear"):
        attach(model, CONFIG, fuse=True)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("source", ["probe", "inline"])
@torch.no_grad()
def test_routes_are_the_unfused_ones(family, source):
    model = biased(make_model(family))
    ids, mask = left_pad(make_prompts(*LENGTHS))
    routes = []
    state = None
    for fuse in (False, True):
        controller = attach(model, replace(CONFIG, router_input=source), fuse=fuse)
        if state is None:
            opinionated(controller)
            state = controller.router.state_dict()
        controller.router.load_state_dict(state)
        logits_of(model, ids, mask)
        routes.append(controller.last_route)
        detach(model)
    torch.testing.assert_close(routes[0].p_full, routes[1].p_full, rtol=0, atol=1e-4)
    assert 0 < routes[0].sparsity.mean() < 1 and torch.equal(routes[0].use_full, routes[1].use_full)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@torch.no_grad()
def test_reading_is_what_an_inline_router_sees(family):
    """Under the route that it decides on, whole prompts of several lengths together; a probe sees something else."""
    model, prompts = biased(make_model(family)), make_prompts(*LENGTHS)
    for fuse in (False, True) if family in FUSABLE else (False,):
        controller = attach(model, replace(CONFIG, router_input="inline"), fuse=fuse)
        opinionated(controller)
        ids, mask = left_pad(prompts)
        logits_of(model, ids, mask)
        route = controller.last_route
        assert route is not None and 0 < route.sparsity.mean() < 1
        found = controller.router.p_full(controller.read(prompts, route))
        torch.testing.assert_close(found, route.p_full, rtol=0, atol=1e-4)
        assert (controller.router.p_full(controller.probe(prompts)) - route.p_full).abs().max() > 1e-3
        detach(model)


@torch.no_grad()
def test_captured_outputs_are_the_models():
    """transformers leaves its capturing hooks on a model; hidden states are right, and layers stay fused."""
    model = biased(make_model("qwen3"))
    ids = make_prompts(40)[0][None]
    expected = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    controller = attach(model, CONFIG, fuse=True)
    assert controller.fusion is not None and not any(layer.hooked for layer in controller.fusion.layers)
    found = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_biased_mlps_are_refused():
    """One-token products up know no bias; the biases of all other projections are added."""
    torch.manual_seed(0)
    model = biased(LlamaForCausalLM(LlamaConfig(**SHAPE, mlp_bias=True)).eval())
    with pytest.raises(ValueError, match="MLPs have biases"):
        attach(model, CONFIG, fuse=True)
    torch.manual_seed(0)
    model = biased(LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)).eval())
    generator = torch.Generator().manual_seed(4)
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = nn.Parameter(torch.randn(96, generator=generator))
    model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY, generator=generator))
    assert one_by_one(model, fuse=True) == one_by_one(model, fuse=False)


@torch.no_grad()
def test_a_probe_adds_the_bias_of_values_alone():
    model, prompts = make_model("llama"), make_prompts(*LENGTHS)
    for layer in model.model.layers:
        layer.self_attn.v_proj.bias = nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(4)))
    controller = attach(model, CONFIG, fuse=False)
    expected = controller.probe(prompts)
    detach(model)
    torch.testing.assert_close(attach(model, CONFIG, fuse=True).probe(prompts), expected, rtol=0, atol=TOLERANCE)


def one_by_one(model, fuse: bool) -> list[int]:
    """Tokens of one prompt, which a fused model generates by its one-token path; the model is detached again."""
    model.generation_config.eos_token_id = None
    controller = attach(model, CONFIG, fuse=fuse)
    route = mixed_route(len(controller.layers), 1)
    tokens = generate(model, make_prompts(LENGTHS[0]), max_new_tokens=16, route=route).tokens[0]
    detach(model)
    return tokens


class Low(nn.Module):
    """A linear layer with something of low rank added, as adapters wrap it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features, generator=generator) * 0.2)
        self.up = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) * 0.2)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "forward"])
@torch.no_grad()
def test_modules_replaced_after_the_attach_are_run(name):
    def tokens(fuse: bool, wrap: bool) -> list[int]:
        model = biased(make_model("qwen3"))
        model.generation_config.eos_token_id = None
        controller = attach(model, CONFIG, fuse=fuse)
        for layer in controller.decoder.layers if wrap else ():
            if name == "forward":
                layer.mlp.forward = lambda x, mlp=layer.mlp: 2 * type(mlp).forward(mlp, x)
            else:
                parent, _, child = name.rpartition(".")
                module = layer.get_submodule(parent)
                setattr(module, child, Low(getattr(module, child)))
        route = mixed_route(len(controller.layers), 1)
        found = generate(model, make_prompts(LENGTHS[0]), max_new_tokens=16, route=route).tokens[0]
        detach(model)
        return found

    expected = tokens(fuse=False, wrap=True)
    assert expected != tokens(fuse=False, wrap=False)
    assert tokens(fuse=True, wrap=True) == expected


@torch.no_grad()
def test_weights_assigned_after_the_attach_are_used():
    model, other = biased(make_model("qwen3")), biased(make_model("qwen3", seed=1))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "norm" in name:
                parameter.mul_(2)
    ids, mask = left_pad(make_prompts(*LENGTHS))
    expected = logits_of(other, ids, mask)
    controller = attach(model, CONFIG, fuse=True)
    model.load_state_dict(other.state_dict(), assign=True)
    with controller.using(Dense()):
        assert worst(logits_of(model, ids, mask), expected, mask) <= TOLERANCE


def by_deepcopy(model):
    return copy.deepcopy(model)


def by_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_save])
@torch.no_grad()
def test_a_copy_is_its_own_model(duplicate):
    model = biased(make_model("qwen3"))
    ids, mask = left_pad(make_prompts(*LENGTHS))
    controller = attach(model, CONFIG, fuse=True)
    opinionated(controller)
    expected = logits_of(model, ids, mask)
    other = duplicate(model)
    assert attached(other) is not controller
    assert worst(logits_of(other, ids, mask), expected, mask) <= TOLERANCE
    for parameter in other.model.layers.parameters():
        parameter.zero_()
    other.lm_head.weight.zero_()
    other.model.norm.weight.zero_()
    assert logits_of(other, ids, mask).abs().max() == 0
    assert torch.equal(logits_of(model, ids, mask), expected)
    detach(other)
    assert not any("forward" in vars(module) for module in other.modules())
    assert torch.equal(logits_of(model, ids, mask), expected)


@pytest.mark.parametrize("after", [0, 3])
def test_a_fusion_that_fails_half_way_is_undone(after, monkeypatch):
    model = make_model("qwen2")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    lay_together, calls = fuse_module._lay_together, []

    def fail(*tensors):
        if len(calls) == after:
            raise torch.OutOfMemoryError
        calls.append(1)
        lay_together(*tensors)

    monkeypatch.setattr(fuse_module, "_lay_together", fail)
    with pytest.raises(torch.OutOfMemoryError):
        attach(model, CONFIG, fuse=True)
    monkeypatch.undo()
    set_forward, set_calls = fuse_module.Fusion._set, []

    def fail_later(self, module, forward):
        if len(set_calls) == after:
            raise KeyboardInterrupt
        set_calls.append(1)
        set_forward(self, module, forward)

    monkeypatch.setattr(fuse_module.Fusion, "_set", fail_later)
    with pytest.raises(KeyboardInterrupt):
        attach(model, CONFIG, fuse=True)
    monkeypatch.undo()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"
    for layer in model.model.layers:
        k, v = layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight
        assert k.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    attach(model, CONFIG, fuse=True)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_hooks_on_attention_see_every_decode_step(register):
    model = make_model("qwen3")
    model.generation_config.eos_token_id = None
    attach(model, CONFIG, fuse=True)
    seen = []
    getattr(model.model.layers[1].self_attn, register)(lambda *_: seen.append(1))
    prompt = make_prompts(40)[0][None]
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    assert len(seen) == 6
