"""Summary: what a module is for, from its source without its docstring; scored by the docstring's NLL."""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flux_attention.data.corpus import Document, documents
from flux_attention.data.prompt import chat_text, encode_text
from flux_attention.data.sample import HOLISTIC, Sample
from flux_attention.data.tasks.base import Task, choose

_TEST = (
    ("You are given the source of a Python module. Summarise what it is for.", "Summary of the module {name}:"),
    ("Read the module below and describe its purpose.", "The purpose of {name}:"),
)
_TRAIN = (
    ("Here is Python source. Write the docstring that it lacks.", "Docstring of {name}:"),
    ("What does this module offer?", "The module {name}:"),
)
_CHARS = (150, 4000)  # docstrings shorter than this say nothing, longer ones are manuals


@lru_cache(maxsize=2)
def _modules(split: str) -> tuple[tuple[Document, str], ...]:
    """Modules without their docstring, and the docstring."""
    found = []
    for document in documents("code", split):
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            continue
        summary = ast.get_docstring(tree)
        if summary and _CHARS[0] <= len(summary) <= _CHARS[1] and ">>>" not in summary and tree.body[1:]:
            lines = document.text.splitlines()
            rest = "\n".join(lines[tree.body[0].end_lineno :]).strip()
            if len(rest) > 3000:
                found.append((Document(document.name, rest), " ".join(summary.split())))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class ModuleSummary(Task):
    """Modules that are too short for the length are preceded by others, each under its name."""

    task_class: str = HOLISTIC
    metric: str = "nll"
    answer_tokens: int = 128

    def sample(self, rng: random.Random, tokenizer: Any, length: int, split: str) -> Sample:
        self._check(length, split)
        (instruction, prefix), index = choose(rng, split, _TRAIN, _TEST)
        modules = _modules(split)
        at = rng.randrange(len(modules))
        module, summary = modules[at]
        answer = encode_text(tokenizer, " " + summary)[: self.answer_tokens]
        marker = "\x00"
        before, after = chat_text(tokenizer, f"{instruction}\n\n{marker}", prefix.format(name=module.name)).split(
            marker
        )
        head, tail = encode_text(tokenizer, before), encode_text(tokenizer, after)
        room = length - len(head) - len(tail) - len(answer)
        if room < 64:
            raise ValueError(f"task {self.name!r} needs more than length={length} tokens for its answer and context")
        # The module's beginning says most; what is cut is its end.
        body = encode_text(tokenizer, f"# {module.name}\n{module.text[: 10 * room]}\n")[:room]
        while len(body) < room:
            at = (at + 1) % len(modules)
            other = modules[at][0]
            body = encode_text(tokenizer, f"# {other.name}\n{other.text[: 10 * room]}\n")[: room - len(body)] + body
        return Sample(
            task=self.name,
            task_class=self.task_class,
            prompt_ids=tuple(head + body + tail),
            answer_ids=tuple(answer),
            answers=(summary,),
            metric=self.metric,
            teacher_forced=False,
            meta={"split": split, "length": length, "document": module.name, "phrasing": index},
        )
