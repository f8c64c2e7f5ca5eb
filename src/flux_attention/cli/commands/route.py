"""`flux-attn route`: which layers a prompt gets full attention in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flux_attention.cli.options import (
    SMOLLM2,
    AdapterOption,
    Device,
    DType,
    Files,
    MaxSparsity,
    MinSparsity,
    Model,
    PolicyOption,
    Prompts,
    Raw,
    make_console,
)


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
    notes = make_console(stderr=True)
    with notes.status("loading"):
        session = open_session(
            model,
            adapter,
            device=device,
            dtype=dtype,
            policy=policy,
            min_sparsity=min_sparsity,
            max_sparsity=max_sparsity,
        )
    rows = []
    for label, text in prompts:
        ids = encode_prompt(session, text, raw)
        row = route_row(f"{label} ({ids.numel():,} tokens)", route_of(session, ids))
        rows.append(row)
        if as_json:
            shown = {"prompt": label, "tokens": ids.numel(), "sparsity": row.sparsity, "use_full": list(row.use_full)}
            print(json.dumps({**shown, "p_full": None if row.p_full is None else list(row.p_full)}, ensure_ascii=False))
    if not as_json:
        print_routes(make_console(), rows)
        short = session.controller.config.min_routed_tokens
        notes.print(f"[dim]prompts of at most {short:,} tokens gain nothing and stay dense[/dim]")
    if figure is not None:
        from flux_attention.report import route_heat_map, save_image

        save_image(route_heat_map(rows), figure)
        notes.print(f"figure: {figure}")
