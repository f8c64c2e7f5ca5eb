"""Evaluation suites: which samples, and the figures that come out of routed against dense on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flux_attention.cache import cache_argument
from flux_attention.data import Sample
from flux_attention.data.progress import Progress
from flux_attention.data.sample_set import SampleSet, make_sample_set, prepared_samples
from flux_attention.evaluation.metrics import (
    Estimate,
    bootstrap_mean,
    clustered_mean,
    clustered_ratio,
    paired_ratio,
    wilson,
)
from flux_attention.evaluation.results import Figure
from flux_attention.evaluation.runner import Record, RunOptions, check_samples, run_samples
from flux_attention.models.controller import FluxAttention
from flux_attention.route import Dense, Dial, Policy

KV_LENGTH = 6000
KV_PROMPTS = 10


@dataclass(frozen=True)
class Suite:
    """Tasks at lengths, run routed and dense.

    Attributes:
        kv_tasks: tasks whose KV memory is measured by a real prefill of 6,000-token prompts.
        kv_figure: name of that figure.
    """

    name: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    n: int
    kv_tasks: tuple[str, ...] = ()
    kv_figure: str = ""


SUITES = {
    suite.name: suite
    for suite in (
        # Enough for a ratio to dense with a standard error of two hundredths.
        Suite("needle", ("needle1", "needle4"), (4096,), 400, ("needle1", "needle4"), "kv_bytes_needle_6k_vs_dense"),
        Suite(
            "continuation",
            ("prose_continuation", "docstring_continuation", "code_completion"),
            (4096,),
            100,
            ("docstring_continuation", "code_completion"),
            "kv_bytes_holistic_6k_vs_dense",
        ),
        Suite("free", ("free_question", "free_request"), (4096,), 200),
        Suite("quick", ("needle1", "needle4", "docstring_continuation", "fewshot_topic"), (1536,), 4),
    )
}


def get_suite(name: str) -> Suite:
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; known: {', '.join(SUITES)}")
    return SUITES[name]


@dataclass(frozen=True)
class SuiteRun:
    """What a suite found: paired records and the figures made of them.

    Attributes:
        kv_shares: bytes held over dense of the prompts whose KV memory was measured.
        texts: fingerprint of the text sources that the samples were made from.
    """

    suite: Suite
    routed: Mapping[tuple[str, int], list[Record]]
    dense: Mapping[tuple[str, int], list[Record]]
    figures: tuple[Figure, ...]
    kv_shares: tuple[float, ...]
    texts: Mapping[str, str]

    def details(self) -> dict[str, Any]:
        """Every sample, compactly, for the results file."""
        samples = []
        for (task, length), records in self.routed.items():
            for ours, theirs in zip(records, self.dense[task, length], strict=True):
                samples.append(
                    {
                        "task": task,
                        "length": length,
                        "index": ours.index,
                        "tokens": ours.tokens,
                        "depth": ours.depth,
                        "document": ours.document,
                        "sparsity": round(ours.sparsity, 4),
                        "route": ours.route,
                        "kv_share": round(ours.kv_share, 4),
                        "score": ours.score,
                        "score_dense": theirs.score,
                        "nll": None if ours.nll is None else round(ours.nll, 5),
                        "nll_dense": None if theirs.nll is None else round(theirs.nll, 5),
                    }
                )
        return {"kv_shares": [round(share, 4) for share in self.kv_shares], "samples": samples}


def suite_samples(
    suite: Suite,
    tokenizer: Any,
    seed: int = 0,
    *,
    folder: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> tuple[SampleSet, SampleSet | None]:
    """Samples of a suite, and the longer ones whose KV memory is measured.

    Args:
        folder: where they are kept from one run to the next; None makes them anew.
        workers: processes that make them, to be forked before CUDA starts.
    """
    if suite.n < 2:
        raise ValueError(f"n must be at least 2 for an interval, got {suite.n}")

    def make(cells: list[tuple[str, int]], n: int) -> SampleSet:
        arguments: dict[str, Any] = {"workers": workers, "progress": progress}
        if folder is None:
            return make_sample_set(cells, n, seed, "test", tokenizer, **arguments)
        return prepared_samples(folder, cells, n, seed, "test", tokenizer, **arguments)

    found = make([(task, length) for task in suite.tasks for length in suite.lengths], suite.n)
    if not suite.kv_figure:
        return found, None
    return found, make([(task, KV_LENGTH) for task in suite.kv_tasks], max(2, min(suite.n, KV_PROMPTS)))


def run_suite(
    controller: FluxAttention,
    tokenizer: Any,
    suite: Suite,
    *,
    n: int | None = None,
    seed: int = 0,
    policy: Policy | None = None,
    dial: Dial | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    samples: Path | None = None,
) -> SuiteRun:
    """Run a suite's samples routed and dense, on the same kernels, and compute its figures.

    Args:
        n: samples per task and length; None = the suite's.
        samples: folder that keeps the samples, see `suite_samples`.

    Raises:
        ValueError: fewer than 2 samples, or a length the model cannot take.
    """
    suite = suite if n is None else replace(suite, n=n)
    found, long = suite_samples(suite, tokenizer, seed, folder=samples, progress=progress)
    cells = found.cells
    for some in (*cells.values(), *(long.cells.values() if long is not None else ())):
        check_samples(controller, some)
    routed, dense = {}, {}
    for key, some in cells.items():
        label = f"{key[0]} {key[1]}"
        routed[key] = run_samples(
            controller, tokenizer, some, policy=policy, dial=dial, options=options, progress=progress, label=label
        )
        dense[key] = run_samples(
            controller,
            tokenizer,
            some,
            policy=Dense(),
            options=options,
            progress=progress,
            label=f"{label}, dense",
        )
    shares: list[float] = []
    if long is not None:
        prompts = [sample for some in long.cells.values() for sample in some]
        with controller.using(policy, dial):
            shares = kv_shares_held(controller, prompts, progress)
    return SuiteRun(
        suite, routed, dense, tuple(_figures(suite, routed, dense, shares)), tuple(shares), found.settings["texts"]
    )


@torch.no_grad()
def kv_shares_held(
    controller: FluxAttention, samples: Sequence[Sample], progress: Progress | None = None
) -> list[float]:
    """Bytes that the cache really holds after prefilling each prompt, over a dense cache's."""
    check_samples(controller, samples)
    found = []
    batches = [samples[i] for i in range(len(samples))]
    for sample in progress(batches, len(batches), "KV memory") if progress else batches:
        cache = controller.new_cache()
        ids = torch.tensor(sample.prompt_ids, device=controller.device)[None]
        controller.decoder(input_ids=ids, use_cache=True, **cache_argument(controller.decoder, cache))
        found.append(cache.memory().share)
    return found


def _figures(
    suite: Suite,
    routed: Mapping[tuple[str, int], list[Record]],
    dense: Mapping[tuple[str, int], list[Record]],
    shares: Sequence[float],
) -> list[Figure]:
    make: Callable[..., list[Figure]] = {
        "needle": _needle,
        "continuation": _continuation,
        "free": _free,
    }.get(suite.name, _quick)
    figures = make(routed, dense)
    if shares:
        figures.append(Figure.of(suite.kv_figure, bootstrap_mean(shares), "ratio"))
    return figures


Cells = Mapping[tuple[str, int], list[Record]]


def _scores(records: Sequence[Record]) -> list[float]:
    return [r.score for r in records if r.score is not None]


def _losses(records: Sequence[Record]) -> list[float]:
    return [r.nll for r in records if r.nll is not None]


def _sparsity(name: str, cells: Cells) -> Figure:
    return Figure.of(name, bootstrap_mean([r.sparsity for records in cells.values() for r in records]), "share")


def accuracy(records: Sequence[Record]) -> Estimate:
    """Mean score with its interval: Wilson's where every score is right or wrong."""
    scores = _scores(records)
    if all(s in (0.0, 1.0) for s in scores):
        return wilson(sum(scores), len(scores))
    return bootstrap_mean(scores)


def _needle(routed: Cells, dense: Cells) -> list[Figure]:
    figures = []
    for (task, length), records in routed.items():
        name = f"{task}_{length // 1024}k"
        reference = dense[task, length]
        # Counted first: a ratio alone hides how good the dense model is.
        figures.append(Figure.of(f"{name}_accuracy", accuracy(records), "share"))
        figures.append(Figure.of(f"{name}_accuracy_dense", accuracy(reference), "share"))
        if sum(_scores(reference)):
            figures.append(Figure.of(f"{name}_vs_dense", paired_ratio(_scores(records), _scores(reference)), "ratio"))
    return [*figures, _sparsity("needle_4k_sparsity", routed)]


def _continuation(routed: Cells, dense: Cells) -> list[Figure]:
    figures = []
    for (task, length), records in routed.items():
        ratio = paired_ratio(_losses(records), _losses(dense[task, length]))
        figures.append(Figure.of(f"{task}_{length // 1024}k_nll_vs_dense", ratio, "ratio"))
    ours, theirs = ([x for records in cells.values() for x in _losses(records)] for cells in (routed, dense))
    figures.append(Figure.of("continuation_4k_nll_vs_dense", paired_ratio(ours, theirs), "ratio"))
    figures.append(Figure.of("continuation_4k_nll_dense", bootstrap_mean(theirs), "nat"))
    return [*figures, _sparsity("continuation_4k_sparsity", routed)]


def _free(routed: Cells, dense: Cells) -> list[Figure]:
    """Does the router hear what is asked, and what does that cost the answers? Documents are few: drawn as a whole."""
    figures = []
    for (task, length), records in routed.items():
        name, reference = f"{task}_{length // 1024}k", dense[task, length]
        texts = [i if r.document is None else r.document for i, r in enumerate(records)]
        found = [("sparsity", clustered_mean([r.sparsity for r in records], texts), "share")]
        if _losses(records):
            ours, theirs = _losses(records), _losses(reference)
            found.append(("nll_vs_dense", clustered_ratio(ours, theirs, texts), "ratio"))
            found.append(("nll_dense", clustered_mean(theirs, texts), "nat"))
        else:  # with --scoring generated
            found.append(("f1", clustered_mean(_scores(records), texts), "share"))
            found.append(("f1_dense", clustered_mean(_scores(reference), texts), "share"))
        figures += [Figure.of(f"{name}_{what}", estimate, unit) for what, estimate, unit in found]
    return figures


def _quick(routed: Cells, dense: Cells) -> list[Figure]:
    figures = []
    for key, records in routed.items():
        task, reference = key[0], dense[key]
        scored = bool(_scores(records))
        values = (bootstrap_mean(_scores(r) if scored else _losses(r)) for r in (records, reference))
        unit = "share" if scored else "nat"
        for suffix, estimate in zip(("", "_dense"), values, strict=True):
            figures.append(Figure.of(f"quick_{task}{suffix}", estimate, unit))
    return [*figures, _sparsity("quick_sparsity", routed)]
