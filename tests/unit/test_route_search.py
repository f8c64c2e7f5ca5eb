"""The search for cheap layers, on a loss that is known."""

import pytest
import torch

from flux_attention.training.damage import Measured
from flux_attention.training.route_search import LayerCosts, race_routes, search_routes


class PlantedMeter:
    """Layers 1 and 4 are needed, 2 and 5 stand in for each other, each sample is hard in its own way."""

    layers = 6

    def __init__(self, deviation: float = 0.1) -> None:
        self.deviation = deviation
        self.generator = torch.Generator().manual_seed(7)
        self.samples = list(range(40))
        self.hardness = torch.rand(40, generator=torch.Generator().manual_seed(0))

    @property
    def dense(self):
        return Measured(*[self.hardness] * 5)

    def measure(self, indices, use_full):
        sparse = (~use_full).double()
        cost = 0.5 * sparse[1] + 0.4 * sparse[4] + 0.45 * sparse[2] * sparse[5] + 0.02 * sparse.sum(0)
        noise = self.deviation * torch.randn(len(indices), generator=self.generator)
        loss = self.hardness[torch.tensor(indices)] + cost + noise
        return Measured(*[loss] * 5)


def test_route_search_finds_the_layers_that_matter_together():
    found = search_routes(PlantedMeter(), 0.5, 240, batch=24, spread=1, seed=1)
    # Three sparse layers: the two that nobody needs, and one of the two that stand in for each other.
    assert set(found.order[:2]) == {0, 3}
    assert found.order[2] in (2, 5)
    assert set(found.order[4:]) == {1, 4}
    assert bool((found.deviation > 0).all())
    assert found.curve[-1]["measured"] == 240
    # Random routes this sparse lose 0.6 on average, and some routes stay random or have a layer more.
    assert sum(row["loss"] for row in found.curve[5:]) / 5 < 0.4


def test_what_other_groups_cost_settles_what_noise_leaves_open():
    known = torch.tensor([0.0, 0.5, 0.21, 0.01, 0.4, 0.2])

    def right(seed, known):
        found = search_routes(PlantedMeter(deviation=3.0), 0.5, 120, batch=24, seed=seed, known=known)
        return len(set(found.order[4:]) & {1, 4})

    alone, helped = (sum(right(seed, guess) for seed in range(12)) for guess in ((), (known,)))
    assert helped >= alone + 6


def test_measurements_overrule_a_wrong_guess():
    known = torch.tensor([0.5, 0.0, 0.1, 0.4, 0.0, 0.1])
    found = search_routes(PlantedMeter(), 0.5, 240, batch=24, spread=1, seed=1, known=[known])
    assert set(found.order[4:]) == {1, 4}


def test_race_settles_what_a_sum_over_layers_cannot_tell():
    # To a sum over layers 2 and 5 are as cheap as 0 and 3: only a measured route shows that both together are not.
    costs = LayerCosts(
        torch.tensor([0.01, 0.5, 0.0, 0.01, 0.4, 0.0], dtype=torch.float64),
        torch.full((6,), 0.05),
        covariance=0.05**2 * torch.eye(6, dtype=torch.float64),
    )
    assert {2, 5} <= set(costs.order[:3])
    heats = []
    meter = PlantedMeter(deviation=0.05)
    found = race_routes(meter, costs, 0.5, routes=8, samples=(10, 40), keep=(3, 1), seed=2, watch=heats.append)
    assert {0, 3} < set(found.raced) and len(set(found.raced) & {2, 5}) == 1
    assert found.order[:3] == sorted(found.raced, key=lambda layer: (float(costs.mean[layer]), layer))
    assert sorted(found.order) == list(range(6)) and found.mean is costs.mean
    assert [(row["samples"], row["left"]) for row in heats] == [(10, 3), (40, 1)]


def test_race_refuses_what_it_cannot_run():
    costs = LayerCosts(torch.zeros(6, dtype=torch.float64), torch.ones(6))
    with pytest.raises(ValueError, match="no covariance"):
        race_routes(PlantedMeter(), costs, 0.5)
    known = LayerCosts(costs.mean, costs.deviation, covariance=torch.eye(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="heats"):
        race_routes(PlantedMeter(), known, 0.5, samples=(4,), keep=(2, 1))
    with pytest.raises(ValueError, match="between 0 and 1"):
        race_routes(PlantedMeter(), known, 1.0)
