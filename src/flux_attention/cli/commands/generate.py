"""`flux-attn generate`: answers to prompts."""

from __future__ import annotations

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
    Seed,
    make_console,
)


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
