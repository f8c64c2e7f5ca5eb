"""Groups of tasks that can spare the same layers, and a router's targets made from their rankings.

A group's prompts run its ranking's least needed layers sparse, as many as its Ω says; a router fitted to that
(`TrainConfig.objective = "damage"`) learns which group a prompt belongs to.

Shapes: `L` routable layers, `n` samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_attention.data import TASK_CLASSES, TASKS, Sample, training_tasks
from flux_attention.router import LayerRouter
from flux_attention.training.damage import budget_targets, rank_positions


@dataclass(frozen=True)
class Group:
    """Tasks that share one ranking of layers.

    Args:
        name: for the log.
        target: Ω of its prompts.
        tasks: names.
        searched: those that its ranking is found on; () = all of them.
        like: name of the group whose ranking it shares; "" = it has its own.
    """

    name: str
    target: float
    tasks: tuple[str, ...]
    searched: tuple[str, ...] = ()
    like: str = ""

    @classmethod
    def parse(cls, text: str) -> Group:
        """`name:target:task,task,…[:searched,…]`, or `name:target:task,task,…:=other` with another group's ranking.

        A class or a prefix ending in `*` stands for its training tasks.

        Raises ValueError for another form and for what is no training task.
        """
        parts = text.split(":")
        if len(parts) not in (3, 4):
            raise ValueError(f"a group is name:target:task,task,…[:searched,… or :=other], got {text!r}")
        name, target, tasks, source = (*parts, "")[:4]
        if source.startswith("="):
            return cls(name, float(target), cls._tasks(tasks), like=source[1:])
        return cls(name, float(target), cls._tasks(tasks), cls._tasks(source) if source else ())

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


def group_targets(
    samples: Sequence[Sample], groups: Sequence[Group], rankings: Mapping[str, Sequence[int]], softness: float
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
