"""Weights of the backbone that an adapter replaces, put in their place while vLLM loads the model.

vLLM fuses, shards and repacks weights as it loads them, so its parameters cannot be written afterwards as those of a
transformers model can. Its models take a stream of a checkpoint's weights by name; the replaced ones change there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flux_attention.models.delta import BackboneDelta, DeltaError

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def replaced(weights: Iterable[tuple[str, Tensor]], delta: BackboneDelta) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's weights, with the adapter's values in place of those that it replaces.

    Raises:
        DeltaError: at the end for weights that the checkpoint lacks, and at once for one of another shape or one that
            the checkpoint holds quantised; the message names it.
    """
    values = delta.load()
    for name, tensor in weights:
        value = values.pop(name, None)
        if value is None:
            yield name, tensor
            continue
        if value.shape != tensor.shape or tensor.dtype not in _PLAIN:
            raise DeltaError(
                f"{delta.path}: weight {name!r} is {list(value.shape)}, the checkpoint's is {list(tensor.shape)} "
                f"{tensor.dtype}; an adapter with replaced weights needs an unquantised checkpoint of its own shape"
            )
        yield name, value.to(tensor.dtype)
    if values:
        raise DeltaError(f"{delta.path}: the checkpoint has no weight {min(values)!r}")


@contextmanager
def loading_with(delta: BackboneDelta | None, model_class: type[Any]) -> Iterator[None]:
    """Models of `model_class` that are loaded inside get the adapter's values; does nothing without a delta.

    Raises:
        DeltaError: as `replaced`, or nothing was loaded by name, as with dummy weights.
    """
    if delta is None:
        yield
        return
    original, done = model_class.load_weights, []

    def load_weights(model: Any, weights: Iterable[tuple[str, Tensor]]) -> Any:
        loaded = original(model, replaced(weights, delta))
        done.append(True)
        return loaded

    model_class.load_weights = load_weights
    try:
        yield
    finally:
        model_class.load_weights = original
    if not done:
        raise DeltaError(
            f"{delta.path}: the adapter replaces weights, and this --load-format does not load the checkpoint's by "
            "name; use the default one"
        )
