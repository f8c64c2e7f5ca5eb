"""A small checkpoint of the published form, and what the published model computes with it, written out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

BLOCK = 128
OPTIONS = {
    "toggle_type": "streaming",
    "retrieval_mode": "full",
    "sink_size": 100,  # rounded up to a block
    "local_window_size": 256,
    "pooling_mode": "ctx_q",
    "pool_size": 30,
    "use_softmax": True,
    "triangle_n_last": 128,
}
ARCHITECTURES = {"qwen3": "PawQwen3ForCausalLM", "llama": "PawLlamaForCausalLM"}


def make_base(kind: str, tied: bool = False) -> PreTrainedModel:
    shape = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(Qwen3Config(**shape)) if kind == "qwen3" else LlamaForCausalLM(LlamaConfig(**shape))
    return made.eval()


class Router(nn.Module):
    """One layer's router under the published names."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.cls_feat_extractor = nn.Sequential(nn.Linear(d, 8 * d), nn.SiLU(), nn.Linear(8 * d, 2 * d))
        self.cls_router_head_agnostic = nn.Sequential(
            nn.Linear(2 * d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d), nn.SiLU(), nn.Linear(d, 2)
        )

    def forward(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.cls_router_head_agnostic(self.cls_feat_extractor(pooled))
        return logits


def make_routers(model: PreTrainedModel) -> list[Router]:
    torch.manual_seed(7)
    routers = [Router(model.config.head_dim).requires_grad_(False) for _ in model.model.layers]
    for router, bias in zip(routers, (0.3, -0.3, 0.0), strict=True):
        for parameter in router.parameters():
            parameter.mul_(3.0)
        router.cls_router_head_agnostic[4].bias[1] += bias
    return routers


def write(
    folder: Path, model: PreTrainedModel, routers: list[Router], *, shards: int = 2, options: dict | None = None
) -> None:
    """The whole model and its routers as sharded safetensors."""
    tensors = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    for layer, router in enumerate(routers):
        for name, value in router.state_dict().items():
            tensors[f"model.layers.{layer}.self_attn.mask_allocator.{name}"] = value.clone()
    write_tensors(folder, tensors, shards)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [ARCHITECTURES[model.config.model_type]]
    config.update(OPTIONS if options is None else options)
    (folder / "config.json").write_text(json.dumps(config))


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    placed = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(placed.values())):
        save_file({name: tensors[name] for name in names if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


@torch.no_grad()
def reference(model: PreTrainedModel, routers: list[Router], ids: Tensor) -> tuple[Tensor, list[bool]]:
    """Logits `[1, T, V]` of the published model on one prompt, and which layers ran full."""
    decoder, pool = model.model, OPTIONS["pool_size"]
    tokens = ids.shape[1]
    hidden = decoder.embed_tokens(ids)
    positions = torch.arange(tokens)[None]
    cos, sin = decoder.rotary_emb(hidden, positions)
    t, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    causal = j <= t
    sinks = -(-OPTIONS["sink_size"] // BLOCK)
    local = -(-OPTIONS["local_window_size"] // BLOCK)
    # Key blocks: the first `sinks`, and the last `local` with the query's own among them.
    near = (j // BLOCK < sinks) | (j // BLOCK > t // BLOCK - local)
    chosen = []
    for layer, router in zip(decoder.layers, routers, strict=True):
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)
        shape = (1, tokens, -1, attention.head_dim)
        q, k, v = (p(x).view(shape) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        pooled = torch.cat([q[:, :pool], q[:, -pool:]], 1).mean(1).mean(1)
        full = bool(router(pooled)[0].argmax() == 1)
        chosen.append(full)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        q, k = (y * cos[:, None] + _half_turned(y) * sin[:, None] for y in (q, k))
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        scores = q @ k.transpose(2, 3) * attention.head_dim**-0.5
        mask = causal if full else causal & near
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        hidden = hidden + attention.o_proj((weights @ v).transpose(1, 2).reshape(1, tokens, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden)), chosen


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
