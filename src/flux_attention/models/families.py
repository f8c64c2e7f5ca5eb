"""Model families: where a layer's queries before RoPE come from.

To add a family, add its row. A family qualifies when its attention reads `config._attn_implementation`, calls
transformers' attention interface with `[B, heads, T, D]` tensors and updates a `Cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: of the transformers config.
        attention: attribute of a decoder layer that holds its attention module.
        query: projection from hidden states to queries.
        query_norm: norm of a head's query before RoPE, where the family has one.
        input_norm: attribute of a decoder layer that holds the norm before its attention.
        fusable: whether its decoder layers are norm, attention with a rotary embedding over the whole head, add,
            norm, gated MLP, add, under Llama's names (`models/fuse.py`).
    """

    model_type: str
    attention: str = "self_attn"
    query: str = "q_proj"
    query_norm: str | None = None
    input_norm: str = "input_layernorm"
    fusable: bool = False

    def queries(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        """Queries before RoPE, `hidden [S, K, hidden]` → `[S, K, Hq, D]`."""
        queries: Tensor = getattr(attention, self.query)(hidden)
        queries = queries.unflatten(-1, (-1, attention.head_dim))
        if self.query_norm is not None:
            queries = getattr(attention, self.query_norm)(queries)
        return queries

    def last_product(self, layer: nn.Module) -> nn.Linear | None:
        """A decoder layer's last product if it is a plain one, whose value no gradient depends on; else None."""
        module = layer.get_submodule("mlp.down_proj") if self.fusable else None
        plain = type(module) is nn.Linear and module.bias is None and "forward" not in vars(module)
        return module if plain and isinstance(module, nn.Linear) else None


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", fusable=True),
        Family("mistral", fusable=True),
        Family("qwen2", fusable=True),
        Family("qwen3", query_norm="q_norm", fusable=True),
        Family("qwen3_moe", query_norm="q_norm"),
        Family("gemma3_text", query_norm="q_norm"),
    )
}


def layer_devices(layers: Sequence[nn.Module]) -> tuple[torch.device, ...]:
    """Where each decoder layer's weights lie.

    Raises ValueError for layers whose weights are not on a device (transformers' offloading).
    """
    devices = tuple(next(layer.parameters()).device for layer in layers)
    if any(device.type == "meta" for device in devices):
        raise ValueError("some layers are offloaded: routed attention takes models that lie on devices as a whole")
    return devices


def family_of(model_type: str) -> Family:
    """The row of a model type. Raises ValueError that names the row to add."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model family {model_type!r} is not known; known ones: {', '.join(FAMILIES)}. If its attention goes "
            "through transformers' attention interface, add a row "
            f'Family("{model_type}", …) to FAMILIES in flux_attention/models/families.py'
        )
    return FAMILIES[model_type]


def layer_types(config: Any) -> Sequence[str] | None:
    return getattr(config, "layer_types", None)


def routable_layers(config: Any) -> tuple[int, ...]:
    """Indices of the layers with full attention, which are the ones that can be routed."""
    types = layer_types(config)
    if types is None:
        if getattr(config, "sliding_window", None):
            raise ValueError(
                f"every layer of this {config.model_type} model slides over {config.sliding_window} tokens: there "
                "is no full attention to route"
            )
        return tuple(range(config.num_hidden_layers))
    layers = tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    if not layers:
        raise ValueError(f"this {config.model_type} model has no full-attention layer to route")
    return layers
