"""The benchmark of training on several ranks runs on CPUs, records what it measured, and notices what is broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "training_parallel.py"

BROKEN = f"""
import sys

sys.path.insert(0, {str(PROGRAM.parent)!r})
import training_parallel
from torch.nn.parallel import DistributedDataParallel

from flux_attention.training import parallel

# Gradients stay with their rank, and so do heads.
DistributedDataParallel.forward = lambda self, *args, **kwargs: self.module(*args, **kwargs)
parallel._exchanged = lambda x, group: x.clone()
sys.exit(training_parallel.main(sys.argv[1:]))
"""


def run(program, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(program)]
    command += ["--tiny", "--device", "cpu", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)


def recorded(folder):
    (path,) = folder.glob("training-parallel-*.json")
    data = json.loads(path.read_text())
    return data, {figure["name"]: figure["value"] for figure in data["figures"]}


def test_every_way_is_checked_and_timed(tmp_path):
    done = run(PROGRAM, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    data, figures = recorded(tmp_path)
    speedups = {"train_8b_1k_ddp2_speedup", "train_8b_1k_fsdp2_speedup", "train_8b_2k_sequence2_speedup"}
    assert {name for name in figures if name.endswith("speedup")} == speedups
    single, both = (figures[f"train_8b_1k_{way}_tokens_per_s"] for way in ("1gpu", "ddp2"))
    assert figures["train_8b_1k_ddp2_speedup"] == both / single
    assert data["settings"]["gpus"] == 2 and data["settings"]["backend"] == "gloo"
    rows = [(row["way"], row["gpus"], row["tokens"]) for row in data["details"]["table"]]
    assert rows == [("one", 1, 1024), ("ddp", 2, 1024), ("one", 1, 2048), ("sequence", 2, 2048), ("fsdp", 2, 1024)]
    assert all(len(row["peak_gb"]) == row["gpus"] for row in data["details"]["table"])
    for way in ("ddp", "sequence", "fsdp"):
        assert f"{way}, relative error of the gradient" in done.stdout


def test_gradients_and_heads_that_stay_with_their_rank_are_noticed(tmp_path):
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    done = run(program, "--out", tmp_path, "--ways", "ddp,sequence", "--seconds", 180)
    assert done.returncode != 0
    assert "FAILED ddp: rank 1 ends with other parameters than rank 0" in done.stdout
    assert "FAILED ddp: the gradient differ" in done.stdout
    assert "FAILED sequence: the gradient differ" in done.stdout
    _, figures = recorded(tmp_path)
    # What one GPU does is not in doubt.
    assert {name for name in figures if name.endswith("speedup")} == {
        "unchecked_train_8b_1k_ddp2_speedup",
        "unchecked_train_8b_2k_sequence2_speedup",
    }
    assert "train_8b_1k_1gpu_tokens_per_s" in figures


def test_ways_that_there_is_no_time_for_are_left_out(tmp_path):
    done = run(PROGRAM, "--out", tmp_path, "--ways", "fsdp", "--seconds", 30)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no time left for fsdp" in done.stdout
    assert not list(tmp_path.glob("*.json"))
