"""`flux-attn serve`: a model on vLLM."""

from __future__ import annotations

from typing import Annotated

import typer


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
