"""Routes by KV head: the same answers as blended gates, and no neighbour matters."""

import pytest
import torch

from flux_attention.models.attach import attach, detach
from flux_attention.models.step import SoftRouting
from flux_attention.route import Fixed, HeadRoute, PolicyContext, Route, StaticHeads, parse_columns

from .tiny import CONFIG, left_pad, make_model, make_prompts, mixed_route, positions_of

LAYERS, HEADS = 4, 2


def random_heads(sequences, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(LAYERS, HEADS, sequences, generator=generator) > 0.5


@pytest.fixture
def attached():
    model = make_model("qwen3").double()
    yield attach(model, CONFIG)
    detach(model)


def logits_of(controller, prompts, policy=None, gates=None):
    ids, mask = left_pad(prompts)
    with controller.using(policy), torch.no_grad():
        call = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask), "use_cache": False}
        if gates is None:
            return controller.model(**call).logits
        with controller.soft_routing(SoftRouting(forced=gates)):
            return controller.model(**call).logits


def test_heads_on_their_sides_equal_blended_gates(attached):
    prompts = make_prompts(150, 83, 131)
    heads = random_heads(3)
    routed = logits_of(attached, prompts, Fixed(HeadRoute.of(heads)))
    blended = logits_of(attached, prompts, gates=heads.float())
    assert (routed - blended).abs().max() < 1e-9
    assert (routed - logits_of(attached, prompts, Fixed(Route.full(LAYERS, 3)))).abs().max() > 1e-3


def test_heads_that_agree_are_a_layer_route(attached):
    prompts = make_prompts(150, 83)
    route = mixed_route(LAYERS, 2)
    same = HeadRoute.of(route.use_full[:, None].expand(-1, HEADS, -1).contiguous())
    assert torch.equal(same.sparsity, route.sparsity)
    difference = logits_of(attached, prompts, Fixed(same)) - logits_of(attached, prompts, Fixed(route))
    assert difference.abs().max() < 1e-9


def test_a_row_is_the_same_alone(attached):
    prompts = make_prompts(150, 83, 131)
    route = HeadRoute.of(random_heads(3))
    together = logits_of(attached, prompts, Fixed(route))
    for row in range(3):
        alone = logits_of(attached, [prompts[row]], Fixed(route.select([row])))
        assert (together[row, -prompts[row].numel() :] - alone[0]).abs().max() < 1e-9


def test_gates_of_heads_are_differentiable(attached):
    gates = torch.full((LAYERS, HEADS, 1), 0.5, requires_grad=True)
    ids = make_prompts(120)[0][None]
    with attached.soft_routing(SoftRouting(forced=gates)):
        attached.model(input_ids=ids, use_cache=False).logits[0, -1].square().sum().backward()
    assert gates.grad.shape == gates.shape and bool((gates.grad != 0).all())


def test_no_cache_for_heads(attached):
    ids = make_prompts(120)[0][None]
    with attached.using(Fixed(HeadRoute.of(random_heads(1)))), pytest.raises(ValueError, match="have no cache"):
        attached.model(input_ids=ids, use_cache=True)


def test_probe_by_head_averages_to_the_probe(attached):
    prompts = make_prompts(150, 83)
    apart = attached.probe(prompts, by_head=True)
    assert apart.shape == (LAYERS, 2, HEADS, 16)
    assert (apart.mean(2) - attached.probe(prompts)).abs().max() < 1e-6


def test_columns_round_trip():
    route, heads = mixed_route(LAYERS, 3), HeadRoute.of(random_heads(3))
    assert torch.equal(parse_columns([route.column(s) for s in range(3)], LAYERS).use_full, route.use_full)
    again = parse_columns([heads.column(s) for s in range(3)], LAYERS)
    assert isinstance(again, HeadRoute) and torch.equal(again.heads, heads.heads)
    assert torch.equal(heads.select([2, 0]).heads, heads.heads[..., [2, 0]])
    with pytest.raises(ValueError, match="multiple of 4"):
        parse_columns(["01010"], LAYERS)


def test_heads_are_checked():
    with pytest.raises(ValueError, match="heads must be a bool tensor"):
        HeadRoute(torch.ones(2, 1, dtype=torch.bool), heads=torch.ones(2, 1, dtype=torch.bool))


def test_static_heads():
    policy = StaticHeads((1, 4, 5), HEADS)
    route = policy(PolicyContext(LAYERS, tuple(make_prompts(5, 6))))
    assert route.column(0) == route.column(1) == "10110011"
    assert route.sparsity.tolist() == pytest.approx([3 / 8, 3 / 8])
    with pytest.raises(ValueError, match=r"0 … 7, got \(8,\)"):
        StaticHeads((8,), HEADS)(PolicyContext(LAYERS, tuple(make_prompts(5))))
