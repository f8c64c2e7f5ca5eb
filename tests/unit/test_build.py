"""Rows to a stored data set: every form of row, what is left out, what is refused by number, and the cache."""

import json

import pytest
import torch

from flux_attention.data import HOLISTIC, RETRIEVAL
from flux_attention.training import store as store_module
from flux_attention.training.build import BadRowsError, build, checked_rows
from flux_attention.training.data import RowFormat
from flux_attention.training.packing import PackedDataset
from flux_attention.training.sources import SOURCES, Rows
from flux_attention.training.store import StoredSamples, StoreError

from .test_data import GOOD, CharTokenizer, write

MUSIQUE = {
    "paragraphs": [
        {"idx": 0, "title": "Rome", "paragraph_text": "A city.", "is_supporting": True},
        {"idx": 1, "title": "Tiber", "paragraph_text": "A river.", "is_supporting": False},
    ],
    "question": "What flows there?",
    "answer": "the Tiber",
    "answer_aliases": ["Tiber"],
    "answerable": True,
}
COLT = {
    "prefix": "def f(x):\n    return ",
    "middle": "g(x)",
    "suffix": "\n",
    "code_file_path": "a/f.py",
    "cross_file_dependency": [{"code_file_path": "a/g.py", "abstraction": "def g(x): ..."}],
}
# One row of each set as it is published, and what it should become.
STAND_INS = {
    "chatqa2-long": (
        {"question": "User: Once upon a time.\n\nThe end.\n\nQ: Who was it?\n\nAssistant:", "answer": ["nobody"]},
        ("Once upon a time.\n\nThe end.\n\nQ: Who was it?", "nobody", RETRIEVAL),
    ),
    "musique": (MUSIQUE, ("Rome\nA city.\n\nTiber\nA river.\n\nWhat flows there?", "the Tiber", RETRIEVAL)),
    "colt-132k": (
        COLT,
        ("# a/g.py\ndef g(x): ...\n\n# a/f.py\ndef f(x):\n    return\n\nContinue the code.", "g(x)", HOLISTIC),
    ),
    "govreport": (
        {"report": "A long report.", "summary": "Short."},
        ("A long report.\n\nSummarise the text above.", "Short.", HOLISTIC),
    ),
    "xsum": (
        {"document": "News.", "summary": "New.", "id": "1"},
        ("News.\n\nSummarise the text above.", "New.", HOLISTIC),
    ),
}


def rows_of(path):
    return Rows.parse(str(path))


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("how", ["file", "hub", "parquet"])
def test_every_known_set_becomes_samples(tmp_path, monkeypatch, name, how):
    row, (prompt, answer, task_class) = STAND_INS[name]
    tokenizer = CharTokenizer()
    if how == "hub":
        if SOURCES[name].hub is None:
            with pytest.raises(ValueError, match=r"'colt-132k' is not on the Hub .*zenodo.*colt-132k=FILE"):
                Rows.parse(name)
            return
        datasets = pytest.importorskip("datasets")
        asked = []

        def load_dataset(place, subset, *, split, streaming):
            asked.append((place, subset, split, streaming))
            return iter([row])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        rows = Rows.parse(name)
    elif how == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist([row])
        parquet.write_table(table, tmp_path / "rows.parquet")
        rows = Rows.parse(f"{name}={tmp_path / 'rows.parquet'}")
    else:
        rows = Rows.parse(f"{name}={write(tmp_path / 'rows.jsonl', [row])}")
    (found,) = checked_rows(rows, tokenizer, RowFormat(), set())
    assert found.error is None
    assert tokenizer.decode(found.sample.prompt_ids) == f"[{prompt}]"
    assert tokenizer.decode(found.sample.answer_ids[:-1]) == answer
    assert found.sample.task_class == task_class
    if how == "hub":
        assert asked == [(SOURCES[name].hub, SOURCES[name].subset, "train", True)]


def test_summaries_among_conversations_are_holistic(tmp_path):
    row = {"question": "User: A text.\n\nPlease write a summary of it.\n\nAssistant:", "answer": "Text."}
    path = write(tmp_path / "rows.jsonl", [row])
    (found,) = checked_rows(Rows.parse(f"chatqa2-long={path}"), CharTokenizer(), RowFormat(), set())
    assert found.sample.task_class == HOLISTIC


def test_unanswerable_questions_are_left_out(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**MUSIQUE, "answerable": False}])
    (found,) = checked_rows(Rows.parse(f"musique={path}"), CharTokenizer(), RowFormat(), set())
    assert found.left_out == "not answerable"


BAD = [
    ({**GOOD, "task": "riddle"}, "row 2: field 'task' holds 'riddle', which has no class"),
    ({k: v for k, v in GOOD.items() if k != "task"}, "row 2: field 'task' is missing"),
    ({**GOOD, "class": "hard"}, "row 2: field 'class' must be one of"),
    ({k: v for k, v in GOOD.items() if k != "answer"}, "row 2: field 'answer' is missing"),
    ({**GOOD, "answer": " "}, "row 2: field 'answer' is empty"),
    ({**GOOD, "context": 7}, "row 2: field 'context' must be a string, got int"),
    ({**GOOD, "context": "a \ud800 b"}, "row 2: field 'context' holds half of a surrogate pair (U+D800, character 3)"),
    ({**GOOD, "answer": ["\udfff"]}, "row 2: field 'answer' holds half of a surrogate pair"),
    ("not an object", "row 2: expected an object with fields, got str"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message[7:40] for _, message in BAD])
def test_bad_rows_are_named(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [GOOD, row, {**GOOD, "answer": "a dog"}])
    found = list(checked_rows(rows_of(path), CharTokenizer(), RowFormat(), set()))
    assert [row.error is None for row in found] == [True, False, True]
    assert message in found[1].error
    with pytest.raises(BadRowsError, match="1 rows cannot be used"):
        build([rows_of(path)], CharTokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest, _ = build([rows_of(path)], CharTokenizer(), tmp_path / "out", skip_bad=True)
    assert (manifest["samples"], manifest["bad_rows"]) == (2, 1)


def test_a_torn_line_does_not_hide_the_rest(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), '{"context": ', json.dumps({**GOOD, "answer": "x"}), "[]"]))
    found = [row.error for row in checked_rows(rows_of(path), CharTokenizer(), RowFormat(), set())]
    assert found[0] is None and found[2] is None
    assert "row 2: not JSON" in found[1] and "row 4: expected an object" in found[3]


def test_rows_of_another_set_are_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD])
    (found,) = checked_rows(Rows.parse(f"govreport={path}"), CharTokenizer(), RowFormat(), set())
    assert "govreport, row 1: field 'report' is missing; the row has context, question" in found.error
    path = write(tmp_path / "other.jsonl", [{"question": "no document", "answer": "x"}])
    (found,) = checked_rows(Rows.parse(f"chatqa2-long={path}"), CharTokenizer(), RowFormat(), set())
    assert "row 1: field 'question' must hold a document" in found.error


def test_duplicates_are_left_out_whatever_their_spacing(tmp_path):
    same = {**GOOD, "context": " The  cat sat\non the mat. "}
    one = write(tmp_path / "one.jsonl", [GOOD, same, {**GOOD, "question": "Where?"}])
    two = write(tmp_path / "two.jsonl", [GOOD])
    manifest, _ = build([rows_of(one), rows_of(two)], CharTokenizer(), tmp_path / "out")
    assert manifest["samples"] == 2
    assert manifest["left_out"] == {"duplicate": 2}


def test_a_stored_set_gives_its_samples_back(tmp_path):
    rows = [{**GOOD, "answer": f"answer {i}", "task": ("qa", "summary")[i % 2], "context": "x " * i} for i in range(20)]
    path = write(tmp_path / "rows.jsonl", rows)
    expected = [r.sample for r in checked_rows(rows_of(path), CharTokenizer(), RowFormat(), set())]
    manifest, there = build([rows_of(path)], CharTokenizer(), tmp_path / "out", pack_tokens=200)
    assert not there
    stored = StoredSamples(tmp_path / "out")
    assert len(stored) == 20 and stored.lengths == [len(s) for s in expected]
    for sample, wanted in zip(stored, expected, strict=False):
        assert (sample.prompt_ids, sample.answer_ids) == (wanted.prompt_ids, wanted.answer_ids)
        assert (sample.task, sample.task_class) == (wanted.task, wanted.task_class)
    assert stored.largest_token == max(max(s.prompt_ids + s.answer_ids) for s in expected)
    table = {(r["class"], r["task"]): r for r in manifest["statistics"]}
    assert set(table) == {(RETRIEVAL, "qa"), (HOLISTIC, "summary")}
    mine = sorted(len(s) for s in expected if s.task == "qa")
    assert table[RETRIEVAL, "qa"]["samples"] == 10
    assert table[RETRIEVAL, "qa"]["tokens"] == sum(mine) and table[RETRIEVAL, "qa"]["longest"] == mine[-1]
    assert manifest["packs"]["filled"] == pytest.approx(sum(stored.lengths) / (200 * manifest["packs"]["count"]))
    packs = PackedDataset(stored, 200, lengths=stored.lengths)
    assert sum(len(pack) for pack in packs.packs) == 20
    with pytest.raises(IndexError):
        stored[20]


def test_the_same_build_is_not_done_twice(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "answer": "b"}])
    calls = []

    class Counting(CharTokenizer):
        def __call__(self, text, add_special_tokens):
            calls.append(text)
            return super().__call__(text, add_special_tokens)

    tokenizer, out = Counting(), tmp_path / "out"
    assert build([rows_of(path)], tokenizer, out)[1] is False
    first = len(calls)
    assert build([rows_of(path)], tokenizer, out)[1] is True
    assert len(calls) == first + 1  # the tokenizer's probe alone
    for change in ({"limit": 1}, {"fmt": RowFormat(max_length=60)}):
        assert build([rows_of(path)], tokenizer, out, **change)[1] is False
    write(path, [GOOD])
    manifest, there = build([rows_of(path)], tokenizer, out)
    assert not there and manifest["samples"] == 1
    assert "no sample of class holistic" in manifest["warning"]


def test_limit_and_length(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**GOOD, "context": "word " * 40, "answer": str(i)} for i in range(9)])
    manifest, _ = build([rows_of(path)], CharTokenizer(), tmp_path / "out", limit=3)
    assert manifest["samples"] == 3
    fmt = RowFormat(max_length=80)
    manifest, _ = build([rows_of(path)], CharTokenizer(), tmp_path / "out", fmt)
    assert max(StoredSamples(tmp_path / "out").lengths) <= 80
    with pytest.raises(StoreError, match=r"no sample is left: 0 bad rows, 9 left out \(too long\)"):
        build([rows_of(path)], CharTokenizer(), tmp_path / "none", RowFormat(max_length=80, overlong="skip"))
    with pytest.raises(BadRowsError, match=r"9 rows cannot be used:\n.*row 1: .* more than max_length=80"):
        build([rows_of(path)], CharTokenizer(), tmp_path / "none", RowFormat(max_length=80, overlong="error"))


def test_names_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file nor a known data set"):
        Rows.parse("no-such-file.jsonl")
    with pytest.raises(ValueError, match="unknown data set 'squad'"):
        Rows.parse("squad=rows.jsonl")
    with pytest.raises(FileNotFoundError, match=r"'gone\.jsonl' is neither"):
        Rows.parse("xsum=gone.jsonl")


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(StoreError, match=r"manifest\.json is missing \(flux-attn data build\)"):
        StoredSamples(tmp_path)
    path = write(tmp_path / "rows.jsonl", [GOOD])
    out = tmp_path / "out"
    build([rows_of(path)], CharTokenizer(), out)
    tokens = out / "samples.safetensors"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-3])
    with pytest.raises(StoreError, match=r"samples\.safetensors is missing, corrupt or truncated"):
        StoredSamples(out)
    tokens.unlink()
    with pytest.raises(StoreError, match=r"samples\.safetensors is missing"):
        StoredSamples(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json: "):
        StoredSamples(out)
    (out / "manifest.json").write_text('{"format_version": 9}')
    with pytest.raises(StoreError, match="format_version must be 1"):
        StoredSamples(out)


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [GOOD])
    out = tmp_path / "out"
    build([rows_of(path)], CharTokenizer(), out)
    before = StoredSamples(out)[0]

    def full(tensors, place):
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "save_file", full)
    write(path, [GOOD, {**GOOD, "answer": "b"}])
    with pytest.raises(OSError, match="No space left"):
        build([rows_of(path)], CharTokenizer(), out)
    assert len(StoredSamples(out)) == 1 and StoredSamples(out)[0] == before
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "samples.safetensors"]
    assert torch.is_tensor(StoredSamples(out)._tokens)
