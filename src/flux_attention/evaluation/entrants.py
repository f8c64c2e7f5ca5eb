"""Who is on the board: routers and every baseline, each as a route for every sample.

Baselines with a size (static splits, interleaved, random, static heads) are brought to *exactly* the router's mean Ω:
of the two sizes around it, a share of the prompts takes the one and the rest the other.
Routed heads (Elastic) get the threshold that gives this Ω on the board's own prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flux_attention.data import Sample
from flux_attention.route import Dial, HeadRoute, Policy, PolicyContext, Random, Route

Cell = tuple[str, int]
#: What `--policies` may name, in the order in which they are run, and what each is.
POLICIES: dict[str, str] = {
    "router": "the adapter's router",
    "greedy-text": "static, layers chosen one after the other by NLL on calibration text (arXiv 2606.27791)",
    "damage": "static, layers ranked by single-layer damage on the training tasks",
    "greedy": "static, layers chosen one after the other by damage on the training tasks",
    "searched": "static, by the costs that the router was fitted to, its groups weighing the same",
    "duo": "static KV heads with gates trained on the training tasks (DuoAttention)",
    "elastic": "a router of KV heads trained on the training tasks (Elastic Attention)",
    "interleaved": "static, sparse layers spread over the depth",
    "random": "random layers for each prompt",
    "inline": "the adapter's router reading the prefill instead of a probe",
    "sparse": "streaming in every layer",
    "triangle": "TriangleMix in every layer",
    "xattention": "XAttention in every layer",
}
#: Known to be far behind or not compared at equal Ω: `weak_samples` of each cell are enough for them.
WEAK = ("interleaved", "random", "inline", "sparse", "triangle", "xattention")
#: Families that choose once for all prompts; the router has to beat the best of them, and of "searched" if it is there.
STATIC = ("greedy-text", "damage", "greedy", "duo", "interleaved")
#: Families that show what the adapters themselves do otherwise.
CURVES = ("dial", "other")


@dataclass(frozen=True)
class Entrant:
    """One line of the board.

    Attributes:
        name: unique on the board.
        family: one of `POLICIES`, "dense", "dial" or "other"; joins points of the Pareto figure.
        columns: the route of each sample in characters (`Route.column`), by cell; may cover the first samples only.
        mode: what a sparse layer does, where it is not the adapter's mode.
        matched: stands at the router's mean Ω and is compared with it.
    """

    name: str
    family: str
    columns: Mapping[Cell, Sequence[str]] = field(repr=False)
    mode: str | None = None
    matched: bool = False


def name_of(cell: Cell) -> str:
    return f"{cell[0]}@{cell[1]}"


def columns_of(route: Route) -> list[str]:
    return [route.column(s) for s in range(route.num_sequences)]


def by_policy(policy: Policy, layers: int, cells: Mapping[Cell, Sequence[Sample]]) -> dict[Cell, list[str]]:
    """A policy's routes."""
    if isinstance(policy, Random):
        return {
            cell: columns_of(policy(PolicyContext(layers, tuple(torch.tensor(s.prompt_ids) for s in samples))))
            for cell, samples in cells.items()
        }
    # The others do not look at prompts, and these are millions of tokens.
    (column,) = columns_of(policy(PolicyContext(layers, (torch.zeros(1, dtype=torch.long),))))
    return {cell: [column] * len(samples) for cell, samples in cells.items()}


def by_size(
    make: Callable[[int], Policy], size: float, layers: int, cells: Mapping[Cell, Sequence[Sample]]
) -> dict[Cell, list[str]]:
    """Routes of a policy with whole sizes, at a size between two of them (see the module's head)."""
    low = by_policy(make(math.floor(size + 1e-6)), layers, cells)
    share = size - math.floor(size + 1e-6)
    if share < 1e-6:
        return low
    high = by_policy(make(math.ceil(size)), layers, cells)
    # Multiples of the golden ratio fill [0, 1) evenly: the share is right to a sample or two, in the first ones too.
    turn = (math.sqrt(5) - 1) / 2
    return {
        cell: [high[cell][i] if (i + 0.5) * turn % 1 < share else column for i, column in enumerate(columns)]
        for cell, columns in low.items()
    }


def by_scores(scores: Mapping[Cell, Tensor], dial: Dial | None = None) -> dict[Cell, list[str]]:
    """Routes of a router's `p_full [L, n]`, under a dial."""
    return {cell: columns_of(Route.from_scores(p).with_dial(dial or Dial())) for cell, p in scores.items()}


def by_threshold(
    scores: Mapping[Cell, Tensor], weights: Mapping[Cell, float], omega: float, layers: int
) -> dict[Cell, list[str]]:
    """Routes of heads `p_full [L·Hk, n]` at the one threshold that gives the mean Ω; `weights` of the cells."""
    values = torch.cat([p.flatten() for p in scores.values()])
    mass = torch.cat([torch.full((p.numel(),), weights[cell] / p.numel()) for cell, p in scores.items()])
    order = torch.argsort(values, stable=True)
    sparse = mass[order].double().cumsum(0) / mass.double().sum() <= omega + 1e-9
    # Ranks, not values: a router that is sure of many heads gives them the same probability.
    full = torch.ones_like(values, dtype=torch.bool)
    full[order[sparse]] = False
    parts = full.split([p.numel() for p in scores.values()])
    return {
        cell: columns_of(HeadRoute.of(part.view(layers, -1, p.shape[1])))
        for part, (cell, p) in zip(parts, scores.items(), strict=True)
    }


def omega_of(column: str) -> float:
    return column.count("0") / len(column)


def mean_omega(columns: Mapping[Cell, Sequence[str]], weights: Mapping[Cell, float]) -> float:
    """Mean Ω over cells."""
    total = sum(weights[cell] for cell in columns)
    means = {cell: np.mean([omega_of(column) for column in found]) for cell, found in columns.items()}
    return float(sum(weights[cell] * means[cell] for cell in columns) / total)
