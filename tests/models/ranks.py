"""What each of several processes runs in the tests of training at scale: `torchrun … ranks.py FOLDER JOB…`.

On CPUs, or with `RANKS_DEVICE=cuda` on a GPU each.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flux_attention.models.attach import attach
from flux_attention.training.launch import rank_device
from flux_attention.training.parallel import end_together
from flux_attention.training.scale import PackTrainer, ScaleConfig
from tests.models.test_training import make_samples
from tests.models.tiny import CONFIG, make_model

#: Packs of a step, over all ranks and accumulated passes.
PACKS = 2
STEPS = 10


def make_controller(router_input: str = "probe", fuse: bool = False, device: torch.device | None = None) -> Any:
    model = make_model("llama").to(device or torch.device("cpu"))
    controller = attach(model, replace(CONFIG, router_input=router_input, full_bias=0.5), fuse=fuse)
    torch.manual_seed(5)
    last = controller.router.weights[-1]
    # Drawn on the CPU: the same on every device.
    last.data.copy_(torch.nn.init.normal_(torch.empty(last.shape), std=0.3))
    return controller


def make_config(**changes: Any) -> ScaleConfig:
    values: dict[str, Any] = {
        "steps": STEPS,
        "accumulation": PACKS,
        "pack_tokens": 320,
        "logging_steps": 1,
        "seed": 3,
        "router_lr": 2e-3,
        "multiplier_lr": 0.05,
    }
    return ScaleConfig(**{**values, **changes})


def make_trainer(folder: Path, router_input: str = "probe", **changes: Any) -> PackTrainer:
    callbacks = changes.pop("callbacks", ())
    device = rank_device(os.environ.get("RANKS_DEVICE", "cpu"))
    controller = make_controller(router_input, changes.pop("fuse", False), device)
    full_bias = changes.pop("full_bias", None)
    if full_bias is not None:
        controller.router.biases[-1].data[:, 1] = full_bias
    if os.environ.get("RANK") == "1":
        # What a rank measured for itself: the first rank's holds.
        controller.router.input_scale.mul_(1.5)
    config = make_config(**changes)
    return PackTrainer(controller, config, make_samples(24), folder, progress=False, callbacks=callbacks)


def outcome(trainer: PackTrainer) -> dict[str, Any]:
    """Losses of every step, and the trained parameters."""
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    tasks = [row["task_loss"] for row in trainer.state.log_history if "loss" in row]
    parameters = {name: p.detach().clone() for name, p in trainer.objective.named_parameters()}
    return {"losses": losses, "tasks": tasks, "parameters": parameters}


class KillAt(TrainerCallback):
    """SIGKILL to this process at the end of a step, or in the middle of writing its checkpoint."""

    def __init__(self, step: int, *, saving: bool) -> None:
        self.step, self.saving = step, saving

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step != self.step:
            return
        if not self.saving:
            os.kill(os.getpid(), signal.SIGKILL)

        def half(self: TrainerState, path: str) -> None:
            Path(path).write_text('{"global_step": ')
            os.kill(os.getpid(), signal.SIGKILL)

        TrainerState.save_to_json = half


class FailAt(TrainerCallback):
    """Rank 1 fails at `step`: with an error, killed as by a machine out of memory, or with an error and a collective
    under way that the other rank will not join."""

    def __init__(self, step: int, *, killed: bool = False, waiting: bool = False) -> None:
        self.step, self.killed, self.waiting = step, killed, waiting

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step != self.step:
            return
        group = dist.new_group() if self.waiting else None
        if self.waiting:
            # Connected first, which all ranks do together with NCCL.
            dist.all_reduce(torch.zeros(1, device=args.device), group=group)
        if args.process_index == 1:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.waiting:
                dist.all_reduce(torch.zeros(1, device=args.device), group=group, async_op=True)
            raise RuntimeError("this rank has had enough")


class Leisurely(TrainerCallback):
    """Takes its time, so that another process can kill this one, whose id and steps are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        (self.folder / f"pid-{args.process_index}").write_text(str(os.getpid()))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = self.folder / f"step-{args.process_index}"
        # In one piece: the kill may come at any moment, but not after the end.
        step.with_suffix(".new").write_text(str(state.global_step))
        step.with_suffix(".new").replace(step)
        time.sleep(0.15 if state.global_step < state.max_steps - 1 else 30)


JOBS: dict[str, dict[str, Any]] = {
    "ddp": {"accumulation": 1},
    # Fused, as on a GPU.
    "fsdp": {"accumulation": 1, "shard_backbone": True, "objective": "distill", "fuse": True},
    # Few documents have a sparse layer: a rank's pack may have none while the other's has one.
    "fsdp_full": {"accumulation": 1, "shard_backbone": True, "objective": "distill", "fuse": True, "full_bias": 4.0},
    "ulysses": {"sequence_parallel": 2, "fuse": True},
    "ulysses_inline": {"sequence_parallel": 2, "router_input": "inline", "objective": "distill"},
    "fails": {"accumulation": 1, "callbacks": (FailAt(2),)},
    "leaves": {"accumulation": 1, "callbacks": (FailAt(2, waiting=True),)},
    "dies": {"accumulation": 1, "callbacks": (FailAt(2, killed=True),)},
    "leisurely": {"accumulation": 1, "save_steps": 2},
    # What is left of the run before it.
    "resumes": {"accumulation": 1, "save_steps": 2},
}


def killed(folder: Path, step: int, saving: bool) -> None:
    """A run of one process that is killed."""
    make_trainer(folder, callbacks=(KillAt(step, saving=saving),), save_steps=2).train()


def main() -> None:
    folder = Path(sys.argv[1])
    if sys.argv[2] == "killed":
        killed(folder, int(sys.argv[3]), sys.argv[4] == "saving")
    # A rank that waits in vain says where, instead of being waited for in vain.
    faulthandler.dump_traceback_later(150, exit=True)
    for job in sys.argv[2:]:
        with end_together():
            run(folder, job)


def run(folder: Path, job: str) -> None:
    options = dict(JOBS[job])
    if job == "leisurely":
        options["callbacks"] = (Leisurely(folder),)
    runs = folder / ("leisurely" if job == "resumes" else job)
    trainer = make_trainer(runs, options.pop("router_input", "probe"), **options)
    sparse: list[bool] = []
    note = trainer._note

    def noted(outputs: Any) -> None:
        sparse.append(bool(outputs["sparsity"].any()))
        note(outputs)

    trainer._note = noted  # type: ignore[method-assign]
    weights = {n: p.detach().clone() for n, p in trainer.flux_controller.model.named_parameters()}
    trainer.train(resume_from_checkpoint=job == "resumes")
    assert all(p.grad is None for p in trainer.flux_controller.model.parameters())
    found = outcome(trainer)
    after = dict(trainer.flux_controller.model.named_parameters())
    found["backbone_same"] = all(torch.equal(_whole(after[n]), _whole(w)) for n, w in weights.items())
    found["shards"] = sum(_local(p).numel() for p in after.values()) / sum(p.numel() for p in after.values())
    found["sparse"] = sparse
    torch.save(found, folder / f"{job}-{dist.get_rank()}.pt")


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    main()
