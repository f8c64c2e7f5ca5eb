"""Training of the head-level baselines: gates find the head that answers need, the backbone stays as it is."""

import pytest
import torch

from flux_attention.data import Sample
from flux_attention.models.attach import attach, detach
from flux_attention.models.step import SoftRouting
from flux_attention.training.heads import (
    HeadTraining,
    _Distiller,
    pooled_heads,
    train_head_router,
    train_static_heads,
)

from .tiny import CONFIG, make_model, make_prompts

OPTIONS = HeadTraining(steps=30, batch_size=4, pass_tokens=300, gate_lr=0.1, penalty=0.02)


def make_samples(count=8):
    found = []
    for i, prompt in enumerate(make_prompts(*(120 + 7 * i for i in range(count)))):
        kind = ("retrieval", "holistic")[i % 2]
        answer = tuple(make_prompts(6, seed=i + 50)[0].tolist())
        found.append(Sample("rows", kind, tuple(prompt.tolist()), answer, ("x",), "f1"))
    return found


@pytest.fixture
def attached():
    model = make_model("llama")
    yield attach(model, CONFIG)
    detach(model)


def test_gates_rank_heads_by_what_they_cost(attached):
    """The gates' order agrees with the KL that each head's loss of its full attention costs."""
    samples = make_samples()
    before = [p.clone() for p in attached.model.parameters()]
    gates = train_static_heads(attached, samples, OPTIONS)
    assert gates.shape == (4, 2) and 0 <= float(gates.min()) < float(gates.max()) <= 1
    assert all(torch.equal(a, b) for a, b in zip(before, attached.model.parameters(), strict=True))
    distiller = _Distiller(attached, samples, OPTIONS)
    cost = torch.zeros(8)
    with torch.no_grad():
        for head in range(8):
            one = torch.ones(8)
            one[head] = 0
            cost[head] = distiller.loss(samples, one.view(4, 2, 1).expand(4, 2, len(samples)))
    order = gates.flatten().argsort()
    assert cost[order[4:]].mean() > 1.3 * cost[order[:4]].mean()


def test_passes_add_up_to_the_batch(attached):
    samples = make_samples()
    distiller = _Distiller(attached, samples, OPTIONS)
    gates = torch.full((4, 2, len(samples)), 0.5)
    batch = sorted(samples, key=len, reverse=True)
    parts = list(distiller.passes(batch))
    assert sorted(i for part in parts for i in part) == list(range(len(batch))) and len(parts) > 2
    with torch.no_grad():
        whole = distiller.loss(batch, gates)
        pieces = sum(distiller.loss([batch[i] for i in part], gates[..., : len(part)]) for part in parts)
    assert float(pieces) == pytest.approx(float(whole), rel=1e-4)


def test_head_router_learns_a_sparsity_of_each_class(attached):
    samples = make_samples()
    options = HeadTraining(
        steps=40, batch_size=4, router_lr=5e-3, multiplier_lr=0.3, targets={"retrieval": 0.3, "holistic": 1.0}
    )
    router = train_head_router(attached, samples, options)
    assert router.num_layers == 8 and not any(p.requires_grad for p in router.parameters())
    p_full = router.p_full(pooled_heads(attached, samples))
    sparsity = (p_full <= 0.5).float().mean(0)
    retrieval, holistic = sparsity[::2].mean(), sparsity[1::2].mean()
    assert float(holistic) > float(retrieval) and float(holistic) > 0.5


def test_pooled_heads_are_the_probes(attached):
    samples = make_samples(3)
    pooled = pooled_heads(attached, samples, batch=2)
    prompts = [torch.tensor(sample.prompt_ids) for sample in samples]
    assert torch.allclose(pooled.unflatten(0, (4, 2)).mean(1), attached.probe(prompts), atol=1e-5)


def test_bad_training():
    with pytest.raises(ValueError, match="steps must be positive"):
        HeadTraining(steps=0)


def test_no_samples(attached):
    with pytest.raises(ValueError, match="need samples"):
        train_static_heads(attached, [], OPTIONS)


def test_forced_gates_of_a_wrong_shape(attached):
    ids = make_prompts(120)[0][None]
    with (
        attached.soft_routing(SoftRouting(forced=torch.ones(4, 3, 1))),
        pytest.raises(ValueError, match=r"or \[4, 2, 1\]"),
    ):
        attached.model(input_ids=ids, use_cache=False)
