"""Figures and the HTML report, one self-contained file that opens offline; and the tables of the README.

`python -m flux_attention.report readme` writes the tables between the markers of README.md anew from the results
files, so that no number there is typed by hand.
"""

from __future__ import annotations

import html
import io
import itertools
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_attention.evaluation.results import RESULTS, read_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

# One ramp for p_full everywhere, terminal included: sparse is cool and dark, full is warm and light.
RAMP = ((38, 70, 131), (66, 132, 168), (138, 178, 160), (226, 190, 110), (224, 122, 62))
# Stands for "the colour of the surrounding text" until the SVG is put into the page.
_INK = "#010203"


def ramp(p: float) -> tuple[int, int, int]:
    """Colour of a probability of full attention, 0 … 1, as RGB."""
    at = min(max(p, 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(at), len(RAMP) - 2)
    (r0, g0, b0), (r1, g1, b1), t = RAMP[i], RAMP[i + 1], at - i
    return round(r0 + t * (r1 - r0)), round(g0 + t * (g1 - g0)), round(b0 + t * (b1 - b0))


@dataclass(frozen=True)
class RouteRow:
    """One prompt's route for a heat map: `use_full` and `p_full` per routable layer.

    `omega` is given where the row stands for many prompts: then `p_full` is the share of them that run full.
    """

    label: str
    use_full: Sequence[bool]
    p_full: Sequence[float] | None = None
    omega: float | None = None

    @property
    def shades(self) -> list[float]:
        return [float(x) for x in (self.use_full if self.p_full is None else self.p_full)]

    @property
    def sparsity(self) -> float:
        return 1 - sum(map(bool, self.use_full)) / len(self.use_full) if self.omega is None else self.omega


# ---------------------------------------------------------------------------------------------------- figures


def _axes(width: float, height: float) -> tuple[Plot, Any]:
    # The object interface leaves pyplot, and whatever back end a notebook runs, alone.
    from matplotlib.figure import Figure

    plot = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = plot.subplots()
    axes.set_facecolor("none")
    axes.tick_params(colors=_INK, labelsize=8, length=3, width=0.6)
    for spine in axes.spines.values():
        spine.set_edgecolor(_INK)
        spine.set_linewidth(0.6)
        spine.set_alpha(0.5)
    return plot, axes


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, color=_INK, fontsize=8)
    axes.set_ylabel(y, color=_INK, fontsize=8)


def _color_map() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("flux", [tuple(c / 255 for c in color) for color in RAMP])


def _color_bar(plot: Plot, axes: Any, image: Any, label: str) -> None:
    bar = plot.colorbar(image, ax=axes, fraction=0.025, pad=0.015)
    bar.set_label(label, color=_INK, fontsize=8)
    bar.ax.tick_params(colors=_INK, labelsize=7, length=2)
    bar.outline.set_visible(False)


def route_heat_map(rows: Sequence[RouteRow], label: str = "p(full)") -> Plot:
    """Layers across, prompts down, coloured by p_full; a dot marks a layer that runs full attention."""
    if not rows:
        raise ValueError("a route heat map needs at least one prompt")
    layers = len(rows[0].use_full)
    plot, axes = _axes(max(5.0, 0.24 * layers + 2.2), 0.9 + 0.26 * len(rows))
    image = axes.imshow([row.shades for row in rows], aspect="auto", vmin=0, vmax=1, cmap=_color_map())
    full = [(x, y) for y, row in enumerate(rows) for x, on in enumerate(row.use_full) if on]
    if full:
        axes.scatter(*zip(*full, strict=True), s=7, color="white", linewidths=0)
    axes.set_xticks(range(0, layers, 5 if layers > 16 else 1))
    axes.set_yticks(range(len(rows)), [f"{row.label}  Ω {row.sparsity:.2f}" for row in rows])
    _label(axes, "routable layer", "")
    _color_bar(plot, axes, image, label)
    return plot


def task_routes(shares: Mapping[str, Sequence[float]]) -> list[RouteRow]:
    """Rows of a heat map: of each task, the share of its prompts in which a layer runs full."""
    return [
        RouteRow(task, [share > 0.5 for share in some], some, omega=1 - sum(some) / len(some))
        for task, some in shares.items()
    ]


def needle_map(cells: Mapping[tuple[int, float], Sequence[float]]) -> Plot:
    """Needle depth × context length, coloured by accuracy. `cells` maps (length, depth) to the scores found there."""
    if not cells:
        raise ValueError("a needle map needs at least one sample")
    bins = 10
    lengths = sorted({length for length, _ in cells})
    sums = [[[0.0, 0] for _ in lengths] for _ in range(bins)]
    for (length, depth), scores in cells.items():
        cell = sums[min(int(depth * bins), bins - 1)][lengths.index(length)]
        cell[0] += sum(scores)
        cell[1] += len(scores)
    grid = [[total / count if count else float("nan") for total, count in row] for row in sums]
    plot, axes = _axes(max(3.2, 0.9 * len(lengths) + 2.0), 3.2)
    image = axes.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap=_color_map())
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(bins), [f"{10 * i}–{10 * (i + 1)} %" for i in range(bins)])
    _label(axes, "prompt length (tokens)", "depth of the needle")
    _color_bar(plot, axes, image, "accuracy")
    return plot


@dataclass(frozen=True)
class Point:
    """A policy's place in a Pareto figure; `family` joins the points of one policy at several sparsities."""

    family: str
    sparsity: float
    value: float
    low: float | None = None
    high: float | None = None
    highlight: bool = False


def pareto(points: Sequence[Point], value: str) -> Plot:
    """Quality against sparsity, one line per family, with 95 % intervals."""
    if not points:
        raise ValueError("a Pareto figure needs at least one point")
    plot, axes = _axes(6.4, 3.8)
    palette = ("#4284a8", "#8a6fb0", "#6b9a4b", "#b8860b", "#888888", "#b05070", "#3a9d8f", "#7a6a55", "#5566cc")
    families = list(dict.fromkeys(point.family for point in points))
    # Beyond the colours there are markers: no two families look alike.
    muted = itertools.cycle((color, marker) for marker in "os^D" for color in palette)
    for family in families:
        found = sorted((p for p in points if p.family == family), key=lambda p: p.sparsity)
        best = any(p.highlight for p in found)
        color, marker = ("#e07a3e", "o") if best else next(muted)
        bars = None
        if all(p.low is not None and p.high is not None for p in found):
            bars = [[p.value - (p.low or 0) for p in found], [(p.high or 0) - p.value for p in found]]
        axes.errorbar(
            [p.sparsity for p in found],
            [p.value for p in found],
            yerr=bars,
            label=family,
            color=color,
            marker=marker,
            markersize=6 if best else 4,
            linewidth=2.2 if best else 1.1,
            elinewidth=0.7,
            capsize=2,
            zorder=3 if best else 2,
        )
    axes.grid(alpha=0.2, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, "mean sparsity Ω", value)
    legend = axes.legend(fontsize=7, frameon=False, labelcolor=_INK)
    legend.set_zorder(1)
    return plot


def svg(plot: Plot, description: str) -> str:
    """A figure as inline SVG whose text takes the page's colour; `description` is read to those who cannot see it."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text, and the same figure gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flux"}):
        plot.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Matplotlib names parts of the drawing; two figures in one page must not share names.
    prefix = f"f{zlib.crc32(text.encode()):08x}-"
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description, quote=True)}"', 1)


def save_image(plot: Plot, path: Path) -> None:
    """The figure on white, as SVG, PNG or whatever the file's name ends in; the same figure gives the same file."""
    import matplotlib
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    for kind in (Text, Line2D):
        artists: list[Any] = plot.findobj(kind)
        for artist in artists:
            # Colours may be arrays, which do not compare to one truth value.
            if isinstance(artist.get_color(), str) and artist.get_color() == _INK:
                artist.set_color("#222222")
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        plot.savefig(path, dpi=160, facecolor="white", metadata=undated)


# ---------------------------------------------------------------------------------------------------- page


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column is a heading. `strong` names the row to set off."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int | None = None

    def markdown(self) -> str:
        """The table in Markdown, numbers to the right."""
        lines = ["| " + " | ".join(self.head) + " |", "|---" + "|---:" * (len(self.head) - 1) + "|"]
        for i, row in enumerate(self.rows):
            cells = [f"**{cell}**" if cell else "" for cell in row] if i == self.strong else row
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


@dataclass(frozen=True)
class Section:
    """A part of the report, in this order: heading, text, routes, quotes, table, figures."""

    heading: str
    text: str = ""
    routes: Sequence[RouteRow] = ()
    quotes: Sequence[tuple[str, str]] = ()
    table: Table | None = None
    figures: Sequence[tuple[str, str]] = field(default=())
    """Inline SVG and caption."""
    note: str = ""


def render(title: str, lead: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], foot: str) -> str:
    """The HTML page. `facts` are the few numbers at the top."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flux_attention"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["shade"] = lambda p: "rgb({}, {}, {})".format(*ramp(p))
    page: str = environment.get_template("report.html.j2").render(
        title=title, lead=lead, facts=facts, sections=sections, foot=foot, ramp=RAMP
    )
    return page


# ---------------------------------------------------------------------------------------------------- README

_MARKER = re.compile(r"(<!-- figures:(?P<name>[a-z0-9_-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Rows of the README's tables: what a reader is told, and the figure it is.
README_TABLES: dict[str, tuple[tuple[str, str], ...]] = {
    "method": (
        ("one needle in 4,096 tokens, accuracy vs dense", "needle1_4k_vs_dense"),
        ("one of four needles in 4,096 tokens, accuracy vs dense", "needle4_4k_vs_dense"),
        ("… share of layers running sparse (Ω)", "needle_4k_sparsity"),
        ("prose and code continuation at 4,096 tokens, NLL vs dense", "continuation_4k_nll_vs_dense"),
        ("… share of layers running sparse (Ω)", "continuation_4k_sparsity"),
        ("KV cache after a 6,000-token needle prompt, bytes vs dense", "kv_bytes_needle_6k_vs_dense"),
        ("KV cache after a 6,000-token holistic prompt, bytes vs dense", "kv_bytes_holistic_6k_vs_dense"),
    ),
    "free": (
        ("questions about one sentence: share of layers running sparse (Ω)", "free_question_4k_sparsity"),
        ("… NLL of that sentence vs dense", "free_question_4k_nll_vs_dense"),
        ("requests about the whole: share of layers running sparse (Ω)", "free_request_4k_sparsity"),
        ("… NLL of the document's first paragraph vs dense", "free_request_4k_nll_vs_dense"),
    ),
    "demo": (
        ("`flux-attn demo`, whole", "demo_seconds_installed"),
        ("… peak resident memory", "demo_peak_gb"),
        ("prefill of a 6,000-token needle prompt, speedup over plain transformers", "demo_retrieval_prefill_speedup"),
        ("prefill of a 6,000-token holistic prompt, speedup", "demo_holistic_prefill_speedup"),
        ("decode after the needle prompt, speedup", "demo_retrieval_decode_speedup"),
        ("decode after the holistic prompt, speedup", "demo_holistic_decode_speedup"),
    ),
    "evidence": (
        ("retrieval tasks, macro accuracy vs dense", "board_retrieval_vs_dense"),
        ("holistic tasks, macro score vs dense", "board_holistic_vs_dense"),
        ("continuation, NLL vs dense", "board_nll_vs_dense"),
        ("tasks kept out of training, macro vs dense", "board_unseen_tasks_vs_dense"),
        ("mean sparsity Ω over the suite", "board_mean_sparsity"),
        ("mean Ω of holistic tasks less that of retrieval tasks", "board_class_sparsity_gap"),
        (
            "macro points over the best static choice (layers, KV heads) at equal Ω",
            "board_margin_over_best_static",
        ),
    ),
    "speed": (
        ("prefill of 131,072 tokens, ¾ of the layers sparse", "prefill_speedup_128k_q75"),
        ("prefill of 262,144 tokens, ¾ of the layers sparse", "prefill_speedup_256k_q75"),
        ("decode after 131,072 tokens", "decode_speedup_128k_q75"),
        ("decode after 262,144 tokens", "decode_speedup_256k_q75"),
        ("KV cache of 131,072 tokens, bytes vs dense", "kv_bytes_128k_q75_vs_dense"),
        ("throughput at 131,072 tokens in 80 GB", "throughput_128k_q75_vs_dense"),
    ),
    "serving": (
        ("time to first token, 131,072 tokens, ¾ of the layers sparse", "vllm_ttft_128k_q75"),
        ("time per token after it", "vllm_tpot_128k_q75"),
        ("throughput at equal memory, 131,072 tokens, four at once", "vllm_throughput_128k_c4"),
        ("… sixteen at once", "vllm_throughput_128k_c16"),
        ("time to first token, 32,768 tokens", "vllm_ttft_32k_q75"),
        ("throughput at equal memory, 32,768 tokens, four at once", "vllm_throughput_32k_c4"),
        ("… sixteen at once", "vllm_throughput_32k_c16"),
        ("2,048 tokens, which gain nothing: routed time over dense", "vllm_overhead_2k"),
        ("what a probe adds to the time to first token", "vllm_probe_ms"),
    ),
    "serving-two-gpus": (
        ("time to first token, 131,072 tokens, ¾ of the layers sparse", "vllm_ttft_128k_q75_tp2"),
        ("time per token after it", "vllm_tpot_128k_q75_tp2"),
        ("throughput at equal memory, 131,072 tokens, four at once", "vllm_throughput_128k_c4_tp2"),
        ("time to first token, 32,768 tokens", "vllm_ttft_32k_q75_tp2"),
        ("throughput at equal memory, 32,768 tokens, sixteen at once", "vllm_throughput_32k_c16_tp2"),
        ("2,048 tokens, which gain nothing: routed time over dense", "vllm_overhead_2k_tp2"),
        ("what a probe adds to the time to first token", "vllm_probe_ms_tp2"),
    ),
    "training": (
        *(
            (f"{label}, packs of {tokens:,} tokens", f"train_8b_{tokens // 1024}k_{figure}")
            for tokens in (8192, 16384, 32768, 65536, 131072)
            for label, figure in (
                ("`lm`", "lm_tokens_per_s"),
                ("`distill`", "distill_tokens_per_s"),
                ("… peak device memory", "peak_gb"),
            )
        ),
        ("`lm`, one document of 131,072 tokens, inputs of layers on the host", "train_8b_128k_1gpu_tokens_per_s"),
        ("… peak device memory", "train_8b_128k_1gpu_peak_gb"),
    ),
    "two-gpus": (
        ("training, packs of 65,536 tokens, one GPU", "train_8b_64k_1gpu_tokens_per_s"),
        ("… data parallel (DDP)", "train_8b_64k_ddp2_tokens_per_s"),
        ("… over one GPU", "train_8b_64k_ddp2_speedup"),
        ("… sharded (FSDP2), over one GPU", "train_8b_64k_fsdp2_speedup"),
        ("… a document of 131,072 tokens shared (Ulysses), over one GPU", "train_8b_128k_sequence2_speedup"),
        ("`generate`, heads split (`tp_plan`): decisions that differ between the ranks", "generate_tp2_ranks_differ"),
        ("… decisions as on one GPU", "generate_tp2_routes_equal"),
        ("… tokens as on one GPU, where its two best logits are no tie", "generate_tp2_tokens_equal_but_ties"),
        ("… prefill of 32,768 tokens, 8 layers, over one GPU", "generate_tp2_prefill_32k_speedup"),
        ("`generate`, layers split (device map): decisions as on one GPU", "generate_map2_routes_equal"),
        ("… tokens as on one GPU, where its two best logits are no tie", "generate_map2_tokens_equal_but_ties"),
        ("… prefill of 32,768 tokens, 8 layers, over one GPU", "generate_map2_prefill_32k_speedup"),
    ),
}


def figure_table(name: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """One of `README_TABLES` as Markdown, with what the figures were measured on."""
    if name not in README_TABLES:
        raise ValueError(f"unknown table {name!r} in a figures marker; known: {', '.join(README_TABLES)}")
    rows, sources = [], []
    for label, figure in README_TABLES[name]:
        if figure not in results:
            continue
        entry = results[figure]
        interval = f"{entry['low']:.3f} – {entry['high']:.3f}" if "low" in entry else ""
        rows.append((label, _number(entry["value"], entry["unit"]), interval, str(entry.get("n", ""))))
        sources.append(f"{entry['device']}, commit {entry['commit'][:12]}, {entry['date'][:10]}")
    if not rows:
        return "*Not measured yet.*"
    table = Table(("", "figure", "95 % interval", "n"), rows).markdown()
    return f"{table}\n\nMeasured on {'; '.join(dict.fromkeys(sources))}."


def _number(value: float, unit: str) -> str:
    if unit == "×":
        return f"{value:.2f}×"
    if unit in ("ratio", "points", "") or unit.startswith("share"):
        return f"{value:.3f}"
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def fill_readme(text: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """`text` with every table between `<!-- figures:NAME -->` and `<!-- end -->` made anew."""
    return _MARKER.sub(lambda found: f"{found[1]}{figure_table(found['name'], results)}\n{found[3]}", text)


def main(arguments: Sequence[str]) -> int:
    if list(arguments[:1]) != ["readme"] or len(arguments) > 2:
        print("usage: python -m flux_attention.report readme [README.md]", file=sys.stderr)
        return 2
    path = Path(arguments[1] if len(arguments) > 1 else "README.md")
    # A page of docs/ lies deeper in the checkout than the README.
    above = (folder / RESULTS for folder in path.resolve().parents)
    results = next((folder for folder in above if folder.is_dir()), None)
    if not path.is_file() or results is None:
        print(f"{path}: " + (f"no {RESULTS} above it" if path.is_file() else "no such file"), file=sys.stderr)
        return 2
    before = path.read_text(encoding="utf-8")
    after = fill_readme(before, read_results(results))
    if after != before:
        path.write_text(after, encoding="utf-8")
    print(f"{path}: {'written anew' if after != before else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
