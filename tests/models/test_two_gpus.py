"""Two GPUs over NCCL train to one GPU's numbers; a rank that fails or dies ends the run with its error."""

import pytest
import torch

from .test_ranks import JOBS, assert_ends, assert_same, failures, launch, run_straight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(autouse=True)
def _on_gpus(monkeypatch):
    monkeypatch.setenv("RANKS_DEVICE", "cuda")


def test_two_gpus_train_to_one_gpus_numbers(tmp_path):
    done = launch(tmp_path, *JOBS)
    assert done.returncode == 0, done.stderr[-4000:]
    # A process of its own that sees both GPUs takes one.
    expected = run_straight(tmp_path)
    for job, name in JOBS.items():
        first, second = (torch.load(tmp_path / f"{job}-{rank}.pt", map_location="cuda:0") for rank in (0, 1))
        # float32, in sums of another order, which ten steps of Adam enlarge: a step may be 20 times as large.
        assert_same(first, expected[name], 1e-4)
        assert all(torch.equal(value, second["parameters"][n]) for n, value in first["parameters"].items())
        assert first["backbone_same"] and second["backbone_same"]
        assert (first["shards"] < 0.75) == job.startswith("fsdp")


@failures
def test_a_rank_that_fails_ends_the_run_with_its_error(tmp_path, job, message):
    assert_ends(tmp_path, job, message)
