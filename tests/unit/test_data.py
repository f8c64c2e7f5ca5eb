"""Rows, mixtures and batches."""

import json
from collections import Counter

import pytest
import torch

from flux_attention.data import HOLISTIC, RETRIEVAL, Sample
from flux_attention.training.data import (
    Collator,
    Mixture,
    MixtureDataset,
    RouterDataset,
    RowFormat,
    read_rows,
    samples_from_rows,
)

GOOD = {"context": "The cat sat on the mat.", "question": "Who sat?", "answer": "the cat", "task": "qa"}


class CharTokenizer:
    """A character is a token; enough to check what is joined and cut."""

    chat_template = "plain"
    eos_token_id = 1

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return f"[{messages[0]['content']}]"

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def tokenizer():
    return CharTokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_become_chat_samples(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "answer": ["a dog", "dog"], "class": "holistic"}])
    first, second = samples_from_rows(path, tokenizer)
    assert tokenizer.decode(first.prompt_ids) == "[The cat sat on the mat.\n\nWho sat?]"
    assert tokenizer.decode(first.answer_ids[:-1]) == "the cat"
    assert first.answer_ids[-1] == tokenizer.eos_token_id
    assert first.spans == ((0, 7),)
    assert (first.task_class, second.task_class) == (RETRIEVAL, HOLISTIC)
    assert second.answers == ("a dog", "dog")
    assert len(list(samples_from_rows(path, tokenizer, limit=1))) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({k: v for k, v in GOOD.items() if k != "answer"}, r"row 2.*'answer' is missing"),
        ({k: v for k, v in GOOD.items() if k != "task"}, r"row 2.*'task' is missing"),
        ({**GOOD, "context": 3}, r"row 2.*'context' must be a string"),
        ({**GOOD, "answer": " "}, r"row 2.*'answer' is empty"),
        ({**GOOD, "task": "juggling"}, r"row 2.*'juggling', which has no class"),
        ({**GOOD, "class": "other"}, r"row 2.*'class' must be one of"),
    ],
)
def test_bad_rows_name_row_and_field(tmp_path, tokenizer, row, message):
    path = write(tmp_path / "rows.jsonl", [GOOD, row])
    with pytest.raises(ValueError, match=message):
        list(samples_from_rows(path, tokenizer))


def test_bad_files(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{oops\n")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"context": "caf\xe9", "question": "q", "answer": "a", "task": "qa"}\n')
    with pytest.raises(ValueError, match=r"latin.jsonl, row 1: field 'context' holds a byte that is not UTF-8 \(0xE9"):
        list(samples_from_rows(latin, tokenizer))
    with pytest.raises(ValueError, match="row 2: not JSON"):
        list(read_rows(path))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="row 1: expected an object"):
        list(read_rows(path))
    with pytest.raises(FileNotFoundError, match="gone"):
        list(read_rows(tmp_path / "gone.jsonl"))


def test_task_classes_can_be_added(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{**GOOD, "task": "juggling"}])
    (sample,) = samples_from_rows(path, tokenizer, RowFormat(task_classes={"juggling": HOLISTIC}))
    assert sample.task_class == HOLISTIC
    with pytest.raises(ValueError, match="task_classes"):
        RowFormat(task_classes={"juggling": "ball"})


def test_overlong_rows(tmp_path, tokenizer):
    context = "".join(chr(ord("a") + i % 26) for i in range(400))
    path = write(tmp_path / "rows.jsonl", [{**GOOD, "context": context}])
    (whole,) = samples_from_rows(path, tokenizer, RowFormat())
    (sample,) = samples_from_rows(path, tokenizer, RowFormat(max_length=101))
    assert sample.meta["cut"] == len(whole) - len(sample) > 0 and "cut" not in whole.meta
    assert len(sample) <= 101
    text = tokenizer.decode(sample.prompt_ids)
    assert text.startswith("[" + context[:20])
    assert text.endswith(context[-20:] + "\n\nWho sat?]")
    assert not list(samples_from_rows(path, tokenizer, RowFormat(max_length=101, overlong="skip")))
    with pytest.raises(ValueError, match="max_length=101"):
        list(samples_from_rows(path, tokenizer, RowFormat(max_length=101, overlong="error")))
    with pytest.raises(ValueError, match="leave room"):
        list(samples_from_rows(path, tokenizer, RowFormat(max_length=15)))


def test_parquet_rows(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([GOOD, GOOD]).to_parquet(str(tmp_path / "rows.parquet"))
    samples = list(samples_from_rows(tmp_path / "rows.parquet", tokenizer))
    assert [s.task for s in samples] == ["qa", "qa"]


def mixture(**kwargs):
    chosen = {"tasks": ("niah_single_1", "kv_lookup", "fewshot_topic"), "lengths": (2500, 4000), "seed": 5}
    return Mixture(**{**chosen, **kwargs})


def test_mixture_is_repeatable_by_index(tokenizer):
    data = MixtureDataset(mixture(), tokenizer, 12)
    again = MixtureDataset(mixture(), tokenizer, 100)
    assert [data[i] for i in (7, 3)] == [again[i] for i in (7, 3)]
    assert data[0] != MixtureDataset(mixture(seed=6), tokenizer, 12)[0]
    assert all(len(data[i]) <= 4000 for i in range(12))
    with pytest.raises(IndexError, match="12"):
        data[12]


def test_mixture_balances_classes_in_every_block():
    even = mixture()
    for block in range(20):
        assert Counter(even.class_of(8 * block + i) for i in range(8)) == {RETRIEVAL: 4, HOLISTIC: 4}
    uneven = mixture(class_weights={RETRIEVAL: 0.3, HOLISTIC: 0.7})
    share = sum(uneven.class_of(i) == RETRIEVAL for i in range(4000)) / 4000
    assert share == pytest.approx(0.3, abs=0.02)


def test_mixture_takes_own_samples(tokenizer):
    own = Sample("mine", HOLISTIC, (5, 6), (7,), ("x",), "f1")
    other = Sample("mine", RETRIEVAL, (5, 6), (7,), ("x",), "f1")
    drawn = [mixture(extra=(own, other), extra_share=1.0).sample(i, tokenizer) for i in range(8)]
    assert [sum(sample is one for sample in drawn) for one in (own, other)] == [4, 4]
    # Rows of one class stand beside built-in samples of the other, or alone.
    drawn = [mixture(extra=(own,), extra_share=0.999).sample(i, tokenizer) for i in range(8)]
    assert sum(sample is own for sample in drawn) == 4
    alone = mixture(extra=(own,), extra_share=1.0, class_weights={HOLISTIC: 1.0})
    assert all(alone.sample(i, tokenizer) is own for i in range(8))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tasks": ()}, "non-empty"),
        ({"tasks": ("kv_lookup", "kv_lookup")}, "distinct"),
        ({"tasks": ("nope",)}, "unknown task"),
        ({"tasks": ("kv_lookup",)}, "no task of the mixture has this class"),
        ({"lengths": ()}, "lengths"),
        ({"length_weights": (1.0,)}, "length_weights"),
        ({"task_weights": {"nope": 1.0}}, "task_weights"),
        ({"class_weights": {"other": 1.0}}, "class_weights"),
        ({"extra_share": 0.5}, "extra"),
        ({"extra_share": 1.0, "extra": (Sample("a", HOLISTIC, (5,), (7,), ("x",), "f1"),)}, "is of class 'retrieval'"),
    ],
)
def test_bad_mixtures(kwargs, message):
    with pytest.raises(ValueError, match=message):
        mixture(**kwargs)


def test_collator_pads_right_and_labels_answers_only():
    samples = [
        Sample("a", RETRIEVAL, (5, 6, 7), (8, 9), ("x",), "f1"),
        Sample("b", HOLISTIC, (3,), (4, 4, 4, 4, 4, 4), ("x",), "nll"),
    ]
    batch = Collator(pad_token_id=2, pad_to_multiple=4)(RouterDataset(samples).samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 2, 2, 2], [3, 4, 4, 4, 4, 4, 4, 2]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 7]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 9, -100, -100, -100], [-100, 4, 4, 4, 4, 4, 4, -100]]
    assert batch["prompt_lens"].tolist() == [3, 1]
    assert batch["class_index"].tolist() == [0, 1]
    assert all(value.dtype == torch.int64 for value in batch.values())
    with pytest.raises(ValueError, match="empty"):
        Collator(pad_token_id=0)([])
    with pytest.raises(ValueError, match="at least one"):
        RouterDataset([])
