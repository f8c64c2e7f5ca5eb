"""The registry of built-in tasks."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from flux_attention.data.sample import Sample
from flux_attention.data.tasks.base import Task
from flux_attention.data.tasks.common_words import CommonWords
from flux_attention.data.tasks.continuation import Continuation
from flux_attention.data.tasks.fewshot_classification import FewShotClassification
from flux_attention.data.tasks.frequent_words import FrequentWords
from flux_attention.data.tasks.interview import NeedleInterview
from flux_attention.data.tasks.kv_lookup import KeyValueLookup
from flux_attention.data.tasks.math_problems import MathProblems
from flux_attention.data.tasks.module_summary import ModuleSummary
from flux_attention.data.tasks.niah import Needle
from flux_attention.data.tasks.open_prompts import FREE_QUESTION, FREE_REQUEST, OpenFact, OpenQuestion, OpenRequest
from flux_attention.data.tasks.passages import PassageCount, PassageRetrieval
from flux_attention.data.tasks.row_qa import RowQA
from flux_attention.data.tasks.variable_tracking import VariableTracking

_BUILT_IN: tuple[Task, ...] = (
    Needle(name="niah_single_1", haystacks=("filler",), test_haystack="ruler_filler"),
    Needle(name="niah_single_2"),
    Needle(name="niah_single_3", value="uuid"),
    Needle(name="niah_multikey_1", keys=4),
    Needle(name="niah_multikey_2", test_haystack="needles"),
    Needle(name="niah_multikey_3", test_haystack="needles", key="uuid", value="uuid"),
    Needle(name="niah_multivalue", values_per_key=4, held_out=True),
    Needle(name="niah_multiquery", keys=4, asked=4),
    Needle(name="niah_two_queries", keys=2, asked=2),
    Needle(name="niah_two_values", values_per_key=2, held_out=True),
    VariableTracking(name="variable_tracking"),
    VariableTracking(name="variable_copies", forward=True),
    KeyValueLookup(name="kv_lookup", numeric=4),
    KeyValueLookup(name="kv_lookup_numbers", digits=7),
    RowQA(name="row_qa", held_out=True),
    RowQA(name="row_qa_people", people=None, held_out=True),
    PassageRetrieval(name="passage_retrieval", held_out=True),
    PassageCount(name="passage_count"),
    CommonWords(name="common_words"),
    CommonWords(name="common_numbers", items="numbers"),
    CommonWords(name="common_codes", items="codes"),
    FrequentWords(name="frequent_words", held_out=True),
    FewShotClassification(name="fewshot_topic", theme="topic"),
    FewShotClassification(name="fewshot_sentiment", theme="sentiment"),
    FewShotClassification(name="fewshot_intent", theme="intent", held_out=True),
    Continuation(name="code_completion", source="code", test_source="code"),
    Continuation(name="prose_continuation", source="topics", test_source="topics"),
    Continuation(name="docstring_continuation", source="docstrings", test_source="docstrings", held_out=True),
    # Many scored answers or tokens a pass, to measure on: a layer may cost thousandths of a nat.
    NeedleInterview(name="needle_interview"),
    FewShotClassification(name="topic_labels", theme="topic", scored=24),
    FewShotClassification(name="sentiment_labels", theme="sentiment", scored=24),
    Continuation(name="code_second_half", source="code", test_source="code", answer_share=0.5),
    Continuation(name="prose_second_half", source="topics", test_source="topics", answer_share=0.5),
    ModuleSummary(name="module_summary"),
    OpenQuestion(name="open_question"),
    OpenFact(name="open_fact"),
    OpenRequest(name="open_request"),
    FREE_QUESTION,
    FREE_REQUEST,
)

TASKS: dict[str, Task] = {task.name: task for task in _BUILT_IN}

#: Short names of FIGURES and the command line.
ALIASES: dict[str, str] = {"needle1": "niah_single_2", "needle4": "niah_multikey_1"}


#: Tasks over data that does not ship with Python: "gsm8k" reads the Hub, "gsm8k:PROBLEMS[:SOLVED]" JSONL files.
FROM_FILES: dict[str, str] = {"gsm8k": "gsm8k", "math500": "math"}


def get_task(task: str | Task) -> Task:
    """A task by name, alias or itself. A name of `FROM_FILES` stands for its latest files from then on.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: a file that is not there.
    """
    if isinstance(task, Task):
        return task
    name, *files = task.split(":")
    if name in FROM_FILES and len(files) <= 2 and (files or name not in TASKS):
        path, solved = (*files, None, None)[:2]
        # Never trained on: their problems may be in a test.
        TASKS[name] = MathProblems(name=name, kind=FROM_FILES[name], path=path, shots_path=solved, held_out=True)
        return TASKS[name]
    name = ALIASES.get(task, task)
    if name not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join((*TASKS, *ALIASES, *FROM_FILES))}")
    return TASKS[name]


def training_tasks() -> dict[str, Task]:
    """The tasks that a router may be trained on."""
    return {name: task for name, task in TASKS.items() if not task.held_out}


def sample_seed(task: str, length: int, split: str, seed: int, index: int) -> int:
    """Seed of one sample: a hash of what it is, so that adding tasks or samples shifts no other."""
    key = f"{task}|{length}|{split}|{seed}|{index}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def make_sample(task: str | Task, index: int, length: int, seed: int, split: str, tokenizer: Any) -> Sample:
    """Sample number `index` of a task."""
    chosen = get_task(task)
    number = sample_seed(chosen.name, length, split, seed, index)
    sample = chosen.sample(random.Random(number), tokenizer, length, split)
    return replace(sample, meta={**sample.meta, "seed": seed, "index": index})


def iter_samples(task: str | Task, n: int, length: int, seed: int, split: str, tokenizer: Any) -> Iterator[Sample]:
    for index in range(n):
        yield make_sample(task, index, length, seed, split, tokenizer)


def make_samples(task: str | Task, n: int, length: int, seed: int, split: str, tokenizer: Any) -> list[Sample]:
    """`n` samples of at most `length` tokens, the same for the same arguments and Python version."""
    if n < 1:
        raise ValueError(f"n must be positive, got {n}")
    return list(iter_samples(task, n, length, seed, split, tokenizer))


__all__ = [
    "ALIASES",
    "TASKS",
    "CommonWords",
    "Continuation",
    "FewShotClassification",
    "FrequentWords",
    "KeyValueLookup",
    "MathProblems",
    "ModuleSummary",
    "Needle",
    "NeedleInterview",
    "OpenFact",
    "OpenQuestion",
    "OpenRequest",
    "PassageCount",
    "PassageRetrieval",
    "RowQA",
    "Task",
    "VariableTracking",
    "get_task",
    "iter_samples",
    "make_sample",
    "make_samples",
    "sample_seed",
    "training_tasks",
]
