"""A transformers checkpoint on the disk, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class ShardedCheckpoint:
    """The tensors of a folder with `config.json` and one or several `.safetensors` files, read when asked for.

    A context manager: the files stay open (and mapped, not loaded) inside of it.

    Args:
        source: a folder, or the id of a model on the Hub (downloaded; only its JSON and safetensors files).

    Attributes:
        folder: where the files are.
        config: `config.json` as it is.
        names: all tensors, sorted.

    Raises:
        FileNotFoundError: no such folder, no `config.json`, no safetensors files, or a shard the index names is gone.
        ValueError: a file that cannot be read, or a tensor that the index places in a shard without it.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = _folder_of(source)
        config_path = self.folder / CONFIG_FILE
        if not config_path.is_file():
            raise FileNotFoundError(f"{self.folder} is no checkpoint: {CONFIG_FILE} is missing")
        self.config: dict[str, Any] = _read_json(config_path)
        self._place = self._places()
        self.names: tuple[str, ...] = tuple(sorted(self._place))
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> ShardedCheckpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def by_shard(self, names: Iterable[str]) -> Iterator[str]:
        """`names` in the order of the files that hold them, so that each file is read once from its beginning."""
        return iter(sorted(names, key=lambda name: (self._place[name], name)))

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU. Raises KeyError for a name that is not in `names`."""
        file = self._place[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(_opened(self.folder / file))
        try:
            found: Tensor = self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.folder / file}: tensor {name!r} cannot be read: {error}") from error
        return found

    def _places(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            placed = _read_json(index).get("weight_map")
            if not isinstance(placed, dict) or not placed:
                raise ValueError(f"{index}: weight_map must name each tensor's file, got {placed!r:.80}")
            for file in sorted(set(placed.values())):
                if not (self.folder / file).is_file():
                    raise FileNotFoundError(f"{self.folder / file} is missing, but {INDEX_FILE} names it")
            return dict(placed)
        single = self.folder / SINGLE_FILE
        if not single.is_file():
            other = sorted(path.name for path in self.folder.glob("*.bin"))
            hint = f"; it holds {', '.join(other[:3])}: save it with safe_serialization=True" if other else ""
            raise FileNotFoundError(f"{self.folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)


def _folder_of(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    owner, _, rest = str(source).partition("/")
    if isinstance(source, Path) or not rest or "/" in rest or owner in ("", ".", "..", "~"):
        raise FileNotFoundError(f"no checkpoint {str(source)!r}: no such folder (a model on the Hub is owner/name)")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data
