"""What sparsity costs: measured damage of routes, and the rankings made from them.

The damage of a route on a sample is KL(dense ‖ routed) on the answer: summed over a short exact answer and turned into
the share of its probability that may be lost, `1 − exp(−KL)`; the mean over tokens for running text. So one broken
answer counts as one however far off it is, and tasks with answers of different lengths are commensurable.

Shapes: `n` samples, `R` routes, `L` routable layers. `use_full`: True = full attention. A *ranking* lists layers, least
needed first, as `route.Static.from_ranking` takes it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_attention.data.sample import Sample
from flux_attention.models.controller import FluxAttention
from flux_attention.models.step import SoftRouting, exact_values
from flux_attention.route import Dense, Fixed, Route
from flux_attention.training.answers import forced_logits
from flux_attention.training.objective import token_kl


@dataclass(frozen=True)
class Measured:
    """Results of (sample, route) pairs, float32 on the CPU, one value a pair.

    Attributes:
        damage: see the module's head; 0 = the dense model's answer.
        nll: of the reference answer, nats a token.
        accuracy: share of the scored spans that teacher forcing gets right.
        soft: softened accuracy (`softened_accuracy`); 1 for running text, which is never out of reach.
        loss: what a route is judged by, see `answer_loss`.
    """

    damage: Tensor
    nll: Tensor
    accuracy: Tensor
    soft: Tensor
    loss: Tensor

    def select(self, indices: Sequence[int]) -> Measured:
        """Some of the pairs."""
        return Measured(*(getattr(self, item.name)[list(indices)] for item in fields(self)))


def counts_as_whole(sample: Sample) -> bool:
    """Whether an answer is right or wrong as a whole (a needle) or token by token (running text)."""
    return sample.teacher_forced and sample.metric != "nll"


def span_share(right: Sequence[bool], sample: Sample) -> float:
    """Share of the sample's scored spans whose answer tokens are all `right`."""
    return sum(all(right[a:b]) for a, b in sample.scored_spans) / len(sample.scored_spans)


def answer_loss(sample: Sample, nll: Tensor, soft: Tensor) -> Tensor:
    """How far a teacher-forced answer is from right, smooth, a scalar, of its NLL (nats a token) and `soft`.

    Running text: the NLL. A short exact answer: one minus its softened accuracy, plus a quarter of the NLL up to
    2 nats, which still tells routes apart on answers that are wrong either way.
    """
    return 1 - soft + 0.25 * nll.clamp_max(2) if counts_as_whole(sample) else nll


def softened_accuracy(sample: Sample, logits: Tensor, target: Tensor) -> Tensor:
    """Sigmoid of the smallest lead of a right token over the next best, mean over the sample's spans, a scalar."""
    logits = logits.float()
    right = logits.gather(-1, target[:, None])
    others = logits.scatter(-1, target[:, None], float("-inf"))
    lead = right[:, 0] - others.amax(-1)
    return torch.sigmoid(torch.stack([lead[a:b].min() for a, b in sample.scored_spans])).mean()


def _nll_and_soft(sample: Sample, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What `answer_loss` takes, of logits `[A, V]` of the answer's tokens `target [A]`: float32 scalars."""
    nll = F.cross_entropy(logits.float(), target)
    return nll, softened_accuracy(sample, logits, target) if counts_as_whole(sample) else torch.ones_like(nll)


def _nothing_yet(pairs: int) -> Measured:
    return Measured(*torch.full((len(fields(Measured)), pairs), float("nan")))


class DamageMeter:
    """Measures routes on fixed samples.

    Args:
        controller: the attached backbone.
        samples: what to measure on.
        batch_tokens: most tokens of one pass.
        gradient_tokens: most tokens of a pass that keeps its activations, see `slopes`.
        teacher: keep the dense model's answers on the device, for `damage`; without them it is NaN.
    """

    def __init__(
        self,
        controller: FluxAttention,
        samples: Sequence[Sample],
        *,
        batch_tokens: int = 65536,
        gradient_tokens: int = 16384,
        teacher: bool = True,
    ) -> None:
        if not samples:
            raise ValueError("a damage meter needs at least one sample")
        if batch_tokens < 1 or gradient_tokens < 1:
            raise ValueError(f"tokens of a pass must be positive, got {batch_tokens} and {gradient_tokens}")
        self.controller, self.samples = controller, list(samples)
        self.batch_tokens, self.gradient_tokens = batch_tokens, gradient_tokens
        self.layers = len(controller.layers)
        self._teacher: list[Tensor] = []
        if teacher:
            self._teacher = self._dense_answers()

    def subset(self, keep: Iterable[int]) -> DamageMeter:
        """A meter on some of the samples that shares what is known of the dense model."""
        chosen = list(keep)
        other = DamageMeter(
            self.controller,
            [self.samples[i] for i in chosen],
            batch_tokens=self.batch_tokens,
            gradient_tokens=self.gradient_tokens,
            teacher=False,
        )
        other._teacher = [self._teacher[i] for i in chosen] if self._teacher else []
        if "dense" in self.__dict__:
            other.dense = self.dense.select(chosen)
        return other

    def batches(self, indices: Sequence[int], tokens: int | None = None) -> Iterator[list[int]]:
        """Places in `indices` (sample numbers, repeats allowed), grouped so that equal lengths go together.

        `tokens`: most of a group; by default `batch_tokens`.
        """
        most = tokens or self.batch_tokens
        order = sorted(range(len(indices)), key=lambda place: (len(self.samples[indices[place]]), indices[place]))
        batch: list[int] = []
        for place in order:
            # Sorted by length, so the newest is the longest and padding is counted with it.
            if batch and (len(batch) + 1) * len(self.samples[indices[place]]) > most:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    @torch.no_grad()
    def _dense_answers(self) -> list[Tensor]:
        found: list[Tensor | None] = [None] * len(self.samples)
        with self.controller.using(Dense()):
            for places in self.batches(range(len(self.samples))):
                logits, _ = forced_logits(self.controller, [self.samples[place] for place in places])
                for place, part in zip(places, logits, strict=True):
                    found[place] = part.clone()
        return [part for part in found if part is not None]

    @cached_property
    def dense(self) -> Measured:
        """Every sample under the dense model."""
        every = range(len(self.samples))
        if not self._teacher:
            return self.measure(every, torch.ones(self.layers, len(every), dtype=torch.bool))
        found = _nothing_yet(len(every))
        targets = [torch.tensor(sample.answer_ids, device=self.controller.device) for sample in self.samples]
        self._judge(found, every, every, self._teacher, targets)
        return found

    @torch.no_grad()
    def measure(self, indices: Sequence[int], use_full: Tensor) -> Measured:
        """Pair i: sample `indices[i]` under the route `use_full[:, i]`; `use_full` bool `[L, pairs]`."""
        if tuple(use_full.shape) != (self.layers, len(indices)):
            raise ValueError(f"use_full must be [{self.layers}, {len(indices)}], got {list(use_full.shape)}")
        use_full = use_full.cpu().bool()
        found = _nothing_yet(len(indices))
        for places in self.batches(indices):
            members = [indices[place] for place in places]
            with self.controller.using(Fixed(Route(use_full[:, places]))):
                answers = forced_logits(self.controller, [self.samples[member] for member in members])
            self._judge(found, places, members, *answers)
        return found

    def slopes(self, indices: Sequence[int], gates: Tensor) -> tuple[Tensor, Tensor]:
        """Pair i: sample `indices[i]` with the layers blended by `gates[:, i]`, float `[L, pairs]`, 1 = full.

        Returns:
            The losses `[pairs]`, and what each layer adds to its pair's loss when it runs sparser, −∂loss/∂gate
            `[L, pairs]`; float32 on the CPU. A number for every layer, at the price of one pass with gradients and,
            where a gate is exactly 0 or 1, a forward pass of the layer's other side.
        """
        if tuple(gates.shape) != (self.layers, len(indices)):
            raise ValueError(f"gates must be [{self.layers}, {len(indices)}], got {list(gates.shape)}")
        losses, slopes = torch.empty(len(indices)), torch.empty(self.layers, len(indices))
        for places in self.batches(indices, self.gradient_tokens):
            samples = [self.samples[indices[place]] for place in places]
            chosen = gates[:, places].float().to(self.controller.device).requires_grad_()
            exact = exact_values(gates[:, places])
            with torch.enable_grad(), self.controller.soft_routing(SoftRouting(forced=chosen, forced_exact=exact)):
                answers = zip(samples, *forced_logits(self.controller, samples), strict=True)
                loss = torch.stack([answer_loss(answer[0], *_nll_and_soft(*answer)) for answer in answers])
                (slope,) = torch.autograd.grad(loss.sum(), chosen)
            losses[places], slopes[:, places] = loss.detach().cpu(), -slope.cpu()
        return losses, slopes

    def _judge(
        self,
        found: Measured,
        places: Sequence[int],
        members: Sequence[int],
        answers: Sequence[Tensor],
        targets: Sequence[Tensor],
    ) -> None:
        """Score the logits `[A, V]` of these samples' answers against their tokens `[A]`, into places of `found`."""
        places = list(places)
        flags = []
        # Row by row on the device; one copy to the host.
        rows = torch.empty(len(places), 3, device=self.controller.device)
        for row, member, logits, target in zip(rows, members, answers, targets, strict=True):
            sample, logits = self.samples[member], logits.float()
            row[0], row[1] = _nll_and_soft(sample, logits, target)
            if self._teacher:
                kl = token_kl(self._teacher[member], logits)
                row[2] = 1 - torch.exp(-(kl.sum() if counts_as_whole(sample) else kl.mean()))
            flags.append(logits.argmax(-1) == target)
        nll, soft, damage = rows.T.cpu()
        found.nll[places], found.soft[places] = nll, soft
        if self._teacher:
            found.damage[places] = damage.clamp_min(0)
        right = torch.cat(flags).cpu().split([len(flag) for flag in flags])
        for i, (place, member) in enumerate(zip(places, members, strict=True)):
            found.loss[place] = answer_loss(self.samples[member], nll[i], soft[i])
            found.accuracy[place] = span_share(right[i].tolist(), self.samples[member])

    def routes(self, use_full: Tensor) -> Measured:
        """Every sample under each of `use_full [R, L]`; results are `[R, n]`."""
        count, n = use_full.shape[0], len(self.samples)
        pairs = use_full.cpu().bool().repeat_interleave(n, 0).T
        found = self.measure(list(range(n)) * count, pairs)
        return Measured(*(getattr(found, item.name).view(count, n) for item in fields(found)))

    def answered(self, least: float = 0.99) -> list[int]:
        """Samples that the dense model answers (running text always): the others cannot tell which layers retrieve."""
        text = torch.tensor([not counts_as_whole(sample) for sample in self.samples])
        return (text | (self.dense.accuracy >= least)).nonzero()[:, 0].tolist()


# ---------------------------------------------------------------------------------------------------- single layers


def leave_one_out(meter: DamageMeter) -> Tensor:
    """Damage of making one layer sparse and no other, float32 `[n, L]`: L passes a sample, no gradient."""
    return meter.routes(~torch.eye(meter.layers, dtype=torch.bool)).damage.T.contiguous()


def static_ranking(damage: Tensor) -> list[int]:
    """Layers by mean damage, least first; `damage [n, L]` or `[L]`."""
    mean = damage if damage.ndim == 1 else damage.mean(0)
    return torch.argsort(mean, stable=True).tolist()


# ---------------------------------------------------------------------------------------------------- greedy


@dataclass
class Greedy:
    """A ranking found by making one layer after the other sparse.

    Attributes:
        order: all layers, least needed first; those behind `measured` were not reached and follow by their last
            known marginal damage.
        measured: number of layers made sparse and measured.
        curve: a row a step: `sparse` layers, mean `damage`, `nll`, `accuracy`.
    """

    order: list[int]
    measured: int
    curve: list[dict[str, float]] = field(default_factory=list)


def greedy_ranking(meter: DamageMeter, *, candidates: int = 5, jump: int = 6, stop: float = 1.0) -> Greedy:
    """Layers in the order in which they can be made sparse at the least damage, given those that are already.

    Damage of single layers does not add up: two layers can stand in for each other, and a ranking by leaving one out
    gives up both. Each step measures the `candidates` layers with the smallest last-known marginal damage (their
    marginals mostly grow along the way, which is what makes lazy evaluation right most of the time) and takes the best.

    Args:
        meter: calibration samples.
        candidates: layers tried each step; L = plain greedy.
        jump: layers taken at once at the start by leave-one-out, where single damages are near 0.
        stop: Ω up to which steps are measured.
    """
    layers = meter.layers
    if candidates < 1 or not 0 <= jump <= layers or not 0.0 <= stop <= 1.0:
        raise ValueError(
            f"greedy needs candidates ≥ 1, jump in [0, {layers}], stop in [0, 1]; got {candidates}, {jump}, {stop}"
        )
    single = leave_one_out(meter) if jump < layers else torch.zeros(len(meter.samples), layers)
    marginal = single.mean(0).tolist()
    queue = [(marginal[layer], layer) for layer in range(layers)]
    heapq.heapify(queue)
    order = [heapq.heappop(queue)[1] for _ in range(jump)]
    use_full = torch.ones(layers, dtype=torch.bool)
    use_full[order] = False
    base, curve = 0.0, []

    def note(found: Measured, row: int) -> float:
        curve.append(
            {
                "sparse": float(len(order)),
                "damage": float(found.damage[row].mean()),
                "nll": float(found.nll[row].mean()),
                "accuracy": float(found.accuracy[row].mean()),
            }
        )
        return curve[-1]["damage"]

    base = note(meter.routes(use_full[None]), 0)
    wanted = round(stop * layers)
    while len(order) < wanted and queue:
        tried = [heapq.heappop(queue)[1] for _ in range(min(candidates, len(queue)))]
        routes = use_full.repeat(len(tried), 1)
        routes[torch.arange(len(tried)), torch.tensor(tried)] = False
        found = meter.routes(routes)
        totals = found.damage.mean(1).tolist()
        best = min(range(len(tried)), key=lambda i: (totals[i], tried[i]))
        for i, layer in enumerate(tried):
            if i != best:
                heapq.heappush(queue, (totals[i] - base, layer))
        order.append(tried[best])
        use_full[tried[best]] = False
        base = note(found, best)
    measured = len(order)
    return Greedy([*order, *(layer for _, layer in sorted(queue))], measured, curve)


# ---------------------------------------------------------------------------------------------------- targets


def rank_positions(ranking: Sequence[int]) -> Tensor:
    """Place of each layer in a ranking, scaled to [0, 1]: 0 = least needed; float32 `[L]`."""
    layers = len(ranking)
    if sorted(ranking) != list(range(layers)):
        raise ValueError(f"a ranking lists every layer from 0 to {layers - 1} once, got {list(ranking)}")
    place = torch.empty(layers)
    place[torch.tensor(ranking)] = torch.arange(layers) / max(1, layers - 1)
    return place


def _ranks(scores: Tensor) -> Tensor:
    """Place of every layer among its row's scores, smallest first; ties in layer order."""
    return torch.argsort(torch.argsort(scores, dim=-1, stable=True), dim=-1)


def budget_targets(scores: Tensor, sparsity: Tensor | float, softness: float | Sequence[float] = 1.0) -> Tensor:
    """Soft targets of `p_full`: the least needed layers below 0.5, exactly as many as the budget asks for.

    A layer's target is the sigmoid of its distance in ranks to the boundary over `softness`; of several, their mean.
    A small one makes the decision sharp but says nothing of the order away from the boundary, a large one teaches the
    order, in which a sparsity dial moves layers; so a router that will be dialled wants one of each.

    Args:
        scores: `[n, L]`, larger = more needed.
        sparsity: Ω, one or `[n]`.
        softness: in ranks, one or several, each > 0.
    """
    widths = (softness,) if isinstance(softness, int | float) else tuple(softness)
    if not widths or min(widths) <= 0:
        raise ValueError(f"softness must be positive, got {softness!r}")
    layers = scores.shape[-1]
    rank = _ranks(scores).float()
    sparse = torch.round(torch.as_tensor(sparsity, dtype=torch.float32) * layers).reshape(-1, 1)
    return torch.stack([torch.sigmoid((rank - sparse + 0.5) / width) for width in widths]).mean(0)
