"""From text to token ids: chat prompts with an answer prefix, and fitting them to a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

ACCEPTED_SHARE = 0.95  # a prompt at least this full is not worth another try
_TRIES = 16


class SizeLimitError(ValueError):
    """A draft of this size needs more texts than there are; `most` is the largest size that they suffice for."""

    def __init__(self, message: str, most: int) -> None:
        super().__init__(message)
        self.most = most


@dataclass(frozen=True)
class Draft:
    """A prompt and its answer as text.

    Args:
        user: the user's turn.
        prefix: what the assistant's turn starts with; the answer follows directly, usually after a space.
        references: what is scored, in the order of the reference answer.
        separator: put behind each reference but the last (not scored); a tuple has one for each.
    """

    user: str
    prefix: str
    references: tuple[str, ...]
    separator: str | tuple[str, ...] = ","
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def check_text(text: str, where: str) -> None:
    """Raise ValueError naming `where` for a lone surrogate, which no tokenizer takes: JSON can spell one, and Python
    reads bytes that are not UTF-8 as such (`surrogateescape`)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ord(text[error.start])
        what = f"half of a surrogate pair (U+{found:04X}"
        if 0xDC80 <= found <= 0xDCFF:
            what = f"a byte that is not UTF-8 (0x{found - 0xDC00:02X}"
        raise ValueError(f"{where} holds {what}, character {error.start + 1})") from None


def encode_text(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_text(tokenizer: Any, user: str, prefix: str = "") -> str:
    """The chat template's text up to where the answer starts; plain text for a tokenizer without a template.

    A template writes the token that begins every text where the model has one; plain text gets it here.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        begin = getattr(tokenizer, "bos_token_id", None)
        starts = begin is not None and list(tokenizer("a")["input_ids"])[:1] == [begin]
        return (tokenizer.bos_token if starts else "") + user + "\n" + prefix
    messages = [{"role": "user", "content": user}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)) + prefix


def encode(tokenizer: Any, draft: Draft) -> Encoded:
    prompt = encode_text(tokenizer, chat_text(tokenizer, draft.user, draft.prefix))
    # An answer that starts a turn, a line or a quotation has no space before it.
    space = "" if not draft.prefix or draft.prefix[-1].isspace() or draft.prefix[-1] in "\"'([{" else " "
    answer: list[int] = []
    spans = []
    for i, reference in enumerate(draft.references):
        start = len(answer)
        answer += encode_text(tokenizer, (space if i == 0 else " ") + reference)
        spans.append((start, len(answer)))
        if i + 1 < len(draft.references) and draft.separator:
            answer += encode_text(
                tokenizer, draft.separator if isinstance(draft.separator, str) else draft.separator[i]
            )
    return Encoded(tuple(prompt), tuple(answer), tuple(spans))


def fit(
    tokenizer: Any, length: int, build: Callable[[int], Draft], *, least: int, guess: int, name: str
) -> tuple[Draft, Encoded]:
    """The largest draft found that takes at most `length` tokens.

    `build(n)` must give the same draft for the same n and grow with n (units are the task's: characters, rows, ...).

    Raises:
        ValueError: when even `build(least)` is longer than `length`, or `length` takes more texts than there are.
    """
    limit: SizeLimitError | None = None
    best: tuple[Draft, Encoded] | None = None
    low, low_size = least - 1, 0  # largest n known to fit
    high: int | None = None  # smallest n known not to fit
    n = max(least, guess)
    points: list[tuple[int, int]] = []
    for _ in range(_TRIES):
        try:
            draft = build(n)
        except SizeLimitError as error:
            limit = error
            if error.most <= low or error.most < least:
                break
            # Guesses may overshoot: what the texts suffice for may still fill the length.
            draft, n = build(error.most), error.most
        encoded = encode(tokenizer, draft)
        size = len(encoded)
        points.append((n, size))
        if size <= length:
            if best is None or size >= len(best[1]):
                best = (draft, encoded)
            low, low_size = n, size
            if size >= ACCEPTED_SHARE * length:
                break
        else:
            high = n
        # Secant through the last two points, aimed a little below the limit.
        if len(points) > 1 and points[-1][0] != points[-2][0] and points[-1][1] != points[-2][1]:
            slope = (points[-1][1] - points[-2][1]) / (points[-1][0] - points[-2][0])
        else:
            slope = size / max(n, 1)
        # A size that hardly changed says little about the slope; no step goes far beyond what was seen.
        slope = max(slope, 0.2 * size / max(n, 1))
        aim = min(n + int((0.98 * length - size) / slope), 4 * max(n, 1))
        if high is not None:
            aim = min(aim, high - 1)
        aim = max(aim, low + 1 if low_size else least)
        if high is not None and aim >= high:
            break
        if aim == n:
            break
        n = aim
    # A prompt that did not fit shows that there was text enough.
    if limit is not None and high is None and (best is None or len(best[1]) < ACCEPTED_SHARE * length):
        longest = "" if best is None else f", its longest prompt and answer take {len(best[1])} tokens"
        raise ValueError(f"task {name!r}: length={length} is too long{longest}: {limit}")
    if best is None:
        draft = build(least)
        encoded = encode(tokenizer, draft)
        if len(encoded) > length:
            raise ValueError(
                f"task {name!r} needs more than length={length} tokens; its shortest prompt does not fit: it takes "
                f"{len(encoded)} with its answer"
            )
        best = (draft, encoded)
    return best


def join_list(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b, and c`."""
    if len(items) < 2:
        return "".join(items)
    if len(items) == 2:
        return f"{items[0]} and {items[1]}"
    return ", ".join(items[:-1]) + f", and {items[-1]}"
