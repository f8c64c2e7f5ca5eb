"""From rows to a stored data set: classes, tokens, duplicates, lengths. And what is wrong with rows, by number."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flux_attention.data.prompt import encode_text
from flux_attention.data.sample import TASK_CLASSES, Sample
from flux_attention.training.data import RowFormat, row_to_sample
from flux_attention.training.packing import pack_lengths
from flux_attention.training.sources import Rows
from flux_attention.training.store import MANIFEST_FILE, StoreError, fingerprint, write_store

#: Bad rows that an error message lists.
_LISTED = 10


class BadRowsError(ValueError):
    """Rows that cannot be used; the message names the first of them and says how many there are."""


@dataclass(frozen=True)
class Checked:
    """A row: its sample, why it is left out ("duplicate", "too long", "not answerable"), or what is wrong with it."""

    where: str
    sample: Sample | None = None
    left_out: str | None = None
    error: str | None = None


def checked_rows(
    rows: Rows, tokenizer: Any, fmt: RowFormat, seen: set[bytes], split: str = "train", limit: int | None = None
) -> Iterator[Checked]:
    """Every row of a source, judged. `seen` holds the digests of rows kept so far, over all sources.

    `limit`: most samples.
    """
    kept = 0
    for where, row in rows.read(split):
        if limit is not None and kept >= limit:
            return
        if isinstance(row, ValueError):
            yield Checked(where, error=str(row))
            continue
        if row is None:
            yield Checked(where, left_out="not answerable")
            continue
        try:
            sample = row_to_sample(row, tokenizer, fmt, where=where)
        except ValueError as error:
            yield Checked(where, error=str(error))
            continue
        digest = _digest(row, fmt)
        if sample is None or digest in seen:
            yield Checked(where, left_out="too long" if sample is None else "duplicate")
            continue
        seen.add(digest)
        kept += 1
        yield Checked(where, sample=sample)


def build(
    sources: Sequence[Rows],
    tokenizer: Any,
    folder: str | Path,
    fmt: RowFormat | None = None,
    *,
    split: str = "train",
    limit: int | None = None,
    skip_bad: bool = False,
    pack_tokens: int | None = None,
) -> tuple[dict[str, Any], bool]:
    """Tokenise rows and store them; does nothing when the folder already holds the result of the same call.

    Args:
        sources: where the rows come from.
        tokenizer: of the backbone.
        folder: of the data set.
        fmt: fields, classes and the longest sample.
        split: of sets on the Hub.
        limit: most samples of each source.
        skip_bad: leave bad rows out and count them, instead of refusing the data.
        pack_tokens: also say how well packs of this length would be filled.

    Returns:
        the manifest, and whether it was there already.

    Raises:
        BadRowsError: rows without a class, without an answer, of another form, …; the first ones are named.
        StoreError: no sample is left.
        OSError: the disk is full; a data set that was there stays.
    """
    fmt, folder = fmt or RowFormat(), Path(folder)
    made_of = {
        "sources": [{"source": s.label, "file": _file_facts(s)} for s in sources],
        "tokenizer": describe_tokenizer(tokenizer),
        "format": {**asdict(fmt), "task_classes": dict(fmt.task_classes)},
        "split": split,
        "limit": limit,
        "skip_bad": skip_bad,
        "pack_tokens": pack_tokens,
    }
    key = fingerprint(made_of)
    if (there := _stored(folder, key)) is not None:
        return there, True
    samples: list[Sample] = []
    left_out: Counter[str] = Counter()
    bad: list[str] = []
    seen: set[bytes] = set()
    for source in sources:
        for row in checked_rows(source, tokenizer, fmt, seen, split, limit):
            if row.sample is not None:
                # Where a row came from is of no use in training, and a string for each takes memory.
                samples.append(replace(row.sample, meta={}))
            elif row.left_out is not None:
                left_out[row.left_out] += 1
            else:
                bad.append(str(row.error))
    if bad and not skip_bad:
        shown = "\n  ".join(bad[:_LISTED])
        more = f"\n  and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        raise BadRowsError(
            f"{len(bad)} rows cannot be used:\n  {shown}{more}\nMend them (flux-attn data check names every one), or "
            "leave them out with --skip-bad"
        )
    if not samples:
        reasons = "".join(f", {count} left out ({reason})" for reason, count in left_out.items())
        raise StoreError(f"no sample is left: {len(bad)} bad rows{reasons or ', and no others'}")
    facts: dict[str, Any] = {"key": key, "made_of": made_of, "left_out": dict(left_out), "bad_rows": len(bad)}
    if pack_tokens is not None:
        lengths = [len(sample) for sample in samples]
        packs = pack_lengths(lengths, pack_tokens)
        facts["packs"] = {
            "tokens": pack_tokens,
            "count": len(packs),
            "filled": sum(lengths) / (len(packs) * pack_tokens),
        }
    missing = [name for name in TASK_CLASSES if not any(sample.task_class == name for sample in samples)]
    if missing:
        facts["warning"] = f"no sample of class {', '.join(missing)}: its routes will be whatever the other class needs"
    return write_store(folder, samples, facts), False


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What tells two tokenizers apart, with a short text in their tokens."""
    return {
        "name": str(getattr(tokenizer, "name_or_path", type(tokenizer).__name__)),
        "template": fingerprint(getattr(tokenizer, "chat_template", None)),
        "probe": encode_text(tokenizer, "The 2 quick foxes: naïve, 東京!\n\tfor x in y:"),
    }


def _digest(row: Any, fmt: RowFormat) -> bytes:
    """Of what makes a row itself: context, question and answer, whatever their spacing."""
    parts: list[str] = []
    for name in (fmt.context, fmt.question, fmt.answer):
        value = row[name]
        parts += [" ".join(text.split()) for text in ([value] if isinstance(value, str) else value)]
    text = "\0".join(parts)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _file_facts(rows: Rows) -> dict[str, Any]:
    path = Path(rows.place)
    if not path.is_file():
        return {"hub": rows.place}
    with path.open("rb") as file:
        return {"path": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _stored(folder: Path, key: str) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if manifest.get("key") == key else None
