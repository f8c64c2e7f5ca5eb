"""What a trained router comes with: a comparison with static splits, and a card in Markdown.

Both are for the recipe's own look at its result; the figures that count are `evaluation`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flux_attention.data import Sample
from flux_attention.models.controller import FluxAttention
from flux_attention.route import Policy, PolicyContext
from flux_attention.training.damage import DamageMeter, counts_as_whole, rank_positions

#: policy → task → `omega` and `accuracy` or `nll`.
Comparison = dict[str, dict[str, dict[str, float]]]


def compare(
    controller: FluxAttention,
    samples: Mapping[str, Sequence[Sample]],
    policies: Mapping[str, Policy],
    batch_tokens: int,
) -> Comparison:
    """Dense, the router and further policies on the same samples of each task, teacher-forced: accuracy or NLL, and Ω.

    `batch_tokens`: most tokens of a pass.
    """
    layers = len(controller.layers)
    table: Comparison = {}
    for task, some in samples.items():
        meter = DamageMeter(controller, some, batch_tokens=batch_tokens, teacher=False)
        prompts = [torch.tensor(sample.prompt_ids) for sample in some]
        context = PolicyContext(layers, tuple(prompts))
        routes = {"dense": torch.ones(layers, len(some), dtype=torch.bool)}
        routes["router"] = controller.route(prompts).use_full
        routes |= {name: policy(context).use_full for name, policy in policies.items()}
        for name, use_full in routes.items():
            found = meter.measure(range(len(some)), use_full)
            key, value = ("accuracy", found.accuracy) if counts_as_whole(some[0]) else ("nll", found.nll)
            table.setdefault(name, {})[task] = {
                key: float(value.mean()),
                "omega": 1 - float(use_full.float().mean()),
            }
    return table


def _score(cell: Mapping[str, float]) -> float:
    return cell["accuracy"] if "accuracy" in cell else cell["nll"]


def comparison_text(table: Comparison) -> str:
    """A line a policy: score, its ratio to dense, and Ω."""
    tasks = list(table["dense"])
    lines = [f"{'policy':<26}" + "".join(f"{task:>28}" for task in tasks)]
    for name, row in table.items():
        cells = []
        for task in tasks:
            base = _score(table["dense"][task])
            ratio = _score(row[task]) / base if base else math.nan
            cells.append(f"{_score(row[task]):>9.3f} ({ratio:.3f}×) Ω{row[task]['omega']:.2f}".rjust(28))
        lines.append(f"{name:<26}" + "".join(cells))
    return "\n".join(lines)


def mean_ranking(path: Path) -> tuple[int, ...]:
    """Layers by their mean place in the rankings of a recipe's log, least needed first.

    Raises ValueError for a file without rankings, or with rankings of different numbers of layers.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rankings"]
        places = [rank_positions(row["order"]) for row in rows.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no rankings of a recipe's run ({error!r})") from error
    if not places:
        raise ValueError(f'{path} holds no rankings of a recipe\'s run: "rankings" is empty')
    if len({len(place) for place in places}) > 1:
        raise ValueError(f'{path} holds "rankings" of different numbers of layers: {sorted(map(len, places))}')
    return tuple(torch.argsort(torch.stack(places).mean(0), stable=True).tolist())


def model_card(result: Mapping[str, Any], title: str, about: str) -> str:
    """The card of a router that was fitted to rankings, from its recipe's log alone.

    Args:
        result: `command`, `date`, `device`, `torch`, `commit`, `options` (with `seed`), `figures`
            (`router_training_minutes`, `router_training_mtokens`), `phases`, `groups`, `rankings` and `evaluation`, as
            `recipes/smollm2.py` writes them.
        title: what it routes.
        about: the backbone, the sparse attention and how the route is decided, in a few lines.
    """
    figures = {figure["name"]: figure["value"] for figure in result["figures"]}
    lines = [
        f"# {title}",
        "",
        about,
        "",
        "```",
        result["command"],
        "```",
        "",
        f"{result['date'][:10]}, {result['device']}, torch {result['torch']}, commit {result['commit']}, seed "
        f"{result['options']['seed']}: {figures['router_training_minutes']:.1f} minutes, "
        f"{figures['router_training_mtokens']:.2f} M tokens through the backbone.",
        "",
        "| phase | seconds | M tokens |",
        "|---|---|---|",
    ]
    lines += [f"| {n} | {p['seconds']:.1f} | {p['tokens'] / 1e6:.3f} |" for n, p in result["phases"].items()]
    lines += ["", "| group | target Ω | tasks | layers, least needed first |", "|---|---|---|---|"]
    for group in result["groups"]:
        order = " ".join(map(str, result["rankings"][group["like"] or group["name"]]["order"]))
        members = ", ".join(dict.fromkeys(group["tasks"]))
        lines.append(f"| {group['name']} | {group['target']:.2f} | {members} | {order} |")
    evaluation = result["evaluation"]
    tasks = list(evaluation["policies"]["dense"])
    lines += [
        "",
        f"Teacher-forced, {evaluation['samples']} samples of {evaluation['length']} tokens a task, text not trained on "
        "(accuracy, or NLL in nats a token; Ω in brackets):",
        "",
        "| policy | " + " | ".join(tasks) + " |",
        "|---|" + "---|" * len(tasks),
    ]
    for name, row in evaluation["policies"].items():
        cells = [f"{_score(row[task]):.3f} ({row[task]['omega']:.2f})" for task in tasks]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Cost of making each layer sparse, beside as many others as the group wants, in hundredths of the loss "
        "(1 = a right answer lost for sure, or a nat a token of running text), ± one deviation of the posterior:",
        "",
        "| layer | " + " | ".join(result["rankings"]) + " |",
        "|---|" + "---|" * len(result["rankings"]),
    ]
    rows = list(result["rankings"].values())
    for layer in range(len(rows[0]["costs"])):
        cells = [f"{100 * row['costs'][layer]:.1f} ± {100 * row['deviations'][layer]:.1f}" for row in rows]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
