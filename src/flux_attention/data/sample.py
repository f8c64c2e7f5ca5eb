"""What a task hands to training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RETRIEVAL = "retrieval"
HOLISTIC = "holistic"
#: Order fixes `class_index` of a collated batch.
TASK_CLASSES: tuple[str, ...] = (RETRIEVAL, HOLISTIC)

#: Names that `evaluation.metrics.score` understands.
METRICS: tuple[str, ...] = (
    "string_match_all",
    "string_match_part",
    "exact_match",
    "f1",
    "number_match",
    "boxed_match",
    "nll",
)


@dataclass(frozen=True)
class Sample:
    """One prompt with its reference answer, as token ids.

    The prompt ends right where the answer starts, so a teacher-forced pass scores `answer_ids` directly.

    Args:
        prompt_ids: the chat prompt, answer prefix included.
        answer_ids: reference answer in the tokens that teacher forcing feeds.
        answers: references for scoring generated text.
        metric: one of `METRICS`.
        spans: `[start, end)` index ranges of `answer_ids` that hold one reference each; separators are outside.
        teacher_forced: False where a right answer may come in another order or wording, so that only generated
            text can be scored.
        meta: seed, split, depth, lengths and whatever else explains the sample.
    """

    task: str
    task_class: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answers: tuple[str, ...]
    metric: str
    spans: tuple[tuple[int, int], ...] = ()
    teacher_forced: bool = True
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task_class not in TASK_CLASSES:
            raise ValueError(f"task_class must be one of {TASK_CLASSES}, got {self.task_class!r} (task {self.task!r})")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {self.metric!r} (task {self.task!r})")
        if not self.prompt_ids or not self.answer_ids:
            raise ValueError(f"task {self.task!r}: prompt and answer must hold at least one token each")
        for start, end in self.spans:
            if not 0 <= start < end <= len(self.answer_ids):
                raise ValueError(
                    f"task {self.task!r}: span {(start, end)} leaves the {len(self.answer_ids)} answer tokens"
                )

    @property
    def scored_spans(self) -> tuple[tuple[int, int], ...]:
        return self.spans or ((0, len(self.answer_ids)),)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)
