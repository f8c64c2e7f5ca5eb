"""Which layers a group of tasks can spare: the slope of the loss in a layer's gate, along the routes that matter.

A measurement is one sample under a route of its own in which a few layers are blends of their two sides and all others
run as routed. Over a gate that is uniform in (0, 1), a blend's mean slope is what its layer adds to the loss from full
to sparse, beside the others as they are; one pass with gradients gives it for all blends. The mean over the
measurements, later ones counting more, is a layer's cost. Hard gates have another slope: at z = 1 a loss that is near
its least is flat, and at z = 0 so is that of an answer that is lost. Nor may all layers be blends: a layer that is half
there retrieves nearly as well as a whole one, so blends stand in for what the others miss, and costs of the second rank
vanish.

Two draws of the costs (Thompson sampling, Chapelle & Li, 2011; with a discount: Raj & Kalyani, arXiv 1707.09727) give
two routes of the wanted Ω; the blends are layers on which the two disagree, which are those near the border between
sparse and full. Two more are sparse layers of promise, by the slope at z = 0 that they have lately had, which a pass
gives for all of them; and Ω grows to the one wanted: some layers are worth something only beside others, which at first
no route holds together. Path integrals of gates: integrated gradients (Sundararajan et al., arXiv 1703.01365).

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
#: Blends of a route that are sparse layers of promise, wherever they rank, and share of the measurements after which
#: one counts half for that. Only beside the layers that routes hold by now is a promise worth anything.
_EXPLORED, _PROMISED = 2, 0.05
#: Share of a layer's slopes on each side that count as the last one before them: their tails are as heavy as gradients
#: are chaotic, and twice as many measurements would tell no more than this does.
_TAIL = 0.05
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
    costs, ends = _Slopes(layers), _Slopes(layers)
    curve: list[dict[str, float]] = []
    queue: list[int] = []
    done, blind, explored = 0, True, min(_EXPLORED, blends - 1)

    def draw_two(count: int) -> Tensor:
        if blind:
            return torch.rand(2, count, layers, generator=generator, dtype=torch.float64)
        mean, deviation = costs.estimate()
        cheap, dear = mean.quantile(torch.tensor([0.2, 0.8], dtype=torch.float64))
        noise = torch.randn(2, count, layers, generator=generator, dtype=torch.float64)
        return mean + (deviation + _NOISE * (dear - cheap)) * noise

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
        place, other = _places(draw_two(count))
        sparse = (place < border).T
        moved = sparse != (other < border).T
        # Draws that agree, as of few layers they often do, still have a layer on each side of the border.
        moved = torch.where(moved.any(0), moved, ((place == border) | (place == border - 1)).T)
        chance = torch.where(moved, torch.rand(layers, count, generator=generator), 2.0)
        if not blind and explored:
            # What a layer is worth depends on others that routes may hold by now and did not when it was last measured;
            # one that looked useless without them is never drawn to the border again.
            mean, deviation = ends.estimate()
            promise = mean.clamp_min(0) + deviation
            promising = torch.multinomial(sparse.T * promise.square() + 1e-12, explored, generator=generator).T
            moved.scatter_(0, promising, True)
            chance.scatter_(0, promising, -1.0)
        chosen = _places(chance.T).T
        moved &= chosen < blends
        gates = torch.where(moved, torch.rand(layers, count, generator=generator), (~sparse).float())
        loss, slope = meter.slopes(members, gates)
        costs.add(slope, moved, keep=0.5 ** (count / (_HALF_LIFE * measurements)))
        ends.add(slope, gates == 0, keep=0.5 ** (count / (_PROMISED * measurements)))
        done += count
        row = {"measured": float(done), "sparsity": float(sparse.float().mean()), "loss": float(loss.mean())}
        curve.append(row)
        if watch is not None:
            watch(row)
    return LayerCosts(*costs.estimate(), curve)


def _places(scores: Tensor) -> Tensor:
    """Place of each score in its row, the smallest first."""
    return scores.argsort(-1).argsort(-1)


class _Slopes:
    """Each layer's slopes so far, newer ones counting more."""

    def __init__(self, layers: int) -> None:
        self._slopes, self._weights = torch.zeros(2, layers, 0, dtype=torch.float64)

    def add(self, slopes: Tensor, measured: Tensor, keep: float) -> None:
        """Slopes `[L, n]`, those that were `measured` (bool `[L, n]`); `keep`: what all before them still counts."""
        self._slopes = torch.cat([self._slopes, slopes.double()], 1)
        self._weights = torch.cat([self._weights * keep, measured.double()], 1)

    def count_once(self) -> None:
        """All that a layer has shown so far counts as one measurement at the most."""
        self._weights /= self._weights.sum(1, keepdim=True).clamp_min(1)

    def estimate(self) -> tuple[Tensor, Tensor]:
        """Mean of each layer's slopes, their tails drawn in, and the mean's own deviation, float64 `[L]`."""
        count = self._weights.sum(1)
        slopes, order = self._slopes.sort(1)
        reached = self._weights.gather(1, order).cumsum(1)
        ends = torch.stack([_TAIL * count, (1 - _TAIL) * count], 1)
        low, high = slopes.gather(1, torch.searchsorted(reached, ends).clamp_max(slopes.shape[1] - 1)).unbind(1)
        slopes = self._slopes.clamp(low[:, None], high[:, None])
        share = self._weights / count.clamp_min(1e-12)[:, None]
        mean = (share * slopes).sum(1)
        variance = (share * (slopes - mean[:, None]).square()).sum(1)
        # A layer's few measurements may agree by chance: all layers' variance counts as one more. What was hardly
        # measured is not known better than by a quarter of a measurement.
        common = (self._weights * slopes.square()).sum() / count.sum().clamp_min(1)
        count = count.clamp_min(0.25)
        return mean, ((count * variance + common) / (count + 1) / count).sqrt()
