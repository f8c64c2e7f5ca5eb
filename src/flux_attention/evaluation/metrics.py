"""Scores of one answer, and means with 95 % intervals over many.

Text scores lie in [0, 1], more is better; NLL is in nats a token, less is better. Intervals are percentile bootstraps
over samples, or Wilson's for plain proportions; `seed` makes them repeatable.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and repeated spaces, as SQuAD's evaluation does."""
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the references that occur in the prediction (RULER)."""
    _need_answers(answers)
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """1 when any reference occurs in the prediction (RULER's QA)."""
    _need_answers(answers)
    return float(any(answer.lower() in prediction.lower() for answer in answers))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction's first line begins with a reference as whole words, both normalised.

    A model may close its answer with a full stop or an explanation; it may not come to it late.
    """
    _need_answers(answers)
    lines = prediction.strip().splitlines()
    start = normalise(lines[0]) + " " if lines else " "
    return float(any(start.startswith(normalise(answer) + " ") for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best word F1 over the references (SQuAD, LongBench QA)."""
    _need_answers(answers)
    return max(_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers)


def _f1(predicted: list[str], reference: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(reference)).values())
    if not common:
        return float(predicted == reference)
    precision, recall = common / len(predicted), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def number_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the number after `####`, else the last number before a next question, equals a reference (GSM8K)."""
    _need_answers(answers)
    text = prediction.split("\nQuestion:")[0]
    if "####" in text:
        text = text.split("####", 1)[1]
        found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)[:1]
    else:
        found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)[-1:]
    if not found:
        return 0.0
    value = float(found[0].replace(",", ""))
    return float(any(_as_number(answer) == value for answer in answers))


def _as_number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").strip("$% "))
    except ValueError:
        return None


def boxed(text: str) -> str | None:
    """What stands in the first complete `\\boxed{...}`, braces balanced."""
    start = text.find("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for end in range(begin, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[begin:end]
    return None


def boxed_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the boxed answer equals a reference up to spacing and LaTeX's optional parts (MATH)."""
    _need_answers(answers)
    found = boxed(prediction.split("\nProblem:")[0])
    return float(found is not None and any(_plain_latex(found) == _plain_latex(answer) for answer in answers))


def _plain_latex(text: str) -> str:
    for command in ("\\left", "\\right", "\\!", "\\,", "\\;", "\\$", "$", "\\%", "%", "^\\circ", "^{\\circ}"):
        text = text.replace(command, "")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\text\{([^}]*)\}", r"\1", text)
    return "".join(text.split()).rstrip(".")


def _need_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers must be a non-empty sequence of strings, got {answers!r}")


SCORERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "exact_match": exact_match,
    "f1": f1,
    "number_match": number_match,
    "boxed_match": boxed_match,
}


def score(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """Score of generated text under a named metric."""
    if metric not in SCORERS:
        raise ValueError(f"metric {metric!r} does not score text; known: {', '.join(SCORERS)} (nll needs logits)")
    return SCORERS[metric](prediction, answers)


def span_accuracy(correct: ArrayLike, spans: Sequence[tuple[int, int]]) -> float:
    """Teacher-forced accuracy: share of the spans whose tokens are all right.

    Args:
        correct: `[answer tokens]`, whether the model's first choice is the reference token.
        spans: one `[start, end)` for each reference (`Sample.scored_spans`).
    """
    flags = np.asarray(correct, dtype=bool)
    if not spans:
        raise ValueError("spans must hold at least one (start, end)")
    return sum(bool(flags[start:end].all()) for start, end in spans) / len(spans)


@dataclass(frozen=True)
class Estimate:
    """A value with its interval and the number of samples it rests on."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n})"


def _checked(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"{name} must be one-dimensional with at least 2 values for an interval, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(array)).sum())} values that are not finite")
    return array


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")


def wilson(successes: float, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson score interval of a proportion: honest at 0, at 1 and for small n, where a bootstrap is not."""
    _check_confidence(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson needs 0 <= successes <= n and n >= 1, got successes={successes}, n={n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounding must not push p itself out of its interval at 0 and 1.
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def _draws(n: int, rng: np.random.Generator, resamples: int) -> NDArray[np.int64]:
    return rng.integers(0, n, size=(resamples, n))


def _percentiles(draws: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_mean(values: ArrayLike, seed: int = 0, confidence: float = 0.95, resamples: int = RESAMPLES) -> Estimate:
    """Mean with a percentile bootstrap interval."""
    _check_confidence(confidence)
    array = _checked(values, "values")
    means = array[_draws(len(array), np.random.default_rng(seed), resamples)].mean(1)
    return Estimate(float(array.mean()), *_percentiles(means, confidence), len(array))


def paired_ratio(
    first: ArrayLike, second: ArrayLike, seed: int = 0, confidence: float = 0.95, resamples: int = RESAMPLES
) -> Estimate:
    """mean(first) / mean(second) on the same samples; pairs are resampled together."""
    return macro_ratio({"": first}, {"": second}, seed, confidence, resamples)


def clustered_ratio(first: ArrayLike, second: ArrayLike, clusters: Sequence[Hashable]) -> Estimate:
    """mean(first) / mean(second) on the same samples, where those of one cluster (a document, say) are drawn together.

    Samples about one document are not independent: resampled one by one they would give too narrow an interval. Where
    all are of one cluster, that is all there is.
    """
    a, b = _pair(first, second)
    if len(clusters) != len(a):
        raise ValueError(f"every sample has one cluster, got {len(clusters)} for {len(a)} samples")
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    if len(index) == 1:
        return paired_ratio(a, b)
    # Sums over clusters: dividing both sides by their number makes them means, which are what is resampled.
    place = [index[cluster] for cluster in clusters]
    first, second = (np.bincount(place, weights=values, minlength=len(index)) for values in (a, b))
    return replace(paired_ratio(first, second), n=len(a))


def clustered_mean(values: ArrayLike, clusters: Sequence[Hashable]) -> Estimate:
    """Mean with an interval whose clusters are drawn together, see `clustered_ratio`."""
    return clustered_ratio(values, np.ones(len(clusters)), clusters)


def _pair(first: ArrayLike, second: ArrayLike, name: str = "first and second") -> tuple[NDArray, NDArray]:
    a, b = _checked(first, "first"), _checked(second, "second")
    if len(a) != len(b):
        raise ValueError(f"{name} must hold the same samples, got {len(a)} and {len(b)} values")
    return a, b


def _macro_draws(
    arrays: Mapping[str, tuple[NDArray, ...]], seed: int, resamples: int
) -> tuple[list[float], list[NDArray[np.float64]]]:
    """Macro means of parallel columns and their bootstrap draws; samples are drawn within tasks, tasks are fixed."""
    rng = np.random.default_rng(seed)
    columns = len(next(iter(arrays.values())))
    values = [float(np.mean([task[c].mean() for task in arrays.values()])) for c in range(columns)]
    draws = [np.zeros(resamples) for _ in range(columns)]
    # Sorted, so that the order in which tasks were run does not change the figures.
    for name in sorted(arrays):
        task = arrays[name]
        index = _draws(len(task[0]), rng, resamples)
        for c in range(columns):
            draws[c] += task[c][index].mean(1) / len(arrays)
    return values, draws


def macro_mean(
    scores: Mapping[str, ArrayLike], seed: int = 0, confidence: float = 0.95, resamples: int = RESAMPLES
) -> Estimate:
    """Mean over tasks of each task's mean, every task weighing the same."""
    _check_confidence(confidence)
    if not scores:
        raise ValueError("macro_mean needs at least one task")
    arrays = {name: (_checked(values, f"scores of {name!r}"),) for name, values in scores.items()}
    values, draws = _macro_draws(arrays, seed, resamples)
    return Estimate(values[0], *_percentiles(draws[0], confidence), sum(len(a[0]) for a in arrays.values()))


def _macro_pairs(first: Mapping[str, ArrayLike], second: Mapping[str, ArrayLike]) -> dict[str, tuple[NDArray, ...]]:
    if not first or set(first) != set(second):
        raise ValueError(f"both sides must hold the same tasks, got {sorted(first)} and {sorted(second)}")
    return {name: _pair(first[name], second[name], f"both sides of task {name!r}") for name in first}


def macro_difference(
    first: Mapping[str, ArrayLike],
    second: Mapping[str, ArrayLike],
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Macro mean of first − second, paired sample by sample."""
    _check_confidence(confidence)
    pairs = _macro_pairs(first, second)
    return macro_mean({name: a - b for name, (a, b) in pairs.items()}, seed, confidence, resamples)


def macro_ratio(
    first: Mapping[str, ArrayLike],
    second: Mapping[str, ArrayLike],
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Macro mean of first over macro mean of second, paired sample by sample."""
    _check_confidence(confidence)
    pairs = _macro_pairs(first, second)
    (top, bottom), (top_draws, bottom_draws) = _macro_draws(pairs, seed, resamples)
    if bottom == 0:
        raise ValueError("the second side's mean is 0: a ratio to it means nothing")
    usable = bottom_draws != 0
    ratios = top_draws[usable] / bottom_draws[usable]
    return Estimate(top / bottom, *_percentiles(ratios, confidence), sum(len(a) for a, _ in pairs.values()))
