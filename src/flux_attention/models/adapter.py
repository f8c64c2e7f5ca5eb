"""Adapter files: `flux_config.json` + `router.safetensors` in one folder, saved whole or not at all.

Two files cannot be replaced in one step, so the configuration holds the router's SHA-256 and renaming it is the one
moment that counts. A save puts the new router beside the old one as `router.safetensors.next`, renames the
configuration into place, then the router. Stopped before the first rename, the old pair is whole; between the two, the
configuration names the router in `.next`, from where loading takes it and the next save moves it home.

An adapter that replaces weights of the backbone has a third file (`models.delta`). Its name holds its digest and the
configuration names it, so it is written first and is committed by the same rename.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from flux_attention.config import Backbone, FluxConfig
from flux_attention.models.delta import DELTA_PATTERN, BackboneDelta, DeltaError

CONFIG_FILE = "flux_config.json"
ROUTER_FILE = "router.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_DIGEST = "router_sha256"
_DELTA = "backbone_delta"
_NEXT = ".next"


class AdapterError(ValueError):
    """An adapter that cannot be found, read or trusted; the message names the file."""


@dataclass(frozen=True)
class Adapter:
    """A trained router.

    Attributes:
        config: how it was trained, and for which backbone.
        state: the `LayerRouter`'s state dict, on the CPU.
        source: folder or Hub id it came from.
        delta: weights of the backbone that it replaces while attached; None for a router alone.
    """

    config: FluxConfig
    state: dict[str, Tensor]
    source: str
    delta: BackboneDelta | None = None


def save_adapter(
    folder: str | Path,
    config: FluxConfig,
    state: Mapping[str, Tensor],
    delta: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter; whatever goes wrong, an adapter that was in `folder` before can still be loaded.

    Args:
        folder: created with its parents; other files in it are left alone.
        config: its `backbone` must be known.
        state: the router's state dict; floating, finite.
        delta: values of the backbone's parameters that the adapter replaces while attached.

    Raises:
        AdapterError: no backbone in `config`, or an empty, non-finite or non-floating state.
        DeltaError: an empty or non-finite delta.
        OSError: the disk is full, or the place is not writable.
    """
    folder = Path(folder).expanduser()
    if config.backbone is None:
        raise AdapterError(f"cannot save {folder}: FluxConfig.backbone is None; an adapter names its backbone")
    _check_state(state, f"cannot save {folder}")
    # A state dict may hold views of one stacked tensor; safetensors refuses shared storage.
    blob = dump_tensors({name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()})
    values = {**config.to_dict(), _DIGEST: _sha256(blob)}

    folder.mkdir(parents=True, exist_ok=True)
    _finish_save(folder)
    kept = None
    if delta is not None:
        written = BackboneDelta.write(folder, delta)
        kept = written.path.name
        values[_DELTA] = {"file": kept, "sha256": written.sha256}
    text = json.dumps(values, indent=2) + "\n"
    next_router, next_config = folder / (ROUTER_FILE + _NEXT), folder / (CONFIG_FILE + _NEXT)
    try:
        _write(next_router, blob)
        _write(next_config, text.encode())
        _sync_folder(folder)
        os.replace(next_config, folder / CONFIG_FILE)
    except BaseException:
        # Frees what a full disk needs; the old pair was not touched.
        next_router.unlink(missing_ok=True)
        next_config.unlink(missing_ok=True)
        _drop_deltas(folder, keep=_delta_name(folder))
        raise
    _sync_folder(folder)
    os.replace(next_router, folder / ROUTER_FILE)
    _sync_folder(folder)
    _drop_deltas(folder, keep=kept)


def load_adapter(source: str | Path) -> Adapter:
    """Read an adapter from a folder, by the name of one the package ships, or from the Hub.

    Args:
        source: looked up in that order; a Hub id is `owner/name`.

    Raises:
        AdapterError: not found, incomplete, truncated, not finite, of another dtype, or a router that does not belong
            to its configuration. The message names the file.
    """
    folder = resolve(source)
    config_path, router_path = folder / CONFIG_FILE, folder / ROUTER_FILE
    if not config_path.is_file():
        raise AdapterError(f"{folder} is no adapter: {CONFIG_FILE} is missing")
    try:
        data = json.loads(config_path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, got {type(data).__name__}")
        digest, named = data.pop(_DIGEST, None), data.pop(_DELTA, None)
        config = FluxConfig.from_dict(data)
    except ValueError as error:
        raise AdapterError(f"{config_path}: {error}") from error
    if not isinstance(digest, str):
        raise AdapterError(f"{config_path}: {_DIGEST} must be the SHA-256 of {ROUTER_FILE}, got {digest!r}")
    if config.backbone is None:
        raise AdapterError(f"{config_path}: backbone must name the model the router was trained for, got None")

    next_path = folder / (ROUTER_FILE + _NEXT)
    # A save that was killed between its two renames left the router that belongs to the configuration here.
    if next_path.is_file() and _sha256(next_path.read_bytes()) == digest:
        router_path = next_path
    elif not router_path.is_file():
        raise AdapterError(f"{folder} is no adapter: {ROUTER_FILE} is missing")
    blob = router_path.read_bytes()
    try:
        state = load_tensors(blob)
    except SafetensorError as error:
        raise AdapterError(f"{router_path} is corrupt or truncated ({len(blob)} bytes): {error}") from error
    if (actual := _sha256(blob)) != digest:
        raise AdapterError(
            f"{router_path} does not belong to {CONFIG_FILE} beside it (torn or changed adapter): "
            f"SHA-256 {actual[:12]}…, {_DIGEST} {digest[:12]}…; save or download the adapter again"
        )
    _check_state(state, str(router_path))
    return Adapter(config=config, state=state, source=str(source), delta=_read_delta(folder, named))


def resolve(source: str | Path) -> Path:
    """The local folder of an adapter: a folder, the name of a shipped adapter, or a Hub id (downloaded).

    Raises AdapterError naming what was looked for.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise AdapterError(f"{path} is a file; an adapter is the folder that holds {CONFIG_FILE} and {ROUTER_FILE}")
    name = str(source)
    shipped = shipped_adapters()
    if name in shipped:
        return shipped[name]
    # `owner/name` and nothing that looks like a path on this machine.
    owner, _, rest = name.partition("/")
    if isinstance(source, Path) or not rest or "/" in rest or owner in ("", ".", "..", "~"):
        raise AdapterError(
            f"no adapter {name!r}: no such folder, and shipped adapters are {', '.join(sorted(shipped)) or 'none'}; "
            "an adapter on the Hub is named owner/name"
        )
    return _download(name)


def shipped_adapters() -> dict[str, Path]:
    """Folders of the adapters that come with the package, by name."""
    package = Path(__file__).resolve().parents[1]
    # In a wheel they lie inside the package; in a checkout beside `src`.
    places = (package / "adapters", package.parents[1] / "adapters")
    return {
        entry.name: entry
        for place in reversed(places)
        if place.is_dir()
        for entry in place.iterdir()
        if (entry / CONFIG_FILE).is_file()
    }


def describe_backbone(model: Any, routable_layers: tuple[int, ...]) -> Backbone:
    """The shape of a transformers model (or of its config) as an adapter records it."""
    whole: Any = model.config if isinstance(model, torch.nn.Module) else model
    # A multimodal model keeps its language model's shape one level down.
    config = whole.get_text_config(decoder=True)
    heads: int = config.num_attention_heads
    # Configs of older checkpoints carry no head_dim.
    head_dim: int | None = config.to_dict().get("head_dim")
    return Backbone(
        # A model made from a config, as in tests, has no name: its type is all there is to say.
        name=str(whole.name_or_path or config.model_type),
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // heads if head_dim is None else head_dim,
        routable_layers=tuple(routable_layers),
    )


def check_backbone(config: FluxConfig, found: Backbone) -> None:
    """Refuse a backbone of another shape than the adapter's; names may differ (a copy, a fine-tune, another precision).

    Raises:
        AdapterError: saying both sides of every field that differs. No error when the config names no backbone.
    """
    wanted = config.backbone
    if wanted is None:
        return
    differences = [
        f"{field.name} {getattr(wanted, field.name)!r} ≠ {getattr(found, field.name)!r}"
        for field in fields(Backbone)
        if field.name != "name" and getattr(wanted, field.name) != getattr(found, field.name)
    ]
    if differences:
        raise AdapterError(
            f"the adapter was trained for {wanted.name!r} and does not fit {found.name!r} "
            f"(adapter ≠ model): {'; '.join(differences)}"
        )


def _check_state(state: Mapping[str, Tensor], where: str) -> None:
    if not state:
        raise AdapterError(f"{where}: the router holds no tensors")
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise AdapterError(f"{where}: tensor {name!r} must be {allowed}, got {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{where}: tensor {name!r} holds NaN or infinite values; the router is unusable")


def _read_delta(folder: Path, named: Any) -> BackboneDelta | None:
    if named is None:
        return None
    config_path = folder / CONFIG_FILE
    file, digest = (named.get(key) for key in ("file", "sha256")) if isinstance(named, dict) else (None, None)
    # A path would reach outside of the adapter's folder.
    if not isinstance(file, str) or not isinstance(digest, str) or Path(file).name != file:
        raise AdapterError(f"{config_path}: {_DELTA} must name a file beside it and its sha256, got {named!r}")
    try:
        return BackboneDelta.read(folder / file, digest)
    except DeltaError as error:
        raise AdapterError(str(error)) from error


def _delta_name(folder: Path) -> str | None:
    """File of the delta that the configuration in `folder` names, if there is one."""
    try:
        return str(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))[_DELTA]["file"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _drop_deltas(folder: Path, keep: str | None) -> None:
    for path in folder.glob(DELTA_PATTERN):
        if path.name != keep:
            path.unlink(missing_ok=True)


def _finish_save(folder: Path) -> None:
    """Move a router home that a killed save left in `.next`, before the next save writes over it."""
    next_router = folder / (ROUTER_FILE + _NEXT)
    if not next_router.is_file():
        return
    try:
        digest = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))[_DIGEST]
    except (OSError, ValueError, KeyError, TypeError):
        return  # no adapter that could be preserved
    if digest == _sha256(next_router.read_bytes()):
        os.replace(next_router, folder / ROUTER_FILE)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        # Without it a power cut may keep the rename and lose the bytes.
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, ROUTER_FILE, DELTA_PATTERN]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        shipped = ", ".join(sorted(shipped_adapters())) or "none"
        raise AdapterError(
            f"no adapter {name!r}: no such folder, not shipped (shipped: {shipped}), and not from the Hub: {error}"
        ) from error
