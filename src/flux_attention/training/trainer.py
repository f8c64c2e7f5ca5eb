"""Training a router with transformers' Trainer: resume, accumulation, progress bar, TensorBoard and saving are its own.

The module that the Trainer sees holds the router and the multipliers and nothing else; the frozen backbone stays
outside of its tree (`objective.AnswerObjective`). So no optimiser, checkpoint or gradient clipping can touch it.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from flux_attention.data.corpus import fingerprint
from flux_attention.data.sample import HOLISTIC, RETRIEVAL, TASK_CLASSES, Sample
from flux_attention.data.sample_set import checksum, digest, tokenizer_digest
from flux_attention.data.tasks import get_task
from flux_attention.models.adapter import save_adapter
from flux_attention.models.controller import FluxAttention
from flux_attention.training.checkpoints import begin_checkpoint, check_settings, check_weights, newest_checkpoint
from flux_attention.training.data import Collator, MixtureDataset, RouterDataset
from flux_attention.training.features import FeatureDataset, collate_features
from flux_attention.training.objective import AnswerObjective, DamageObjective, Multipliers
from flux_attention.training.parallel import first_ranks
from flux_attention.training.schedules import temperature, warmup, warmup_cosine

Objective = Literal["lm", "distill", "damage"]
OBJECTIVES = ("lm", "distill", "damage")
#: Bytes below which a disk counts as full.
_FULL = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a router is trained. Defaults are the published recipe (arXiv 2604.07394) where it has the option.

    Args:
        objective: "lm" (cross entropy, the paper's), "distill" (KL to the dense model), "damage" (cached features
            against targets from measured damage; no pass of the backbone).
        targets: Ω wanted of each class (lm, distill).
        steps: optimiser steps.
        batch_size: samples of a forward pass, per device.
        accumulation: forward passes of an optimiser step.
        router_lr, multiplier_lr: peak learning rates of the router (descent) and of λ (ascent).
        multiplier_start: initial λ1 = λ2 of every class, ≥ 0.
        betas, weight_decay: of AdamW; λ has no decay.
        clip: largest gradient norm.
        warmup_share: share of the steps with rising learning rates; the router's then falls as a cosine.
        temperature_start, temperature_end, temperature_share: τ, and the share of the steps it falls over.
        gumbel_noise: sample the gates; False takes noise-free straight-through gates.
        class_weights: what a prompt of each class counts in the loss (damage). A retrieval prompt that runs too sparse
            loses its answer, a holistic one that runs too dense a little speed.
        input_noise, input_dropout: augmentation of the cached features (damage).
        seed: of noise and data order.
        logging_steps, save_steps: 0 = never.
    """

    objective: Objective = "lm"
    targets: Mapping[str, float] = field(default_factory=lambda: {RETRIEVAL: 0.7, HOLISTIC: 1.0})
    steps: int = 300
    batch_size: int = 4
    accumulation: int = 12
    router_lr: float = 5e-4
    multiplier_lr: float = 1e-3
    multiplier_start: float = 0.25
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 5.0
    warmup_share: float = 0.2
    temperature_start: float = 1.5
    temperature_end: float = 1.0
    temperature_share: float = 0.6
    gumbel_noise: bool = True
    class_weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(TASK_CLASSES, 1.0))
    input_noise: float = 0.2
    input_dropout: float = 0.1
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"TrainConfig.objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        for name in ("steps", "batch_size", "accumulation"):
            self._check_int(name, least=1)
        for name in ("logging_steps", "save_steps", "seed"):
            self._check_int(name, least=0)
        for name in ("router_lr", "clip", "temperature_start", "temperature_end"):
            self._check_number(name, above=True)
        for name in ("multiplier_lr", "multiplier_start", "weight_decay", "input_noise"):
            self._check_number(name, above=False)
        for name in ("warmup_share", "temperature_share", "input_dropout"):
            self._check_number(name, above=False)
            if getattr(self, name) > 1:
                raise ValueError(f"TrainConfig.{name} must be at most 1, got {getattr(self, name)!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"TrainConfig.betas must be two numbers in [0, 1), got {self.betas!r}")
        if set(self.targets) != set(TASK_CLASSES) or not all(0 <= t <= 1 for t in self.targets.values()):
            raise ValueError(
                f"TrainConfig.targets must give each of {', '.join(TASK_CLASSES)} a share in [0, 1], "
                f"got {dict(self.targets)!r}"
            )
        weights = self.class_weights
        if set(weights) != set(TASK_CLASSES) or not all(w > 0 and math.isfinite(w) for w in weights.values()):
            raise ValueError(
                f"TrainConfig.class_weights must give each of {', '.join(TASK_CLASSES)} a number above 0, "
                f"got {dict(weights)!r}"
            )

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"TrainConfig.{name} must be an integer of at least {least}, got {value!r}")

    def _check_number(self, name: str, above: bool) -> None:
        value = getattr(self, name)
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < 0 or (above and value == 0):
            bound = "above" if above else "of at least"
            raise ValueError(f"TrainConfig.{name} must be a number {bound} 0, got {value!r}")

    def arguments(
        self, output_dir: str | Path, *, device: torch.device, report_to: Sequence[str] = (), progress: bool = True
    ) -> TrainingArguments:
        """The Trainer's arguments that follow from this configuration."""
        return TrainingArguments(
            output_dir=str(output_dir),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation,
            learning_rate=self.router_lr,
            adam_beta1=self.betas[0],
            adam_beta2=self.betas[1],
            weight_decay=self.weight_decay,
            max_grad_norm=self.clip,
            logging_strategy="steps" if self.logging_steps else "no",
            logging_steps=self.logging_steps or 500,
            save_strategy="steps" if self.save_steps else "no",
            save_steps=self.save_steps or 500,
            seed=self.seed,
            data_seed=self.seed,
            # Samples are objects of our own; the collator makes the tensors.
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
            report_to=list(report_to) or "none",
            disable_tqdm=not progress,
            use_cpu=device.type == "cpu",
            # Every parameter is used in every pass, and no buffer changes under training.
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
        )


class _Project(TrainerCallback):
    """Keeps λ ≥ 0 after each ascent step."""

    def __init__(self, multipliers: Multipliers) -> None:
        self._multipliers = multipliers

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._multipliers.project()


def dataset_key(dataset: Any) -> str | None:
    """What tells a dataset's samples from others as many; None for a dataset of a kind unknown here.

    A mixture makes its samples when asked for, so that its settings stand for them.
    """
    if isinstance(dataset, RouterDataset):
        return digest(_samples_key(dataset.samples))
    if isinstance(dataset, MixtureDataset):
        mixture = dataset.mixture
        return digest(
            {
                "tasks": [get_task(task).name for task in mixture.tasks],
                "lengths": [mixture.lengths, mixture.length_weights],
                "weights": [dict(mixture.class_weights), dict(mixture.task_weights)],
                "draws": [mixture.seed, mixture.split, mixture.block, mixture.extra_share],
                "extra": _samples_key(mixture.extra),
                "tokenizer": tokenizer_digest(dataset.tokenizer),
                "texts": fingerprint(),
            }
        )
    if isinstance(dataset, FeatureDataset):
        found = hashlib.sha256()
        for tensor in (dataset.pooled, dataset.target, dataset.class_index):
            found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]
    return None


def _samples_key(samples: Sequence[Sample]) -> list[tuple[str, int]]:
    # The class says which target Ω the tokens are held to.
    return [(sample.task_class, checksum(sample)) for sample in samples]


class RouterTrainer(Trainer):
    """transformers' Trainer for a router.

    Args:
        controller: the attached backbone; its router is trained in place, its weights stay as they are.
        config: how.
        train_dataset: `Sample`s (lm, distill) or `FeatureDataset` (damage).
        output_dir: of checkpoints and logs.
        report_to: "tensorboard", "wandb", …
        progress: show the progress bar.
        callbacks: of transformers.
        data_key: what tells the data from other data when a run is resumed; by default `dataset_key`, which knows
            `RouterDataset`, `MixtureDataset` and `FeatureDataset`. Other datasets without a key are told by size alone.

    `train(resume_from_checkpoint=…)` continues to the same numbers: τ and learning rates follow from the step, and
    noise from (seed, step, pass), whatever else drew random numbers in between.

    Raises:
        ValueError: the backbone is on another device than the one the Trainer takes.
    """

    def __init__(
        self,
        controller: FluxAttention,
        config: TrainConfig,
        train_dataset: Dataset[Any],
        output_dir: str | Path,
        *,
        report_to: Sequence[str] = (),
        progress: bool = True,
        callbacks: Sequence[TrainerCallback] = (),
        data_key: str | None = None,
    ) -> None:
        self.flux_controller, self.flux_config = controller, config
        self._given_key = data_key
        # No gradient is wanted here, and computing one would take the memory of a full fine-tuning.
        controller.model.requires_grad_(False)
        device = controller.device
        arguments = config.arguments(output_dir, device=device, report_to=report_to, progress=progress)
        # Asking for the device starts torch.distributed where a launcher wants it.
        taken = arguments.device
        # A process without a launcher sees every GPU of the host, and the Trainer would cut each batch into as many.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        if taken.type != device.type or (None not in (taken.index, device.index) and taken.index != device.index):
            raise ValueError(f"the backbone is on {device}, training runs on {taken}: move the model before attaching")
        objective, collate = self._objective_of(controller, config)
        every = list(callbacks)
        if isinstance(objective, AnswerObjective):
            every.append(_Project(objective.multipliers))
        self.objective = objective
        self._pass = (-1, 0)
        self._sums: dict[str, list[Tensor]] = {}
        super().__init__(
            model=objective,
            args=arguments,
            data_collator=collate,
            train_dataset=train_dataset,
            callbacks=every,
        )
        # Our loss is a mean of the batch; the Trainer divides it by the number of accumulated passes.
        self.loss_is_scaled_for_ga = False

    def _objective_of(
        self, controller: FluxAttention, config: TrainConfig
    ) -> tuple[AnswerObjective | DamageObjective, Any]:
        """The module to train, and the collator of its batches."""
        if config.objective == "damage":
            objective = DamageObjective(
                controller.router,
                class_weights=config.class_weights,
                input_noise=config.input_noise,
                input_dropout=config.input_dropout,
            )
            return objective, collate_features
        answers = AnswerObjective(
            controller,
            config.objective,
            config.targets,
            noise=config.gumbel_noise,
            multiplier_start=config.multiplier_start,
        )
        return answers.to(controller.device), Collator(pad_token_id=0)

    # ------------------------------------------------------------------ optimisation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW: the router by descent with weight decay, the multipliers by ascent without."""
        if self.optimizer is None:  # type: ignore[has-type]
            config = self.flux_config
            groups: list[dict[str, Any]] = [{"params": list(self.objective.router.parameters())}]
            if isinstance(self.objective, AnswerObjective):
                groups.append(
                    {
                        "params": list(self.objective.multipliers.parameters()),
                        "lr": config.multiplier_lr,
                        "weight_decay": 0.0,
                        "maximize": True,
                    }
                )
            self.optimizer = torch.optim.AdamW(
                groups, lr=config.router_lr, betas=config.betas, weight_decay=config.weight_decay
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Warm-up and cosine for the router; warm-up alone for λ, which must keep pushing to the end."""
        if self.lr_scheduler is None:  # type: ignore[has-type]
            chosen = self.optimizer if optimizer is None else optimizer
            share = self.flux_config.warmup_share
            rates = [
                lambda step: warmup_cosine(step, num_training_steps, share=share),
                lambda step: warmup(step, num_training_steps, share=share),
            ]
            self.lr_scheduler = LambdaLR(chosen, rates[: len(chosen.param_groups)])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        step, config = self.state.global_step, self.flux_config
        self._pass = (step, self._pass[1] + 1 if self._pass[0] == step else 0)
        if isinstance(self.objective, AnswerObjective):
            self.objective.temperature = temperature(
                step,
                config.steps,
                start=config.temperature_start,
                end=config.temperature_end,
                share=config.temperature_share,
            )
        self.objective.generator = self._generator()
        outputs = model(**inputs)
        self._note(outputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _generator(self) -> torch.Generator:
        """Noise of this pass: a function of seed, step and batch of the step.

        A resumed run draws the same, and so do several ranks and one that accumulates their batches.
        """
        step, number = self._pass
        rows, row = self._place()
        mixed = hash((self.flux_config.seed, step, number * rows + row)) & 0x7FFF_FFFF_FFFF_FFFF
        return torch.Generator(self.flux_controller.device).manual_seed(mixed)

    def _place(self) -> tuple[int, int]:
        """How many different batches the ranks see at a time, and which of them this rank sees."""
        return self.args.world_size, self.args.process_index

    # ------------------------------------------------------------------ logging

    def _note(self, outputs: Mapping[str, Tensor]) -> None:
        # Tensors stay on the device until something is logged: no step waits for its own numbers.
        for name in ("task_loss", "penalty"):
            self._sums.setdefault(name, []).append(outputs[name].detach())
        sparsity, classes = outputs["sparsity"].detach(), outputs["class_index"]
        for index, name in enumerate(TASK_CLASSES):
            member = (classes == index).to(sparsity.dtype)
            self._sums.setdefault(f"omega_{name}", []).append(torch.stack([(sparsity * member).sum(), member.sum()]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log, with task loss, penalty, Ω and λ of each class and τ since the last one."""
        if "loss" in logs:
            for name, values in self._sums.items():
                # Every rank logs, so that every rank is here.
                total = self.accelerator.reduce(torch.stack(values).float().mean(0), reduction="mean")
                if total.ndim == 0:
                    logs[name] = float(total)
                elif float(total[1]) > 0:
                    logs[name] = float(total[0] / total[1])
            if isinstance(self.objective, AnswerObjective):
                logs["temperature"] = self.objective.temperature
                for name, (linear, square) in zip(
                    TASK_CLASSES, self.objective.multipliers.values.tolist(), strict=True
                ):
                    logs[f"lambda1_{name}"], logs[f"lambda2_{name}"] = linear, square
            self._sums = {}
        super().log(logs, start_time)

    # ------------------------------------------------------------------ checkpoints

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it resumes: a change would change its numbers.

        How the samples of a step are divided over ranks and accumulated passes is not among it.
        """
        values = asdict(self.flux_config)
        accumulation = values.pop("accumulation")
        for name in ("logging_steps", "save_steps"):
            values.pop(name)
        per_step = self._place()[0] * values.pop("batch_size") * accumulation
        data = {"samples_per_step": per_step, "samples": len(self.train_dataset), "data": self._dataset_key}
        adapter = {f"adapter.{name}": value for name, value in self.flux_controller.config.to_dict().items()}
        return {**values, **data, **adapter}

    @cached_property
    def _dataset_key(self) -> str | None:
        # Once a run: every checkpoint asks for it.
        return dataset_key(self.train_dataset) if self._given_key is None else self._given_key

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> Any:
        """The Trainer's `train`; `True` resumes from the newest checkpoint that is complete.

        Raises ResumeError for settings or weights that differ from the checkpoint's, and lists them.
        """
        chosen = None
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = first_ranks(lambda: str(newest_checkpoint(str(self.args.output_dir))))
            chosen = Path(resume_from_checkpoint)
            check_settings(chosen, self.settings())
            check_weights(chosen, self.objective.state_dict())
        return super().train(resume_from_checkpoint=None if chosen is None else str(chosen), **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            begin_checkpoint(folder, self.settings())
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:
            # What PyTorch and safetensors say of a full disk does not name it.
            if shutil.disk_usage(self.args.output_dir).free < _FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
            raise

    # ------------------------------------------------------------------ the result

    def save_adapter(self, folder: str | Path) -> None:
        """Write the trained router as an adapter (`flux_config.json`, `router.safetensors`)."""
        if self.is_world_process_zero():
            controller = self.flux_controller
            delta = None if controller.delta is None else controller.delta.source.load()
            save_adapter(folder, controller.config, compact_state(controller.router), delta)


def compact_state(router: nn.Module) -> dict[str, Tensor]:
    """The router's state with float16 weights: half the file, and well below what a decision can notice.

    The input whitening stays float32: its mean is subtracted from features many deviations away from 0.
    """
    return {
        name: tensor.detach().cpu() if name.startswith("input_") else tensor.detach().half().cpu()
        for name, tensor in router.state_dict().items()
    }
