"""Several processes train to one process's numbers; a killed run resumes to them; a rank that fails ends the run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flux_attention
from flux_attention.models.attach import attach
from flux_attention.training.checkpoints import ResumeError, begin_checkpoint, is_complete, newest_checkpoint
from flux_attention.training.parallel import Ranks, Ulysses, shard_backbone
from flux_attention.training.scale import PackTrainer, RepeatedPacks, ScaleConfig

from .ranks import STEPS, make_config, make_controller, make_trainer, outcome
from .test_training import make_samples
from .tiny import CONFIG, make_model

ROOT = Path(__file__).resolve().parents[2]


def environment():
    places = [str(ROOT), str(Path(flux_attention.__file__).resolve().parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}


def start(folder, *arguments, ranks=2):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "tests" / "models" / "ranks.py"), str(folder), *arguments]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, cwd=ROOT)


def end(process, timeout=240):
    """Its exit status and what it said."""
    try:
        told = process.communicate(timeout=timeout)[1]
    finally:
        # The launcher passes this on to the ranks; a kill would leave them behind.
        process.terminate()
    return subprocess.CompletedProcess(process.args, process.returncode, stderr=told)


def launch(folder, *arguments, ranks=2, timeout=240):
    return end(start(folder, *arguments, ranks=ranks), timeout)


#: Jobs of several ranks, and the run of one process that each must come to.
JOBS = {"ddp": "lm", "fsdp": "distill", "fsdp_full": "full", "ulysses": "lm", "ulysses_inline": "inline"}


def run_straight(folder):
    """What one uninterrupted process comes to, by objective and router input."""
    found = {}
    for name, router_input, options in (
        ("lm", "probe", {}),
        ("distill", "probe", {"objective": "distill"}),
        ("inline", "inline", {"objective": "distill"}),
        ("full", "probe", {"objective": "distill", "full_bias": 4.0}),
    ):
        trainer = make_trainer(folder / name, router_input, **options)
        trainer.train()
        found[name] = outcome(trainer)
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run_straight(tmp_path_factory.mktemp("straight"))


def assert_same(actual, expected, tolerance):
    assert len(actual["losses"]) == len(expected["losses"]) == STEPS
    # The Trainer rounds nothing; logged task losses are means over the ranks.
    assert actual["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    assert actual["tasks"] == pytest.approx(expected["tasks"], abs=tolerance)
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(actual["parameters"][name], value, rtol=0, atol=tolerance)


def test_ranks_train_to_one_processs_numbers(tmp_path, straight):
    """DDP, a backbone sharded by FSDP2, and packs shared by two ranks; probe and inline."""
    done = launch(tmp_path, *JOBS)
    assert done.returncode == 0, done.stderr[-4000:]
    start = dict(make_controller().router.named_parameters())
    moved = max(float((straight["lm"]["parameters"][f"router.{n}"] - p.detach()).abs().max()) for n, p in start.items())
    assert moved > 1e-3  # the updates that are compared are not all but nothing
    for job, expected in JOBS.items():
        ranks = [torch.load(tmp_path / f"{job}-{rank}.pt") for rank in (0, 1)]
        assert_same(ranks[0], straight[expected], 1e-5)
        for name, value in ranks[0]["parameters"].items():
            assert torch.equal(value, ranks[1]["parameters"][name]), (job, name)
        assert all(rank["backbone_same"] for rank in ranks)
        assert (ranks[0]["shards"] < 0.75) == job.startswith("fsdp")
    # One rank had a pack to leave out while the other had none, and both went through the layers.
    full = [torch.load(tmp_path / f"fsdp_full-{rank}.pt")["sparse"] for rank in (0, 1)]
    assert any(a != b for a, b in zip(*full, strict=True))


#: Jobs in which a rank fails, and what the run then says.
failures = pytest.mark.parametrize(
    ("job", "message"),
    [
        ("fails", "RuntimeError: this rank has had enough"),
        ("leaves", "RuntimeError: this rank has had enough"),
        ("dies", "Signal 9 (SIGKILL)"),
    ],
)


def assert_ends(tmp_path, job, message):
    started = time.monotonic()
    done = launch(tmp_path, job, timeout=120)
    assert done.returncode != 0
    assert message in done.stderr
    assert time.monotonic() - started < 60


@failures
def test_a_rank_that_fails_ends_the_run_with_its_error(tmp_path, job, message):
    assert_ends(tmp_path, job, message)


# ---------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("moment", ["running", "saving"])
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, straight, moment):
    # Any step will do; a save happens at even ones.
    step = 2 * random.randint(2, 4) - (moment == "running")
    done = launch(tmp_path, "killed", str(step), moment, ranks=1)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    kept = newest_checkpoint(tmp_path)
    # At most one interval is lost, and a half-written checkpoint is not taken for one.
    assert kept.name == f"checkpoint-{step - 1 if moment == 'running' else step - 2}"
    assert (tmp_path / f"checkpoint-{step}").exists() == (moment == "saving")
    torch.manual_seed(999)
    resumed = make_trainer(tmp_path, save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    found = outcome(resumed)
    assert found["losses"][-STEPS:] == straight["lm"]["losses"]
    for name, value in straight["lm"]["parameters"].items():
        assert torch.equal(found["parameters"][name], value), name


@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_killed_at_a_random_moment_resume_to_one_processs_numbers(tmp_path, straight, victim):
    process = start(tmp_path, "leisurely")
    try:
        first = tmp_path / "leisurely" / "checkpoint-2"
        while not is_complete(first):
            assert process.poll() is None
            time.sleep(0.01)
        # The steps that follow take longer; a save or a step, whatever it hits.
        time.sleep(random.Random(victim).uniform(0, 1))
        os.kill(int((tmp_path / f"pid-{victim}").read_text()), signal.SIGKILL)
        died = time.monotonic()
    finally:
        done = end(process, 60)
    assert time.monotonic() - died < 60
    assert "Signal 9 (SIGKILL)" in done.stderr
    kept = newest_checkpoint(tmp_path / "leisurely")
    assert int((tmp_path / "step-0").read_text()) - 2 <= int(kept.name.removeprefix("checkpoint-")) < STEPS
    done = launch(tmp_path, "resumes")
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"resumes-{rank}.pt") for rank in (0, 1)]
    assert_same(ranks[0], straight["lm"], 1e-5)
    assert all(torch.equal(value, ranks[1]["parameters"][name]) for name, value in ranks[0]["parameters"].items())


def test_a_checkpoint_with_unknown_keys(tmp_path):
    make_trainer(tmp_path, steps=2, save_steps=2).train()
    weights = tmp_path / "checkpoint-2" / "model.safetensors"
    stored = load_file(weights)
    stored["router.later"] = stored.pop("multipliers.values")
    save_file(stored, weights)
    with pytest.raises(ResumeError, match=r"unknown router\.later; missing multipliers\.values"):
        make_trainer(tmp_path, steps=2, save_steps=2).train(resume_from_checkpoint=True)
    weights.write_bytes(b"\0")
    with pytest.raises(ResumeError, match=r"model\.safetensors is missing, corrupt or truncated"):
        make_trainer(tmp_path, steps=2, save_steps=2).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_earlier_run_is_no_part_of_a_new_one(tmp_path):
    """A run in the same folder that is killed while it saves: nothing of both looks complete."""
    trainer = make_trainer(tmp_path, steps=2, save_steps=2)
    trainer.train()
    assert is_complete(tmp_path / "checkpoint-2")
    begin_checkpoint(tmp_path / "checkpoint-2", trainer.settings())
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    assert not is_complete(tmp_path / "checkpoint-2")


def test_resuming_with_other_settings_lists_them(tmp_path):
    make_trainer(tmp_path, steps=2, save_steps=1).train()
    changed = make_trainer(tmp_path, steps=2, save_steps=1, router_lr=1e-4, accumulation=3)
    with pytest.raises(ResumeError) as caught:
        changed.train(resume_from_checkpoint=True)
    message = str(caught.value)
    assert "router_lr: 0.002 → 0.0001" in message and "samples_per_step: 2 → 3" in message
    assert "multiplier_lr" not in message
    other = make_trainer(tmp_path, "inline", steps=2, save_steps=1)
    with pytest.raises(ResumeError, match=r"then → now\): adapter\.router_input: 'probe' → 'inline'\. "):
        other.train(resume_from_checkpoint=True)
    # How memory is used changes no numbers, so it may change.
    kept = make_trainer(tmp_path, steps=2, save_steps=1, recompute=False, logging_steps=0)
    kept.train(resume_from_checkpoint=True)


def test_nothing_to_resume_from(tmp_path):
    trainer = make_trainer(tmp_path, steps=2)
    with pytest.raises(ResumeError, match=r"no complete checkpoint to resume from \(0 incomplete\)"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ResumeError, match=r"\(1 incomplete\)"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ResumeError, match=r"flux_settings\.json is missing"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "flux_settings.json").write_text("{")
    with pytest.raises(ResumeError, match=r"flux_settings\.json: "):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-1")


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, steps=4, save_steps=2)
    real, usage = torch.save, shutil.disk_usage(tmp_path)

    def full(*args, **kwargs):
        if trainer.state.global_step == 4:
            # All that PyTorch says.
            raise RuntimeError("basic_ios::clear: iostream error")
        real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=0))
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint-4"):
        trainer.train()
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    resumed = make_trainer(tmp_path, steps=4, save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"


# ---------------------------------------------------------------------------------------------------- settle


def test_training_stops_when_the_routes_have_settled(tmp_path):
    """A router that cannot move has settled after two windows, once its Ω is where it should be."""
    controller = make_controller()
    with torch.no_grad():
        controller.router.weights[-1].zero_()
        controller.router.biases[-1][:, 1] = torch.tensor([-9.0, -9.0, -9.0, 9.0])
    frozen = {"router_lr": 1e-9, "multiplier_lr": 0.0, "gumbel_noise": False, "settle_steps": 2, "pack_tokens": 640}
    for targets, steps in (({"retrieval": 0.75, "holistic": 0.75}, 4), ({"retrieval": 0.5, "holistic": 0.75}, 8)):
        config = make_config(**frozen, targets=targets, steps=8)
        trainer = PackTrainer(controller, config, make_samples(24), tmp_path, progress=False)
        trainer.train()
        assert trainer.state.global_step == steps


def test_the_window_is_saved_with_the_router(tmp_path):
    options = {"settle_steps": 2, "settle_change": 1e-9, "steps": 4}
    make_trainer(tmp_path, save_steps=2, **options).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = make_trainer(tmp_path, save_steps=2, **options)
    resumed.train(resume_from_checkpoint=True)
    again = make_trainer(tmp_path / "again", **options)
    again.train()
    assert torch.equal(resumed.objective.window.previous, again.objective.window.previous)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "damage"}, "objective must be lm or distill, got 'damage'"),
        ({"batch_size": 2}, "batch_size must be 1 pack, got 2"),
        ({"pack_tokens": 0}, "pack_tokens must be an integer of at least 1, got 0"),
        ({"pack_tokens": 63, "sequence_parallel": 2}, "pack_tokens must be a multiple of sequence_parallel=2, got 63"),
        ({"offload": True, "recompute": False}, "offload moves what recompute keeps"),
        ({"settle_steps": 4, "save_steps": 6}, "save_steps must be a multiple of settle_steps=4, got 6"),
        ({"settle_change": 0.0}, "settle_change must be a number above 0"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        ScaleConfig(**changes)


def test_ranks_that_do_not_divide(tmp_path):
    with pytest.raises(
        ValueError, match=r"sequence_parallel=2 must divide the number of ranks, 1 \(start with torchrun"
    ):
        make_trainer(tmp_path, sequence_parallel=2)
    with pytest.raises(RuntimeError, match="start with torchrun"):
        shard_backbone(make_controller())
    with pytest.raises(ValueError, match=r"sequence_parallel=3 must divide the key/value heads of llama, 2"):
        Ulysses(Ranks(3, 0, 3), make_controller())
    with pytest.raises(ValueError, match="2 layers that stay as they are"):
        Ulysses(Ranks(2, 0, 2), attach(make_model("gemma3"), replace(CONFIG)))
    exchange = Ulysses(Ranks(4, 3, 2), make_controller())
    assert (exchange.ranks.rows, exchange.ranks.row, exchange.ranks.first) == (2, 1, 2)
    assert exchange.share(10) == slice(5, 10)
    with pytest.raises(ValueError, match="a row of 7 tokens does not divide"):
        exchange.share(7)


def test_a_document_longer_than_the_pack(tmp_path):
    with pytest.raises(ValueError, match=r"document \d+ has \d+ tokens, a pack 100"):
        make_trainer(tmp_path, pack_tokens=100)


def test_packs_repeat_in_another_order(tmp_path):
    packs = make_trainer(tmp_path)._packs
    repeated = RepeatedPacks(packs, 3 * len(packs), seed=1)
    turns = [[repeated[t * len(packs) + i] for i in range(len(packs))] for t in range(3)]
    assert turns[0] == [packs[i] for i in range(len(packs))]
    assert turns[0] != turns[1] != turns[2]
    assert sorted(map(str, turns[0])) == sorted(map(str, turns[1])) == sorted(map(str, turns[2]))
    with pytest.raises(IndexError):
        repeated[len(repeated)]


def test_the_adapter_is_written_as_by_the_other_trainer(tmp_path):
    trainer = make_trainer(tmp_path, steps=1)
    trainer.train()
    trainer.save_adapter(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "flux_config.json").read_text())["router_input"] == "probe"
