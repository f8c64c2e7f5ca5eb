"""The search for cheap layers, on a loss that is known."""

import pytest
import torch

from flux_attention.training import route_search
from flux_attention.training.route_search import search_routes


class PlantedMeter:
    """Layers 1 and 4 are needed, 2 and 5 stand in for each other, each sample is hard in its own way.

    Where layers 1 and 4 are full the loss is at its least and has no slope: what a search with hard gates would see.
    """

    layers = 6

    def __init__(self, deviation: float = 0.1) -> None:
        self.deviation = deviation
        self.generator = torch.Generator().manual_seed(7)
        self.samples = list(range(40))
        self.hardness = torch.rand(40, generator=torch.Generator().manual_seed(0))
        self.seen: list[int] = []
        self.gates: list[torch.Tensor] = []

    def slopes(self, indices, gates):
        self.seen += indices
        self.gates.append(gates)
        gates = gates.double().requires_grad_()
        sparse = 1 - gates
        cost = 0.5 * sparse[1].square() + 0.4 * sparse[4].square() + 0.45 * sparse[2] * sparse[5] + 0.02 * sparse.sum(0)
        loss = self.hardness[torch.tensor(indices)] + cost
        (slope,) = torch.autograd.grad(loss.sum(), gates)
        noise = self.deviation * torch.randn(slope.shape, generator=self.generator)
        return loss.detach().float(), (-slope).float() + noise


def test_route_search_finds_the_layers_that_matter_together():
    meter, rows = PlantedMeter(), []
    found = search_routes(meter, 0.5, 480, batch=24, spread=1, blends=2, seed=1, watch=rows.append)
    # Three sparse layers: the two that nobody needs, and one of the two that stand in for each other.
    assert set(found.order[:2]) == {0, 3}
    assert found.order[2] in (2, 5)
    assert set(found.order[4:]) == {1, 4}
    assert bool((found.deviation > 0).all()) and float(found.deviation.max()) < 0.05
    # The slopes' mean is what a layer adds from full to sparse, to the noise.
    assert float(found.mean[1]) == pytest.approx(0.52, abs=0.15)
    assert float(found.mean[0]) == pytest.approx(0.02, abs=0.03)
    assert found.curve is not rows and found.curve == rows and rows[-1]["measured"] == 480
    # Every sample is measured as often as any other.
    assert {meter.seen.count(i) for i in range(40)} == {12}
    # Few layers are blends; the others run as routes with about three sparse layers do.
    gates = torch.cat(meter.gates, 1)
    blended = (gates > 0) & (gates < 1)
    assert int(blended.sum(0).min()) >= 1 and int(blended.sum(0).max()) == 2
    assert float(gates[blended].min()) < 0.1 and float(gates[blended].max()) > 0.9
    hard = (gates == 0).sum(0)
    assert int(hard.max()) <= 4 and int((hard + blended.sum(0)).min()) >= 2


@pytest.mark.parametrize(("explored", "begin", "more"), [(0, 240, 1.5), (2, 360, 1.25)])
def test_layers_near_the_border_are_measured_most(monkeypatch, explored, begin, more):
    monkeypatch.setattr(route_search, "_EXPLORED", explored)
    meter = PlantedMeter(deviation=0.02)
    search_routes(meter, 0.5, 480, batch=24, spread=0, blends=6, seed=0)
    # Ω is the wanted one from 240 on; exploring goes to the others for a while longer.
    gates = torch.cat(meter.gates, 1)[:, begin:]
    counts = ((gates > 0) & (gates < 1)).sum(1)
    # One of 2 and 5 has to be full, whichever it is; 0 and 3 need not be, and 1 has to.
    assert int(counts[[2, 5]].min()) > more * int(counts[[0, 1, 3]].max())


class BuildingMeter(PlantedMeter):
    """Layer 2 is needed where layer 0 is full, and does harm where it is not, which is most of the time by chance."""

    layers = 24

    def slopes(self, indices, gates):
        gates = gates.double().requires_grad_()
        sparse = 1 - gates
        hidden = 0.05 * gates[0] * sparse[2] - 0.03 * sparse[0] * sparse[2]
        loss = 0.1 * sparse[0] + hidden + 0.01 * sparse[3:9].sum(0)
        (slope,) = torch.autograd.grad(loss.sum(), gates)
        noise = 1e-3 * torch.randn(slope.shape, generator=self.generator)
        return loss.detach().float(), (-slope).float() + noise


def test_a_layer_that_another_one_hides_is_found():
    orders = [search_routes(BuildingMeter(), 0.9, 800, batch=16, spread=1, seed=seed).order for seed in range(12)]
    assert sum(order[-2:] == [2, 0] for order in orders) >= 11


class ComplementMeter(PlantedMeter):
    """Layer 7 is worth more than any border layer where 18, 20 and 23 are full; without them it does harm."""

    layers = 30

    def slopes(self, indices, gates):
        gates = gates.double().requires_grad_()
        sparse = 1 - gates
        beside = gates[18] * gates[23] * (0.3 + 0.7 * gates[20])
        loss = 0.12 * sparse[18] + 0.06 * sparse[23] * gates[18] + 0.02 * gates[7] * (1 - 5 * beside)
        loss = loss + 0.011 * sparse[[14, 15, 20, 21]].sum(0) + 0.006 * sparse[[5, 9, 17, 19, 24]].sum(0)
        (slope,) = torch.autograd.grad(loss.sum(), gates)
        noise = self.deviation * torch.randn(slope.shape, generator=self.generator)
        return loss.detach().float(), (-slope).float() + noise


def test_a_layer_that_needs_others_beside_it_is_found():
    orders = [search_routes(ComplementMeter(0.05), 0.867, 704, seed=seed).order for seed in range(8)]
    assert sum({7, 18, 23} <= set(order[-4:]) for order in orders) >= 7


def test_few_noisy_measurements_are_enough():
    """Noise as large as what is to be found, and twice as many measurements as there are routes of three layers."""
    orders = [search_routes(PlantedMeter(deviation=0.25), 0.5, 40, batch=10, seed=seed).order for seed in range(12)]
    assert sum(set(order[:3]) in ({0, 3, 2}, {0, 3, 5}) for order in orders) >= 10


class WildMeter(PlantedMeter):
    """One slope in fifty is far off to either side, as gradients through many layers are."""

    def slopes(self, indices, gates):
        loss, slopes = super().slopes(indices, gates)
        wild = torch.rand(slopes.shape, generator=self.generator) < 0.02
        return loss, slopes + wild * 30 * torch.randn(slopes.shape, generator=self.generator)


def test_wild_slopes_do_not_decide():
    orders = [search_routes(WildMeter(), 0.5, 480, batch=24, seed=seed).order for seed in range(12)]
    assert sum(set(order[:3]) in ({0, 3, 2}, {0, 3, 5}) for order in orders) >= 11


def test_bad_input():
    with pytest.raises(ValueError, match="between 0 and 1"):
        search_routes(PlantedMeter(), 1.0, 20)
    with pytest.raises(ValueError, match="two measurements"):
        search_routes(PlantedMeter(), 0.5, 1)
    with pytest.raises(ValueError, match="at least one"):
        search_routes(PlantedMeter(), 0.5, 20, blends=0)
