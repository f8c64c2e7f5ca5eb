"""Backbone weights that an adapter replaces while it is attached.

Published checkpoints have trained the q, k and v projections along with the router. Their values travel with the
adapter as a file of their own; `attach` writes them into the model, `detach` puts the old ones back, bit for bit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DELTA_PREFIX = "backbone_delta-"
DELTA_PATTERN = f"{DELTA_PREFIX}*.safetensors"
_NEXT = "backbone_delta.next"


class DeltaError(ValueError):
    """Replaced weights that cannot be read or do not fit the model; the message names the file or the weight."""


@dataclass(frozen=True)
class BackboneDelta:
    """Weights on the disk, read when they are applied.

    Attributes:
        path: a safetensors file: name of a model parameter -> its new value.
        sha256: of the file.
    """

    path: Path
    sha256: str

    @classmethod
    def write(cls, folder: Path, tensors: Mapping[str, Tensor]) -> BackboneDelta:
        """Write `tensors` under a name made from their digest: a file that is there already stays untouched.

        Raises DeltaError for no tensors or non-finite ones, OSError when the disk is full; leaves no part of a file.
        """
        if not tensors:
            raise DeltaError(f"{folder}: a delta without weights")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise DeltaError(f"{folder}: weight {name!r} holds NaN or infinite values, or no floating-point ones")
        temporary = folder / _NEXT
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
            digest = file_sha256(temporary)
            path = folder / f"{DELTA_PREFIX}{digest[:16]}.safetensors"
            if path.is_file():
                temporary.unlink()
            else:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise
            raise OSError(f"{temporary}: {error}") from error
        return cls(path, digest)

    @classmethod
    def read(cls, path: Path, sha256: str) -> BackboneDelta:
        """The file at `path`. Raises DeltaError when it is missing or is not the one that `sha256` names."""
        if not path.is_file():
            raise DeltaError(f"{path} is missing: the adapter names it; download the adapter again")
        if (actual := file_sha256(path)) != sha256:
            raise DeltaError(
                f"{path} is torn or changed: SHA-256 {actual[:12]}…, not {sha256[:12]}…; download the adapter again"
            )
        return cls(path, sha256)

    def load(self) -> dict[str, Tensor]:
        return dict(load_file(self.path))


@dataclass
class AppliedDelta:
    """Weights of a model that hold replaced values until `revert`.

    Attributes:
        source: where the new values came from.
        names: the parameters, sorted.
    """

    source: BackboneDelta
    names: tuple[str, ...]
    _originals: dict[str, Tensor] = field(repr=False)

    @classmethod
    def apply(cls, model: nn.Module, delta: BackboneDelta) -> AppliedDelta:
        """Write the values into the model's parameters, in place: nothing that holds the parameters notices.

        The old values are kept on the CPU. Raises DeltaError naming a weight that the model lacks, holds in another
        shape, or holds quantised; the model is then as it was.
        """
        values = delta.load()
        parameters = dict(model.named_parameters())
        for name, value in values.items():
            if name not in parameters:
                raise DeltaError(f"{delta.path}: the model has no weight {name!r}")
            found = parameters[name]
            if hasattr(found, "device_mesh") or found.is_meta:
                raise DeltaError(
                    f"{delta.path}: the model's weight {name!r} is split over ranks or offloaded; an adapter with "
                    "replaced weights needs a model that lies on devices as a whole"
                )
            if found.shape != value.shape or not found.is_floating_point():
                raise DeltaError(
                    f"{delta.path}: weight {name!r} is {list(value.shape)}, the model's is {list(found.shape)} "
                    f"{found.dtype}; an adapter with replaced weights needs an unquantised model of its own shape"
                )
        originals = {}
        with torch.no_grad():
            for name, value in values.items():
                originals[name] = parameters[name].detach().to("cpu", copy=True)
                parameters[name].copy_(value)
        return cls(delta, tuple(sorted(values)), originals)

    @torch.no_grad()
    def revert(self, model: nn.Module) -> None:
        """Put the old values back."""
        parameters = dict(model.named_parameters())
        for name, value in self._originals.items():
            parameters[name].copy_(value)
        self._originals = {}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
