"""Which layers a group of tasks can spare: the slope of the loss in a layer's gate, along the routes that matter.

A measurement is one sample under a route of its own in which a few layers are blends of their two sides and all others
run as routed. Over a gate that is uniform in (0, 1), a blend's mean slope is what its layer adds to the loss from full
to sparse, beside the others as they are; one pass with gradients gives it for all blends. The mean over the
measurements, later ones counting more, is a layer's cost. Hard gates would have no such slope: at z = 1 a loss that is
near its least is flat, and at z = 0 so is that of an answer that is lost. Nor may all layers be blends: a layer that is
half there retrieves nearly as well as a whole one, so blends stand in for what the others miss, and costs of the second
rank vanish.

Two draws of the costs (Thompson sampling, Chapelle & Li, 2011; with a discount: Raj & Kalyani, arXiv 1707.09727) give
two routes of the wanted Ω; the blends are layers on which the two disagree, which are those near the border between
sparse and full. Two more are sparse layers, drawn by how uncertain their costs are, and Ω grows to the one wanted: some
layers are worth something only beside others, which at first no route holds together. Path integrals of gates:
integrated gradients (Sundararajan et al., arXiv 1703.01365).

Shapes: `L` routable layers, `n` measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flux_attention.training.damage import DamageMeter

#: Share of the measurements whose routes are drawn blindly, before costs are looked at.
_BLIND = 0.125
#: Share of the measurements after which one counts half. What a layer costs depends on the others, and early routes
#: lack layers that all build on: most layers cost nothing there. What blind routes showed counts as one measurement.
_HALF_LIFE = 0.5
#: Routes begin at this share of the wanted Ω and reach it after this share of the measurements. A layer that needs
#: others beside it shows its worth while there are many full ones; at the wanted Ω from the start, it is rarely seen
#: with all of them and looks useless.
_START, _RAMP = 0.7, 0.5
#: Blends of a route that are sparse layers of uncertain cost, wherever they rank.
_EXPLORED = 2
#: Noise of a draw beside the costs' own uncertainty, in distances between a cheap layer's cost and a dear one's: layers
#: that stand in for each other show it in routes that differ. Twice as much spends passes on layers that are settled.
_NOISE = 0.5


@dataclass
class LayerCosts:
    """What it costs to make each layer sparse, beside about as many others as wanted.

    Attributes:
        mean, deviation: over the measurements, float64 `[L]`, in units of `Measured.loss`; the mean's own deviation.
        curve: a row a round: `measured` so far, mean `sparsity` and mean `loss` of the round's routes.
    """

    mean: Tensor
    deviation: Tensor
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def order(self) -> list[int]:
        """A ranking: layers, cheapest to make sparse first."""
        order: list[int] = torch.argsort(self.mean, stable=True).tolist()
        return order


def search_routes(
    meter: DamageMeter,
    sparsity: float,
    measurements: int,
    *,
    batch: int = 16,
    spread: int = 2,
    blends: int | None = None,
    seed: int = 0,
    watch: Callable[[dict[str, float]], None] | None = None,
) -> LayerCosts:
    """Learn what each layer costs the meter's samples at about Ω = `sparsity`.

    Args:
        meter: samples of one group of tasks; each is measured about equally often. Different samples tell more than
            the same ones again: half of a slope's variance is between samples.
        sparsity: Ω wanted.
        measurements: (sample, route) pairs, each one pass of one sample with gradients.
        batch: pairs between two looks at the costs.
        spread: routes have up to this many sparse layers more or fewer than wanted, so that a dial moves well.
        blends: most layers of a route that are blends, by default two for three full ones, at least three: fewer
            measure less a pass, more hide what layers cost.
        seed: of the order of samples and the draws.
        watch: called with each row of the curve.

    Raises:
        ValueError: a sparsity outside (0, 1), fewer than two measurements, or routes without a blend.
    """
    layers = meter.layers
    if not 0.0 < sparsity < 1.0:
        raise ValueError(f"sparsity must lie strictly between 0 and 1, got {sparsity!r}")
    if measurements < 2 or batch < 1:
        raise ValueError(f"costs with a deviation need two measurements, got {measurements} in batches of {batch}")
    if blends is None:
        blends = max(1, min(max(3, 2 * round((1 - sparsity) * layers) // 3), layers - 1))
    if blends < 1:
        raise ValueError(f"a layer is measured as a blend, so routes need at least one, got {blends}")
    generator = torch.Generator().manual_seed(seed)
    costs = _Costs(layers)
    curve: list[dict[str, float]] = []
    queue: list[int] = []
    done, blind, explored = 0, True, min(_EXPLORED, blends - 1)

    def draw(count: int) -> Tensor:
        if blind:
            return torch.rand(count, layers, generator=generator, dtype=torch.float64)
        cheap, dear = costs.mean.quantile(torch.tensor([0.2, 0.8], dtype=torch.float64))
        noise = torch.randn(count, layers, generator=generator, dtype=torch.float64)
        return costs.mean + (costs.deviation + _NOISE * (dear - cheap)) * noise

    while done < measurements:
        if blind and done >= _BLIND * measurements:
            blind = False
            costs.count_once()
        count = min(batch, measurements - done)
        while len(queue) < count:
            queue += torch.randperm(len(meter.samples), generator=generator).tolist()
        members, queue = queue[:count], queue[count:]
        reached = min(1.0, _START + (1 - _START) * done / (_RAMP * measurements))
        wanted = round(reached * sparsity * layers) + torch.randint(-spread, spread + 1, (count,), generator=generator)
        border = wanted.clamp(1, layers - 1)[:, None]
        place, other = _places(draw(count)), _places(draw(count))
        sparse = (place < border).T
        moved = sparse != (other < border).T
        # Draws that agree, as of few layers they often do, still have a layer on each side of the border.
        moved = torch.where(moved.any(0), moved, ((place == border) | (place == border - 1)).T)
        chance = torch.where(moved, torch.rand(layers, count, generator=generator), 2.0)
        if not blind and explored:
            # What a layer is worth depends on others that routes may hold by now and did not when it was last seen; one
            # that looked useless without them is never drawn to the border again.
            unsure = torch.multinomial(sparse.T * costs.deviation + 1e-9, explored, generator=generator).T
            moved.scatter_(0, unsure, True)
            chance.scatter_(0, unsure, -1.0)
        chosen = _places(chance.T).T
        moved &= chosen < blends
        gates = torch.where(moved, torch.rand(layers, count, generator=generator), (~sparse).float())
        loss, slope = meter.slopes(members, gates)
        costs.add(slope, moved, keep=0.5 ** (count / (_HALF_LIFE * measurements)))
        done += count
        row = {"measured": float(done), "sparsity": float(sparse.float().mean()), "loss": float(loss.mean())}
        curve.append(row)
        if watch is not None:
            watch(row)
    return LayerCosts(costs.mean, costs.deviation, curve)


def _places(scores: Tensor) -> Tensor:
    """Place of each score in its row, the smallest first."""
    return scores.argsort(1).argsort(1)


class _Costs:
    """Mean of each layer's slopes, newer ones counting more, and that mean's deviation, float64 `[L]`."""

    def __init__(self, layers: int) -> None:
        self._count, self._sum, self._squares = torch.zeros(3, layers, dtype=torch.float64)

    def add(self, slopes: Tensor, measured: Tensor, keep: float) -> None:
        """Slopes `[L, n]`, those that were `measured` (bool `[L, n]`); `keep`: what all before them still counts."""
        slopes = torch.where(measured, slopes.double(), 0.0)
        for sums, new in ((self._count, measured.double()), (self._sum, slopes), (self._squares, slopes.square())):
            sums.mul_(keep).add_(new.sum(1))

    def count_once(self) -> None:
        """All that a layer has shown so far counts as one measurement at the most."""
        once = self._count.clamp_min(1)
        for sums in (self._count, self._sum, self._squares):
            sums.div_(once)

    @property
    def mean(self) -> Tensor:
        return torch.where(self._count > 0, self._sum / self._count, 0.0)

    @property
    def deviation(self) -> Tensor:
        # What was hardly measured is not known better than by a quarter of a measurement.
        count = self._count.clamp_min(0.25)
        variance = (self._squares / count - self.mean.square()).clamp_min(0)
        # A layer's few measurements may agree by chance: all layers' variance counts as one more.
        common = self._squares.sum() / self._count.sum().clamp_min(1)
        return ((count * variance + common) / (count + 1) / count).sqrt()
