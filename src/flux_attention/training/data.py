"""What a router is trained on: rows of one's own, built-in generators, or a mixture; and batches of them.

Shapes: `B` samples, `T` tokens of the longest one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from flux_attention.data.jsonl import jsonl_rows
from flux_attention.data.prompt import chat_text, check_text, encode_text
from flux_attention.data.sample import HOLISTIC, RETRIEVAL, TASK_CLASSES, Sample
from flux_attention.data.tasks import Task, get_task, make_sample, sample_seed, training_tasks

IGNORED = -100  # label of positions without a loss, torch's convention

#: Class by the task names that long-context training sets use. Pass `task_classes` to add or change some.
DEFAULT_TASK_CLASSES: dict[str, str] = {
    **dict.fromkeys(("qa", "single_qa", "multi_qa", "multihop_qa", "needle", "retrieval", "lookup"), RETRIEVAL),
    **dict.fromkeys(("summarization", "summary", "code", "icl", "in_context_learning", "continuation"), HOLISTIC),
}

Overlong = Literal["truncate", "skip", "error"]


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How a row becomes a sample.

    Args:
        context, question, answer, task, task_class: names of the row's fields. `answer` may hold a list of
            references, of which the first is trained on. `task_class` is optional in a row and wins over `task`.
        task_classes: task name -> class, beside `DEFAULT_TASK_CLASSES`.
        max_length: most tokens of prompt and answer together; None for no limit.
        overlong: what a longer row gets: the middle of its context dropped, left out, or an error.
    """

    context: str = "context"
    question: str = "question"
    answer: str = "answer"
    task: str = "task"
    task_class: str = "class"
    task_classes: Mapping[str, str] = field(default_factory=dict)
    max_length: int | None = None
    overlong: Overlong = "truncate"

    def __post_init__(self) -> None:
        for name, value in self.task_classes.items():
            if value not in TASK_CLASSES:
                raise ValueError(f"task_classes[{name!r}] must be one of {TASK_CLASSES}, got {value!r}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be positive, got {self.max_length}")
        if self.overlong not in ("truncate", "skip", "error"):
            raise ValueError(f"overlong must be truncate, skip or error, got {self.overlong!r}")


def read_rows(
    source: str | Path, split: str = "train", *, subset: str | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a `.jsonl` or `.parquet` file, or of a data set on the Hub, numbered from 1 (JSONL: by line).

    `subset` names a configuration of a set on the Hub.

    Raises:
        ValueError: a JSONL line is not a JSON object; the message names the line.
        ModuleNotFoundError: Parquet and the Hub need the `datasets` package.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json") or (path.is_file() and path.suffix != ".parquet"):
        yield from jsonl_rows(path)
        return
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading {source} needs the package datasets: pip install 'flux-attention[train]'"
        ) from error
    if path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        rows = load_dataset("parquet", data_files=str(path), split="train")
    else:
        rows = load_dataset(str(source), subset, split=split, streaming=True)
    for number, row in enumerate(rows, 1):
        yield number, dict(row)


def row_to_sample(row: Mapping[str, Any], tokenizer: Any, fmt: RowFormat, *, where: str = "row") -> Sample | None:
    """One row as a chat prompt: context, blank line, question; the answer is the assistant's turn.

    Returns:
        The sample, or None for a row that is too long under `overlong="skip"`. Where the middle of the context was
        dropped, `meta["cut"]` says how many tokens of prompt and answer are gone.

    Raises:
        ValueError: naming `where` (source and row number) and the field at fault.
    """
    values = {name: _text_field(row, name, where) for name in (fmt.context, fmt.question)}
    answers = _answers(row, fmt.answer, where)
    task = row.get(fmt.task)
    given = row.get(fmt.task_class)
    if task is None and given is None:
        raise ValueError(f"{where}: field {fmt.task!r} is missing")
    task = "rows" if task is None else str(task)
    known = {**DEFAULT_TASK_CLASSES, **fmt.task_classes}
    task_class = known.get(task) if given is None else given
    if task_class is None:
        raise ValueError(
            f"{where}: field {fmt.task!r} holds {task!r}, which has no class; add it to task_classes or give the row "
            f"a field {fmt.task_class!r} (one of {', '.join(TASK_CLASSES)})"
        )
    if task_class not in TASK_CLASSES:
        raise ValueError(f"{where}: field {fmt.task_class!r} must be one of {TASK_CLASSES}, got {task_class!r}")

    answer = encode_text(tokenizer, answers[0])
    span = (0, len(answer))
    # The end of the turn is part of what an instruction-tuned model answers, but no reference holds it.
    if tokenizer.eos_token_id is not None:
        answer.append(int(tokenizer.eos_token_id))
    context = values[fmt.context]
    prompt = _prompt(tokenizer, context, values[fmt.question])
    meta: dict[str, Any] = {"source": where}
    if fmt.max_length is not None and len(prompt) + len(answer) > fmt.max_length:
        if fmt.overlong == "skip":
            return None
        if fmt.overlong == "error":
            raise ValueError(
                f"{where}: {len(prompt) + len(answer)} tokens are more than max_length={fmt.max_length}; "
                "set overlong to truncate or skip"
            )
        whole = len(prompt)
        prompt = _truncated(tokenizer, context, values[fmt.question], fmt.max_length - len(answer), where)
        meta["cut"] = whole - len(prompt)
    return Sample(
        task=task,
        task_class=task_class,
        prompt_ids=tuple(prompt),
        answer_ids=tuple(answer),
        answers=answers,
        metric="f1",
        spans=(span,),
        meta=meta,
    )


def _text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    if row.get(name) is None:
        raise ValueError(f"{where}: field {name!r} is missing; the row has {', '.join(map(str, row)) or 'no fields'}")
    if not isinstance(row[name], str):
        raise ValueError(f"{where}: field {name!r} must be a string, got {type(row[name]).__name__}")
    check_text(row[name], f"{where}: field {name!r}")
    return str(row[name])


def _answers(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = row.get(name)
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) and item for item in value):
        for item in value:
            check_text(item, f"{where}: field {name!r}")
        return tuple(value)
    text = _text_field(row, name, where)
    if not text.strip():
        raise ValueError(f"{where}: field {name!r} is empty")
    return (text,)


def _prompt(tokenizer: Any, context: str, question: str) -> list[int]:
    parts = [part for part in (context.strip(), question.strip()) if part]
    return encode_text(tokenizer, chat_text(tokenizer, "\n\n".join(parts)))


def _truncated(tokenizer: Any, context: str, question: str, room: int, where: str) -> list[int]:
    """Prompt of at most `room` tokens: the context loses its middle, as LongBench cuts."""
    ids = encode_text(tokenizer, context)
    frame = len(_prompt(tokenizer, "", question)) + 2
    keep = room - frame
    # Re-tokenising the two halves can cost a token or two at the seam.
    while keep >= 2:
        halves = tokenizer.decode(ids[: keep // 2]) + "\n" + tokenizer.decode(ids[len(ids) - keep // 2 :])
        prompt = _prompt(tokenizer, halves, question)
        if len(prompt) <= room:
            return prompt
        keep -= len(prompt) - room
    raise ValueError(f"{where}: question and answer alone do not leave room for a context in max_length")


def samples_from_rows(
    source: str | Path, tokenizer: Any, fmt: RowFormat | None = None, *, split: str = "train", limit: int | None = None
) -> Iterator[Sample]:
    """Samples of a JSONL or Parquet file or a Hub data set with rows `{context, question, answer, task}`."""
    made = 0
    for number, row in read_rows(source, split):
        if limit is not None and made >= limit:
            return
        sample = row_to_sample(row, tokenizer, fmt or RowFormat(), where=f"{source}, row {number}")
        if sample is not None:
            made += 1
            yield sample


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """An endless, repeatable stream over built-in tasks: sample i is the same whatever was drawn before.

    Args:
        tasks: names or tasks; default all that are not held out.
        lengths: prompt + answer tokens, drawn with `length_weights` (equal without).
        class_weights: share of each class; kept exactly in every run of `block` samples, up to rounding.
        task_weights: weight of a task within its class, 1 where not named.
        extra: samples of one's own, drawn with probability `extra_share` in the place of a generated one of the same
            class. A class that `extra` lacks is generated always, which a share of 1 does not allow.
    """

    tasks: Sequence[str | Task] = field(default_factory=lambda: tuple(training_tasks()))
    lengths: tuple[int, ...] = (1536, 2048, 3072, 4096)
    length_weights: tuple[float, ...] | None = None
    class_weights: Mapping[str, float] = field(default_factory=lambda: {RETRIEVAL: 0.5, HOLISTIC: 0.5})
    task_weights: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    split: str = "train"
    block: int = 8
    extra: Sequence[Sample] = ()
    extra_share: float = 0.0

    def __post_init__(self) -> None:
        chosen = [get_task(task) for task in self.tasks]
        if not chosen or len({task.name for task in chosen}) != len(chosen):
            raise ValueError(f"tasks must be non-empty and distinct, got {[task.name for task in chosen]}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be positive, got {self.lengths}")
        if self.length_weights is not None and len(self.length_weights) != len(self.lengths):
            raise ValueError(f"length_weights must match lengths ({len(self.lengths)}), got {len(self.length_weights)}")
        if unknown := set(self.task_weights) - {task.name for task in chosen}:
            raise ValueError(f"task_weights names tasks that are not in the mixture: {sorted(unknown)}")
        if any(weight < 0 for weight in (*self.task_weights.values(), *self.class_weights.values())):
            raise ValueError("task_weights and class_weights must not be negative")
        if self.block < 1 or not 0 <= self.extra_share <= 1 or (self.extra_share > 0 and not self.extra):
            raise ValueError(
                f"block must be positive and extra_share in [0, 1] with samples in extra; got block={self.block}, "
                f"extra_share={self.extra_share}, {len(self.extra)} extra samples"
            )
        for name, weight in self.class_weights.items():
            if name not in TASK_CLASSES:
                raise ValueError(f"class_weights names {name!r}; classes are {TASK_CLASSES}")
            if weight > 0 and not any(task.task_class == name and self._weight(task) > 0 for task in chosen):
                raise ValueError(f"class_weights asks for {name!r}, but no task of the mixture has this class")
            if weight > 0 and self.extra_share == 1 and not any(sample.task_class == name for sample in self.extra):
                raise ValueError(
                    f"extra_share=1 asks for samples of one's own alone, but none of the {len(self.extra)} is of class "
                    f"{name!r}: add rows of this class, or take a smaller share, which fills it with built-in tasks"
                )
        if sum(self.class_weights.values()) <= 0:
            raise ValueError("class_weights must have a positive sum")

    def _weight(self, task: Task) -> float:
        return float(self.task_weights.get(task.name, 1.0))

    def _rng(self, kind: str, index: int) -> random.Random:
        return random.Random(sample_seed(kind, 0, self.split, self.seed, index))

    def class_of(self, index: int) -> str:
        """Class of sample `index`: each block holds its shares, what rounding leaves is drawn."""
        number, place = divmod(index, self.block)
        rng = self._rng("mixture-block", number)
        names = [name for name in TASK_CLASSES if self.class_weights.get(name, 0) > 0]
        total = sum(self.class_weights[name] for name in names)
        shares = [self.block * self.class_weights[name] / total for name in names]
        order = [name for name, share in zip(names, shares, strict=True) for _ in range(int(share))]
        rest = [share - int(share) for share in shares]
        while len(order) < self.block:
            order.append(rng.choices(names, rest if sum(rest) > 1e-9 else shares)[0])
        rng.shuffle(order)
        return order[place]

    def sample(self, index: int, tokenizer: Any) -> Sample:
        rng = self._rng("mixture", index)
        task_class = self.class_of(index)
        own = [sample for sample in self.extra if sample.task_class == task_class]
        if own and rng.random() < self.extra_share:
            return rng.choice(own)
        tasks = [task for task in map(get_task, self.tasks) if task.task_class == task_class]
        task = rng.choices(tasks, [self._weight(task) for task in tasks])[0]
        length = rng.choices(self.lengths, self.length_weights)[0]
        return make_sample(task, index, length, self.seed, self.split, tokenizer)


class RouterDataset(Dataset[Sample]):
    """Samples in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        if not samples:
            raise ValueError("RouterDataset needs at least one sample")
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


class MixtureDataset(Dataset[Sample]):
    """The first `size` samples of a mixture, made when asked for: workers and resumed runs see the same ones."""

    def __init__(self, mixture: Mixture, tokenizer: Any, size: int) -> None:
        if size < 1:
            raise ValueError(f"size must be positive, got {size}")
        self.mixture, self.tokenizer, self.size = mixture, tokenizer, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is out of range for {self.size} samples")
        return self.mixture.sample(index, self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Samples to a right-padded batch.

    Args:
        pad_token_id: any valid id: padding is masked and has no label.
        pad_to_multiple: round T up to a multiple of this.

    Returns (of a call):
        `input_ids`, `attention_mask`, `labels` `[B, T]` (labels are −100 outside the answers, not shifted);
        `prompt_lens`, `class_index` (into `TASK_CLASSES`) `[B]`; all int64.
    """

    pad_token_id: int
    pad_to_multiple: int = 1

    def __post_init__(self) -> None:
        if self.pad_token_id < 0 or self.pad_to_multiple < 1:
            raise ValueError(
                f"pad_token_id must be >= 0 and pad_to_multiple >= 1, got {self.pad_token_id}, {self.pad_to_multiple}"
            )

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        if not samples:
            raise ValueError("cannot collate an empty batch")
        longest = max(map(len, samples))
        width = -(-longest // self.pad_to_multiple) * self.pad_to_multiple
        input_ids = torch.full((len(samples), width), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED)
        for i, sample in enumerate(samples):
            prompt, total = len(sample.prompt_ids), len(sample)
            input_ids[i, :total] = torch.tensor(sample.prompt_ids + sample.answer_ids)
            attention_mask[i, :total] = 1
            labels[i, prompt:total] = torch.tensor(sample.answer_ids)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "prompt_lens": torch.tensor([len(sample.prompt_ids) for sample in samples]),
            "class_index": class_index(samples),
        }


def class_index(samples: Sequence[Sample]) -> torch.Tensor:
    """Number of each sample's class, its place in `TASK_CLASSES`, int64 `[n]`."""
    return torch.tensor([TASK_CLASSES.index(sample.task_class) for sample in samples])
