"""A model of Qwen3-8B's shapes with random weights, a toy beside it, and attention modes made for measuring."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from flux_attention.kernels.api import block_sparse_attention, select_blocks
from flux_attention.modes import Mode, PrefillInputs

#: Share of key blocks that `ForcedDensity` attends to.
DENSITY = 0.25


def build(config: Qwen3Config, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, made on the device itself: transformers' initialisation takes minutes."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    # Memory that was only reserved holds no rotary frequencies: they are computed anew, in float32.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)
    return model.requires_grad_(False)


def qwen3_8b(layers: int) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12288,
        vocab_size=151936,
        max_position_embeddings=300000,
        tie_word_embeddings=False,
    )


def toy() -> Qwen3Config:
    return Qwen3Config(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=256,
        max_position_embeddings=300000,
        tie_word_embeddings=False,
    )


class NoAttention(Mode):
    """Returns its queries: what is left of a prefill is the linear work."""

    name = "none"

    def prefill(self, inputs: PrefillInputs) -> Tensor:
        return inputs.q


@functools.lru_cache(maxsize=64)
def random_blocks(heads: int, n_q: int, n_k: int, device: torch.device) -> Tensor:
    """Random causal blocks for the last n_q of n_k query blocks, block 0 and the own one among them."""
    own = torch.arange(n_k - n_q, n_k, device=device)[:, None]
    j = torch.arange(n_k, device=device)
    return ((torch.rand(heads, n_q, n_k, device=device) < DENSITY) | (j == own) | (j == 0)) & (j <= own)


class ForcedDensity(Mode):
    """XAttention that pays for its selection and then attends to random blocks: random weights have no structure."""

    name = "forced_density"

    def prefill(self, inputs: PrefillInputs) -> Tensor:
        q, k, packing, block = inputs.q, inputs.k, inputs.packing, self.config.block_tokens
        select_blocks(
            q,
            k,
            packing,
            block=block,
            stride=self.config.xattention_stride,
            threshold=self.config.xattention_threshold,
            scale=inputs.scale,
        )
        blocks = [
            random_blocks(q.shape[1], -(-n_q // block), -(-n_k // block), q.device)
            for n_q, n_k in zip(packing.q_lens, packing.k_lens, strict=True)
        ]
        return block_sparse_attention(
            q, k, inputs.v, packing, blocks, block=block, scale=inputs.scale, impl=inputs.impl
        )
