"""Results files: figures with what one needs to judge and repeat them. One writer for every program that measures.

A file is JSON with `device`, `torch`, `transformers`, `python`, `commit`, `date` (ISO 8601, UTC), the settings of the
run and `figures`: `{"name", "value", "unit", "n"?, "low"?, "high"?, "repetitions"?}`, where low and high bound the
95 % interval. For a name that several files hold, the newest file counts.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from flux_attention.evaluation.metrics import Estimate

RESULTS = Path("benchmarks/results")
UNKNOWN_COMMIT = "unknown"


@dataclass(frozen=True)
class Figure:
    """One measured number. `low` and `high` bound its 95 % interval, `n` counts the samples it rests on."""

    name: str
    value: float
    unit: str
    n: int | None = None
    low: float | None = None
    high: float | None = None
    repetitions: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_]+", self.name):
            raise ValueError(f"a figure's name has lower case letters, digits and _ only, got {self.name!r}")
        if not math.isfinite(self.value):
            raise ValueError(f"figure {self.name!r} must be finite, got {self.value}")

    @classmethod
    def of(cls, name: str, estimate: Estimate, unit: str) -> Figure:
        return cls(name, estimate.value, unit, estimate.n, estimate.low, estimate.high)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without what is not known."""
        found: dict[str, Any] = {"name": self.name, "value": self.value, "unit": self.unit}
        for field in ("n", "low", "high"):
            if getattr(self, field) is not None:
                found[field] = getattr(self, field)
        if self.repetitions:
            found["repetitions"] = list(self.repetitions)
        return found

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.name} = {self.value:.4g}{interval} {self.unit}" + ("" if self.n is None else f" (n = {self.n})")


def device_name(device: torch.device | str) -> str:
    """What the run was on: the GPU's name, or the processor's with the number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1] if found else name
    except OSError:
        pass  # not Linux: the machine's type is what there is
    return f"{' '.join(name.split())}, {torch.get_num_threads()} threads"


def commit_id(folder: Path | None = None) -> str:
    """Commit of the checkout that this package lies in, "-dirty" with uncommitted changes; "unknown" without one."""
    folder = folder or Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        # Results of earlier runs lie in the checkout and do not change what is measured; neither do stray files.
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN_COMMIT
    return head + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.strip()


def environment(device: torch.device | str) -> dict[str, Any]:
    """Device, versions, commit and date of a run."""
    import transformers

    import flux_attention

    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "flux_attention": flux_attention.__version__,
        "commit": commit_id(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_results(
    name: str,
    figures: Sequence[Figure],
    *,
    device: torch.device | str,
    settings: Mapping[str, Any],
    folder: Path = RESULTS,
    details: Mapping[str, Any] | None = None,
    commit: str | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder/name-DEVICE.json`, in the place of an earlier one of the same name and device.

    Args:
        name: of the program or suite.
        settings: what the run was asked to do: backbone, adapter, seed, n, lengths, dtype, …
        details: every repetition or sample, for whoever wants to look closer.
        commit: of the code, where it cannot be read from the checkout.
        measured: `environment` of the run, where that was another process than this one.

    Raises:
        ValueError: no figures, or two of the same name.
    """
    names = [figure.name for figure in figures]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"a results file needs figures, each name once, got {', '.join(names) or 'none'}")
    if any(not math.isfinite(figure.value) for figure in figures):
        raise ValueError("figures must be finite")
    data = {**(measured or environment(device)), "program": name, "settings": dict(settings)}
    if commit is not None:
        data["commit"] = commit
    data["figures"] = [figure.to_dict() for figure in figures]
    if details:
        data["details"] = dict(details)
    path = results_path(name, str(data["device"]), folder)
    write_json(path, data)
    return path


def results_path(name: str, device: str, folder: Path = RESULTS) -> Path:
    """File of program or suite `name` on the device with `device_name` `device`."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.split(",")[0].lower()).strip("-")
    return Path(folder) / f"{name}-{slug}.json"


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all. Lists of plain values stay on one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".next")
    temporary.write_text(_dump(data) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _dump(data: Any, indent: str = "") -> str:
    """JSON that diffs well: one line per figure or sample, not one per number."""
    flat = json.dumps(data, ensure_ascii=False, allow_nan=False)
    if len(flat) + len(indent) <= 160 or not isinstance(data, dict | list) or _is_flat(data):
        return flat
    deeper = indent + "  "
    if isinstance(data, dict):
        parts = [f"{deeper}{json.dumps(str(key))}: {_dump(value, deeper)}" for key, value in data.items()]
    else:
        parts = [deeper + _dump(value, deeper) for value in data]
    first, last = "{}" if isinstance(data, dict) else "[]"
    return f"{first}\n" + ",\n".join(parts) + f"\n{indent}{last}"


def _is_flat(data: dict[str, Any] | list[Any]) -> bool:
    values = data.values() if isinstance(data, dict) else data
    plain = str | int | float | bool | None
    return all(isinstance(v, plain) or (isinstance(v, list) and all(isinstance(x, plain) for x in v)) for v in values)


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The newest figure of every name: its entry plus `device`, `date`, `commit` and `source` (the file's name).

    Raises ValueError for a file that is no results file, naming it.
    """
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            for figure in data["figures"]:
                entry = {**figure, "source": path.name, **{key: data[key] for key in ("device", "date", "commit")}}
                if figure["name"] not in newest or data["date"] >= newest[figure["name"]]["date"]:
                    newest[figure["name"]] = entry
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no results file: {error!r}") from error
    return newest
