from __future__ import annotations

import itertools

import pytest
import torch

from flux_attention.route import (
    POLICIES,
    AllSparse,
    Dense,
    Dial,
    Fixed,
    Interleaved,
    PolicyContext,
    Random,
    Route,
    Static,
    parse_policy,
)

PROMPTS = tuple(torch.arange(10 * i, 10 * i + 10) for i in range(3))
CONTEXT = PolicyContext(10, PROMPTS)


def sparsity(policy) -> list[float]:
    return [round(x, 4) for x in policy(CONTEXT).sparsity.tolist()]


def test_policies_reach_their_sparsity():
    assert sparsity(Dense()) == [0.0] * 3
    assert sparsity(AllSparse()) == [1.0] * 3
    assert sparsity(Static((0, 3, 9))) == [0.3] * 3
    assert sparsity(Interleaved(0.7)) == [0.7] * 3
    assert sparsity(Random(0.4)) == [0.4] * 3
    assert Static.from_ranking([5, 1, 7, 0], 0.5).sparse_layers == (5, 1)
    spread = Interleaved(0.8)(CONTEXT).use_full[:, 0].nonzero()[:, 0].tolist()
    assert spread == [2, 7]


def test_random_depends_on_the_prompt_alone():
    batch = Random(0.5, seed=4)(CONTEXT)
    for s, prompt in enumerate(PROMPTS):
        alone = Random(0.5, seed=4)(PolicyContext(10, (prompt,)))
        assert torch.equal(alone.use_full[:, 0], batch.use_full[:, s])
    assert not torch.equal(batch.use_full, Random(0.5, seed=5)(CONTEXT).use_full)
    assert len({tuple(column) for column in batch.use_full.T.tolist()}) > 1


def test_dial_moves_the_least_certain_layers_first():
    p_full = torch.tensor([[0.9, 0.1], [0.6, 0.2], [0.4, 0.3], [0.1, 0.45]])
    route = Route.from_scores(p_full)
    assert route.use_full.T.tolist() == [[True, True, False, False], [False] * 4]
    more = route.with_dial(Dial(min_sparsity=0.75))
    assert more.use_full.T.tolist() == [[True, False, False, False], [False] * 4]
    fewer = route.with_dial(Dial(max_sparsity=0.25))
    assert fewer.use_full.T.tolist() == [[True, True, True, False], [False, True, True, True]]
    assert route.with_dial(Dial()) is route
    # One after the other, the routes of a prompt are nested.
    nested = [route.with_dial(Dial(k / 4, k / 4)).use_full for k in range(5)]
    assert all(bool((a | ~b).all()) for a, b in itertools.pairwise(nested))
    assert [r.float().sum(0).tolist() for r in nested] == [[4 - k] * 2 for k in range(5)]


def test_dial_needs_scores_and_a_range():
    with pytest.raises(ValueError, match="p_full"):
        Dense()(CONTEXT).with_dial(Dial(0.5, 1.0))
    with pytest.raises(ValueError, match="above max_sparsity"):
        Dial(0.6, 0.5)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        Dial(max_sparsity=2)


def test_select_and_where():
    route = Route.from_scores(torch.rand(4, 3))
    assert torch.equal(route.select([2, 2]).use_full, route.use_full[:, [2, 2]])
    mixed = route.where([True, False, True], Route.full(4, 3))
    assert mixed.use_full[:, 1].all() and torch.equal(mixed.use_full[:, 0], route.use_full[:, 0])
    assert mixed.p_full is not None and mixed.p_full[:, 1].eq(1).all()


def test_fixed_checks_its_shape():
    assert Fixed(Route.full(10, 1))(CONTEXT).num_sequences == 3
    with pytest.raises(ValueError, match="2 sequences, the batch 3"):
        Fixed(Route.full(10, 2))(CONTEXT)
    with pytest.raises(ValueError, match="9 layers, the model 10"):
        Fixed(Route.full(9, 1))(CONTEXT)
    with pytest.raises(ValueError, match="bool tensor"):
        Route(torch.ones(2, 2))
    with pytest.raises(ValueError, match="shape of use_full"):
        Route(torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 3))


def test_parse_policy():
    assert parse_policy("router") is None
    assert parse_policy("dense") == Dense()
    assert parse_policy("sparse") == AllSparse()
    assert parse_policy("interleaved:0.5") == Interleaved(0.5)
    assert parse_policy("random:0.5:7") == Random(0.5, 7)
    assert parse_policy("static:1,2") == Static((1, 2))
    for text in ("", "nothing", "interleaved", "interleaved:1.5", "random:x", "static:a", "dense:1"):
        with pytest.raises(ValueError, match="the forms are") as error:
            parse_policy(text)
        assert POLICIES[3] in str(error.value)
    with pytest.raises(ValueError, match="names layer 99"):
        Static((99,))(CONTEXT)
