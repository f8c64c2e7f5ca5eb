"""A tiny random model with a real tokenizer, saved as transformers saves one: what the command line is given."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flux_attention.config import FluxConfig
from flux_attention.models.adapter import save_adapter
from flux_attention.models.attach import attach, detach

CONFIG = FluxConfig(sink_tokens=16, window_tokens=32, block_tokens=16, pool_tokens=8)
LAYERS = 4


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_backbone() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval()


def save_all(folder: Path) -> tuple[Path, Path]:
    """Folders of a saved backbone and of an adapter for it whose router prefers some layers."""
    model = make_backbone()
    backbone, adapter = folder / "backbone", folder / "adapter"
    model.save_pretrained(backbone)
    make_tokenizer().save_pretrained(backbone)
    controller = attach(model, CONFIG)
    with torch.no_grad():
        controller.router.weights[-1].normal_(0, 1)
        controller.router.biases[-1].zero_()
        controller.router.biases[-1][0, 1] = 50.0
        controller.router.biases[-1][1, 0] = 50.0
    save_adapter(adapter, controller.config, controller.router.state_dict())
    detach(model)
    return backbone, adapter
