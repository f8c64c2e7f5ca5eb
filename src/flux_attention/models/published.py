"""The authors' published checkpoints, turned into adapters.

A published checkpoint is a whole fine-tuned model: the backbone's tensors, a router in every attention module
(`self_attn.mask_allocator`), and the method's options in `config.json`. An adapter is the router alone, so the backbone
is compared with the model it was made from, tensor by tensor: what differs in the q, k and v projections travels as a
delta (`models.delta`), and anything else that differs is refused.

The published streaming kernel counts the query's own block into its window; ours counts whole blocks before it. A
published window of n blocks is therefore `window_tokens = 128·(n − 1)` here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.models.adapter import describe_backbone, save_adapter
from flux_attention.models.families import routable_layers
from flux_attention.models.shards import ShardedCheckpoint

#: Architecture of a published checkpoint -> model type of its backbone.
ARCHITECTURES = {"PawQwen3ForCausalLM": "qwen3", "PawLlamaForCausalLM": "llama"}
BLOCK_TOKENS = 128
_MODES = {"full": "full", "xattn": "xattention", "triangle": "triangle", "streaming": "streaming"}

#: Options that change what the published model computes, with the value its code takes where one is missing.
OPTIONS: dict[str, Any] = {
    "toggle_type": "streaming",
    "retrieval_mode": "full",
    "sink_size": 128,
    "local_window_size": 1024,
    "pooling_mode": "first_token",
    "pool_size": 100,
    "use_softmax": False,
    "triangle_n_last": 128,
    "use_task_emb_for_mask": False,
}
#: Options of its training and of its own batching, which a converted adapter does not need.
IGNORED_OPTIONS = frozenset(
    {
        "disable_linear_regularization_term",
        "enable_ada_sparsity",
        "enable_lambda_task",
        "enable_layerwise_sparsity",
        "erank_analysis_path",
        "layerwise_sparsity_max_ratio",
        "layerwise_sparsity_min_ratio",
        "layerwise_sparsity_power",
        "layerwise_sparsity_schedule",
        "layerwise_sparsity_weight",
        "mask_hard_sample",
        "mask_temp",
        "pooling_seq",
        "suggested_sparsity",
        "topk_k",
        "use_batch_routed_attention",
    }
)
#: Options of the backbone that may differ: they say how it was stored or is prompted, not what it computes.
_FREE_OPTIONS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "max_position_embeddings",
        "model_type",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_ROUTER = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.self_attn\.mask_allocator\."
    r"(?P<part>cls_feat_extractor|cls_router_head_agnostic)\.(?P<place>\d+)\.(?P<kind>weight|bias)"
)
#: Place of each Linear in the two published Sequentials -> index in `LayerRouter.weights`.
_LINEARS = {
    ("cls_feat_extractor", 0): 0,
    ("cls_feat_extractor", 2): 1,
    ("cls_router_head_agnostic", 0): 2,
    ("cls_router_head_agnostic", 2): 3,
    ("cls_router_head_agnostic", 4): 4,
}
_TRAINED = re.compile(r"model\.layers\.\d+\.self_attn\.[qkv]_proj\.(weight|bias)")


class ConversionError(ValueError):
    """A checkpoint that cannot become an adapter; the message names the option or the tensor."""


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` found.

    Attributes:
        config: of the adapter.
        compared: backbone tensors that were compared with the base model.
        replaced: those among them that differ and travel as a delta.
        ignored: options of the checkpoint without a meaning for an adapter.
        notes: what is worth knowing, a sentence each.
    """

    config: FluxConfig
    compared: int
    replaced: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]


def convert_checkpoint(checkpoint: str | Path, base: str | Path, out: str | Path) -> Conversion:
    """Write the adapter that makes `base` the published model.

    Tensors are read one at a time, each file from its beginning; only the router and replaced weights stay in memory.

    Args:
        checkpoint: folder or Hub id of a published checkpoint.
        base: folder or Hub id of the model that it was trained from.
        out: folder of the adapter.

    Raises:
        ConversionError: another architecture, an option that this package does not know or cannot express, a tensor
            that neither the router nor the base model has, or one outside of q, k and v that differs.
        FileNotFoundError, ValueError: files that are missing or unreadable.
        OSError: the disk is full; an adapter that was in `out` stays whole.
    """
    with ShardedCheckpoint(checkpoint) as published, ShardedCheckpoint(base) as original:
        model_type = _model_type(published)
        base_config, notes = _compare_backbones(published, original, model_type)
        config = _adapter_config(published.config)
        layers = routable_layers(base_config)
        backbone = describe_backbone(base_config, layers)
        config = FluxConfig(**{**_fields(config), "backbone": backbone})
        state = _router_state(published, layers, backbone.head_dim)
        compared, delta = _compare_tensors(published, original, bool(base_config.tie_word_embeddings))
        save_adapter(out, config, state, delta or None)
        return Conversion(
            config=config,
            compared=compared,
            replaced=tuple(sorted(delta)),
            ignored=tuple(sorted(IGNORED_OPTIONS & set(published.config))),
            notes=notes,
        )


def _fields(config: FluxConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "format_version"}


def _model_type(published: ShardedCheckpoint) -> str:
    found = published.config.get("architectures") or []
    if len(found) != 1 or found[0] not in ARCHITECTURES:
        raise ConversionError(
            f"{published.folder}: architectures must be one of {', '.join(ARCHITECTURES)}, got {found!r}"
        )
    return ARCHITECTURES[found[0]]


def _adapter_config(options: Mapping[str, Any]) -> FluxConfig:
    """The adapter's configuration from the method's options of a published `config.json`."""
    given = {name: options.get(name, default) for name, default in OPTIONS.items()}
    if given["pooling_mode"] != "ctx_q":
        raise ConversionError(
            f"option pooling_mode must be 'ctx_q' (mean of the first and last queries), got {given['pooling_mode']!r}"
        )
    if given["use_softmax"] is not True:
        raise ConversionError(f"option use_softmax must be true (a router with two logits), got {given['use_softmax']}")
    if given["use_task_emb_for_mask"]:
        raise ConversionError("option use_task_emb_for_mask is set: a router that is told the task cannot be expressed")
    modes = {}
    for option, allowed in (
        ("toggle_type", ("streaming", "triangle", "xattn")),
        ("retrieval_mode", ("full", "triangle", "xattn")),
    ):
        if given[option] not in allowed:
            raise ConversionError(f"option {option} must be one of {', '.join(allowed)}, got {given[option]!r}")
        modes[option] = _MODES[given[option]]
    lengths = {}
    for option, least in (("sink_size", 1), ("local_window_size", 1), ("pool_size", 1), ("triangle_n_last", 1)):
        value = given[option]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConversionError(f"option {option} must be an integer of at least {least}, got {value!r}")
        lengths[option] = value
    window_blocks = -(-lengths["local_window_size"] // BLOCK_TOKENS) - 1
    if window_blocks < 1:
        raise ConversionError(
            f"option local_window_size must be above {BLOCK_TOKENS}, got {lengths['local_window_size']}: the query's "
            "own block alone is no window"
        )
    return FluxConfig(
        retrieval_mode=modes["retrieval_mode"],
        sparse_mode=modes["toggle_type"],
        sink_tokens=-(-lengths["sink_size"] // BLOCK_TOKENS) * BLOCK_TOKENS,
        window_tokens=window_blocks * BLOCK_TOKENS,
        block_tokens=BLOCK_TOKENS,
        pool_tokens=lengths["pool_size"],
        triangle_tokens=lengths["triangle_n_last"],
        router_input="inline",
    )


def _compare_backbones(
    published: ShardedCheckpoint, original: ShardedCheckpoint, model_type: str
) -> tuple[Any, tuple[str, ...]]:
    """The base model's configuration, and notes. Raises ConversionError for options that differ or are not known."""
    from transformers import AutoConfig

    found = original.config.get("model_type")
    if found != model_type:
        raise ConversionError(
            f"the checkpoint's backbone is {model_type!r}, but {original.folder} holds a {found!r} model"
        )
    base = AutoConfig.for_model(**original.config)
    base.name_or_path = base.name_or_path or original.folder.name
    own = {k: v for k, v in published.config.items() if k not in OPTIONS and k not in IGNORED_OPTIONS}
    # What the backbone's own class defines, under its new and its old names.
    known = set(base.to_dict()) | set(original.config) | {"rope_theta", "rope_scaling", "rope_parameters"}
    if unknown := sorted(set(own) - known - _FREE_OPTIONS):
        raise ConversionError(
            f"{published.folder}: unknown option{'s' * (len(unknown) > 1)} "
            + ", ".join(f"{name}={own[name]!r}" for name in unknown)
        )
    # Through the same class, so that old and new spellings of one option compare equal.
    theirs = AutoConfig.for_model(**{**own, "model_type": model_type}).to_dict()
    ours = base.to_dict()
    differences = [
        f"{name} {theirs.get(name)!r} ≠ {ours.get(name)!r}"
        for name in sorted((set(theirs) | set(ours)) - _FREE_OPTIONS)
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        raise ConversionError(
            f"the checkpoint was not trained from {original.folder} (checkpoint ≠ base): {'; '.join(differences)}"
        )
    notes = []
    if theirs.get("max_position_embeddings") != ours.get("max_position_embeddings"):
        notes.append(
            f"the checkpoint allows {theirs['max_position_embeddings']} positions, the base model "
            f"{ours['max_position_embeddings']}: the base model's limit holds"
        )
    return base, tuple(notes)


def _router_state(published: ShardedCheckpoint, layers: tuple[int, ...], head_dim: int) -> dict[str, Tensor]:
    """`LayerRouter`'s state dict; its input whitening is the identity."""
    found: dict[tuple[int, int, str], Tensor] = {}
    for name in published.by_shard(name for name in published.names if ".mask_allocator." in name):
        match = _ROUTER.fullmatch(name)
        linear = None if match is None else _LINEARS.get((match["part"], int(match["place"])))
        if match is None or linear is None:
            raise ConversionError(f"{published.folder}: unknown router tensor {name!r}")
        found[int(match["layer"]), linear, match["kind"]] = published.tensor(name)
    state: dict[str, Tensor] = {}
    sizes = (head_dim, 8 * head_dim, 2 * head_dim, 4 * head_dim, head_dim, 2)
    for linear, (inner, outer) in enumerate(itertools.pairwise(sizes)):
        for kind, shape in (("weight", (outer, inner)), ("bias", (outer,))):
            rows = []
            for layer in layers:
                tensor = found.pop((layer, linear, kind), None)
                part = next(part for part, index in _LINEARS.items() if index == linear)
                name = f"model.layers.{layer}.self_attn.mask_allocator.{part[0]}.{part[1]}.{kind}"
                if tensor is None:
                    raise ConversionError(f"{published.folder}: router tensor {name!r} is missing")
                if tuple(tensor.shape) != shape:
                    raise ConversionError(
                        f"{published.folder}: router tensor {name!r} must be {list(shape)} for head dim {head_dim}, "
                        f"got {list(tensor.shape)}"
                    )
                rows.append(tensor)
            state[f"{'weights' if kind == 'weight' else 'biases'}.{linear}"] = torch.stack(rows)
    if found:
        extra = sorted({layer for layer, _, _ in found})
        raise ConversionError(f"{published.folder}: routers of layers {extra} have no layer in the base model")
    state["input_mean"] = torch.zeros(len(layers), head_dim)
    state["input_scale"] = torch.ones(len(layers), head_dim)
    return state


def _compare_tensors(
    published: ShardedCheckpoint, original: ShardedCheckpoint, tied: bool
) -> tuple[int, dict[str, Tensor]]:
    """Number of backbone tensors compared, and those of q, k and v that differ."""
    names = [name for name in published.names if ".mask_allocator." not in name]
    place = {name: _name_in(original, name, tied) for name in names}
    if unknown := [name for name, other in place.items() if other is None]:
        raise ConversionError(f"{published.folder}: tensors that the base model does not have: {_some(unknown)}")
    missing = set(original.names) - set(place.values())
    if tied:
        missing -= {"lm_head.weight"}
    if missing:
        raise ConversionError(f"{published.folder}: tensors of the base model are missing: {_some(sorted(missing))}")
    changed: list[str] = []
    delta: dict[str, Tensor] = {}
    for name in published.by_shard(names):
        theirs, ours = published.tensor(name), original.tensor(place[name] or name)
        if theirs.shape != ours.shape:
            raise ConversionError(f"tensor {name!r} is {list(theirs.shape)}, the base model's {list(ours.shape)}")
        # A copy in another precision is the same weight when rounding to the coarser one gives the same values.
        coarse = min((theirs.dtype, ours.dtype), key=lambda dtype: (dtype.itemsize, str(dtype)))
        if torch.equal(theirs.to(coarse), ours.to(coarse)):
            continue
        if _TRAINED.fullmatch(name):
            delta[name] = theirs
        else:
            changed.append(name)
    if changed:
        raise ConversionError(
            f"tensors outside of the q, k and v projections differ from {original.folder}: {_some(changed)}. Is it the "
            "model that the checkpoint was trained from?"
        )
    return len(names), delta


def _name_in(original: ShardedCheckpoint, name: str, tied: bool) -> str | None:
    """The base model's tensor for a checkpoint's `name`; a tied output layer is its embedding."""
    if name in original:
        return name
    if tied and name == "lm_head.weight" and "model.embed_tokens.weight" in original:
        return "model.embed_tokens.weight"
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
