"""Tiny random models of every known family, and the batches that tests feed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from flux_attention.config import FluxConfig
from flux_attention.route import Route

VOCABULARY = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # A wider initialisation gives more peaked attention: with the default every mask yields nearly the same logits.
    "initializer_range": 0.15,
}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, sliding_window=32, layer_types=["sliding_attention", "full_attention"] * 2)
    ),
}

CONFIG = FluxConfig(
    sink_tokens=16,
    window_tokens=32,
    block_tokens=16,
    pool_tokens=5,
    tail_tokens=2,
    triangle_tokens=16,
    xattention_stride=4,
)


def make_model(family: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def make_prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


def left_pad(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """ids and mask `[B, T]`."""
    columns = max(p.numel() for p in prompts)
    ids, mask = (torch.zeros(len(prompts), columns, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, columns - prompt.numel() :] = prompt
        mask[row, columns - prompt.numel() :] = 1
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def mixed_route(layers: int, sequences: int, seed: int = 1) -> Route:
    generator = torch.Generator().manual_seed(seed)
    return Route(torch.rand(layers, sequences, generator=generator) > 0.5)
