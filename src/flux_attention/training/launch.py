"""One training run over packs from its settings to an adapter: what the command line and the recipes call.

    run(PackRun(model="Qwen/Qwen3-8B", data="data/mix", out="adapters/qwen3-8b"))

Under `torchrun` or `accelerate launch` every rank calls it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flux_attention.config import FluxConfig
from flux_attention.data import HOLISTIC, RETRIEVAL
from flux_attention.models.adapter import load_adapter
from flux_attention.models.attach import attach
from flux_attention.models.backbones import choose_dtype, load_backbone
from flux_attention.training.features import pooled_queries
from flux_attention.training.parallel import end_together
from flux_attention.training.scale import PackTrainer, ScaleConfig
from flux_attention.training.store import StoredSamples


@dataclass(frozen=True, kw_only=True)
class PackRun:
    """A run.

    Args:
        model: folder or Hub id of the backbone.
        data: folder that `flux-attn data build` made.
        out: folder of the adapter.
        runs: folder of checkpoints and logs.
        flux: of the adapter; ignored with `start`.
        scale: how to train.
        start: adapter to go on from, instead of a router that starts with every layer full.
        quantize: "4bit" loads the backbone with bitsandbytes; None = bfloat16 on a GPU, float32 on a CPU.
        calibrate: documents whose pooled queries set the scale of the router's input; 0 = leave it as it is.
        report_to: "tensorboard", "wandb", …
    """

    model: str
    data: str | Path
    out: str | Path
    runs: str | Path = Path("runs/packs")
    flux: FluxConfig = field(default_factory=FluxConfig)
    scale: ScaleConfig = field(default_factory=lambda: ScaleConfig(objective="distill", save_steps=20))
    start: str | None = None
    quantize: str | None = None
    calibrate: int = 64
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.quantize not in (None, "4bit"):
            raise ValueError(f'PackRun.quantize must be None or "4bit", got {self.quantize!r}')
        if self.calibrate < 0 or self.calibrate == 1:
            raise ValueError(f"PackRun.calibrate must be 0 or at least 2 documents, got {self.calibrate}")


#: Starts less sure of full than the default, so that tens of steps are enough.
SHORT_FLUX = FluxConfig(sink_tokens=128, window_tokens=2048, full_bias=2.0)


def short_run(name: str, *, model: str, settle_steps: int, flux: FluxConfig = SHORT_FLUX, **scale: Any) -> PackRun:
    """A run of tens of steps, a fraction of the published ones: what the recipes for 8B models share.

    The router starts less sure of full, and it and the multipliers move faster. Found on SmolLM2 (40 steps on a CPU);
    not yet tried at 8B.

    Args:
        name: of the folders: `data/NAME`, `adapters/NAME` and `runs/NAME`.
        model, flux: as `PackRun`.
        settle_steps: training ends early when two windows of so many steps agree and both targets are met; checkpoints
            are as far apart.
        scale: what a recipe settles itself, as `ScaleConfig` names it: objective, steps, pack_tokens, accumulation, …
    """
    shared = {
        "targets": {RETRIEVAL: 0.7, HOLISTIC: 1.0},
        "router_lr": 3e-3,
        "multiplier_lr": 0.1,
        "multiplier_start": 1.0,
        "save_steps": settle_steps,
        "logging_steps": 1,
    }
    return PackRun(
        model=model,
        data=Path("data", name),
        out=Path("adapters", name),
        runs=Path("runs", name),
        flux=flux,
        scale=ScaleConfig(**{**shared, "settle_steps": settle_steps, **scale}),
    )


def run(plan: PackRun, *, resume: bool = False, device: str = "auto", progress: bool = True) -> PackTrainer:
    """Train and write the adapter.

    Args:
        resume: go on from the newest complete checkpoint in `plan.runs`.
        device: "auto" is this rank's GPU where there is one.

    Raises:
        ValueError, OSError, ImportError: whatever is wrong with the plan, the data or the checkpoint, as the parts say.
    """
    with end_together():
        return _run(plan, resume, device, progress)


def _run(plan: PackRun, resume: bool, device: str, progress: bool) -> PackTrainer:
    samples = StoredSamples(plan.data)
    start = None if plan.start is None else load_adapter(plan.start)
    where = rank_device(device)
    model = _load(plan, where)
    if samples.largest_token >= model.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"{plan.data} holds token {samples.largest_token}, but {plan.model} has "
            f"{model.get_input_embeddings().num_embeddings}: build the data with this model's tokenizer"
        )
    # The router's first weights: the Trainer sets the seed too late for them.
    torch.manual_seed(plan.scale.seed)
    controller = attach(model, plan.flux if start is None else start)
    if start is None and plan.calibrate and not resume:
        calibrate(controller, samples, plan.calibrate)
    trainer = PackTrainer(
        controller,
        plan.scale,
        samples,
        plan.runs,
        lengths=samples.lengths,
        data_key=samples.manifest["key"],
        report_to=plan.report_to,
        progress=progress,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_adapter(plan.out)
    return trainer


def main(plan: PackRun, arguments: Sequence[str] | None = None) -> PackTrainer:
    """A recipe's own command line: its plan, with a few settings replaced by options."""
    parser = argparse.ArgumentParser(description=f"Train a router for {plan.model}.")
    parser.add_argument("--model", default=plan.model)
    parser.add_argument("--data", type=Path, default=plan.data)
    parser.add_argument("--out", type=Path, default=plan.out)
    parser.add_argument("--runs", type=Path, default=plan.runs)
    parser.add_argument("--steps", type=int, default=plan.scale.steps)
    parser.add_argument("--accumulation", type=int, default=plan.scale.accumulation)
    parser.add_argument("--sequence-parallel", type=int, default=plan.scale.sequence_parallel)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --runs")
    options = parser.parse_args(arguments)
    scale = replace(
        plan.scale,
        steps=options.steps,
        accumulation=options.accumulation,
        sequence_parallel=options.sequence_parallel,
        # A single process has nobody to share the layers with.
        shard_backbone=plan.scale.shard_backbone and "LOCAL_RANK" in os.environ,
    )
    where = {name: getattr(options, name) for name in ("model", "data", "out", "runs")}
    return run(replace(plan, scale=scale, **where), resume=options.resume, device=options.device)


def rank_device(name: str = "auto") -> torch.device:
    """This rank's device: `LOCAL_RANK`, which every launcher sets, chooses among the GPUs."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


@torch.no_grad()
def calibrate(controller: Any, samples: StoredSamples, count: int) -> None:
    """Set the scale of the router's input from the first documents' pooled queries, the same on every rank."""
    prompts = [samples[i].prompt_ids for i in range(min(count, len(samples)))]
    if len(prompts) < 2:
        raise ValueError(f"calibration needs at least 2 documents, the data set has {len(prompts)}")
    controller.router.fit_input_scale(pooled_queries(controller, prompts, 16))


def _load(plan: PackRun, device: torch.device) -> Any:
    if plan.quantize is None:
        return load_backbone(plan.model, dtype=choose_dtype("auto", device), device=device)[0]
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            "a 4-bit backbone needs the package bitsandbytes: pip install 'flux-attention[quantize]'"
        )
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        plan.model, quantization_config=options, dtype=torch.bfloat16, device_map={"": device}
    )
    loaded.eval().requires_grad_(False)
    for module in loaded.modules():
        if type(module).__name__ == "Linear4bit":
            # In eval mode some processors take a product without a gradient. These modules do nothing else in training.
            module.train()
    return loaded
