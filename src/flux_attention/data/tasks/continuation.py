"""Continuation of prose or code: mean negative log-likelihood of the next 128 tokens, or of the whole second half."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from flux_attention.data.corpus import window
from flux_attention.data.prompt import chat_text, encode_text
from flux_attention.data.sample import HOLISTIC, Sample
from flux_attention.data.tasks.base import Task, choose

_PROSE_TEST = ("Continue the following text.", "What comes next in this documentation?")
_PROSE_TRAIN = ("Write on where this text stops.", "Here is a part of a manual. Carry on.", "Go on with the text.")
_CODE_TEST = ("Please complete the code given below.", "What are the next lines of this program?")
_CODE_TRAIN = ("Finish this Python file.", "Write the code that follows.", "Continue the program.")


@dataclass(frozen=True, kw_only=True)
class Continuation(Task):
    """The answer is whatever stands next in the source.

    The text stands in the assistant's turn, so that the answer continues it without a break; in training half of
    the samples keep only its last lines there and put the rest into the user's turn.

    Args:
        answer_tokens: what is scored.
        answer_share: the same as a share of the sample's tokens, where that is more.
        in_reply: tokens before the answer that always stand in the assistant's turn.
    """

    task_class: str = HOLISTIC
    metric: str = "nll"
    source: str = "topics"
    test_source: str = "topics"
    answer_tokens: int = 128
    answer_share: float = 0.0
    in_reply: int = 64

    def sample(self, rng: random.Random, tokenizer: Any, length: int, split: str) -> Sample:
        self._check(length, split)
        source = self.source if split == "train" else self.test_source
        if source == "code":
            instruction, index = choose(rng, split, _CODE_TRAIN, _CODE_TEST)
        else:
            instruction, index = choose(rng, split, _PROSE_TRAIN, _PROSE_TEST)
        divided = split == "train" and rng.random() < 0.5
        # Ten characters a token is more than any of the sources has; the surplus is cut below.
        found = window(source, split, rng, 10 * length)
        ids = encode_text(tokenizer, found.text)
        marker = "\x00"
        if divided:
            before, after = chat_text(tokenizer, f"{instruction}\n{marker}").split(marker)
        else:
            before, after = chat_text(tokenizer, instruction), ""
        head, middle = encode_text(tokenizer, before), encode_text(tokenizer, after) if after else []
        room = length - len(head) - len(middle)
        scored = max(self.answer_tokens, int(self.answer_share * length))
        if room < scored + self.in_reply + 1:
            raise ValueError(f"task {self.name!r} needs more than length={length} tokens for its answer and context")
        ids = ids[-room:]
        context, answer = ids[:-scored], ids[-scored:]
        cut = len(context) - self.in_reply if divided else 0
        prompt = head + context[:cut] + middle + context[cut:]
        return Sample(
            task=self.name,
            task_class=self.task_class,
            prompt_ids=tuple(prompt),
            answer_ids=tuple(answer),
            answers=(tokenizer.decode(answer),),
            metric=self.metric,
            teacher_forced=False,
            meta={"split": split, "length": length, "document": found.name, "source": source, "phrasing": index},
        )
