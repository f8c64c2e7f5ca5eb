"""Sets of samples in one file."""

import json

import pytest

from flux_attention.data import sample_set, tasks
from flux_attention.data.sample_set import Job, SampleSet, make_sample_set, prepared_jobs, prepared_samples, spread_jobs

from .tiny_backbone import make_tokenizer


def test_samples_come_back_as_they_were(tmp_path):
    cells = [("niah_multivalue", 900), ("docstring_continuation", 700)]
    made = make_sample_set(cells, 3, 0, "test", make_tokenizer())
    made.save(tmp_path / "samples.xz")
    again = SampleSet.load(tmp_path / "samples.xz")
    assert again.cells == made.cells and again.settings == json.loads(json.dumps(made.settings))


def test_workers_make_the_same_samples():
    cells = [("niah_single_2", 900), ("fewshot_topic", 900)]
    assert make_sample_set(cells, 3, 0, "test", make_tokenizer(), workers=2) == make_sample_set(
        cells, 3, 0, "test", make_tokenizer()
    )


def test_prepared_samples_are_made_once(tmp_path, monkeypatch):
    arguments = (tmp_path, [("niah_single_2", 900)], 2, 0, "test", make_tokenizer())
    first = prepared_samples(*arguments)
    # Another machine's texts do not matter once the file is there.
    monkeypatch.setattr(sample_set, "make_sample_set", None)
    assert prepared_samples(*arguments).cells == first.cells


@pytest.mark.parametrize("damage", [b"", b"no xz", None])
def test_damaged_sample_files(tmp_path, damage):
    path = tmp_path / "samples.xz"
    make_sample_set([("niah_single_2", 900)], 2, 0, "test", make_tokenizer()).save(path)
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    with pytest.raises(ValueError, match=r"samples\.xz .*delete it"):
        SampleSet.load(path)


def test_samples_of_another_version(tmp_path, monkeypatch):
    made = make_sample_set([("niah_single_2", 900)], 2, 0, "test", make_tokenizer())
    monkeypatch.setattr(sample_set, "VERSION", 0)
    made.save(tmp_path / "samples.xz")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="of version 0, this is 1"):
        SampleSet.load(tmp_path / "samples.xz")


def test_jobs_go_round_tasks_and_lengths():
    jobs = spread_jobs(["a", "b"], 5, [100, 200], seed=3, first=10)
    assert jobs[:3] == [Job("a", 10, 100, 3, "train"), Job("b", 11, 100, 3, "train"), Job("a", 12, 200, 3, "train")]
    assert [job.length for job in jobs] == [100, 100, 200, 200, 100]


def test_samples_of_named_jobs_come_back(tmp_path, monkeypatch):
    path, tokenizer = tmp_path / "run.xz", make_tokenizer()
    jobs = {
        "fit": spread_jobs(["niah_single_2", "fewshot_topic"], 3, [900], seed=0),
        "gates": [],
        "eval": spread_jobs(["niah_single_2"], 1, [900], seed=1, split="test"),
    }
    made = prepared_jobs(path, jobs, tokenizer)
    assert [sample.task for sample in made["fit"]] == ["niah_single_2", "fewshot_topic", "niah_single_2"]
    assert made["gates"] == [] and len(made["eval"]) == 1
    monkeypatch.setattr(sample_set, "make_jobs", None)
    assert prepared_jobs(path, jobs, tokenizer) == made
    with pytest.raises(ValueError, match=r"run\.xz holds samples of other settings"):
        prepared_jobs(path, {**jobs, "eval": []}, tokenizer)


def write_problems(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join(json.dumps({"question": f"{row} + 1?", "answer": f"#### {row + 1}"}) + "\n" for row in rows)
    )
    return path


def test_files_of_a_task_are_part_of_what_samples_are_made_from(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    path = write_problems(tmp_path / "a.jsonl", range(8))
    cells = [(f"gsm8k:{path}", 900)]
    arguments = (cells, 2, 0, "test", make_tokenizer())
    first = prepared_samples(tmp_path, *arguments)
    # The same problems elsewhere are the same; a task is known by its short name too.
    tasks.get_task(f"gsm8k:{write_problems(tmp_path / 'b' / 'a.jsonl', range(8))}")
    short = sample_set._settings([("gsm8k", 900)], 2, 0, "test", make_tokenizer())
    assert list(short["files"].values()) == list(first.settings["files"].values())
    write_problems(path, range(8, 16))
    again = prepared_samples(tmp_path, *arguments)
    assert again.settings["files"] != first.settings["files"] and again.cells != first.cells
    assert len(list(tmp_path.glob("samples-test-*.xz"))) == 2

    jobs = {"eval": [Job(f"gsm8k:{path}", 0, 900, 0, "test")]}
    made = prepared_jobs(tmp_path / "run.xz", jobs, make_tokenizer())
    assert prepared_jobs(tmp_path / "run.xz", jobs, make_tokenizer()) == made
    write_problems(path, range(4))
    with pytest.raises(ValueError, match=r"run\.xz holds samples of other settings"):
        prepared_jobs(tmp_path / "run.xz", jobs, make_tokenizer())


def test_settings_of_other_tasks_are_as_they_were():
    settings = sample_set._settings([("niah_single_2", 900), ("fewshot_topic", 900)], 2, 0, "test", make_tokenizer())
    assert set(settings) == {"cells", "samples", "seed", "split", "tokenizer"}
    revised = sample_set._settings([("free_request", 900)], 2, 0, "test", make_tokenizer())
    assert revised["revisions"] == {"free_request": 2} and "files" not in revised


def test_jobs_of_another_tokenizer_are_refused(tmp_path):
    path, tokenizer = tmp_path / "run.xz", make_tokenizer()
    jobs = {"fit": spread_jobs(["niah_single_2"], 1, [900], seed=0)}
    prepared_jobs(path, jobs, tokenizer)
    other = make_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"run\.xz holds samples of other settings"):
        prepared_jobs(path, jobs, other)
    # A file from before it named its tokenizer.
    made = SampleSet.load(path)
    SampleSet({"jobs": made.settings["jobs"]}, made.cells).save(path)
    with pytest.raises(ValueError, match=r"run\.xz holds samples of other settings"):
        prepared_jobs(path, jobs, tokenizer)
