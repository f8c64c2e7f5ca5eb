"""Which layers a group of tasks can spare: Thompson sampling over whole routes.

Greedy searches measure one layer at a time on all samples. Here every measurement is one sample under a whole route of
its own: a Bayesian linear model explains the loss over the dense model's by the layers that ran sparse, and the next
routes are the best ones under draws from its posterior. All measurements inform every layer, they gather where the
good routes are, and the model is fitted at the sparsity that is wanted, where layers that stand in for each other have
made themselves felt. Forward passes only. Sources: Thompson sampling for combinatorial bandits (Chapelle & Li, 2011),
regression on random subsets (Ilyas et al., arXiv 2202.00622). What a sum over layers cannot tell, which of two close
routes is better, a race settles: successive halving (Jamieson & Talwalkar, arXiv 1502.07943) on the same samples.

Shapes: `L` routable layers, `n` measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flux_attention.training.damage import DamageMeter

#: Share of the layers that the first routes make sparse where nothing is known: few, so that single layers show.
_FIRST_SHARE = 0.3
#: Share of the measurements after which routes are as sparse as wanted.
_GROWTH = 0.4
#: Share of the routes that are drawn at random.
_BLIND = 0.125
#: Deviations that a layer's own effect may have beforehand, in deviations of a measurement; the likeliest is taken.
_PRIORS = (0.3, 0.1, 0.03, 0.01, 0.003)


@dataclass
class LayerCosts:
    """What it costs to make each layer sparse, beside about as many others as wanted.

    Attributes:
        mean, deviation: of the posterior, float64 `[L]`, in units of `Measured.loss`.
        curve: a row a round: `measured` so far, mean `sparsity` and mean `loss` over dense of the round's routes.
        covariance: of the posterior, float64 `[L, L]`; None where only deviations are known.
        raced: layers that the best route of a race makes sparse; they come first in the ranking.
    """

    mean: Tensor
    deviation: Tensor
    curve: list[dict[str, float]] = field(default_factory=list)
    covariance: Tensor | None = None
    raced: tuple[int, ...] = ()

    @property
    def order(self) -> list[int]:
        """A ranking: layers, cheapest to make sparse first."""
        by_cost = torch.argsort(self.mean, stable=True).tolist()
        return sorted(by_cost, key=lambda layer: layer not in self.raced)


def combined(found: Sequence[LayerCosts]) -> LayerCosts:
    """What several searches for the same costs say together: their means, each by its precision.

    One search comes back as it is; of several, curves, covariances and races do not survive.
    """
    if len(found) == 1:
        return found[0]
    precision = torch.stack([costs.deviation.double().clamp_min(1e-9) ** -2 for costs in found])
    mean = (precision * torch.stack([costs.mean.double() for costs in found])).sum(0) / precision.sum(0)
    return LayerCosts(mean, precision.sum(0) ** -0.5)


class _LinearModel:
    """Bayesian regression of the loss on the sparse layers, float64 on the CPU.

    A layer's cost is its own, drawn from a prior around zero whose width is learnt, plus a multiple of what the layer
    costs other groups of tasks: where measurements are few or noisy, layers keep the order that is known.

    Args:
        layers: L.
        known: costs found for other groups, `[L]` each.
    """

    def __init__(self, layers: int, known: Sequence[Tensor] = ()) -> None:
        self.layers = layers
        self.known = [cost.double() / cost.double().abs().max().clamp_min(1e-12) for cost in known]
        self.inputs: list[Tensor] = []
        self.losses: list[Tensor] = []
        # Costs of the layers as a function of the coefficients: their own, the multiples, the constant's (none).
        self._to_costs = torch.cat(
            (torch.eye(layers, dtype=torch.float64), *(k[:, None] for k in self.known), torch.zeros(layers, 1)), 1
        )

    def add(self, sparse: Tensor, loss: Tensor) -> None:
        """`sparse` bool `[n, L]`, `loss` `[n]`."""
        x = sparse.double() @ self._to_costs
        x[:, -1] = 1
        self.inputs.append(x)
        self.losses.append(loss.double())

    def costs(self) -> tuple[Tensor, Tensor]:
        """Posterior of the layers' costs: mean `[L]` and covariance `[L, L]`."""
        width = self._to_costs.shape[1]
        if not self.inputs:
            # Nothing measured: a draw is what is known, or a random order.
            prior = torch.stack(self.known).mean(0) if self.known else torch.zeros(self.layers, dtype=torch.float64)
            return prior, torch.eye(self.layers, dtype=torch.float64)
        x, y = torch.cat(self.inputs), torch.cat(self.losses)
        noise = y.var(unbiased=False).clamp_min(1e-12)
        # Twice: with the deviation of the losses first, then with what the layers leave unexplained.
        for _ in range(2):
            best: tuple[Tensor, Tensor, Tensor] | None = None
            for share in _PRIORS:
                prior = torch.full((width,), 1e-3, dtype=torch.float64) / noise
                prior[: self.layers] = 1 / (share**2 * noise)
                precision = x.T @ x / noise + prior.diag()
                mean = torch.linalg.solve(precision, x.T @ y / noise)
                # Of the data under this prior, up to a constant.
                evidence = 0.5 * (prior.log().sum() - torch.logdet(precision) + mean @ precision @ mean)
                if best is None or evidence > best[0]:
                    best = (evidence, mean, precision)
            assert best is not None
            _, mean, precision = best
            noise = (y - x @ mean).square().mean().clamp_min(1e-12)
        covariance = self._to_costs @ torch.linalg.inv(precision) @ self._to_costs.T
        return self._to_costs @ mean, covariance

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Costs of the layers under `count` draws from the posterior, `[count, L]`."""
        return _draws(*self.costs(), count, generator)


def search_routes(
    meter: DamageMeter,
    sparsity: float,
    measurements: int,
    *,
    batch: int = 64,
    spread: int = 2,
    seed: int = 0,
    known: Sequence[Tensor] = (),
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
        known: costs that other groups' searches found, `[L]` each, a guess for this one's.
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
    dense = meter.dense.loss
    model = _LinearModel(layers, known)
    curve: list[dict[str, float]] = []
    queue: list[int] = []
    done = 0
    while done < measurements:
        count = min(batch, measurements - done)
        while len(queue) < count:
            queue += torch.randperm(len(meter.samples), generator=generator).tolist()
        members, queue = queue[:count], queue[count:]
        growing = 0.0 if known else max(0.0, 1 - done / (_GROWTH * measurements))
        share = sparsity - max(0.0, sparsity - _FIRST_SHARE) * growing
        wanted = round(share * layers) + torch.randint(-spread, spread + 1, (count,), generator=generator)
        draws = model.draw(count, generator)
        # A confident model never looks again at what it has given up: a part of the routes is drawn blindly.
        blind = torch.rand(count, generator=generator) < _BLIND
        draws[blind] = torch.rand(int(blind.sum()), layers, generator=generator, dtype=torch.float64)
        rank = draws.argsort(1).argsort(1)
        sparse = rank < wanted.clamp(1, layers - 1)[:, None]
        loss = meter.measure(members, ~sparse.T).loss - dense[members]
        model.add(sparse, loss)
        done += count
        row = {"measured": float(done), "sparsity": float(sparse.float().mean()), "loss": float(loss.mean())}
        curve.append(row)
        if watch is not None:
            watch(row)
    mean, covariance = model.costs()
    return LayerCosts(mean, covariance.diagonal().clamp_min(0).sqrt(), curve, covariance)


def race_routes(
    meter: DamageMeter,
    costs: LayerCosts,
    sparsity: float,
    *,
    routes: int = 32,
    samples: Sequence[int] = (64, 192, 512),
    keep: Sequence[int] = (10, 4, 1),
    seed: int = 0,
    watch: Callable[[dict[str, float]], None] | None = None,
) -> LayerCosts:
    """Let likely routes of exactly Ω = `sparsity` race on the same samples; the costs with the winner in `raced`.

    Heats measure the routes that are left on more and more samples and keep the best; a measurement is never
    repeated. The field is the ranking's own route and the best ones under draws from the posterior.

    Args:
        meter: samples that the search did not see, or the same.
        costs: what a search found, with its covariance.
        routes: that start.
        samples, keep: of each heat: how many samples, and how many routes go on.
        seed: of the draws and the order of samples.
        watch: called with each heat's `samples`, routes `left` and best mean `loss`.

    Raises:
        ValueError: a sparsity outside (0, 1), costs without covariance, or heats that do not match.
    """
    layers = meter.layers
    if not 0.0 < sparsity < 1.0:
        raise ValueError(f"sparsity must lie strictly between 0 and 1, got {sparsity!r}")
    if costs.covariance is None:
        raise ValueError("a race draws its routes from the posterior of a search: these costs have no covariance")
    if routes < 1 or not samples or len(samples) != len(keep) or min(*samples, *keep) < 1:
        raise ValueError(f"a race needs routes and heats, got {routes} routes, samples {samples}, keep {keep}")
    generator = torch.Generator().manual_seed(seed)
    budget = round(sparsity * layers)
    draws = torch.cat((costs.mean[None], _draws(costs.mean, costs.covariance, 8 * routes, generator)))
    # Many draws agree; dict keeps the first of each.
    running = list(dict.fromkeys(tuple(sorted(row[:budget])) for row in draws.argsort(1).tolist()))[:routes]
    order = torch.randperm(len(meter.samples), generator=generator).tolist()
    losses = dict.fromkeys(running, torch.zeros(0))
    for count, left in zip(samples, keep, strict=True):
        # All that still run were measured on the same samples.
        fresh = order[len(losses[running[0]]) : count]
        if fresh:
            use_full = torch.ones(len(running), layers, dtype=torch.bool)
            for i, route in enumerate(running):
                use_full[i, list(route)] = False
            found = meter.measure(fresh * len(running), use_full.repeat_interleave(len(fresh), 0).T).loss
            for route, loss in zip(running, found.view(len(running), -1), strict=True):
                losses[route] = torch.cat((losses[route], loss))
        running = sorted(running, key=lambda route: float(losses[route].mean()))[:left]
        if watch is not None:
            mean = float(losses[running[0]].mean())
            watch({"samples": float(min(count, len(order))), "left": float(len(running)), "loss": mean})
    return replace(costs, raced=running[0])


def _draws(mean: Tensor, covariance: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` draws from a normal distribution, float64 `[count, L]`; the covariance may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    normal = torch.randn(count, len(mean), dtype=torch.float64, generator=generator)
    return mean + (normal * values.clamp_min(0).sqrt()) @ vectors.T
