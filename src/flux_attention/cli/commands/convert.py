"""`flux-attn convert`: a published checkpoint becomes an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    checkpoint: Annotated[str, typer.Argument(help="Published checkpoint: a folder or a Hub id.")],
    base: Annotated[str, typer.Option("--base", help="The model it was trained from: a folder or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the adapter.")],
) -> None:
    """Turn a published Flux Attention checkpoint into an adapter for the model it was trained from."""
    from rich.console import Console

    from flux_attention.models.published import convert_checkpoint

    notes = Console(stderr=True, highlight=False)
    with notes.status("comparing the checkpoint with the base model"):
        found = convert_checkpoint(checkpoint, base, out)
    config = found.config
    notes.print(
        f"{config.retrieval_mode} + {config.sparse_mode}, {config.sink_tokens} sinks, window {config.window_tokens} "
        f"tokens, first and last {config.pool_tokens} tokens pooled"
    )
    notes.print(f"{found.compared} backbone tensors compared with {base}, {len(found.replaced)} differ (q, k, v)")
    if found.replaced:
        notes.print("  attach replaces them, detach puts the old ones back")
    if found.ignored:
        notes.print(f"options without a meaning here: {', '.join(found.ignored)}")
    for note in found.notes:
        notes.print(f"note: {note}")
    print(out)
