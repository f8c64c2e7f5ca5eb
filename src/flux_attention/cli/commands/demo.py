"""`flux-attn demo`: two long prompts with and without routing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flux_attention.cli.options import SMOLLM2, AdapterOption, Commit, Device, DType, Model, Record, Seed, make_console


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
    console = make_console()
    for name, value, least in (("--length", length, 1), ("--new-tokens", new_tokens, 2), ("--rounds", rounds, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    with console.status("loading torch and the model"):
        from flux_attention.cli.demo import run_demo
        from flux_attention.cli.session import choose_device, find_adapter, quiet
        from flux_attention.models.adapter import load_adapter
        from flux_attention.models.backbones import choose_dtype, load_backbone

        # Looked for first: loading the model only to miss the adapter would waste the user's time.
        loaded = None if adapter is None else load_adapter(adapter)
        where = choose_device(device)
        quiet()
        backbone, tokenizer = load_backbone(model, dtype=choose_dtype(dtype, where), device=where)
        if loaded is None:
            loaded = find_adapter(backbone)
    console.print(f"[bold]{backbone.config.name_or_path}[/bold] with adapter [bold]{loaded.source}[/bold]")
    # A folder that cannot be written is said before the work, not after.
    out.mkdir(parents=True, exist_ok=True)
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
