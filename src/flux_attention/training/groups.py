"""Groups of tasks that can spare the same layers, and a router's targets made from their rankings.

A group's prompts run its ranking's least needed layers sparse, as many as its Ω says; a router fitted to that
(`TrainConfig.objective = "damage"`) learns which group a prompt belongs to.

Shapes: `L` routable layers, `n` samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from flux_attention.data import TASK_CLASSES, TASKS, Sample, training_tasks
from flux_attention.router import LayerRouter
from flux_attention.training.damage import DamageMeter, budget_targets, counts_as_whole, rank_positions


@dataclass(frozen=True)
class Group:
    """Tasks that share one ranking of layers.

    Args:
        name: for the log.
        target: Ω of its prompts; NaN while it has to be found.
        keep: share of the dense model's score that the target must keep, where it is to be found (`largest_sparsity`).
        tasks: names.
        searched: those that its ranking is found on; () = all of them.
        like: name of the group whose ranking it shares (`resolve_rankings`); "" = it has its own.
    """

    name: str
    target: float
    tasks: tuple[str, ...]
    searched: tuple[str, ...] = ()
    like: str = ""
    keep: float | None = None

    @classmethod
    def parse(cls, text: str) -> Group:
        """`name:target:task,task,…[:searched,…]`, or `name:target:task,task,…:=other` with another group's ranking.

        A target is an Ω, or such as `98%`: the largest Ω that keeps so much of the dense model's score. A class or a
        prefix ending in `*` stands for its training tasks.

        Raises ValueError for another form and for what is no training task.
        """
        parts = text.split(":")
        if len(parts) not in (3, 4):
            raise ValueError(f"a group is name:target:task,task,…[:searched,… or :=other], got {text!r}")
        name, target, tasks, source = (*parts, "")[:4]
        keep = float(target[:-1]) / 100 if target.endswith("%") else None
        omega = float(target) if keep is None else math.nan
        if not 0 < (omega if keep is None else keep) <= 1:
            raise ValueError(f"a group's target is an Ω in (0, 1] or a share such as 98%, got {target!r}")
        if source.startswith("="):
            return cls(name, omega, cls._tasks(tasks), (), source[1:], keep)
        return cls(name, omega, cls._tasks(tasks), cls._tasks(source) if source else (), "", keep)

    @staticmethod
    def _tasks(text: str) -> tuple[str, ...]:
        known = training_tasks()
        tasks: list[str] = []
        for word in text.split(","):
            if word in TASK_CLASSES:
                tasks += [name for name, task in known.items() if task.task_class == word]
            elif word.endswith("*"):
                tasks += [name for name in known if name.startswith(word[:-1])]
            elif word in known:
                tasks.append(word)
            else:
                raise ValueError(f"{word!r} is no training task; they are {', '.join(known)}")
        return tuple(tasks)


def resolve_rankings(groups: Sequence[Group]) -> list[Group]:
    """The groups, each that shares a ranking naming the group whose own it is, however many lie between.

    Raises ValueError for a name given twice and for a ranking of no group before.
    """
    roots: dict[str, str] = {}
    for group in groups:
        if group.name in roots:
            raise ValueError(f"two groups are named {group.name!r}")
        if group.like and group.like not in roots:
            raise ValueError(f"group {group.name} shares the ranking of {group.like!r}, which must come before it")
        roots[group.name] = roots[group.like] if group.like else group.name
    return [replace(group, like=roots[group.name]) if group.like else group for group in groups]


def largest_sparsity(meter: DamageMeter, order: Sequence[int], keep: float) -> tuple[float, dict[int, float]]:
    """The largest Ω of a ranking that keeps a share of the dense model's score, and the shares by sparse layers.

    The score of an exact answer is its softened accuracy, that of running text the share exp(NLL dense − NLL) of its
    probability a token. Every second number of layers is measured on all samples; what they keep is smoothed to fall
    with their number, as it does but for noise. 0 when no number keeps enough.

    Args:
        meter: samples of a group's tasks, as many of each.
        order: all layers, least needed first.
        keep: in (0, 1].
    """
    counts = [n for n in range(2, meter.layers + 1) if (meter.layers - n) % 2 == 0]
    use_full = torch.ones(len(counts), meter.layers, dtype=torch.bool)
    for row, n in zip(use_full, counts, strict=True):
        row[list(order[:n])] = False
    text = torch.tensor([not counts_as_whole(sample) for sample in meter.samples])
    dense, found = meter.dense, meter.routes(use_full)
    scores = torch.where(text, torch.exp(dense.nll - found.nll), found.soft)
    shares = (scores.mean(1) / torch.where(text, 1.0, dense.soft).mean()).tolist()
    kept = [n for n, share in zip(counts, _falling(shares), strict=True) if share >= keep]
    return max(kept, default=0) / meter.layers, dict(zip(counts, shares, strict=True))


def _falling(values: Sequence[float]) -> list[float]:
    """The closest falling sequence, by pooling adjacent violators."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and fmean(pools[-2]) < fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [fmean(pool) for pool in pools for _ in pool]


def group_targets(
    samples: Sequence[Sample],
    groups: Sequence[Group],
    rankings: Mapping[str, Sequence[int]],
    softness: float | Sequence[float],
) -> Tensor:
    """Target `p_full [n, L]`: each sample's layers by the ranking of its group, cut at the group's Ω.

    `rankings`: group → layers, least needed first; `softness` as in `budget_targets`.
    """
    home = {task: group for group in groups for task in group.tasks}
    scores = torch.stack([rank_positions(rankings[home[s.task].name]) for s in samples])
    return budget_targets(scores, torch.tensor([home[s.task].target for s in samples]), softness)


def class_target(groups: Sequence[Group], task_class: str) -> float:
    """Mean Ω of the groups of a class, each as often as it has tasks of it; 1 for a class without a group."""
    found = [g.target for g in groups for task in g.tasks if TASKS[task].task_class == task_class]
    return sum(found) / len(found) if found else 1.0


@torch.no_grad()
def agreement(
    router: LayerRouter, pooled: Tensor, samples: Sequence[Sample], target: Tensor
) -> dict[str, dict[str, float]]:
    """Task → Ω of the router's decisions (`omega`) and the share of them that are as the target wants (`agreement`).

    `pooled [L, n, D]`, `target [n, L]`.
    """
    device = next(router.parameters()).device
    use_full = router.p_full(pooled.to(device)).T.cpu() > 0.5
    report = {}
    for task in sorted({sample.task for sample in samples}):
        rows = [i for i, sample in enumerate(samples) if sample.task == task]
        report[task] = {
            "omega": round(1 - float(use_full[rows].float().mean()), 3),
            "agreement": round(float((use_full[rows] == (target[rows] > 0.5)).float().mean()), 4),
        }
    return report
