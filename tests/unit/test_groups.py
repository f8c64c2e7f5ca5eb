"""Groups of tasks that share a ranking, and the targets made from them."""

import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from flux_attention.data import HOLISTIC, RETRIEVAL, training_tasks
from flux_attention.router import LayerRouter
from flux_attention.training.damage import Measured
from flux_attention.training.features import pooled_queries
from flux_attention.training.groups import (
    Group,
    _falling,
    agreement,
    class_target,
    group_targets,
    largest_sparsity,
    resolve_rankings,
)


def test_groups_are_parsed():
    group = Group.parse("mixed:0.6:niah_single_2,fewshot*:niah_single_2")
    assert (group.name, group.target, group.searched) == ("mixed", 0.6, ("niah_single_2",))
    assert Group.parse("prose:0.8:prose_continuation:=code").like == "code"
    found = Group.parse("prose:98%:prose_continuation")
    assert found.keep == 0.98 and math.isnan(found.target)
    with pytest.raises(ValueError, match="an Ω in"):
        Group.parse("prose:1.2:prose_continuation")
    assert group.tasks == ("niah_single_2", "fewshot_topic", "fewshot_sentiment")  # not the held-out one
    known = training_tasks()
    wanted = tuple(name for name, task in known.items() if task.task_class == RETRIEVAL)
    assert Group.parse(f"r:0.5:{RETRIEVAL}").tasks == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [("name:0.5", "a group is"), ("a:0.5:nonsense", "'nonsense' is no training task"), ("a:b:kv_lookup", "float")],
)
def test_bad_groups(text, message):
    with pytest.raises(ValueError, match=message):
        Group.parse(text)


def test_shared_rankings_lead_to_the_group_whose_own_they_are():
    groups = [Group.parse(t) for t in ("a:0.5:kv_lookup", "b:0.6:kv_lookup:=a", "c:0.7:kv_lookup:=b")]
    found = resolve_rankings(groups)
    assert [g.like for g in found] == ["", "a", "a"]
    assert [g.target for g in found] == [0.5, 0.6, 0.7]
    with pytest.raises(ValueError, match="c shares the ranking of 'b', which must come before it"):
        resolve_rankings([groups[0], groups[2], groups[1]])
    with pytest.raises(ValueError, match="two groups are named 'a'"):
        resolve_rankings([groups[0], groups[0]])
    with pytest.raises(ValueError, match="must come before it"):
        resolve_rankings([Group.parse("a:0.5:kv_lookup:=a")])


def test_targets_follow_the_ranking_of_a_samples_group():
    groups = [Group("a", 0.25, ("x",)), Group("b", 0.75, ("y",))]
    samples = [SimpleNamespace(task=name) for name in ("x", "y", "x")]
    target = group_targets(samples, groups, {"a": [3, 2, 1, 0], "b": [0, 1, 2, 3]}, softness=0.5)
    assert (target > 0.5).tolist() == [[True, True, True, False], [False, False, False, True], [True] * 3 + [False]]


def test_class_targets_weigh_tasks():
    groups = [Group("a", 0.6, ("niah_single_2",)), Group("b", 0.9, ("niah_single_3", "kv_lookup"))]
    assert class_target(groups, RETRIEVAL) == pytest.approx(0.8)
    assert class_target(groups, HOLISTIC) == 1.0


def test_agreement_is_told_by_task():
    router = LayerRouter(2, 4, 3.0)  # starts with every layer full
    samples = [SimpleNamespace(task=name) for name in ("x", "y", "y")]
    target = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    found = agreement(router, torch.zeros(2, 3, 4), samples, target)
    assert found == {"x": {"omega": 0.0, "agreement": 1.0}, "y": {"omega": 0.0, "agreement": 0.25}}


def test_pooled_queries_keep_the_order_of_prompts():
    def probe(prompts):
        return torch.stack([prompt.float().mean().reshape(1) for prompt in prompts])[None]

    found = pooled_queries(SimpleNamespace(probe=probe), [(1, 1), (2,), (3, 3, 3)], batch=2)
    assert found.tolist() == [[[1.0], [2.0], [3.0]]]


class CountingMeter:
    """Four layers, least needed first 2, 0, 3, 1; a needle loses with each, text does not mind the first two."""

    layers = 4
    samples = (SimpleNamespace(teacher_forced=True, metric="f1"), SimpleNamespace(teacher_forced=False, metric="nll"))

    def routes(self, use_full):
        needle = {(): 0.8, (2,): 0.8, (0, 2): 0.79, (0, 2, 3): 0.5, (0, 1, 2, 3): 0.1}
        text = {(): 2.0, (2,): 2.0, (0, 2): 2.0, (0, 2, 3): 2.02, (0, 1, 2, 3): 2.1}
        sparse = [tuple((~row).nonzero()[:, 0].tolist()) for row in use_full]
        soft = torch.tensor([[needle[s], 1.0] for s in sparse])
        nll = torch.tensor([[1.0, text[s]] for s in sparse])
        return Measured(soft, nll, soft, soft, soft)

    @property
    def dense(self):
        return Measured(*(getattr(self.routes(torch.ones(1, 4).bool()), f.name)[0] for f in fields(Measured)))


def test_the_largest_sparsity_that_keeps_a_share():
    found, shares = largest_sparsity(CountingMeter(), [2, 0, 3, 1], 0.98)
    assert found == 0.5 and list(shares) == [2, 4]
    assert shares[2] == pytest.approx((0.79 + 1) / 1.8)
    assert largest_sparsity(CountingMeter(), [2, 0, 3, 1], 0.995)[0] == 0
    assert _falling([1.0, 0.8, 0.9, 0.5]) == pytest.approx([1.0, 0.85, 0.85, 0.5])
