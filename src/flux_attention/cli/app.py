"""The commands of `flux-attn`. Heavy imports wait inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from flux_attention.cli import data as data_commands
from flux_attention.cli.convert import convert
from flux_attention.cli.packs import train_packs

T = TypeVar("T")

app = typer.Typer(
    name="flux-attn",
    help="Context-aware hybrid attention: a small router picks full or sparse attention per layer and request, on a "
    "frozen language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


SMOLLM2 = "smollm2"

Model = Annotated[
    str,
    typer.Option(
        "--model", "--backbone", "-m", help="'smollm2', a folder, or a Hub id of a causal LM.", show_default=True
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", "-a", help="Folder, Hub id or shipped name; by default the shipped one that fits."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
DType = Annotated[str, typer.Option("--dtype", help="auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16.")]
PolicyOption = Annotated[
    str,
    typer.Option(
        "--policy", help="router, dense, sparse, interleaved:SHARE, random:SHARE[:SEED] or static:LAYER,LAYER,…"
    ),
]
MinSparsity = Annotated[float, typer.Option("--min-sparsity", help="Least share of layers that run sparse, 0 to 1.")]
MaxSparsity = Annotated[float, typer.Option("--max-sparsity", help="Largest share of layers that run sparse, 0 to 1.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Prompt text; may be given several times.")]
Files = Annotated[list[Path] | None, typer.Option("--file", "-f", help="File with a prompt, - for standard input.")]
Raw = Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of samples and sampling.")]
Record = Annotated[bool, typer.Option("--record", help="Write the figures to benchmarks/results.")]
Commit = Annotated[
    str | None, typer.Option("--commit", help="Commit to record, where the code is not in a git checkout.")
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    # Read by `main`, which sees the arguments first; declared here for --help.
    del debug


@app.command()
def demo(
    model: Model = SMOLLM2,
    adapter: AdapterOption = None,
    length: Annotated[int, typer.Option("--length", help="Tokens of a prompt.")] = 6000,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to write for each prompt.")] = 24,
    rounds: Annotated[int, typer.Option("--rounds", help="Repetitions, as far as time allows.")] = 2,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path("flux-demo"),
    device: Device = "auto",
    dtype: DType = "auto",
    record: Record = False,
    commit: Commit = None,
) -> None:
    """Answer two long prompts with and without routing; show routes, memory and time, and write a report."""
    console = _console()
    for name, value, least in (("--length", length, 1), ("--new-tokens", new_tokens, 2), ("--rounds", rounds, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    with console.status("loading torch and the model"):
        from flux_attention.cli.demo import run_demo
        from flux_attention.cli.session import choose_device, choose_dtype, find_adapter, quiet
        from flux_attention.models.adapter import load_adapter
        from flux_attention.models.backbones import load_backbone

        # Looked for first: loading the model only to miss the adapter would waste the user's time.
        loaded = None if adapter is None else load_adapter(adapter)
        where = choose_device(device)
        quiet()
        backbone, tokenizer = load_backbone(model, dtype=choose_dtype(dtype, where), device=where)
        if loaded is None:
            loaded = find_adapter(backbone)
    console.print(f"[bold]{backbone.config.name_or_path}[/bold] with adapter [bold]{loaded.source}[/bold]")
    run_demo(
        backbone,
        tokenizer,
        loaded,
        console,
        length=length,
        new_tokens=new_tokens,
        seed=seed,
        rounds=rounds,
        folder=out,
        record=record,
        commit=commit,
    )


@app.command()
def generate(
    model: Model = SMOLLM2,
    adapter: AdapterOption = None,
    prompt: Prompts = None,
    file: Files = None,
    raw: Raw = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 = greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus sampling, in (0, 1].")] = 1.0,
    seed: Seed = 0,
    policy: PolicyOption = "router",
    min_sparsity: MinSparsity = 0.0,
    max_sparsity: MaxSparsity = 1.0,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Answer a prompt with routed attention; the route and the memory go to the error stream."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"--temperature must be at least 0 and --top-p in (0, 1], got {temperature} and {top_p}")
    from flux_attention.cli.session import encode_prompt, open_session, read_prompts, route_row
    from flux_attention.cli.terminal import print_routes

    prompts = read_prompts(prompt, file)
    notes = _console(stderr=True)
    with notes.status("loading"):
        session = _open(open_session, model, adapter, policy, min_sparsity, max_sparsity, device, dtype)
    import torch
    from transformers import GenerationConfig

    from flux_attention.generation import generate as answer

    ids = [encode_prompt(session, text, raw) for _, text in prompts]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    stop = session.model.generation_config.eos_token_id
    config = GenerationConfig(eos_token_id=stop, max_new_tokens=max_new_tokens, **sampling)
    generator = torch.Generator(session.controller.device).manual_seed(seed)
    with session.using():
        found = answer(session.model, ids, generation_config=config, generator=generator)
    for i, (label, _) in enumerate(prompts):
        if len(prompts) > 1:
            notes.rule(label, align="left")
        print(session.tokenizer.decode(found.tokens[i], skip_special_tokens=True).strip(), flush=True)
    notes.print()
    print_routes(notes, [route_row(label, found.route, i) for i, (label, _) in enumerate(prompts)])
    memory, tokens = found.memory, sum(map(len, found.tokens))
    notes.print(
        f"[dim]KV cache {memory.held / 1e6:.1f} MB, {memory.share:.0%} of dense · route {found.route_seconds:.2f} s, "
        f"prefill {found.prefill_seconds:.2f} s, {tokens / max(found.decode_seconds, 1e-9):.1f} tokens/s[/dim]"
    )


@app.command()
def route(
    model: Model = SMOLLM2,
    adapter: AdapterOption = None,
    prompt: Prompts = None,
    file: Files = None,
    raw: Raw = False,
    policy: PolicyOption = "router",
    min_sparsity: MinSparsity = 0.0,
    max_sparsity: MaxSparsity = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt, for programs.")] = False,
    figure: Annotated[Path | None, typer.Option("--figure", help="Also write a heat map (PNG) here.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Show which layers a prompt gets full attention in: a heat row per prompt, and its sparsity Ω."""
    from flux_attention.cli.session import encode_prompt, open_session, read_prompts, route_of, route_row
    from flux_attention.cli.terminal import print_routes

    prompts = read_prompts(prompt, file)
    notes = _console(stderr=True)
    with notes.status("loading"):
        session = _open(open_session, model, adapter, policy, min_sparsity, max_sparsity, device, dtype)
    rows = []
    for label, text in prompts:
        ids = encode_prompt(session, text, raw)
        row = route_row(f"{label} ({ids.numel():,} tokens)", route_of(session, ids))
        rows.append(row)
        if as_json:
            shown = {"prompt": label, "tokens": ids.numel(), "sparsity": row.sparsity, "use_full": list(row.use_full)}
            print(json.dumps({**shown, "p_full": None if row.p_full is None else list(row.p_full)}, ensure_ascii=False))
    if not as_json:
        print_routes(_console(), rows)
        short = session.controller.config.min_routed_tokens
        notes.print(f"[dim]prompts of at most {short:,} tokens gain nothing and stay dense[/dim]")
    if figure is not None:
        from flux_attention.report import route_heat_map, save_png

        save_png(route_heat_map(rows), figure)
        notes.print(f"figure: {figure}")


def _prepare_suite(suite: Any, model: str, n: int | None, seed: int, folder: Path | None) -> None:
    import os
    from dataclasses import replace

    from flux_attention.cli.session import Bars
    from flux_attention.evaluation.suites import suite_samples
    from flux_attention.models.backbones import load_backbone

    if folder is None:
        raise ValueError("--prepare needs --samples, the folder that keeps the samples")
    _, tokenizer = load_backbone(model)
    with Bars(_console(stderr=True)) as bars:
        chosen = suite if n is None else replace(suite, n=n)
        suite_samples(chosen, tokenizer, seed, folder=folder, workers=os.cpu_count() or 1, progress=bars)


@app.command(name="eval")
def evaluate(
    suite: Annotated[str, typer.Option("--suite", "-s", help="needle, continuation or quick.")] = "quick",
    model: Model = SMOLLM2,
    adapter: AdapterOption = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Samples per task; by default the suite's.")] = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Samples packed into one pass.")] = 1,
    scoring: Annotated[str, typer.Option("--scoring", help="auto, forced or generated.")] = "auto",
    policy: PolicyOption = "router",
    min_sparsity: MinSparsity = 0.0,
    max_sparsity: MaxSparsity = 1.0,
    device: Device = "auto",
    dtype: DType = "auto",
    record: Record = False,
    results: Annotated[Path, typer.Option("--results", help="Folder that --record writes to.")] = Path(
        "benchmarks/results"
    ),
    figure: Annotated[Path | None, typer.Option("--figure", help="Write the needle map (PNG) here.")] = None,
    samples: Annotated[Path | None, typer.Option("--samples", help="Folder that keeps the samples.")] = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Only make them, on all cores; needs no GPU.")] = False,
    impl: Annotated[str, typer.Option("--impl", help="Kernels of prefill: auto or a name of kernels.api.")] = "auto",
    commit: Commit = None,
) -> None:
    """Score routed against dense on the same samples."""
    from flux_attention.evaluation.suites import get_suite

    chosen = get_suite(suite)
    if prepare:
        _prepare_suite(chosen, model, n, seed, samples)
        return
    if record and policy != "router":
        raise ValueError(f"--record is for the adapter's router; --policy {policy} is a baseline")
    from flux_attention.cli.session import Bars, open_session
    from flux_attention.cli.terminal import print_table
    from flux_attention.evaluation.runner import RunOptions
    from flux_attention.evaluation.suites import run_suite
    from flux_attention.report import Table

    options = RunOptions(batch_size=batch_size, scoring=scoring)  # type: ignore[arg-type]
    notes = _console(stderr=True)
    with notes.status("loading"):
        session = _open(open_session, model, adapter, policy, min_sparsity, max_sparsity, device, dtype)
        session.controller.impl = impl
    with Bars(notes) as bars:
        run = run_suite(
            session.controller,
            session.tokenizer,
            chosen,
            n=n,
            seed=seed,
            policy=session.policy,
            dial=session.dial,
            options=options,
            progress=bars,
            samples=samples,
        )
    rows = []
    for found in run.figures:
        interval = "" if found.low is None else f"{found.low:.4f} – {found.high:.4f}"
        rows.append((found.name, f"{found.value:.4f} {found.unit}", interval, "" if found.n is None else str(found.n)))
    title = f"{suite}: {session.adapter_name} on {session.controller.config.backbone.name}"
    print_table(_console(), Table(("figure", "value", "95 % interval", "n"), rows), title)
    if record:
        from flux_attention.evaluation.results import write_results

        settings = {
            "backbone": session.controller.config.backbone.name,
            "adapter": session.adapter_name,
            "impl": impl,
            "dtype": str(session.model.dtype).removeprefix("torch."),
            "seed": seed,
            "n": run.suite.n,
            "repetitions": 1,
            "tasks": list(run.suite.tasks),
            "lengths": list(run.suite.lengths),
            "scoring": scoring,
            "min_sparsity": min_sparsity,
            "max_sparsity": max_sparsity,
            "texts": dict(run.texts),
        }
        path = write_results(
            f"eval-{suite}",
            run.figures,
            device=session.controller.device,
            settings=settings,
            folder=results,
            details=run.details(),
            commit=commit,
        )
        notes.print(f"figures: [bold]{path}[/bold]")
    if figure is not None:
        from flux_attention.report import needle_map, save_png

        cells: dict[tuple[int, float], list[float]] = {}
        for records in run.routed.values():
            for r in records:
                if r.depth is not None and r.score is not None:
                    cells.setdefault((r.length, r.depth), []).append(r.score)
        save_png(needle_map(cells), figure)
        notes.print(f"figure: {figure}")


@app.command()
def board(
    model: Model = SMOLLM2,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="Several = seeds of one recipe, whose figures are averaged."),
    ] = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Names with commas between them, or mixed.")] = "mixed",
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of the samples.")] = "4096,8000",
    samples: Annotated[int, typer.Option("--samples", "-n", help="Samples per task and length.")] = 200,
    policies: Annotated[
        str, typer.Option("--policies", help="Names with commas between them, or all; an unknown one lists them.")
    ] = "all",
    weak_samples: Annotated[
        int, typer.Option("--weak-samples", help="Samples per task and length for weak baselines and curves.")
    ] = 25,
    dial: Annotated[
        str, typer.Option("--dial", help="Ω that the first adapter's dial is set to, such as 0.5,0.7,0.9: a curve.")
    ] = "",
    other: Annotated[
        list[str] | None, typer.Option("--other", help="An adapter with a line of its own, trained for one target say.")
    ] = None,
    sparsities: Annotated[
        str, typer.Option("--sparsities", help="Further Ω of the static splits; by default only the router's.")
    ] = "",
    calibration: Annotated[
        int, typer.Option("--calibration", help="Samples per training task that static splits are chosen on.")
    ] = 2,
    calibration_text: Annotated[
        int, typer.Option("--calibration-text", help="The same per training task of running text.")
    ] = 12,
    calibration_length: Annotated[int, typer.Option("--calibration-length", help="Their tokens.")] = 3072,
    head_steps: Annotated[int, typer.Option("--head-steps", help="Training steps of the head-level baselines.")] = 80,
    head_samples: Annotated[
        int, typer.Option("--head-samples", help="Their training samples per task and length.")
    ] = 16,
    head_lengths: Annotated[
        str, typer.Option("--head-lengths", help="Tokens of their training samples.")
    ] = "2048,3072",
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", "-b", help="Tokens of one pass; by default 131072 on a GPU.")
    ] = None,
    impl: Annotated[str, typer.Option("--impl", help="Prefill kernels: auto, sdpa, flash4 or flex.")] = "auto",
    seed: Seed = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; an interrupted board goes on in it.")] = Path(
        "runs/board"
    ),
    prepare: Annotated[bool, typer.Option("--prepare", help="Only make the samples, which needs no GPU.")] = False,
    minutes: Annotated[float, typer.Option("--minutes", help="Stop after this time; 0 = never.")] = 0.0,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes that make samples; by default one a core, 16 at most.")
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    record: Record = False,
    commit: Commit = None,
) -> None:
    """Put the router beside dense and every baseline: tables, figures and HTML, with 95 % intervals. Resumable."""
    import os

    from flux_attention.cli.board import run
    from flux_attention.cli.session import choose_device
    from flux_attention.evaluation.board_config import MIXED, BoardConfig
    from flux_attention.evaluation.entrants import POLICIES
    from flux_attention.training.heads import HeadTraining

    on_gpu = choose_device(device).type == "cuda"
    config = BoardConfig(
        tasks=MIXED if tasks == "mixed" else tuple(tasks.split(",")),
        lengths=_numbers("--lengths", lengths, int),
        samples=samples,
        seed=seed,
        policies=tuple(POLICIES) if policies == "all" else tuple(policies.split(",")),
        weak_samples=min(weak_samples, samples),
        dial=_numbers("--dial", dial, float),
        sparsities=_numbers("--sparsities", sparsities, float),
        calibration=calibration,
        calibration_text=calibration_text,
        calibration_length=calibration_length,
        # Activations kept for gradients: about a megabyte a token for the smallest models.
        heads=HeadTraining(steps=head_steps, pass_tokens=16384 if on_gpu else 2048),
        head_samples=head_samples,
        head_lengths=_numbers("--head-lengths", head_lengths, int),
        batch_tokens=batch_tokens or (131072 if on_gpu else 8192),
        impl=impl,
        workers=workers or min(16, os.cpu_count() or 1),
        minutes=minutes,
    )
    run(
        config,
        model,
        adapter or [],
        out,
        others=other or [],
        only_prepare=prepare,
        device=device,
        dtype=dtype,
        record=record,
        commit=commit,
        console=_console(),
        notes=_console(stderr=True),
    )


@app.command(
    name="lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness, which knows `--model flux` here; its own options follow."""
    from flux_attention.cli.harness import run

    run(context.args)


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the adapter.")],
    model: Model = SMOLLM2,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Rows {context, question, answer, task}: .jsonl, .parquet or a Hub data set."),
    ] = None,
    data_share: Annotated[float, typer.Option("--data-share", help="Share of the samples drawn from --data.")] = 0.5,
    lengths: Annotated[
        str, typer.Option("--lengths", help="Tokens of the built-in tasks' samples.")
    ] = "1536,2048,4096",
    objective: Annotated[str, typer.Option("--objective", help="lm, or distill (KL to the dense model).")] = "distill",
    retrieval_target: Annotated[float, typer.Option("--retrieval-target", help="Ω of retrieval prompts.")] = 0.7,
    holistic_target: Annotated[float, typer.Option("--holistic-target", help="Ω of holistic prompts.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps.")] = 300,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Samples of a forward pass.")] = 4,
    accumulation: Annotated[int, typer.Option("--accumulation", help="Forward passes of a step.")] = 2,
    router_lr: Annotated[float, typer.Option("--router-lr", help="Peak learning rate of the router.")] = 5e-4,
    sink_tokens: Annotated[int, typer.Option("--sink-tokens", help="First tokens that a sparse layer keeps.")] = 128,
    window_tokens: Annotated[int, typer.Option("--window-tokens", help="Latest tokens that it keeps.")] = 2048,
    sparse_mode: Annotated[str, typer.Option("--sparse-mode", help="streaming, triangle or xattention.")] = "streaming",
    router_input: Annotated[str, typer.Option("--router-input", help="probe or inline.")] = "probe",
    runs: Annotated[Path, typer.Option("--runs", help="Folder of checkpoints and logs.")] = Path("runs/train"),
    save_steps: Annotated[int, typer.Option("--save-steps", help="Steps between checkpoints; 0 = none.")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the latest checkpoint in --runs.")] = False,
    report_to: Annotated[str, typer.Option("--report-to", help="tensorboard, wandb or none.")] = "none",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Train a router for a frozen model, on your own rows, on built-in tasks, or on both."""
    from flux_attention.cli.session import choose_device, choose_dtype, quiet
    from flux_attention.config import FluxConfig
    from flux_attention.data import HOLISTIC, RETRIEVAL
    from flux_attention.training.data import Mixture, MixtureDataset, RowFormat, samples_from_rows
    from flux_attention.training.trainer import RouterTrainer, TrainConfig

    if objective not in ("lm", "distill"):
        raise ValueError(f"--objective must be lm or distill, got {objective!r}")
    tokens = _numbers("--lengths", lengths, int)
    # Whatever is wrong with the settings is said before the model is loaded.
    config = FluxConfig(
        sink_tokens=sink_tokens,
        window_tokens=window_tokens,
        sparse_mode=sparse_mode,
        router_input=router_input,  # type: ignore[arg-type]
    )
    recipe = TrainConfig(
        objective=objective,  # type: ignore[arg-type]
        targets={RETRIEVAL: retrieval_target, HOLISTIC: holistic_target},
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        router_lr=router_lr,
        seed=seed,
        save_steps=save_steps,
    )
    mixture = Mixture(lengths=tokens, seed=seed)
    notes = _console(stderr=True)
    with notes.status("loading"):
        from flux_attention.models.attach import attach
        from flux_attention.models.backbones import load_backbone

        where = choose_device(device)
        quiet()
        backbone, tokenizer = load_backbone(model, dtype=choose_dtype(dtype, where), device=where)
        controller = attach(backbone, config)
        if data is not None:
            rows = list(samples_from_rows(data, tokenizer, RowFormat(max_length=max(tokens))))
            mixture = Mixture(lengths=tokens, seed=seed, extra=rows, extra_share=data_share)
    samples = MixtureDataset(mixture, tokenizer, steps * batch_size * accumulation)
    trainer = RouterTrainer(controller, recipe, samples, runs, report_to=() if report_to == "none" else (report_to,))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_adapter(out)
    notes.print(f"adapter: [bold]{out}[/bold]   try it: flux-attn eval --suite quick --adapter {out}")


app.command(name="train-packs")(train_packs)
app.add_typer(data_commands.app, name="data")
app.command()(convert)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help='"smollm2", or a folder or Hub id of a Llama, Qwen2 or Qwen3 model.')],
    adapter: Annotated[str, typer.Option(help="Shipped name, folder or Hub id of a router.")],
    kv_bundle: Annotated[
        int, typer.Option(help="Layers that share a KV-cache group; 0 = as many as leave six groups.")
    ] = 0,
    break_even: Annotated[
        int, typer.Option(help="Prompts of at most this many tokens run dense; 0 = sinks + window.")
    ] = 0,
) -> None:
    """Serve a model with vLLM (OpenAI-compatible); further options go to `vllm serve`."""
    from flux_attention.serving.launch import serve as run

    asked = {"kv_bundle": kv_bundle, "break_even_tokens": break_even}
    run(model, adapter, context.args, {name: value for name, value in asked.items() if value})


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A program of benchmarks/, such as kernels or end_to_end.")] = "",
) -> None:
    """Run a program of benchmarks/ (in a checkout of the project); further arguments go to it."""
    import runpy

    folder = Path("benchmarks")
    known = sorted(path.stem for path in folder.glob("*.py"))
    if not known:
        raise ValueError(f"{folder.resolve()} holds no benchmarks: run this in a checkout of the project")
    if name not in known:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(known)}")
    path = folder / f"{name}.py"
    # The program sees its own arguments, as if started by itself.
    before, sys.argv = sys.argv, [str(path), *context.args]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


def _numbers(option: str, text: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between them, got {text!r}") from None


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _open(
    open_session: Any,
    model: str,
    adapter: str | None,
    policy: str,
    min_sparsity: float,
    max_sparsity: float,
    device: str,
    dtype: str,
) -> Any:
    return open_session(
        model,
        adapter,
        device=device,
        dtype=dtype,
        policy=policy,
        min_sparsity=min_sparsity,
        max_sparsity=max_sparsity,
    )


# Names, so that no optional package is imported to compare with.
_EXPECTED = ("PoolExhaustedError", "OutOfMemoryError", "UnfinishedError", "UnsupportedVLLMError")


def main(arguments: list[str] | None = None) -> None:
    """Run a command; errors of bad input are one line and exit code 2 (`--debug` shows where they came from)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app(args=arguments, prog_name="flux-attn")
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        _fail(error, 2)
    except RuntimeError as error:
        # What the user can change; anything else is a bug worth a traceback.
        if debug or type(error).__name__ not in _EXPECTED:
            raise
        _fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error: BaseException, code: int) -> None:
    from flux_attention.cli.terminal import print_error

    print_error(_console(stderr=True), error)
    sys.exit(code)
