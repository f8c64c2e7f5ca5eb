"""The training benchmark runs anywhere on a toy model, and records what it measured."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "training.py"),
        "--tiny",
        "--device",
        "cpu",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_the_toy_run_checks_and_records(tmp_path):
    done = run("--out", tmp_path, "--sparsity", "0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "relative error of the gradient" in done.stdout
    (path,) = tmp_path.glob("training-sparse50-*.json")
    data = json.loads(path.read_text())
    figures = {figure["name"]: figure["value"] for figure in data["figures"]}
    assert set(figures) == {
        "train_8b_1k_lm_sparse50_tokens_per_s",
        "train_8b_1k_distill_sparse50_tokens_per_s",
        "train_8b_1k_peak_gb_sparse50",
    }
    assert figures["train_8b_1k_lm_sparse50_tokens_per_s"] > 0
    rows = data["details"]["table"]
    assert [row["objective"] for row in rows] == ["lm", "distill"]
    # The route was what the command line asked for.
    assert all(row["omega"] == 0.5 for row in rows)
    assert data["settings"]["backbone"] == "toy"


def test_rows_that_there_is_no_time_for_are_left_to_the_next_run(tmp_path):
    """Another run of the same commit adds its rows; each row is there as soon as it is known."""
    done = run(
        "--out", tmp_path, "--lengths", "1024,90000000", "--objectives", "lm", "--seconds", 600, "--commit", "a1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no time left for 90000000 tokens of lm" in done.stdout
    # The long row would have had no time, so that only an objective's first row is warmed up.
    assert done.stdout.count("step 1") == 1
    again = run("--out", tmp_path, "--lengths", "1024,2048", "--objectives", "distill", "--commit", "a1")
    assert again.returncode == 0, again.stdout + again.stderr
    (path,) = tmp_path.glob("training-*.json")
    data = json.loads(path.read_text())
    rows = [(row["tokens"], row["objective"]) for row in data["details"]["table"]]
    assert rows == [(1024, "lm"), (1024, "distill"), (2048, "distill")]
    names = {figure["name"] for figure in data["figures"]}
    assert {f"train_8b_{n}_tokens_per_s" for n in ("1k_lm", "1k_distill", "2k_distill")} < names
