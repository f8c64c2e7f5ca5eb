"""`flux-attn demo`: two long prompts answered by the plain model and by the routed one, measured side by side."""

from __future__ import annotations

import platform
import resource
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor
from transformers import GenerationConfig

from flux_attention.cache import CACHE_KEYWORDS, MemoryReport, cache_argument
from flux_attention.cli.session import route_row
from flux_attention.cli.terminal import print_routes, print_table
from flux_attention.data import Sample, make_sample
from flux_attention.evaluation.results import Figure, commit_id, device_name, write_results
from flux_attention.generation import TokenCallback, generate
from flux_attention.models.adapter import Adapter
from flux_attention.models.attach import attach, detach
from flux_attention.report import Section, Table, render, route_heat_map, svg
from flux_attention.route import Dense, Route

STARTED = time.monotonic()
CASES = (
    ("retrieval", "needle1", "Find a number hidden in prose"),
    ("holistic", "docstring_continuation", "Continue a long documentation text"),
)


@dataclass
class Timing:
    """Seconds of every repetition."""

    prefill: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)


@dataclass
class Case:
    """One prompt and what came of it."""

    name: str
    title: str
    sample: Sample
    plain: Timing = field(default_factory=Timing)
    routed: Timing = field(default_factory=Timing)
    plain_text: str = ""
    routed_text: str = ""
    route: Route | None = None
    memory: MemoryReport | None = None

    def speedup(self, phase: str) -> float:
        return median(getattr(self.plain, phase)) / median(getattr(self.routed, phase))


def run_demo(
    model: Any,
    tokenizer: Any,
    adapter: Adapter,
    console: Console,
    *,
    length: int = 6000,
    new_tokens: int = 24,
    seed: int = 0,
    rounds: int = 2,
    folder: Path = Path("flux-demo"),
    record: bool = False,
    commit: str | None = None,
    budget: float = 150.0,
) -> list[Case]:
    """Run, print and write `folder/report.html`.

    Args:
        model: not attached; it is attached for the routed half and detached for the plain one, in turns.
        length: tokens of a prompt.
        rounds: repetitions; a round that would not fit into `budget` seconds of the whole process is left out.
        record: write the figures to benchmarks/results.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length + new_tokens > context:
        raise ValueError(
            f"--length {length} and {new_tokens} new tokens are over the model's context of {context} tokens"
        )
    cases = [Case(name, title, make_sample(task, seed, length, seed, "test", tokenizer)) for name, task, title in CASES]
    error = _warm_up(model, adapter, cases[0].sample)
    console.print(f"[dim]every layer full gives the plain model's logits: largest difference {error:.1e}[/dim]\n")
    for done in range(rounds):
        started = time.monotonic()
        for case in cases:
            label = f"round {done + 1}: {case.name} prompt of {len(case.sample.prompt_ids):,} tokens"
            with console.status(f"{label}, plain model"):
                text = _plain(model, case, new_tokens, tokenizer)
            with console.status(f"{label}, routed"):
                _routed(model, adapter, case, new_tokens, tokenizer)
            case.plain_text = text
        # A machine slower than expected shows one round rather than keeping its user waiting.
        if process_seconds() + (time.monotonic() - started) > budget:
            break
    _show(console, cases)
    path = folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(model, adapter, cases, error), encoding="utf-8")
    seconds, peak = process_seconds(), peak_gb()
    console.print(f"\nreport: [bold]{path}[/bold]   whole run {seconds:.0f} s, peak memory {peak:.1f} GB")
    if record:
        written = write_results(
            "demo",
            _figures(cases, seconds, peak),
            device=model.device,
            settings=_settings(model, adapter, cases, new_tokens, seed, error),
            commit=commit,
        )
        console.print(f"figures: [bold]{written}[/bold]")
    return cases


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _plain_pass(model: Any, ids: Tensor, new_tokens: int) -> tuple[list[int], float, float]:
    """Greedy decoding by the model as transformers has it; returns tokens, prefill seconds, seconds per token."""
    started = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    found = [int(token)]
    _sync(ids.device)
    times = [time.perf_counter()]
    for _ in range(new_tokens - 1):
        kept = next(out[name] for name in CACHE_KEYWORDS if name in out)
        out = model(input_ids=token, use_cache=True, **cache_argument(model, kept))
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(token))
        times.append(time.perf_counter())
    return found, times[0] - started, _step_seconds(times)


def _step_seconds(times: list[float]) -> float:
    """Median time between tokens: on a shared machine a mean is that of its worst moments."""
    return median(b - a for a, b in pairwise(times)) if len(times) > 1 else float("nan")


@torch.no_grad()
def _plain(model: Any, case: Case, new_tokens: int, tokenizer: Any) -> str:
    ids = torch.tensor(case.sample.prompt_ids, device=model.device)[None]
    tokens, prefill, per_token = _plain_pass(model, ids, new_tokens)
    case.plain.prefill.append(prefill)
    case.plain.per_token.append(per_token)
    return _text(model, tokenizer, tokens)


def _routed(model: Any, adapter: Adapter, case: Case, new_tokens: int, tokenizer: Any) -> None:
    attach(model, adapter)
    try:
        # Both sides write the same number of tokens, so that seconds per token compare.
        config = GenerationConfig(do_sample=False, eos_token_id=[], max_new_tokens=new_tokens)
        times: list[float] = []
        prompt = torch.tensor(case.sample.prompt_ids)
        note: TokenCallback = lambda row, token: times.append(time.perf_counter())  # noqa: E731
        found = generate(model, [prompt], generation_config=config, on_token=note)
    finally:
        detach(model)
    found.cache.clear()
    case.routed.prefill.append(found.route_seconds + found.prefill_seconds)
    case.routed.per_token.append(_step_seconds(times))
    case.routed_text = _text(model, tokenizer, found.tokens[0])
    case.route, case.memory = found.route, found.memory


def _text(model: Any, tokenizer: Any, tokens: list[int]) -> str:
    stop = model.generation_config.eos_token_id
    stops = set(stop) if isinstance(stop, list) else {stop}
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    text: str = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return text.strip()


@torch.no_grad()
def _warm_up(model: Any, adapter: Adapter, sample: Sample) -> float:
    """Run both paths once on a shorter prompt and check that an all-full route is the plain model.

    Raises RuntimeError when it is not: times of a wrong computation mean nothing.
    """
    ids = torch.tensor(sample.prompt_ids[-1024:], device=model.device)[None]
    plain = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.float()
    _plain_pass(model, ids, 4)
    controller = attach(model, adapter)
    try:
        with controller.using(Dense()):
            routed = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.float()
        generate(model, [ids[0].cpu()], max_new_tokens=4).cache.clear()
    finally:
        detach(model)
    error = float((plain - routed).abs().max())
    # In 16 bits logits of this size carry an error of their own.
    allowed = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.05 * float(plain.abs().max())
    if not error <= allowed:
        raise RuntimeError(f"with every layer full the logits differ from the plain model's by {error:.2e}")
    return error


def process_seconds() -> float:
    """Seconds since this process began, imports included."""
    try:
        import os

        # Field 22 of stat, counted after the command's name, which may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic() - STARTED


def peak_gb() -> float:
    """Peak resident memory of this process in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kilobytes, macOS bytes.
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


# ---------------------------------------------------------------------------------------------------- what is shown


def _times(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def _ratio(value: float) -> str:
    return f"{value:.2f}× faster" if value >= 1 else f"{1 / value:.2f}× slower"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def comparison(case: Case) -> Table:
    """Plain beside routed."""
    assert case.memory is not None and case.route is not None
    memory = case.memory
    rows = []
    for label, phase in (("prefill", "prefill"), ("decode, per token", "per_token")):
        plain, routed = median(getattr(case.plain, phase)), median(getattr(case.routed, phase))
        rows.append((label, _times(plain), _times(routed), _ratio(plain / routed)))
    kv = f"{1 - memory.share:.0%} less"
    return Table(
        ("", "plain", "routed", ""), [*rows, ("KV cache", _megabytes(memory.dense), _megabytes(memory.held), kv)]
    )


def _show(console: Console, cases: list[Case]) -> None:
    for case in cases:
        body = Text()
        body.append("expected  ", style="dim").append(_short(case.sample.answers[0]) + "\n")
        body.append("plain     ", style="dim").append(_short(case.plain_text) + "\n")
        body.append("routed    ", style="dim").append(_short(case.routed_text), style="bold")
        console.print(Panel(body, title=f"{case.title} ({len(case.sample.prompt_ids):,} tokens)", title_align="left"))
        print_table(console, comparison(case))
        console.print()
    print_routes(console, [_row(case) for case in cases])


def _row(case: Case) -> Any:
    assert case.route is not None
    return route_row(case.name, case.route)


def _short(text: str, limit: int = 220) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _page(model: Any, adapter: Adapter, cases: list[Case], error: float) -> str:
    sections = []
    for case in cases:
        wanted = "hidden in the prompt" if case.name == "retrieval" else "what the text really goes on with"
        quotes = [
            (wanted, _short(case.sample.answers[0])),
            ("routed", case.routed_text),
            ("plain model", case.plain_text),
        ]
        repeats = len(case.plain.prefill)
        sections.append(
            Section(
                case.title,
                _explain(case),
                routes=[_row(case)],
                quotes=quotes,
                table=comparison(case),
                note=f"Median of {repeats}, plain and routed in turns, in one process. Plain: the same model, not "
                f"attached, with transformers' {model.config._attn_implementation} attention.",
            )
        )
    rows = [_row(case) for case in cases]
    sections.append(
        Section(
            "The two routes side by side",
            "The router looks at the first and last tokens of a prompt only, and decides before the prompt is read.",
            figures=[
                (svg(route_heat_map(rows), "routes of both prompts, layer by layer"), "Colour: p(full). A dot: full.")
            ],
        )
    )
    facts = []
    for case in cases:
        assert case.memory is not None and case.route is not None
        facts.append((f"layers sparse, {case.name} prompt", f"{float(case.route.sparsity[0]):.0%}"))
        facts.append((f"KV memory held, {case.name} prompt", f"{case.memory.share:.0%}"))
    config = adapter.config
    lead = (
        f"{model.config.name_or_path} with a router of {len(rows[0].use_full)} small networks. Each prompt gets its "
        f"own split into full and sparse layers; a sparse layer keeps {config.sink_tokens} first and about "
        f"{config.window_tokens} latest tokens."
    )
    foot = (
        f"{device_name(model.device)} · torch {torch.__version__} · Python {platform.python_version()} · commit "
        f"{commit_id()} · with every layer full the logits equal the plain model's to {error:.1e}"
    )
    return render("Which layers need to see everything?", lead, facts, sections, foot)


def _explain(case: Case) -> str:
    tokens = f"{len(case.sample.prompt_ids):,} tokens"
    if case.name == "retrieval":
        depth = case.sample.meta.get("depth")
        where = "" if depth is None else f", {depth:.0%} of the way in"
        return f"A prompt of {tokens} of prose hides one seven-digit number{where}. The question asks for it."
    return f"A prompt of {tokens} of documentation; the model goes on writing. Most of what it needs is near."


def _figures(cases: list[Case], seconds: float, peak: float) -> list[Figure]:
    figures = [Figure("demo_seconds_installed", seconds, "s"), Figure("demo_peak_gb", peak, "GB")]
    for case in cases:
        assert case.memory is not None and case.route is not None
        name = f"demo_{case.name}"
        figures += [
            Figure(f"{name}_sparsity", float(case.route.sparsity[0]), "share"),
            Figure(f"{name}_kv_vs_dense", case.memory.share, "ratio"),
            Figure(f"{name}_prefill_speedup", case.speedup("prefill"), "×"),
            Figure(f"{name}_decode_speedup", case.speedup("per_token"), "×"),
            Figure(f"{name}_prefill_seconds", median(case.routed.prefill), "s", repetitions=tuple(case.routed.prefill)),
            Figure(
                f"{name}_prefill_seconds_plain", median(case.plain.prefill), "s", repetitions=tuple(case.plain.prefill)
            ),
        ]
    return figures


def _settings(
    model: Any, adapter: Adapter, cases: list[Case], new_tokens: int, seed: int, error: float
) -> dict[str, Any]:
    return {
        "backbone": str(model.config.name_or_path),
        "adapter": adapter.source,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "seed": seed,
        "n": len(cases),
        "repetitions": len(cases[0].plain.prefill),
        "prompt_tokens": [len(case.sample.prompt_ids) for case in cases],
        "new_tokens": new_tokens,
        "all_full_largest_logit_difference": error,
    }
