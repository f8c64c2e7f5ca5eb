"""What the baselines rest on: layer rankings, head gates and a head router, measured or trained once and kept in files.

All of it comes from the training split: the samples that the layer router may be trained on as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flux_attention.data import Sample
from flux_attention.data.progress import Progress
from flux_attention.data.sample_set import checksum, digest
from flux_attention.evaluation.entrants import columns_of, name_of
from flux_attention.evaluation.outcomes import read_settings
from flux_attention.evaluation.results import write_json
from flux_attention.models.controller import FluxAttention
from flux_attention.route import Route
from flux_attention.training.damage import DamageMeter, greedy_ranking, leave_one_out, static_ranking
from flux_attention.training.heads import HeadTraining, head_router, pooled_heads, train_head_router, train_static_heads
from flux_attention.training.trainer import compact_state

VERSION = 1


def layer_rankings(
    controller: FluxAttention,
    samples: Mapping[str, Sequence[Sample]],
    folder: Path,
    base: Mapping[str, Any],
    *,
    batch_tokens: int,
    progress: Progress,
) -> dict[str, list[int]]:
    """Layer rankings, least needed first, by method, from files where they are there.

    damage: by single-layer damage. greedy: one layer after the other at the least damage. greedy-text: the same as
    greedy, on samples of running text, which needs no task.

    Args:
        samples: of each method that is wanted.
    """
    # Layers whose single damage is next to nothing are taken at once.
    jump = len(controller.layers) // 5
    rank: dict[str, Callable[[DamageMeter], list[int]]] = {
        "damage": lambda meter: static_ranking(leave_one_out(meter)),
        "greedy": lambda meter: greedy_ranking(meter, jump=jump).order,
        "greedy-text": lambda meter: greedy_ranking(meter, jump=jump).order,
    }
    found: dict[str, list[int]] = {}
    missing: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name, some in samples.items():
        sums = digest([checksum(sample) for sample in some])
        settings = {**base, "version": VERSION, "samples": sums, "method": name}
        path = folder / f"ranking-{name}-{digest(settings)}.json"
        if path.is_file():
            found[name] = [int(layer) for layer in read_settings(path, settings)["ranking"]]
        else:
            _check_device(path, settings, controller)
            missing[name] = path, settings
    for name in progress(list(missing), len(missing), "static rankings") if missing else ():
        meter = DamageMeter(controller, samples[name], batch_tokens=batch_tokens)
        # What the dense model cannot answer tells nothing about layers.
        found[name] = rank[name](meter.subset(meter.answered()))
        path, settings = missing[name]
        write_json(path, {"settings": settings, "ranking": found[name]})
    return {name: found[name] for name in samples}


def static_heads(
    controller: FluxAttention,
    samples: Sequence[Sample],
    training: HeadTraining,
    folder: Path,
    base: Mapping[str, Any],
    progress: Progress,
) -> list[int]:
    """KV heads, least needed first (DuoAttention-style gates), numbered as `route.StaticHeads` does."""
    tensors = _kept(
        folder / "heads-static",
        {**base, **_settings(samples, training)},
        lambda: {"gates": train_static_heads(controller, samples, training, progress)},
        controller,
    )
    return torch.argsort(tensors["gates"].flatten(), stable=True).tolist()


def head_scores(
    controller: FluxAttention,
    samples: Sequence[Sample],
    training: HeadTraining,
    cells: Mapping[tuple[str, int], Sequence[Sample]],
    folder: Path,
    base: Mapping[str, Any],
    progress: Progress,
) -> dict[tuple[str, int], Tensor]:
    """`p_full [L·Hk, n]` of every cell's prompts by an Elastic-style head router, trained unless its file is there."""
    own = {**base, **_settings(samples, training)}

    def train() -> dict[str, Tensor]:
        return compact_state(train_head_router(controller, samples, training, progress))

    def score() -> dict[str, Tensor]:
        router = head_router(controller)
        router.load_state_dict(_kept(folder / "heads-routed", own, train, controller))
        with torch.no_grad():
            return {name_of(cell): router.p_full(pooled_heads(controller, some)).cpu() for cell, some in cells.items()}

    found = _kept(folder / "heads-routes", {**own, "prompts": _prompts(cells)}, score, controller)
    return {cell: found[name_of(cell)] for cell in cells}


def _prompts(cells: Mapping[tuple[str, int], Sequence[Sample]]) -> str:
    return digest({name_of(cell): [checksum(sample) for sample in some] for cell, some in cells.items()})


def _settings(samples: Sequence[Sample], training: HeadTraining) -> dict[str, Any]:
    options = {**asdict(training), "targets": dict(training.targets)}
    # How a step is cut into passes changes nothing.
    del options["pass_tokens"]
    return {"version": VERSION, "samples": digest([checksum(sample) for sample in samples]), "training": options}


def _check_device(path: Path, settings: Mapping[str, Any], controller: FluxAttention) -> None:
    if settings.get("device") != controller.device.type:
        raise FileNotFoundError(f"{path} is not there, and was to be made on another device")


def _kept(
    stem: Path, settings: Mapping[str, Any], make: Callable[[], dict[str, Tensor]], controller: FluxAttention
) -> dict[str, Tensor]:
    """Tensors of a file named by its settings; made when it is not there.

    Raises FileNotFoundError when it is not, and belongs to a run on another device than the controller's.
    """
    path = stem.with_name(f"{stem.name}-{digest(settings)}.safetensors")
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                written = json.loads((file.metadata() or {}).get("settings", "null"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it") from error
        if written != json.loads(json.dumps(settings)):
            raise ValueError(f"{path} holds a run of other settings; delete it or use another folder")
        return found
    _check_device(path, settings, controller)
    made = {name: tensor.contiguous() for name, tensor in make().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".next")
    save_file(made, temporary, metadata={"settings": json.dumps(settings)})
    temporary.replace(path)
    return made


def router_scores(
    controller: FluxAttention,
    cells: Mapping[tuple[str, int], Sequence[Sample]],
    folder: Path,
    base: Mapping[str, Any],
    *,
    prompts: int = 64,
) -> dict[tuple[str, int], Tensor]:
    """`p_full [L, n]` of every cell by the controller's probe router; 1 where a prompt is too short to be routed."""
    settings = {**base, "version": VERSION, "samples": _prompts(cells)}

    def make() -> dict[str, Tensor]:
        found = {}
        with controller.using(None), torch.no_grad():
            for cell, some in cells.items():
                parts = []
                for start in range(0, len(some), prompts):
                    route = controller.route([torch.tensor(s.prompt_ids) for s in some[start : start + prompts]])
                    parts.append(route.use_full.float() if route.p_full is None else route.p_full)
                found[name_of(cell)] = torch.cat(parts, 1)
        return found

    found = _kept(folder / "routes", settings, make, controller)
    return {cell: found[name_of(cell)] for cell in cells}


def inline_routes(
    controller: FluxAttention,
    cells: Mapping[tuple[str, int], Sequence[Sample]],
    folder: Path,
    base: Mapping[str, Any],
    *,
    batch_tokens: int,
    progress: Progress,
) -> dict[tuple[str, int], list[str]]:
    """Routes that the controller's inline router finds while it reads the prompts whole, in characters."""

    def read(some: Sequence[Sample]) -> Tensor:
        size, parts = max(1, batch_tokens // max(map(len, some))), []
        for start in range(0, len(some), size):
            batch = some[start : start + size]
            ids = torch.tensor([t for s in batch for t in s.prompt_ids], device=controller.device)[None]
            positions = torch.cat([torch.arange(len(s.prompt_ids)) for s in batch]).to(ids.device)[None]
            controller.decoder(input_ids=ids, position_ids=positions, use_cache=False)
            route = controller.last_route
            assert route is not None
            parts.append(route.use_full)
        return torch.cat(parts, 1)

    def make() -> dict[str, Tensor]:
        with controller.using(None), torch.no_grad():
            return {name_of(cell): read(cells[cell]) for cell in progress(list(cells), len(cells), "inline routes")}

    found = _kept(folder / "routes-inline", {**base, "version": VERSION, "samples": _prompts(cells)}, make, controller)
    return {cell: columns_of(Route(found[name_of(cell)])) for cell in cells}
