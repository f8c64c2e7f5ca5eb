"""`flux-attn train`: a router for one's own model, on samples of moderate length."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flux_attention.cli.options import SMOLLM2, Device, DType, Model, Seed, make_console, numbers


def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the adapter.")],
    model: Model = SMOLLM2,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Rows {context, question, answer, task}: .jsonl, .parquet or a Hub data set."),
    ] = None,
    data_share: Annotated[float, typer.Option("--data-share", help="Share of the samples drawn from --data.")] = 0.5,
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of the built-in tasks' samples.")] = "3072,4096",
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
    from flux_attention.cli.session import choose_device, quiet
    from flux_attention.config import FluxConfig
    from flux_attention.data import HOLISTIC, RETRIEVAL, make_sample
    from flux_attention.training.data import Mixture, MixtureDataset, RowFormat, samples_from_rows
    from flux_attention.training.trainer import RouterTrainer, TrainConfig

    if objective not in ("lm", "distill"):
        raise ValueError(f"--objective must be lm or distill, got {objective!r}")
    if not 0 <= data_share <= 1:
        raise ValueError(f"--data-share must be in [0, 1], got {data_share}")
    tokens = numbers("--lengths", lengths, int)
    # Whatever is wrong with the settings is said before the model is loaded.
    config = FluxConfig(
        sink_tokens=sink_tokens,
        window_tokens=window_tokens,
        sparse_mode=sparse_mode,
        router_input=router_input,  # type: ignore[arg-type]
    )
    alike = config.min_routed_tokens
    if min(tokens) <= alike:
        raise ValueError(
            f"--lengths {min(tokens)}: up to {alike} tokens (sinks and window) a sparse layer sees what a full one "
            "does, and a router learns nothing from such samples; use longer ones or a smaller --window-tokens"
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
    notes = make_console(stderr=True)
    with notes.status("loading"):
        import torch

        from flux_attention.models.attach import attach
        from flux_attention.models.backbones import choose_dtype, load_backbone

        where = choose_device(device)
        quiet()
        backbone, tokenizer = load_backbone(model, dtype=choose_dtype(dtype, where), device=where)
        # The router's first weights: the Trainer sets the seed too late for them.
        torch.manual_seed(seed)
        controller = attach(backbone, config)
        context = getattr(controller.decoder.config, "max_position_embeddings", None)
        if context is not None and max(tokens) > context:
            raise ValueError(f"--lengths {max(tokens)} is over the model's context of {context} tokens")
        if data is not None:
            rows = list(samples_from_rows(data, tokenizer, RowFormat(max_length=max(tokens))))
            if not rows:
                raise ValueError(f"--data {data} holds no rows")
            cut = sum("cut" in row.meta for row in rows)
            if cut:
                notes.print(
                    f"{cut} of {len(rows)} rows are longer than {max(tokens)} tokens, the largest of --lengths: the "
                    "middle of their contexts is left out"
                )
            mixture = Mixture(lengths=tokens, seed=seed, extra=rows, extra_share=data_share)
        for task in mixture.tasks:
            # One of each: a length too short for a task is said now, not in the middle of the run.
            make_sample(task, 0, min(tokens), seed, mixture.split, tokenizer)
    # A folder that cannot be written is said before the work, too.
    out.mkdir(parents=True, exist_ok=True)
    samples = MixtureDataset(mixture, tokenizer, steps * batch_size * accumulation)
    trainer = RouterTrainer(controller, recipe, samples, runs, report_to=() if report_to == "none" else (report_to,))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_adapter(out)
    notes.print(f"adapter: [bold]{out}[/bold]   try it: flux-attn eval --suite needle -n 20 --adapter {out}")
