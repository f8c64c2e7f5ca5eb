"""The same share of sparsity by layers and by heads: what a decode step's attention costs as the context grows.

    python benchmarks/head_level.py [--lengths 8192,…,262144] [--out DIR]

A quarter of an 8B model's attention keeps its whole cache, the rest sinks and window: both sides read the same bytes.

* by layers: 9 of 36 layers are full, 27 sparse, each one launch of the routed kernel;
* by heads, one launch: every layer has 2 of 8 key heads full, each head with a page table of its own, so that the
  kernel sees rows of both lengths;
* by heads, two launches: the full heads and then the sparse ones, as kernels with one length a row do it.

Each is captured as a CUDA graph over all layers. The outputs are compared with float64 in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Recorder, add_run_options, graphed, label, once_ms, run_sections, sync
from tests.kernels import fuzz
from torch import Tensor

from flux_attention.kernels import api, paged_decode, reference


@dataclass(frozen=True)
class Setup:
    device: torch.device
    lengths: tuple[int, ...]
    layers: int
    heads: tuple[int, int, int]
    page: int
    kept: int
    """Tokens that a sparse row holds: sinks, window, its own page."""
    repetitions: int


@dataclass
class Launch:
    """One call of the decode kernel: rows of one token, pages of `Hk` heads."""

    q: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor
    out: Tensor

    @classmethod
    def make(cls, setup: Setup, lens: Sequence[int], hq: int, hk: int) -> Launch:
        """Rows of `lens` tokens with random keys, their pages side by side."""
        page, dim = setup.page, setup.heads[2]
        used = [-(-n // page) for n in lens]
        # 16 bits on a CPU too: its kernel keeps float32 inside, so its error is well below the eager oracle's, where in
        # float32 both are luck of rounding.
        made = {"device": setup.device, "dtype": torch.bfloat16}
        keys, values = (torch.randn(sum(used), page, hk, dim, **made) for _ in "kv")
        table = torch.zeros(len(lens), max(used), dtype=torch.int32, device=setup.device)
        start = 0
        for row, pages in enumerate(used):
            table[row, :pages] = torch.arange(start, start + pages, dtype=torch.int32)
            start += pages
        q = torch.randn(len(lens), hq, dim, **made)
        lengths = torch.tensor(lens, dtype=torch.int32, device=setup.device)
        return cls(q, keys, values, table, lengths, torch.full_like(q, float("nan")))

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1]) ** -0.5

    def run(self) -> None:
        api.paged_decode(self.q, self.keys, self.values, self.table, self.lengths, scale=self.scale, out=self.out)

    def tune(self) -> None:
        if self.q.is_cuda:
            paged_decode.tune(self.q, self.keys, self.values, self.table, self.lengths, scale=self.scale)

    def error(self) -> float:
        """Error over its limit, as in the fuzz."""
        tensors = (self.q, self.keys, self.values)
        rest = {"page_table": self.table, "lengths": self.lengths, "scale": self.scale}
        exact = reference.paged_decode(*(t.double() for t in tensors), **rest)
        eager = fuzz.relative(reference.paged_decode(*tensors, **rest), exact)
        return fuzz.relative(self.out, exact) / fuzz.error_limit(eager, self.q.dtype)

    @property
    def bytes(self) -> int:
        return 2 * int(self.lengths.sum()) * self.keys.shape[2] * self.keys.shape[3] * self.keys.element_size()


def by_layers(setup: Setup, n: int) -> list[Launch]:
    hq, hk, _ = setup.heads
    full = setup.layers // 4
    return [Launch.make(setup, [n if i < full else min(n, setup.kept)], hq, hk) for i in range(setup.layers)]


def by_heads(setup: Setup, n: int) -> list[Launch]:
    """A key head is a row: its queries are the row's, and its pages hold this head alone."""
    hq, hk, _ = setup.heads
    lens = [n] * (hk // 4) + [min(n, setup.kept)] * (hk - hk // 4)
    return [Launch.make(setup, lens, hq // hk, 1) for _ in range(setup.layers)]


def by_heads_twice(setup: Setup, n: int) -> list[Launch]:
    hq, hk, _ = setup.heads
    full, group = hk // 4, hq // hk
    short = min(n, setup.kept)
    return [
        Launch.make(setup, [length], heads * group, heads)
        for _ in range(setup.layers)
        for length, heads in ((n, full), (short, hk - full))
    ]


WAYS: dict[str, Callable[[Setup, int], list[Launch]]] = {
    "layers": by_layers,
    "heads": by_heads,
    "heads_two_launches": by_heads_twice,
}


def measure(setup: Setup, record: Recorder) -> None:
    torch.manual_seed(0)
    for n in setup.lengths:
        medians = {}
        for name, make in WAYS.items():
            launches = make(setup, n)
            for launch in {(x.table.shape, x.keys.shape): x for x in launches}.values():
                launch.tune()

            def step(launches: list[Launch] = launches) -> None:
                for launch in launches:
                    launch.run()

            replay = graphed(step) if setup.device.type == "cuda" else step
            replay()
            sync(setup.device)
            worst = max(x.error() for x in (launches[0], launches[-1]))
            assert worst <= 1, f"{name} at {n} tokens: error is {worst:.2f} times its limit"
            times = [once_ms(replay, setup.device) for _ in range(setup.repetitions)]
            medians[name] = statistics.median(times)
            moved = sum(x.bytes for x in launches)
            record.note(
                f"{name}_{label(n)}",
                {"ms": medians[name], "tbps": moved / medians[name] / 1e9, "error_over_limit": round(worst, 3)},
            )
            record.add(f"decode_attention_{name}_{label(n)}_ms", medians[name], "ms", times)
            del launches, launch, replay, step
            if setup.device.type == "cuda":
                torch.cuda.empty_cache()
        for name in ("heads", "heads_two_launches"):
            record.add(f"decode_attention_{name}_{label(n)}_vs_layers", medians[name] / medians["layers"], "ratio")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="8192,16384,32768,65536,131072,262144", help="tokens of the context")
    add_run_options(parser)
    options = parser.parse_args(arguments)
    device, tiny = torch.device(options.device), options.tiny
    if device.type != "cuda" and not tiny:
        sys.exit("these shapes need a CUDA device; --tiny runs toy sizes anywhere")
    setup = Setup(
        device=device,
        lengths=(1024, 2048) if tiny else tuple(int(n) for n in options.lengths.split(",")),
        layers=4 if tiny else 36,
        heads=(8, 4, 64) if tiny else (32, 8, 128),
        page=128,
        kept=128 + (256 if tiny else 2048) + 100,
        repetitions=3 if tiny else 15,
    )
    folder = options.out or (None if tiny else Path("benchmarks/results"))
    settings = {"layers": setup.layers, "heads": list(setup.heads), "kept_tokens": setup.kept, "full_share": 0.25}
    record = Recorder("head-level", device, settings, folder, options.commit)
    return run_sections([("head_level", lambda record: measure(setup, record))], record)


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(1 if main() else 0)
