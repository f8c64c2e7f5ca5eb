"""Training on long packs, on one GPU or many: recomputed layers, a sharded backbone, rows shared by several ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import TrainerCallback

from flux_attention.data.sample import Sample
from flux_attention.models.controller import FluxAttention
from flux_attention.training.compiled import compiled_layers
from flux_attention.training.objective import AnswerObjective, DamageObjective
from flux_attention.training.packed_objective import PackedObjective
from flux_attention.training.packing import PackCollator, PackedDataset
from flux_attention.training.parallel import Ranks, Ulysses, same_everywhere, shard_backbone
from flux_attention.training.recompute import recomputed_layers
from flux_attention.training.settle import RouteWindow, StopWhenSettled
from flux_attention.training.trainer import RouterTrainer, TrainConfig


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(TrainConfig):
    """`TrainConfig` for packs: a sample is a pack, so `batch_size` is 1 and `accumulation` counts packs of a rank.

    Args:
        pack_tokens: tokens of a pack.
        short_first: pack and train short documents before long ones.
        recompute: keep one tensor a layer and run the layers again in the backward pass.
        offload: keep these tensors in the host's memory.
        compile: compile norms and gating for passes with gradients (`training.compiled`).
        shard_backbone: shard the frozen layers over all ranks (FSDP2).
        sequence_parallel: ranks that share a pack's tokens.
        settle_steps: look every so many steps whether the routes have settled, and stop then; 0 = never. `save_steps`
            must be a multiple.
        settle_change, settle_slack: what counts as settled: mean change of a layer's share of full routes between two
            windows, and distance of Ω from its target.
    """

    batch_size: int = 1
    pack_tokens: int = 65536
    short_first: bool = False
    recompute: bool = True
    offload: bool = False
    compile: bool = False
    shard_backbone: bool = False
    sequence_parallel: int = 1
    settle_steps: int = 0
    settle_change: float = 0.02
    settle_slack: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in ("lm", "distill"):
            raise ValueError(f"ScaleConfig.objective must be lm or distill, got {self.objective!r}")
        if self.batch_size != 1:
            raise ValueError(f"ScaleConfig.batch_size must be 1 pack, got {self.batch_size}: use accumulation")
        for name, least in (("pack_tokens", 1), ("sequence_parallel", 1), ("settle_steps", 0)):
            self._check_int(name, least)
        for name in ("settle_change", "settle_slack"):
            self._check_number(name, above=True)
        if self.pack_tokens % self.sequence_parallel:
            raise ValueError(
                f"ScaleConfig.pack_tokens must be a multiple of sequence_parallel={self.sequence_parallel}, "
                f"got {self.pack_tokens}"
            )
        if self.offload and not self.recompute:
            raise ValueError("ScaleConfig.offload moves what recompute keeps: it needs recompute=True")
        if self.settle_steps and self.save_steps % self.settle_steps:
            raise ValueError(
                f"ScaleConfig.save_steps must be a multiple of settle_steps={self.settle_steps}, got {self.save_steps}"
            )


class RepeatedPacks(Dataset[list[Sample]]):
    """`size` packs: all of them in order, then again and again in orders of their own."""

    def __init__(self, packs: PackedDataset, size: int, seed: int) -> None:
        self.packs, self._size, self._seed = packs, size, seed
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> list[Sample]:
        if not 0 <= index < self._size:
            raise IndexError(f"index {index} is out of range for {self._size} packs")
        turn, place = divmod(index, len(self.packs))
        if turn:
            if turn not in self._orders:
                order = list(range(len(self.packs)))
                random.Random(f"{self._seed}/{turn}").shuffle(order)
                self._orders = {turn: order}
            place = self._orders[turn][place]
        return self.packs[place]


class PackTrainer(RouterTrainer):
    """`RouterTrainer` over packs, alone or under `torchrun` / `accelerate launch`.

    Losses and updates are those of one process that accumulates the same packs, however many ranks there are and
    however they share the work. The router and the multipliers are replicated (DDP); the backbone is replicated or
    sharded, and never gets gradients or optimiser state.

    On several ranks, make and train it within `parallel.end_together`, as `launch.run` does.

    Args:
        controller: the attached backbone, on this rank's device.
        config: how.
        samples: documents; each at most `pack_tokens` long.
        output_dir, report_to, progress, callbacks: as `RouterTrainer`.
        lengths: tokens of each sample, where they are known.
        data_key: what tells this data from other data when a run is resumed, as the `key` of a data set's manifest.

    Raises:
        ValueError: a document longer than a pack, heads or ranks not divisible by `sequence_parallel`, or a launcher
            that wants to shard the router.
    """

    flux_config: ScaleConfig

    def __init__(
        self,
        controller: FluxAttention,
        config: ScaleConfig,
        samples: Dataset[Sample] | Sequence[Sample],
        output_dir: str | Path,
        *,
        lengths: Sequence[int] | None = None,
        data_key: str | None = None,
        report_to: Sequence[str] = (),
        progress: bool = True,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        packs = PackedDataset(
            samples, config.pack_tokens, lengths=lengths, seed=config.seed, short_first=config.short_first
        )
        self._ranks = Ranks()
        self._packs, self._data_key = packs, data_key
        super().__init__(
            controller,
            config,
            # Its size follows from the number of ranks, known once the Trainer has started.
            RepeatedPacks(packs, 0, config.seed),
            output_dir,
            report_to=report_to,
            progress=progress,
            callbacks=callbacks,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "the launcher shards the trained module, which is a router of a few megabytes: launch with plain data "
                "parallelism (torchrun, or accelerate launch --multi_gpu) and set shard_backbone=True"
            )
        size = config.steps * config.accumulation * self._ranks.rows
        self.train_dataset = RepeatedPacks(packs, size, config.seed)
        if config.shard_backbone:
            shard_backbone(controller)
        if config.settle_steps:
            assert isinstance(self.objective, PackedObjective) and self.objective.window is not None
            self.add_callback(
                StopWhenSettled(
                    self.objective.window,
                    self.objective.multipliers.targets,
                    steps=config.settle_steps,
                    change=config.settle_change,
                    slack=config.settle_slack,
                )
            )

    def _objective_of(
        self, controller: FluxAttention, config: TrainConfig
    ) -> tuple[AnswerObjective | DamageObjective, Any]:
        assert isinstance(config, ScaleConfig) and config.objective != "damage"
        self._ranks = Ranks.of(config.sequence_parallel)
        if self._ranks.world > 1:
            # A calibrated router: its buffers were measured on every rank, and all must decide alike.
            same_everywhere(controller.router)
        exchange = Ulysses(self._ranks, controller) if self._ranks.shared > 1 else None
        objective = PackedObjective(
            controller,
            config.objective,
            config.targets,
            noise=config.gumbel_noise,
            multiplier_start=config.multiplier_start,
            exchange=exchange,
            always_passes=config.shard_backbone,
        )
        if config.settle_steps:
            objective.window = RouteWindow(len(controller.layers))
        return objective.to(controller.device), PackCollator(self._ranks.shared)

    def _place(self) -> tuple[int, int]:
        return self._ranks.rows, self._ranks.row

    def settings(self) -> dict[str, Any]:
        """As `RouterTrainer.settings`; how memory and ranks are used changes no numbers."""
        found = super().settings()
        for name in ("recompute", "offload", "compile", "shard_backbone", "sequence_parallel"):
            found.pop(name)
        return {**found, "packs": len(self._packs), "filled": self._packs.filled, "data": self._data_key}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # The packs are in a random order already, and the same one on every rank.
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As the Trainer's; ranks that share a pack get the same one."""
        if self._ranks.shared == 1:
            return super().get_train_dataloader()
        mine = range(self._ranks.row, len(self.train_dataset), self._ranks.rows)
        return DataLoader(
            self.train_dataset,
            batch_sampler=[[index] for index in mine],
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> Any:
        """As `RouterTrainer.train`."""
        config, controller = self.flux_config, self.flux_controller
        with ExitStack() as stack:
            if config.compile:
                stack.enter_context(compiled_layers(controller))
            if config.recompute:
                stack.enter_context(recomputed_layers(controller, offload=config.offload))
            return super().train(resume_from_checkpoint, **options)

    def _note(self, outputs: Any) -> None:
        super()._note(outputs)
        if isinstance(self.objective, PackedObjective) and self.objective.window is not None:
            with torch.no_grad():
                self.objective.window.add(outputs["decisions"], outputs["class_index"])
