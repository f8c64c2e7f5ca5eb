"""`flux-attn train-packs`: a router for one's own model, on one GPU or, under a launcher, on many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

#: What an adapter settles itself.
_OF_THE_ADAPTER = ("router_input", "sparse_mode", "sink_tokens", "window_tokens")


def train_packs(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="Folder that `flux-attn data build` made.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hub id of the backbone.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the adapter.")],
    objective: Annotated[str, typer.Option("--objective", help="lm, or distill (KL to the dense model).")] = "distill",
    retrieval_target: Annotated[float, typer.Option("--retrieval-target", help="Ω of retrieval documents.")] = 0.7,
    holistic_target: Annotated[float, typer.Option("--holistic-target", help="Ω of holistic documents.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps.")] = 100,
    accumulation: Annotated[int, typer.Option("--accumulation", help="Packs of a step, on each rank.")] = 4,
    pack_tokens: Annotated[int, typer.Option("--pack-tokens", help="Tokens of a pack.")] = 65536,
    router_lr: Annotated[float, typer.Option("--router-lr", help="Peak learning rate of the router.")] = 5e-4,
    multiplier_lr: Annotated[float, typer.Option("--multiplier-lr", help="Learning rate of the multipliers.")] = 1e-3,
    short_first: Annotated[bool, typer.Option("--short-first", help="Short documents before long ones.")] = False,
    settle_steps: Annotated[
        int,
        typer.Option("--settle-steps", help="Stop when routes and targets hold over windows of so many steps; 0 = no."),
    ] = 0,
    router_input: Annotated[str, typer.Option("--router-input", help="probe or inline.")] = "probe",
    sparse_mode: Annotated[str, typer.Option("--sparse-mode", help="streaming, triangle or xattention.")] = "streaming",
    sink_tokens: Annotated[int, typer.Option("--sink-tokens", help="First tokens that a sparse layer keeps.")] = 128,
    window_tokens: Annotated[int, typer.Option("--window-tokens", help="Latest tokens that it keeps.")] = 2048,
    start: Annotated[str | None, typer.Option("--start", help="Adapter to go on from, as it is.")] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep the layers' inputs in the host's memory.")] = False,
    shard: Annotated[bool, typer.Option("--shard", help="Shard the frozen backbone over the ranks (FSDP2).")] = False,
    sequence_parallel: Annotated[int, typer.Option("--sequence-parallel", help="Ranks that share a pack.")] = 1,
    quantize: Annotated[str | None, typer.Option("--quantize", help="4bit: needs bitsandbytes.")] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of checkpoints and logs.")] = Path("runs/packs"),
    save_steps: Annotated[int, typer.Option("--save-steps", help="Steps between checkpoints; 0 = none.")] = 20,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in --runs.")] = False,
    report_to: Annotated[str, typer.Option("--report-to", help="tensorboard, wandb or none.")] = "none",
    seed: Annotated[int, typer.Option("--seed", help="Seed of noise and order.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train a router on packs of long documents; on N GPUs: torchrun --nproc-per-node N -m flux_attention …"""
    from flux_attention.cli.session import quiet
    from flux_attention.config import FluxConfig
    from flux_attention.data import HOLISTIC, RETRIEVAL
    from flux_attention.training.launch import PackRun, run
    from flux_attention.training.scale import ScaleConfig

    # A default is not asked for: the adapter's own settings are kept without a word.
    given = [name for name in _OF_THE_ADAPTER if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"]
    if start is not None and given:
        named = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"--start {start} goes on with the adapter's own settings: leave out {named}")
    quiet()
    plan = PackRun(
        model=model,
        data=data,
        out=out,
        runs=runs,
        start=start,
        quantize=quantize,
        report_to=() if report_to == "none" else (report_to,),
        flux=FluxConfig(
            sink_tokens=sink_tokens,
            window_tokens=window_tokens,
            sparse_mode=sparse_mode,
            router_input=router_input,  # type: ignore[arg-type]
        ),
        scale=ScaleConfig(
            objective=objective,  # type: ignore[arg-type]
            targets={RETRIEVAL: retrieval_target, HOLISTIC: holistic_target},
            steps=steps,
            accumulation=accumulation,
            pack_tokens=pack_tokens,
            router_lr=router_lr,
            multiplier_lr=multiplier_lr,
            short_first=short_first,
            settle_steps=settle_steps,
            offload=offload,
            shard_backbone=shard,
            sequence_parallel=sequence_parallel,
            save_steps=save_steps,
            seed=seed,
        ),
    )
    trainer = run(plan, resume=resume, device=device)
    if trainer.is_world_process_zero():
        print(out)
