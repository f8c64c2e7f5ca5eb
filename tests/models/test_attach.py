"""Routed attention on whole models: equal to the model itself, to its own chunks, and to itself alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, StaticCache

from flux_attention.config import FluxConfig
from flux_attention.generation import generate
from flux_attention.models.attach import attach, attached, detach
from flux_attention.models.step import SoftRouting
from flux_attention.route import AllSparse, Dense, Dial, Fixed, Random, Route, Static
from tests.models.tiny import (
    CONFIG,
    FAMILIES,
    left_pad,
    make_model,
    make_prompts,
    mixed_route,
    positions_of,
)

LENGTHS = (150, 111, 73)
TOLERANCE = 1e-4


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest):
    return make_model(request.param)


@torch.no_grad()
def logits_of(model, ids: Tensor, mask: Tensor, **kwargs) -> Tensor:
    return model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False, **kwargs).logits


def worst(a: Tensor, b: Tensor, mask: Tensor) -> float:
    return ((a - b) * mask[..., None]).abs().max().item()


@torch.no_grad()
def test_all_full_is_the_model(model):
    ids, mask = left_pad(make_prompts(*LENGTHS))
    expected = logits_of(model, ids, mask)
    controller = attach(model, CONFIG)
    with controller.using(Dense()):
        assert worst(logits_of(model, ids, mask), expected, mask) <= TOLERANCE
    # The router starts towards full, so an untrained adapter is the model too.
    assert worst(logits_of(model, ids, mask), expected, mask) <= TOLERANCE
    detach(model)
    assert torch.equal(logits_of(model, ids, mask), expected)


@torch.no_grad()
def test_sparse_layers_change_long_prompts_and_no_short_ones(model):
    controller = attach(model, CONFIG)
    for length, differs in ((CONFIG.min_routed_tokens, False), (150, True)):
        ids, mask = left_pad(make_prompts(length))
        with controller.using(Dense()):
            full = logits_of(model, ids, mask)
        with controller.using(AllSparse()):
            sparse = logits_of(model, ids, mask)
        assert (worst(full, sparse, mask) > 100 * TOLERANCE) == differs


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma3"])
def test_all_sparse_is_the_model_under_the_definitions_mask(family):
    """Written out as transformers' own 4D mask: k ≤ t with k < sink or k ≥ A·⌊t/A⌋ − window."""
    model = make_model(family)
    (prompt,) = make_prompts(150)
    t, k = torch.arange(150)[:, None], torch.arange(150)[None]
    block = CONFIG.block_tokens
    seen = (k <= t) & ((k < CONFIG.sink_tokens) | (k >= block * (t // block) - CONFIG.window_tokens))
    expected = model(prompt[None], attention_mask=seen[None, None], use_cache=False).logits
    controller = attach(model, CONFIG)
    with controller.using(AllSparse()):
        assert (model(prompt[None], use_cache=False).logits - expected).abs().max() <= TOLERANCE


def test_sliding_layers_are_left_alone():
    model = make_model("gemma3")
    controller = attach(model, CONFIG)
    assert controller.layers == (1, 3) and controller.router.num_layers == 2
    with pytest.raises(ValueError, match="routable layers are 0 … 1"), controller.using(Static((2,))):
        model(torch.full((1, 60), 5))


@torch.no_grad()
@pytest.mark.parametrize("widths", [(90, 60), (90, 33, 1, 1, 20, 5), (80, *[1] * 70)])
def test_chunks_and_decode_equal_the_whole(model, widths):
    """prefill(n + m) = prefill(n) + decode(m) = chunks, in a left-padded batch of mixed routes and lengths."""
    ids, mask = left_pad(make_prompts(*LENGTHS))
    positions = positions_of(mask)
    controller = attach(model, CONFIG)
    with controller.using(Fixed(mixed_route(len(controller.layers), 3))):
        whole = logits_of(model, ids, mask)
        cache, parts, done = controller.new_cache(), [], 0
        for width in widths:
            end = done + width
            out = model(
                ids[:, done:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, done:end],
                past_key_values=cache,
            )
            parts.append(out.logits)
            done = end
    assert done == 150
    assert worst(torch.cat(parts, 1), whole, mask) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right", "packed"])
def test_a_row_is_the_same_alone(model, padding):
    prompts = make_prompts(*LENGTHS)
    controller = attach(model, CONFIG)
    route = mixed_route(len(controller.layers), 3)
    if padding == "packed" and len(controller.layers) < model.config.num_hidden_layers:
        pytest.skip("transformers packs sliding layers by itself; their masks are its business")
    alone = []
    for s, prompt in enumerate(prompts):
        with controller.using(Fixed(route.select([s]))):
            alone.append(model(prompt[None], use_cache=False).logits[0])
    with controller.using(Fixed(route)):
        if padding == "packed":
            positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
            out = model(torch.cat(prompts)[None], position_ids=positions, use_cache=False).logits[0]
            together = list(out.split(LENGTHS))
        else:
            ids, mask = left_pad(prompts)
            if padding == "right":
                flipped = left_pad([p.flip(0) for p in prompts])
                ids, mask = flipped[0].flip(1), flipped[1].flip(1)
            # Poison: whatever the padding holds must not matter.
            ids = torch.where(mask.bool(), ids, torch.randint(3, 97, ids.shape))
            out = logits_of(model, ids, mask)
            together = [row[m.bool()] for row, m in zip(out, mask, strict=True)]
    for a, b in zip(alone, together, strict=True):
        assert (a - b).abs().max().item() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("pair", [("full", "triangle"), ("full", "xattention"), ("xattention", "streaming")])
def test_a_row_of_any_mode_is_the_same_alone(pair):
    retrieval, sparse = pair
    model = make_model("llama")
    controller = attach(model, copy_config(retrieval_mode=retrieval, sparse_mode=sparse))
    prompts, route = make_prompts(*LENGTHS), mixed_route(4, 3)
    ids, mask = left_pad(prompts)
    with controller.using(Fixed(route)):
        together = logits_of(model, ids, mask)
    for row, prompt in enumerate(prompts):
        with controller.using(Fixed(route.select([row]))):
            alone = model(prompt[None], use_cache=False).logits[0]
        assert (together[row][mask[row].bool()] - alone).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("router_input", ["inline", "probe"])
def test_short_prompts_never_reach_the_router(router_input, monkeypatch):
    model = make_model("llama")
    controller = attach(model, copy_config(router_input=router_input))
    for name in ("forward", "p_full"):
        monkeypatch.setattr(type(controller.router), name, lambda *_: pytest.fail("the router ran"))
    (prompt,) = make_prompts(CONFIG.min_routed_tokens)
    model(prompt[None])
    assert controller.last_route is not None and controller.last_route.use_full.all()


@torch.no_grad()
@pytest.mark.parametrize("router_input", ["inline", "probe"])
def test_router_decides_per_request(router_input):
    """Routes of a batch are those of its rows alone, padded and packed alike; only the prompt is looked at."""
    model = make_model("qwen3")
    controller = attach(model, copy_config(router_input=router_input))
    opinionated(controller)
    prompts = make_prompts(*LENGTHS, 40)
    alone = []
    for prompt in prompts:
        model(prompt[None])
        alone.append(controller.last_route)
    assert alone[3].use_full.all(), "a prompt too short to gain stays dense"
    use_full = torch.cat([r.use_full for r in alone[:3]], 1)
    assert use_full.any() and not use_full.all() and not torch.equal(use_full[:, 0], use_full[:, 1])

    ids, mask = left_pad(prompts)
    logits_of(model, ids, mask)
    assert torch.equal(controller.last_route.use_full[:, :3], use_full)
    assert torch.allclose(controller.last_route.p_full[:, 0], alone[0].p_full[:, 0], atol=1e-5)
    positions = torch.cat([torch.arange(p.numel()) for p in prompts])[None]
    model(torch.cat(prompts)[None], position_ids=positions, use_cache=False)
    assert torch.equal(controller.last_route.use_full[:, :3], use_full)
    # Teacher forcing: the answer stands behind the prompt and is not pooled.
    with controller.prompt_lengths([150]):
        model(torch.cat((prompts[0], prompts[3]))[None], use_cache=False)
    assert torch.equal(controller.last_route.use_full[:, 0], use_full[:, 0])


def copy_config(**changes) -> FluxConfig:
    from dataclasses import replace

    return replace(CONFIG, **changes)


@torch.no_grad()
def test_inline_sides_are_ready_before_the_decision(monkeypatch):
    """Every layer prepares both sides, waits, and takes one; the result is that of a pass that is given the route."""
    model = make_model("qwen3")
    controller = attach(model, copy_config(router_input="inline"))
    opinionated(controller)
    events = []
    decide = controller.pooling.decide
    monkeypatch.setattr(controller.pooling, "decide", lambda *a: events.append("decide") or decide(*a))

    def watched(name, prepare):
        def prepared(self, inputs):
            run = prepare(self, inputs)
            events.append(f"{name} ready")
            return lambda: events.append(f"{name} taken") or run()

        return prepared

    for name, mode in (("full", controller.full_mode), ("sparse", controller.sparse_mode)):
        monkeypatch.setattr(type(mode), "prepare", watched(name, type(mode).prepare))
    for prompts in (make_prompts(LENGTHS[0]), make_prompts(*LENGTHS)):
        events.clear()
        ids, mask = left_pad(prompts)
        found, route = logits_of(model, ids, mask), controller.last_route
        expected = []
        for use_full in route.use_full.tolist():
            expected += ["full ready", "sparse ready", "decide"]
            # Rows on both sides go by side: neither is taken whole.
            expected += ["full taken"] if all(use_full) else [] if any(use_full) else ["sparse taken"]
        assert events == expected
        with controller.using(Fixed(route)):
            assert (found - logits_of(model, ids, mask))[mask.bool()].abs().max() <= TOLERANCE
    assert len({tuple(row) for row in route.use_full.tolist()}) > 1


def opinionated(controller) -> None:
    """Random last weights, so that the router's answer depends on the prompt."""
    with torch.no_grad():
        torch.manual_seed(3)
        controller.router.fit_input_scale(controller.probe(make_prompts(*[60] * 16, seed=9)))
        controller.router.biases[-1].zero_()
        torch.nn.init.normal_(controller.router.weights[-1], std=0.3)
        for weight in controller.router.weights[:-1]:
            weight.mul_(2)


@torch.no_grad()
def test_generate_of_transformers(model):
    """Greedy generation with mixed routes equals feeding every prefix anew."""
    model.generation_config.eos_token_id = None
    prompts = make_prompts(*LENGTHS)
    ids, mask = left_pad(prompts)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    controller = attach(model, CONFIG)
    with controller.using(Dense()):
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False), expected)
    route = mixed_route(len(controller.layers), 3)
    with controller.using(Fixed(route)):
        got = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
        for row in range(3):
            with controller.using(Fixed(route.select([row]))):
                text = torch.cat((prompts[row], got[row, 150:]))
                again = model(text[None], use_cache=False).logits[0, len(prompts[row]) - 1 : -1].argmax(-1)
            assert torch.equal(again, got[row, 150:])
        torch.manual_seed(0)
        sampled = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True)
        assert sampled.shape == (3, 158)


@torch.no_grad()
def test_beam_search_of_transformers(model):
    """Beams reorder the rows of the cache; with every layer full they are the model's own."""
    ids, mask = left_pad(make_prompts(*LENGTHS))
    options = {"attention_mask": mask, "max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, **options)
    controller = attach(model, CONFIG)
    with controller.using(Dense()):
        assert torch.equal(model.generate(ids, **options), expected)
    # Beams of a prompt share its route; without a cache there is nothing to reorder.
    route = mixed_route(len(controller.layers), 3).select([row for row in range(3) for _ in range(3)])
    with controller.using(Fixed(route)):
        assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


@torch.no_grad()
def test_second_turn_keeps_the_route():
    model = make_model("llama")
    controller = attach(model, CONFIG)
    first, second = make_prompts(150, 30)
    with controller.using(Random(0.5, seed=1)):
        out = model(first[None])
        route = controller.last_route
        out2 = model(second[None], past_key_values=out.past_key_values)
    assert out.past_key_values.route is route
    with controller.using(Fixed(route)):
        whole = model(torch.cat((first, second))[None], use_cache=False).logits
    assert (out2.logits - whole[:, 150:]).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("pair", [("full", "triangle"), ("full", "xattention"), ("xattention", "streaming")])
def test_mode_pairs_in_chunks(pair):
    """Prefill approximations: chunks cut at block boundaries give the whole prompt's result, decode is over all."""
    retrieval, sparse = pair
    model = make_model("qwen3")
    controller = attach(model, copy_config(retrieval_mode=retrieval, sparse_mode=sparse))
    (prompt,) = make_prompts(150)
    with controller.using(Fixed(mixed_route(4, 1))):
        whole = model(prompt[None], use_cache=False).logits
        cache, parts = controller.new_cache(), []
        with controller.prompt_lengths([150]):
            for a, b in ((0, 64), (64, 112), (112, 150)):
                parts.append(model(prompt[None, a:b], past_key_values=cache).logits)
    assert (torch.cat(parts, 1) - whole).abs().max() <= TOLERANCE
    assert cache.memory().share == 1.0 if sparse != "streaming" else cache.memory().share < 1.0


def test_backbone_is_bit_for_bit_unchanged():
    model = make_model("qwen3")
    before = copy.deepcopy(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    controller = attach(model, CONFIG)
    opinionated(controller)
    soft = SoftRouting()
    ids, mask = left_pad(make_prompts(*LENGTHS))
    with controller.soft_routing(soft):
        model(ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    detach(model)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert [name for name, _ in model.named_modules()] == modules
    assert not any("flux" in key for module in model.modules() for key in vars(module))
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("router_input", ["inline", "probe"])
def test_soft_routing_reaches_the_router(router_input):
    """The hard gate of the forward pass is the routed model; gradients reach every layer's router."""
    model = make_model("llama").requires_grad_(False)
    controller = attach(model, copy_config(router_input=router_input))
    opinionated(controller)
    ids, mask = left_pad(make_prompts(*LENGTHS))
    soft = SoftRouting(temperature=1.0, noise=True, generator=torch.Generator().manual_seed(0))
    with controller.soft_routing(soft):
        out = model(ids, attention_mask=mask, use_cache=False).logits
    assert soft.gates is not None and soft.gates.shape == (4, 3)
    assert set(soft.gates.unique().tolist()) <= {0.0, 1.0}
    with torch.no_grad(), controller.using(Fixed(Route(soft.gates.detach() > 0.5))):
        assert worst(logits_of(model, ids, mask), out, mask) <= TOLERANCE
    (out * mask[..., None]).square().mean().backward()
    gradient = controller.router.biases[-1].grad
    assert gradient is not None and bool((gradient.abs().sum(1) > 0).all())


def test_forced_gates_are_differentiable():
    model = make_model("llama").requires_grad_(False)
    controller = attach(model, CONFIG)
    ids, mask = left_pad(make_prompts(150, 111))
    gates = torch.full((4, 2), 0.5, requires_grad=True)
    with controller.soft_routing(SoftRouting(forced=gates)):
        out = model(ids, attention_mask=mask, use_cache=False).logits[:, -1].square().sum()
    (gradient,) = torch.autograd.grad(out, gates)
    with torch.no_grad():
        for layer, row in ((0, 0), (3, 1)):
            values = []
            for delta in (1e-2, -1e-2):
                moved = gates.detach().clone()
                moved[layer, row] += delta
                with controller.soft_routing(SoftRouting(forced=moved)):
                    logits = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
                values.append(logits.square().sum())
            numeric = (values[0] - values[1]) / 2e-2
            assert torch.isclose(numeric, gradient[layer, row], rtol=0.05, atol=1e-2)


# ------------------------------------------------------------------------------------------------ bad input


def test_unknown_family():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9))
    with pytest.raises(ValueError, match=r"gpt2.*add a row"):
        attach(model)


def test_nothing_to_route():
    sliding = MistralConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, sliding_window=64
    )
    with pytest.raises(ValueError, match="slides over 64"):
        attach(MistralForCausalLM(sliding))


def test_attach_twice_and_detach_never_attached():
    model = make_model("llama")
    with pytest.raises(ValueError, match="not attached"):
        detach(model)
    attach(model, CONFIG)
    with pytest.raises(ValueError, match="attached already"):
        attach(model, CONFIG)
    assert attached(model).layers == (0, 1, 2, 3)
    detach(model)
    with pytest.raises(ValueError, match="not attached"):
        attached(model)


def test_adapter_of_another_backbone():
    small, other = make_model("llama"), make_model("qwen3")
    config = attach(small, CONFIG).config
    with pytest.raises(ValueError, match=r"llama.*qwen3|qwen3.*llama"):
        attach(other, config)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), "empty"),
        (lambda m: m(torch.full((1, 1025), 5)), "1025 tokens exceed the model's context of 1024"),
        (lambda m: m(torch.tensor([[0, 5, 6], [4, 5, 6]])), "padding token 0 and has no attention_mask"),
        (lambda m: m(torch.full((1, 4), 5), attention_mask=torch.tensor([[1, 0, 1, 1]])), "holes in row 0"),
        (lambda m: m(torch.full((1, 4), 5), attention_mask=torch.ones(1, 5)), r"must be \[1, 4\]"),
        (lambda m: m(torch.full((1, 4), 5), attention_mask=torch.ones(1, 1, 4, 4)), "2D attention mask"),
        (
            lambda m: m(torch.full((2, 4), 5), attention_mask=torch.tensor([[1] * 4, [0] * 4]), use_cache=False),
            "prompt is empty",
        ),
        (lambda m: m(torch.full((1, 4), 5), past_key_values=StaticCache(m.config, max_cache_len=8)), "StaticCache"),
    ],
)
def test_bad_calls(call, message):
    model = make_model("llama")
    controller = attach(model, CONFIG)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(model)
    # Nothing is left behind: the next request runs.
    assert controller._step is None
    with torch.no_grad():
        model(torch.full((1, 4), 5))


@torch.no_grad()
def test_foreign_cache_with_tokens_is_refused():
    model = make_model("llama")
    cache = DynamicCache(config=model.config)
    model(torch.full((1, 4), 5), past_key_values=cache)
    attach(model, CONFIG)
    with pytest.raises(ValueError, match="DynamicCache that holds tokens"):
        model(torch.full((1, 1), 5), past_key_values=cache)


def test_bad_routes_and_dials():
    model = make_model("llama")
    controller = attach(model, CONFIG)
    with pytest.raises(ValueError, match="3 layers, the model 4"), controller.using(Fixed(Route.full(3, 1))):
        model(torch.full((1, 60), 5))
    for value in (-0.1, 1.1, float("nan"), True, "x"):
        with pytest.raises(ValueError, match="min_sparsity"):
            Dial(min_sparsity=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1025 tokens exceed the model's context of 1024"):
        controller.route(make_prompts(60, 1025))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        controller.route(make_prompts(60, 0))
    with pytest.raises(ValueError, match="not inputs_embeds"), torch.no_grad():
        model(inputs_embeds=torch.zeros(1, 60, 96))


@pytest.mark.parametrize("implementation", ["eager", "flex_attention", "flash_attention_2"])
@torch.no_grad()
def test_sliding_layers_of_a_model_loaded_with_another_implementation(implementation):
    """They get a mask and a function that belong together."""
    ids, mask = left_pad(make_prompts(*LENGTHS))
    expected = logits_of(make_model("gemma3"), ids, mask)
    model = make_model("gemma3")
    model.config._attn_implementation = implementation
    controller = attach(model, CONFIG)
    with controller.using(Dense()):
        assert worst(logits_of(model, ids, mask), expected, mask) <= TOLERANCE
    detach(model)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["ALL_MASK_ATTENTION_FUNCTIONS.register", "importable"])
def test_an_attach_that_fails_is_undone(error, name, monkeypatch):
    """Whatever it fails with, and wherever: before anything is set, or after all of it."""

    def fail(*args):
        raise error

    model = make_model("llama")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    monkeypatch.setattr(f"flux_attention.models.attach.{name}", fail)
    # On CUDA only is it asked what can be imported.
    monkeypatch.setattr("flux_attention.models.controller.FluxAttention.device", torch.device("cuda"))
    with pytest.raises(error):
        attach(model, CONFIG)
    monkeypatch.undo()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    attach(model, CONFIG)


@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_autocast(fuse):
    """Its values come in bfloat16, its rotated queries and keys in float32; a cache is begun in the model's dtype."""
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    ids, mask = left_pad(make_prompts(*LENGTHS))
    arguments = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_of(model, ids, mask)
    controller = attach(model, CONFIG, fuse=fuse)
    opinionated(controller)
    with torch.autocast("cpu", torch.bfloat16):
        with controller.using(Dense()):
            found = logits_of(model, ids, mask)
            again = model.generate(ids, **arguments)
            ours = generate(model, make_prompts(*LENGTHS), max_new_tokens=4).tokens
        logits_of(model, ids, mask)
    # bfloat16 rounds differently by the order of sums.
    assert ((found - expected) * mask[..., None]).abs().mean() <= 0.01 * expected.abs().mean()
    assert again.shape[1] == ids.shape[1] + 4 and [len(tokens) for tokens in ours] == [4] * len(LENGTHS)
    assert controller.last_route is not None and 0 < controller.last_route.sparsity.mean() < 1


@torch.no_grad()
def test_mixed_dtypes_without_autocast_are_refused():
    model = make_model("llama")
    controller = attach(model, CONFIG)
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, out: out.bfloat16())
    with controller.using(Dense()), pytest.raises(ValueError, match="must share a floating dtype"):
        model(make_prompts(40)[0][None], use_cache=False)
