"""A real frozen model: SmolLM2-135M-Instruct and the router that the project ships for it."""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch
from torch import Tensor

from flux_attention.models.attach import attach, detach
from flux_attention.models.backbones import load_backbone
from flux_attention.route import Dense, Dial, Fixed

ADAPTER = "smollm2-135m-instruct"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def backbone():
    try:
        return load_backbone()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def prompts(backbone) -> tuple[Tensor, Tensor]:
    """ids and mask of a left-padded batch, 900 and 300 tokens; only the first is long enough to lose keys."""
    ids = backbone[1]("\n".join(pydoc_data.topics.topics.values())[:9000], return_tensors="pt").input_ids[0]
    batch, mask = torch.zeros(2, 900, dtype=torch.long), torch.zeros(2, 900, dtype=torch.long)
    batch[0], mask[0] = ids[:900], 1
    batch[1, 600:], mask[1, 600:] = ids[900:1200], 1
    return batch, mask


@pytest.fixture
def routed(backbone):
    controller = attach(backbone[0], ADAPTER)
    yield controller
    detach(backbone[0])


def logits_of(model, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits * mask[..., None]


@pytest.fixture(scope="module")
def expected(backbone, prompts) -> Tensor:
    return logits_of(backbone[0], *prompts)


def test_all_full_is_the_model(backbone, prompts, expected, routed):
    with routed.using(Dense()):
        assert (logits_of(backbone[0], *prompts) - expected).abs().max() <= TOLERANCE
    with routed.using(None, Dial(max_sparsity=0.0)):
        assert (logits_of(backbone[0], *prompts) - expected).abs().max() <= TOLERANCE
        assert routed.last_route.p_full.min() < 0.5 and routed.last_route.use_full.all()


def test_chunks_and_decode_equal_the_whole(backbone, prompts, expected, routed):
    model, (ids, mask) = backbone[0], prompts
    whole = logits_of(model, ids, mask)
    route = routed.last_route
    assert 0.5 < route.sparsity[0] < 1 and route.sparsity[1] == 0
    # The long row is routed, the short one is the plain model's beside it.
    assert (whole - expected)[0].abs().max() > 100 * TOLERANCE
    assert (whole - expected)[1].abs().max() <= TOLERANCE
    positions, cache, parts = (mask.cumsum(1) - 1).clamp_min(0), routed.new_cache(), []
    with torch.no_grad(), routed.using(Fixed(route)):
        for a, b in ((0, 610), (610, 890), *((t, t + 1) for t in range(890, 900))):
            step = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b], "past_key_values": cache}
            parts.append(model(ids[:, a:b], **step).logits)
    assert (torch.cat(parts, 1) * mask[..., None] - whole).abs().max() <= TOLERANCE


def test_backbone_is_bit_for_bit_unchanged(backbone, prompts, expected):
    model, (ids, mask) = backbone[0], prompts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    controller = attach(model, ADAPTER)
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert controller.last_route.sparsity[0] > 0.5
    during = model.state_dict()
    assert before.keys() == during.keys() and all(torch.equal(before[name], during[name]) for name in before)
    detach(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits_of(model, ids, mask), expected)
