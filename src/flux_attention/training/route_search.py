"""Which layers a group of tasks can spare: Thompson sampling over whole routes.

Greedy searches measure one layer at a time on all samples. Here every measurement is one sample under a whole route of
its own: a Bayesian linear model explains the loss over the dense model's by the layers that ran sparse, and the next
routes are the best ones under draws from its posterior. All measurements inform every layer, they gather where the
good routes are, and the model is fitted at the sparsity that is wanted, where layers that stand in for each other have
made themselves felt. Forward passes only. Sources: Thompson sampling for combinatorial bandits (Chapelle & Li, 2011),
regression on random subsets (Ilyas et al., arXiv 2202.00622).

Shapes: `L` routable layers, `n` measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flux_attention.training.damage import DamageMeter

#: Share of the layers that the first routes make sparse: few enough that single layers are told apart.
_FIRST_SHARE = 0.3
#: Share of the measurements after which routes are as sparse as wanted.
_GROWTH = 0.4
#: Deviation of the prior of a layer's effect, in deviations of a measurement.
_PRIOR = 0.33


@dataclass
class LayerCosts:
    """What it costs to make each layer sparse, beside about as many others as wanted.

    Attributes:
        mean, deviation: of the posterior, float64 `[L]`, in units of `Measured.loss`.
        curve: a row a round: `measured` so far, mean `sparsity` and mean `loss` over dense of the round's routes.
    """

    mean: Tensor
    deviation: Tensor
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def order(self) -> list[int]:
        """A ranking: layers, cheapest to make sparse first."""
        return torch.argsort(self.mean, stable=True).tolist()


class _LinearModel:
    """Bayesian regression of the loss on the sparse layers and a constant, float64 on the CPU."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.inputs: list[Tensor] = []
        self.losses: list[Tensor] = []

    def add(self, sparse: Tensor, loss: Tensor) -> None:
        """`sparse` bool `[n, L]`, `loss` `[n]`."""
        self.inputs.append(torch.cat((sparse.double(), torch.ones(len(loss), 1, dtype=torch.float64)), 1))
        self.losses.append(loss.double())

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean `[L + 1]` and covariance `[L + 1, L + 1]`, the constant last."""
        if not self.inputs:
            # Nothing known: a draw is a random order.
            return torch.zeros(self.layers + 1, dtype=torch.float64), torch.eye(self.layers + 1, dtype=torch.float64)
        x, y = torch.cat(self.inputs), torch.cat(self.losses)
        noise = y.var(unbiased=False).clamp_min(1e-12)
        # Twice: with the deviation of the losses first, then with what the layers leave unexplained.
        for _ in range(2):
            prior = torch.full((self.layers + 1,), 1.0, dtype=torch.float64) / (_PRIOR**2 * noise)
            prior[-1] = 1e-6 / noise
            covariance = torch.linalg.inv(x.T @ x / noise + prior.diag())
            mean = covariance @ (x.T @ y) / noise
            noise = (y - x @ mean).square().mean().clamp_min(1e-12)
        return mean, covariance

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Costs of the layers under `count` draws from the posterior, `[count, L]`."""
        mean, covariance = self.posterior()
        normal = torch.randn(count, self.layers + 1, dtype=torch.float64, generator=generator)
        return (mean + normal @ torch.linalg.cholesky(covariance).T)[:, : self.layers]


def search_routes(
    meter: DamageMeter,
    sparsity: float,
    measurements: int,
    *,
    batch: int = 64,
    spread: int = 2,
    seed: int = 0,
    watch: Callable[[dict[str, float]], None] | None = None,
) -> LayerCosts:
    """Learn what each layer costs the meter's samples at about Ω = `sparsity`.

    Args:
        meter: samples of one group of tasks, with dense answers; each is measured about equally often.
        sparsity: Ω wanted.
        measurements: (sample, route) pairs, each one forward pass of one sample.
        batch: pairs between two looks at the posterior.
        spread: routes have up to this many sparse layers more or fewer than wanted, so that a dial moves well.
        seed: of the order of samples and the draws.
        watch: called with each row of the curve.

    Raises:
        ValueError: a sparsity outside (0, 1), or fewer measurements than layers.
    """
    layers = meter.layers
    if not 0.0 < sparsity < 1.0:
        raise ValueError(f"sparsity must lie strictly between 0 and 1, got {sparsity!r}")
    if measurements < layers or batch < 1:
        raise ValueError(f"{measurements} measurements in batches of {batch} cannot tell {layers} layers apart")
    generator = torch.Generator().manual_seed(seed)
    dense = meter.dense_losses()
    model, curve = _LinearModel(layers), []
    queue: list[int] = []
    done = 0
    while done < measurements:
        count = min(batch, measurements - done)
        while len(queue) < count:
            queue += torch.randperm(len(meter.samples), generator=generator).tolist()
        members, queue = queue[:count], queue[count:]
        share = sparsity - max(0.0, sparsity - _FIRST_SHARE) * max(0.0, 1 - done / (_GROWTH * measurements))
        wanted = round(share * layers) + torch.randint(-spread, spread + 1, (count,), generator=generator)
        rank = model.draw(count, generator).argsort(1).argsort(1)
        sparse = rank < wanted.clamp(1, layers - 1)[:, None]
        loss = meter.measure(members, ~sparse.T).loss - dense[members]
        model.add(sparse, loss)
        done += count
        row = {"measured": float(done), "sparsity": float(sparse.float().mean()), "loss": float(loss.mean())}
        curve.append(row)
        if watch is not None:
            watch(row)
    mean, covariance = model.posterior()
    return LayerCosts(mean[:layers], covariance.diagonal()[:layers].sqrt(), curve)
