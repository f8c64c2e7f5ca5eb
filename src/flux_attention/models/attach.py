"""Attach routed attention to an unmodified transformers model, and take it off again.

`attach` changes three things and `detach` restores them: the name of the attention implementation in the model's
config, one forward hook pair on the decoder and one forward hook per routable attention module. On CUDA it also fuses
the layers (`models/fuse.py`), which `detach` undoes as well. No weight and no class is touched.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from flux_attention.config import FluxConfig
from flux_attention.models.adapter import Adapter, check_backbone, describe_backbone, load_adapter
from flux_attention.models.controller import FluxAttention
from flux_attention.models.delta import AppliedDelta
from flux_attention.models.families import family_of, routable_layers
from flux_attention.router import LayerRouter

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
        controller._install(fuse)
    except ValueError:
        controller._remove()
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
    attached(model)._remove()
