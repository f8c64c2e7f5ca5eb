"""What a board runs, and the samples that it needs: everything that can be said without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux_attention.data import Sample, get_task
from flux_attention.data.progress import Progress, tqdm_progress
from flux_attention.data.sample_set import SampleSet, prepared_samples
from flux_attention.data.tasks import Continuation, training_tasks
from flux_attention.evaluation.entrants import POLICIES, Cell
from flux_attention.route import Dial
from flux_attention.training.heads import HeadTraining

#: Half retrieval, half holistic; what `flux-attn board` runs unless told otherwise.
MIXED = (
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_two_values",
    "niah_multivalue",
    "variable_copies",
    "kv_lookup_numbers",
    "row_qa",
    "fewshot_topic",
    "fewshot_sentiment",
    "fewshot_intent",
    "common_words",
    "frequent_words",
    "code_completion",
    "docstring_continuation",
    "module_summary",
)
# Another stream of the training split than the router's own data.
_TRAINING_SEED = 7919


@dataclass(frozen=True, kw_only=True)
class BoardConfig:
    """What a board runs.

    Attributes:
        tasks, lengths, samples, seed: the cells; the same samples for every entrant.
        policies: of `entrants.POLICIES`; the dense model is always there.
        searched: layers, least needed first, of the policy of this name; it is there when they are.
        weak_samples: the first samples of each cell, for entrants far behind and for curves; XAttention, whose plain
            kernel is many small launches, gets a quarter of them.
        min_sparsity, max_sparsity: range that the routers' Ω is held in, prompt by prompt (`route.Dial`).
        dial: Ω that the first adapter's dial is set to, for its curve.
        sparsities: further Ω of the static splits' curves.
        calibration, calibration_text: samples per training task, and per training task of running text, that layer
            rankings are measured on.
        calibration_length: their tokens.
        heads: training of the head-level baselines.
        head_samples, head_lengths: their samples per training task and length.
        batch_tokens: tokens of a pass; results do not depend on it.
        impl: kernel implementation of prefill.
        workers: processes that make samples.
        processes: that measure, on every visible GPU in turn; results do not depend on it.
        minutes: of wall clock after which the board stops between two passes; 0 = never.
    """

    tasks: tuple[str, ...] = MIXED
    lengths: tuple[int, ...] = (4096, 8000)
    samples: int = 200
    seed: int = 0
    policies: tuple[str, ...] = tuple(name for name in POLICIES if name != "searched")
    searched: tuple[int, ...] = ()
    weak_samples: int = 25
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0
    dial: tuple[float, ...] = ()
    sparsities: tuple[float, ...] = ()
    calibration: int = 2
    calibration_text: int = 12
    calibration_length: int = 3072
    heads: HeadTraining = field(default_factory=HeadTraining)
    head_samples: int = 16
    head_lengths: tuple[int, ...] = (2048, 3072)
    batch_tokens: int = 16384
    impl: str = "auto"
    workers: int = 1
    processes: int = 1
    minutes: float = 0.0

    def __post_init__(self) -> None:
        names = [get_task(task).name for task in self.tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a board needs tasks, each once, got {', '.join(names) or 'none'}")
        object.__setattr__(self, "tasks", tuple(names))
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) != len(self.lengths):
            raise ValueError(f"lengths must be positive, each once, got {self.lengths}")
        for name in ("samples", "weak_samples"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2 for an interval, got {getattr(self, name)}")
        unknown = [name for name in self.policies if name not in POLICIES]
        if unknown:
            raise ValueError(f"unknown policy {unknown[0]!r}; known: {', '.join(POLICIES)}")
        if ("searched" in self.policies) != bool(self.searched):
            raise ValueError("the policy searched and its order of layers (--searched FILE) come together")
        if "router" not in self.policies:
            raise ValueError("policies must include the router: the baselines stand at its sparsity")
        for name in (
            "calibration",
            "calibration_text",
            "calibration_length",
            "head_samples",
            "batch_tokens",
            "workers",
            "processes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("sparsities", "dial"):
            if any(not 0 <= sparsity <= 1 for sparsity in getattr(self, name)):
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
            if len({f"{sparsity:.2f}" for sparsity in getattr(self, name)}) < len(getattr(self, name)):
                raise ValueError(f"{name} are told apart by two digits, got {getattr(self, name)}")
        if not self.held.is_open and "inline" in self.policies:
            raise ValueError(
                "inline routes are decided layer by layer, no dial holds them: leave out the one or the other"
            )
        if self.minutes < 0:
            raise ValueError(f"minutes must not be negative, got {self.minutes}")

    @property
    def held(self) -> Dial:
        """The dial that the routers are under."""
        return Dial(self.min_sparsity, self.max_sparsity)

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple((task, length) for task in self.tasks for length in self.lengths)


@dataclass(frozen=True)
class Prepared:
    """Samples of a board: its cells, and those of the training split that baselines are made with, where needed."""

    test: SampleSet
    tasks: tuple[Sample, ...] = ()
    text: tuple[Sample, ...] = ()
    heads: tuple[Sample, ...] = ()


def prepare(config: BoardConfig, tokenizer: Any, folder: Path, progress: Progress = tqdm_progress) -> Prepared:
    """The samples, from files in `folder` where they are there.

    Needs no model and no GPU, and must come before CUDA starts.
    """
    seed = config.seed + _TRAINING_SEED

    def make(cells: Sequence[Cell], n: int, seed: int, split: str) -> SampleSet:
        return prepared_samples(folder, cells, n, seed, split, tokenizer, workers=config.workers, progress=progress)

    def train(
        tasks: Sequence[str], lengths: Sequence[int], n: int, seed: int, policies: set[str]
    ) -> tuple[Sample, ...]:
        if not policies & set(config.policies):
            return ()
        made = make([(task, length) for task in tasks for length in lengths], n, seed, "train")
        return tuple(sample for samples in made.cells.values() for sample in samples)

    names = list(training_tasks())
    text = [name for name, task in training_tasks().items() if isinstance(task, Continuation)]
    length = (config.calibration_length,)
    return Prepared(
        make(config.cells, config.samples, config.seed, "test"),
        train(names, length, config.calibration, seed, {"damage", "greedy"}),
        train(text, length, config.calibration_text, seed + 1, {"greedy-text"}),
        train(names, config.head_lengths, config.head_samples, seed + 2, {"duo", "elastic"}),
    )
