"""Which layers a group of tasks can spare: the slope of the loss in every layer's gate, along the routes that matter.

A measurement is one sample under a route of its own whose layers are blends, more than half full or more than half
sparse. One pass with gradients tells what each layer adds to the loss when it runs sparser, beside the others as they
are; blends rather than hard gates, because at z = 1 a loss that is near its least has no slope, and at z = 0 an answer
that is lost has none either. The mean over the measurements is a layer's cost. The next routes are those that the costs
found so far favour, with as much noise as the costs are uncertain and as far as they lie apart (Thompson sampling for
combinatorial bandits, Chapelle & Li, 2011): layers that stand in for each other show it where routes are as sparse as
wanted. Path integrals of gates: integrated gradients (Sundararajan et al., arXiv 1703.01365).

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


@dataclass
class LayerCosts:
    """What it costs to make each layer sparse, beside about as many others as wanted.

    Attributes:
        mean, deviation: over the measurements, float64 `[L]`, in units of `Measured.loss`; the mean's own deviation.
        curve: a row a round: `measured` so far, mean `sparsity` and mean `loss` over dense of the round's routes.
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
    seed: int = 0,
    watch: Callable[[dict[str, float]], None] | None = None,
) -> LayerCosts:
    """Learn what each layer costs the meter's samples at about Ω = `sparsity`.

    Args:
        meter: samples of one group of tasks; each is measured about equally often.
        sparsity: Ω wanted.
        measurements: (sample, route) pairs, each one pass of one sample with gradients.
        batch: pairs between two looks at the costs.
        spread: routes have up to this many sparse layers more or fewer than wanted, so that a dial moves well.
        seed: of the order of samples and the draws.
        watch: called with each row of the curve.

    Raises:
        ValueError: a sparsity outside (0, 1), or fewer than two measurements.
    """
    layers = meter.layers
    if not 0.0 < sparsity < 1.0:
        raise ValueError(f"sparsity must lie strictly between 0 and 1, got {sparsity!r}")
    if measurements < 2 or batch < 1:
        raise ValueError(f"costs with a deviation need two measurements, got {measurements} in batches of {batch}")
    generator = torch.Generator().manual_seed(seed)
    slopes: list[Tensor] = []
    mean = deviation = torch.zeros(layers, dtype=torch.float64)
    curve: list[dict[str, float]] = []
    queue: list[int] = []
    done = 0
    while done < measurements:
        count = min(batch, measurements - done)
        while len(queue) < count:
            queue += torch.randperm(len(meter.samples), generator=generator).tolist()
        members, queue = queue[:count], queue[count:]
        if done < _BLIND * measurements:
            scores = torch.rand(count, layers, generator=generator, dtype=torch.float64)
        else:
            low, high = mean.quantile(torch.tensor([0.2, 0.8], dtype=torch.float64))
            noise = torch.randn(count, layers, generator=generator, dtype=torch.float64)
            scores = mean + (deviation + (high - low)) * noise
        wanted = round(sparsity * layers) + torch.randint(-spread, spread + 1, (count,), generator=generator)
        rank = scores.argsort(1).argsort(1)
        sparse = (rank < wanted.clamp(1, layers - 1)[:, None]).T
        away = torch.rand(layers, count, generator=generator) / 2
        loss, slope = meter.slopes(members, torch.where(sparse, away, 1 - away))
        slopes.append(slope.double())
        done += count
        found = torch.cat(slopes, 1)
        mean = found.mean(1)
        if done > 1:
            deviation = found.std(1) / done**0.5
        row = {
            "measured": float(done),
            "sparsity": float(sparse.float().mean()),
            "loss": float((loss - meter.dense.loss[members]).mean()),
        }
        curve.append(row)
        if watch is not None:
            watch(row)
    return LayerCosts(mean, deviation, curve)
