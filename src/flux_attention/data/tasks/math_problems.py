"""GSM8K and MATH-500 with as many solved examples as fit, from JSONL files of their original fields or the Hub."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flux_attention.data.jsonl import jsonl_rows
from flux_attention.data.prompt import Draft, check_text, encode, encode_text
from flux_attention.data.sample import HOLISTIC, Sample
from flux_attention.data.tasks.base import Task

#: kind -> data set on the Hub, its configuration, splits of problems and of solved examples
HUB: dict[str, tuple[str, str | None, str, str | None]] = {
    "gsm8k": ("openai/gsm8k", "main", "test", "train"),
    "math": ("HuggingFaceH4/MATH-500", None, "test", None),
}
#: kind -> (question field, solution field, metric, question form, solution form)
_KINDS = {
    "gsm8k": ("question", "answer", "number_match", "Question: {question}", "Answer: {solution}"),
    "math": ("problem", "solution", "boxed_match", "Problem: {question}", "Solution: {solution}"),
}


@lru_cache(maxsize=4)
def _read_hub(kind: str, solved: bool) -> tuple[tuple[str, str], ...]:
    name, config, split, solved_split = HUB[kind]
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading {name} from the Hub needs the package datasets: pip install 'flux-attention[train]'; or give a "
            f"JSONL file: {kind}:PATH"
        ) from error
    question, solution = _KINDS[kind][:2]
    rows = load_dataset(name, config, split=solved_split if solved and solved_split else split)
    return tuple((row[question].strip(), row[solution].strip()) for row in rows)


def _read(path: str, question: str, solution: str) -> tuple[tuple[str, str], ...]:
    # A file that changed is read again.
    return _read_version(path, question, solution, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read_version(path: str, question: str, solution: str, changed: int) -> tuple[tuple[str, str], ...]:
    rows = []
    for number, row in jsonl_rows(Path(path)):
        for field in (question, solution):
            if not isinstance(row.get(field), str):
                raise ValueError(f"{path}, row {number}: field {field!r} is missing or no string")
            check_text(row[field], f"{path}, row {number}: field {field!r}")
        rows.append((row[question].strip(), row[solution].strip()))
    if not rows:
        raise ValueError(f"{path}: no rows")
    return tuple(rows)


def final_answer(kind: str, solution: str) -> str:
    """The reference: after `####` in GSM8K, inside the last `\\boxed{}` in MATH."""
    if kind == "gsm8k":
        return solution.rsplit("####", 1)[-1].strip().replace(",", "")
    start = solution.rfind("\\boxed{")
    if start < 0:
        return solution.strip()
    depth, begin = 1, start + len("\\boxed{")
    for end in range(begin, len(solution)):
        depth += (solution[end] == "{") - (solution[end] == "}")
        if depth == 0:
            return solution[begin:end]
    return solution[begin:]


@dataclass(frozen=True, kw_only=True)
class MathProblems(Task):
    """Few-shot problems; `answer_ids` is the worked solution, and the score is the final answer of generated text.

    Args:
        kind: "gsm8k" (`question`, `answer`) or "math" (`problem`, `solution`).
        path: JSONL with the problems to solve; None = the data set on the Hub (`HUB`).
        shots_path: JSONL with the solved examples; without it they come from `path`, the asked row excluded.
        shots: most examples, None for as many as the length takes.
    """

    task_class: str = HOLISTIC
    metric: str = "number_match"
    teacher_forced: bool = False
    kind: str
    path: str | None = None
    shots_path: str | None = None
    shots: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"task {self.name!r}: kind must be one of {tuple(_KINDS)}, got {self.kind!r}")
        for path in (self.path, self.shots_path):
            if path is not None and not Path(path).is_file():
                raise FileNotFoundError(f"task {self.name!r}: no such JSONL file: {path}")
        object.__setattr__(self, "metric", _KINDS[self.kind][2])
        super().__post_init__()

    def files(self) -> tuple[Path, ...]:
        return tuple(Path(path) for path in (self.path, self.shots_path) if path is not None)

    def sample(self, rng: random.Random, tokenizer: Any, length: int, split: str) -> Sample:
        self._check(length, split)
        question_field, solution_field, _, question_form, solution_form = _KINDS[self.kind]
        rows = _read_hub(self.kind, False) if self.path is None else _read(self.path, question_field, solution_field)
        asked = rng.randrange(len(rows))
        question, solution = rows[asked]
        solved = self.shots_path or self.path
        examples = list(_read_hub(self.kind, True) if solved is None else _read(solved, question_field, solution_field))
        examples = [row for row in examples if row[0] != question]
        rng.shuffle(examples)
        intro = "Solve the problem. Solved examples come first."
        last = question_form.format(question=question)
        prefix = solution_form.format(solution="").rstrip()
        used = len(encode(tokenizer, Draft(f"{intro}\n\n{last}", prefix, (solution,))))
        if used > length:
            raise ValueError(f"task {self.name!r}: the problem alone takes {used} of length={length} tokens")
        shown: list[str] = []
        for example, worked in examples[: self.shots]:
            text = question_form.format(question=example) + "\n" + solution_form.format(solution=worked)
            cost = len(encode_text(tokenizer, text)) + 4
            if used + cost > length:
                if self.shots is None and length - used > 200:
                    continue
                break
            shown.append(text)
            used += cost
        draft = Draft("\n\n".join((intro, *shown, last)), prefix, (solution,))
        encoded = encode(tokenizer, draft)
        return Sample(
            task=self.name,
            task_class=self.task_class,
            prompt_ids=encoded.prompt_ids,
            answer_ids=encoded.answer_ids,
            answers=(final_answer(self.kind, solution),),
            metric=self.metric,
            teacher_forced=False,
            meta={"split": split, "length": length, "row": asked + 1, "shots": len(shown)},
        )
