"""Attach routed attention to an unmodified transformers model, and take it off again.

`attach` changes three things and `detach` restores them: the name of the attention implementation in the model's
config, one forward hook pair on the decoder and one forward hook per routable attention module. On CUDA it also fuses
the layers (`models/fuse.py`), which `detach` undoes as well. No weight and no class is touched.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flux_attention.config import FluxConfig
from flux_attention.kernels.dispatch import importable
from flux_attention.models.adapter import Adapter, check_backbone, describe_backbone, load_adapter
from flux_attention.models.controller import FluxAttention
from flux_attention.models.delta import AppliedDelta
from flux_attention.models.families import family_of, routable_layers
from flux_attention.models.fuse import fuse as fuse_model
from flux_attention.models.fuse import why_not
from flux_attention.router import LayerRouter

ATTENTION_NAME = "flux_attention"

_logger = logging.getLogger(__name__)


def attach(
    model: PreTrainedModel, adapter: FluxConfig | Adapter | str | Path | None = None, *, fuse: bool | None = None
) -> FluxAttention:
    """Route the attention of `model`, in place and reversibly.

    Args:
        model: an unmodified transformers causal LM of a known family.
        adapter: a trained adapter (object, folder, Hub id or shipped name), or a `FluxConfig` for an untrained
            router, which starts with every layer full. None = `FluxConfig()`.
        fuse: run norms, rotary embedding and gating folded together (`models/fuse.py`). None: on CUDA, where the
            family allows it; the results are the same to rounding.

    Returns:
        the controller; `detach(model)` ends it. An adapter with a `delta` replaces weights of the model until then; the
        controller's `delta` and a logged warning name them.

    Raises:
        ValueError: unknown family, adapter of another backbone, a model that is attached already, or `fuse=True` for
            a model that cannot be fused.
    """
    if hasattr(model, "_flux_attention_controller"):
        raise ValueError("the model is attached already; detach(model) first")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    config = decoder.config
    family_of(config.model_type)
    layers = routable_layers(config)
    if isinstance(adapter, (str, Path)):
        adapter = load_adapter(adapter)
    flux = adapter.config if isinstance(adapter, Adapter) else (adapter or FluxConfig())
    found = describe_backbone(model, layers)
    if flux.backbone is not None:
        check_backbone(flux, found)
    else:
        flux = replace(flux, backbone=found)
    router = LayerRouter(len(layers), found.head_dim, flux.full_bias)
    if isinstance(adapter, Adapter):
        router.load_state_dict(adapter.state)
    router.to(next(decoder.parameters()).device).float().eval()
    controller = FluxAttention(model, flux, router)
    if isinstance(adapter, Adapter) and adapter.delta is not None:
        controller.delta = AppliedDelta.apply(model, adapter.delta)
        _logger.warning(
            "%s replaces %d weights of %s until detach: %s",
            adapter.source,
            len(controller.delta.names),
            found.name,
            ", ".join(sorted({name.rpartition("self_attn.")[2] for name in controller.delta.names})),
        )
    try:
        _install(controller, fuse)
    except BaseException:
        # Whatever it was, memory that ran out included: the model must not stay half attached.
        _remove(controller)
        raise
    return controller


def attached(model: PreTrainedModel) -> FluxAttention:
    """The controller of an attached model. Raises ValueError when there is none."""
    controller = getattr(model, "_flux_attention_controller", None)
    if controller is None:
        raise ValueError("the model is not attached; call attach(model, adapter) first")
    return controller


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`. Raises ValueError when the model is not attached."""
    _remove(attached(model))


def _install(controller: FluxAttention, fuse_layers: bool | None) -> None:
    # Registering is idempotent and does nothing for models that do not name this implementation.
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _mask)
    for index, layer in enumerate(controller.decoder.layers):
        module = getattr(layer, controller.family.attention)
        routable = controller.layers.index(index) if index in controller.layers else None
        module._flux_attention = (controller, routable)
        controller._modules.append(module)
        if routable is not None:
            hook = module.register_forward_pre_hook(controller.pooling.before_attention, with_kwargs=True)
            controller._handles.append(hook)
    controller._handles.append(
        controller.decoder.register_forward_pre_hook(controller._before_decoder, with_kwargs=True)
    )
    controller._handles.append(controller.decoder.register_forward_hook(controller._after_decoder, always_call=True))
    controller.decoder.config._attn_implementation = ATTENTION_NAME
    controller.decoder._flux_config = controller.config
    controller.model._flux_attention_controller = controller
    able = controller.device.type == "cuda" and importable("triton")
    if fuse_layers or (fuse_layers is None and able and why_not(controller) is None):
        controller.fusion = fuse_model(controller)


def _remove(controller: FluxAttention) -> None:
    if controller.fusion is not None:
        controller.fusion.remove()
    for handle in controller._handles:
        handle.remove()
    for module in controller._modules:
        vars(module).pop("_flux_attention", None)
    controller._handles, controller._modules = [], []
    controller.decoder.config._attn_implementation = controller._implementation
    # An attach that failed half way has not set everything.
    vars(controller.decoder).pop("_flux_config", None)
    vars(controller.model).pop("_flux_attention_controller", None)
    if controller.delta is not None:
        controller.delta.revert(controller.model)
        controller.delta = None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls for an attached model."""
    controller, layer = module._flux_attention  # type: ignore[misc]
    if layer is None:
        # By the function that `_mask` writes for, whatever the model was loaded with: the flash implementations look
        # themselves up under the config's implementation, which is ours here, and flex takes another kind of mask.
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if dropout:
        raise ValueError(f"routed attention has no dropout, got {dropout}; the backbone is frozen: use model.eval()")
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embedding leaves queries and keys in float32, where autocast's projections give values in its own
        # dtype; a cache may have been begun in a third.
        step = controller._step
        cached = step is not None and step.cache is not None
        dtype = step.cache.pool_of(layer).keys.dtype if cached else value.dtype
        query, key, value = (x.to(dtype) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return controller.attend(layer, query, key, value, scale), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Masks for the layers that are not routed; routable layers know their sequences from the step."""
    # Only sliding layers ask with a local size; a global mask over a long prompt must never be materialised.
    if kwargs.get("local_size") is None:
        return None
    kwargs.pop("config", None)
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
