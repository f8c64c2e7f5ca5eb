"""Figures of the benchmarks, from their results files alone.

    python benchmarks/plots.py [--results benchmarks/results] [--out docs/figures]

Draws what the files hold: prefill and decode speed against length and sparsity with the roofline beside them
(`end_to_end.py --sections sweep`), sparsity by layers against sparsity by heads (`head_level.py`), and the layers that
each task of a board needs (`flux-attn board --record`). The newest file counts for every name.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import ROOT

#: What a decode step of the 8B model moves besides keys: the weights it reads, bytes; and the rates of the rooflines.
WEIGHT_BYTES, BANDWIDTH, FLOPS = 15.1e9, 3.0e12, 700e12
LAYERS, HEADS, KEY_HEADS, DIM, LINEAR_PARAMETERS = 36, 32, 8, 128, 6.95e9
SINK_WINDOW = 128 + 2048 + 128
#: Ways of `head_level.py`.
HEAD_LEVEL = {"layers": "by layers", "heads": "by heads, one launch", "heads_two_launches": "by heads, two launches"}


def newest(folder: Path) -> dict[str, tuple[float, str]]:
    """Value and device of every figure, from the newest file that has it; with what `longest` makes of its details."""
    found: dict[str, tuple[str, float, str]] = {}
    for path in sorted(folder.glob("*.json")):
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values = dict(longest(data.get("details", {})))
        values |= {figure["name"]: figure["value"] for figure in data.get("figures", ())}
        for name, value in values.items():
            known = found.get(name)
            if known is None or data["date"] >= known[0]:
                found[name] = (data["date"], value, data["device"])
    return {name: (value, device) for name, (_, value, device) in found.items()}


def longest(details: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What other sections measured at lengths that a sweep leaves out, dense and three quarters sparse."""
    for key, value in details.items():
        if match := re.fullmatch(r"prefill_(\d+k)_ms", key):
            yield f"sweep_prefill_{match[1]}_q0_ms", value["dense"]
            yield f"sweep_prefill_{match[1]}_q75_ms", value["q75"]
        elif match := re.fullmatch(r"decode_(\d+k)_(dense|q75)_ms", key):
            yield f"sweep_decode_{match[1]}_b1_{match[2].replace('dense', 'q0')}_ms", value["median"]


def roofline_prefill(n: int, sparsity: float) -> float:
    """Least milliseconds of a prefill: its products at the rate of the device's large matrix products."""
    sparse = round(sparsity * LAYERS)
    pairs = (LAYERS - sparse) * n * n / 2 + sparse * n * min(n / 2, SINK_WINDOW)
    return (2 * LINEAR_PARAMETERS * n + 4 * HEADS * DIM * pairs) / FLOPS * 1e3


def roofline_decode(n: int, sparsity: float) -> float:
    """Least milliseconds of a decode step of one row: weights and kept keys at the device's copy bandwidth."""
    sparse = round(sparsity * LAYERS)
    tokens = (LAYERS - sparse) * n + sparse * min(n, SINK_WINDOW)
    return (WEIGHT_BYTES + tokens * KEY_HEADS * DIM * 2 * 2) / BANDWIDTH * 1e3


def sweep(figures: dict[str, tuple[float, str]], out: Path) -> list[Path]:
    """Measured points and their roofline, one line for each sparsity."""
    import matplotlib.pyplot as plt

    made = []
    for phase, pattern, roofline in (
        ("prefill", r"sweep_prefill_(\d+)k_q(\d+)_ms", roofline_prefill),
        ("decode", r"sweep_decode_(\d+)k_b1_q(\d+)_ms", roofline_decode),
    ):
        points: dict[float, list[tuple[int, float]]] = defaultdict(list)
        device = ""
        for name, (value, where) in figures.items():
            if match := re.fullmatch(pattern, name):
                points[int(match[2]) / 100].append((int(match[1]) * 1024, value))
                device = where
        if not points:
            continue
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for sparsity, seen in sorted(points.items()):
            lengths, values = zip(*sorted(seen), strict=True)
            (line,) = axes.plot(lengths, values, "o-", label=f"Ω = {sparsity:g}")
            axes.plot(lengths, [roofline(n, sparsity) for n in lengths], ":", color=line.get_color())
        axes.plot([], [], "k:", label="roofline")
        token_axis(axes, sorted({n for seen in points.values() for n, _ in seen}))
        axes.set_xlabel("tokens")
        if phase == "prefill":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda ms, _: f"{ms / 1e3:g}")
            axes.set_ylabel("prefill, s")
        else:
            axes.set_ylim(bottom=0)
            axes.set_ylabel("a decode step, batch 1, ms")
        axes.set_title(f"8B shapes, {device}", fontsize=10)
        axes.legend(fontsize=8)
        made.append(save(figure, out / f"{phase}.svg"))
    return made


def head_level(figures: dict[str, tuple[float, str]], out: Path) -> list[Path]:
    """Decode attention by layers and by heads against the context."""
    import matplotlib.pyplot as plt

    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    device = ""
    for name, (value, where) in figures.items():
        if match := re.fullmatch(r"decode_attention_(layers|heads|heads_two_launches)_(\d+)k_ms", name):
            points[match[1]].append((int(match[2]) * 1024, value))
            device = where
    if not points:
        return []
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, seen in points.items():
        lengths, values = zip(*sorted(seen), strict=True)
        axes.plot(lengths, values, "o-", label=HEAD_LEVEL[name])
    lengths = sorted(n for n, _ in points["layers"])
    axes.plot(
        lengths, [roofline_decode(n, 0.75) - WEIGHT_BYTES / BANDWIDTH * 1e3 for n in lengths], "k:", label="roofline"
    )
    token_axis(axes, lengths)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of the context")
    axes.set_ylabel("attention of a decode step, ms")
    axes.set_title(f"three quarters sparse, {device}", fontsize=10)
    axes.legend(fontsize=8)
    return [save(figure, out / "head_level.svg")]


def routes(results: Path, out: Path) -> list[Path]:
    """Layers that run full, by task, of the newest board."""
    from flux_attention.report import route_heat_map, save_image, task_routes

    boards = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("board-*.json"))]
    boards = [board for board in boards if board["program"] == "board"]
    if not boards:
        return []
    newest = max(boards, key=lambda board: board["date"])
    path = out / "routes.svg"
    save_image(route_heat_map(task_routes(newest["details"]["routes"]), "share of prompts full"), path)
    return [path]


def token_axis(axes: Any, lengths: list[int]) -> None:
    """Lengths on a logarithmic axis, named as people do."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])


def save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    from flux_attention.report import save_image

    save_image(figure, path)
    plt.close(figure)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    options = parser.parse_args(arguments)
    figures = newest(options.results)
    made = sweep(figures, options.out) + head_level(figures, options.out) + routes(options.results, options.out)
    for path in made:
        print(path)
    if not made:
        sys.exit(f"no results of a sweep, of head_level.py or of a board in {options.results}")
    return 0


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("svg")
    sys.exit(main())
