"""What most commands begin with: a backbone, its adapter, a policy and a dial."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from flux_attention.config import FluxConfig
from flux_attention.data.prompt import chat_text, check_text, encode_text
from flux_attention.models.adapter import Adapter, AdapterError, check_backbone, describe_backbone, load_adapter
from flux_attention.models.adapter import shipped_adapters as shipped
from flux_attention.models.attach import attach
from flux_attention.models.backbones import choose_dtype, load_backbone
from flux_attention.models.controller import FluxAttention
from flux_attention.models.families import family_of, routable_layers
from flux_attention.report import RouteRow
from flux_attention.route import Dial, Policy, Route, parse_policy


@dataclass
class Session:
    """An attached model with how it routes."""

    model: Any
    tokenizer: Any
    controller: FluxAttention
    adapter: Adapter | FluxConfig
    policy: Policy | None
    dial: Dial

    @property
    def adapter_name(self) -> str:
        return self.adapter.source if isinstance(self.adapter, Adapter) else "untrained"

    def using(self) -> AbstractContextManager[FluxAttention]:
        return self.controller.using(self.policy, self.dial)


def quiet() -> None:
    """Libraries' notices are for developers; whoever types a command wants its result."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Without a network it tells of every retry.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|torch)\.")


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises ValueError for a device that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available: this torch ({torch.__version__}) sees no CUDA device")
    return device


def find_adapter(model: Any) -> Adapter:
    """The shipped adapter that fits a model.

    Raises AdapterError, saying how to get one, when none does; ValueError for a model of an unknown family.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    family_of(decoder.config.model_type)
    found = describe_backbone(model, routable_layers(decoder.config))
    for folder in shipped().values():
        adapter = load_adapter(folder)
        try:
            check_backbone(adapter.config, found)
        except AdapterError:
            continue
        return replace(adapter, source=folder.name)
    names = ", ".join(sorted(shipped())) or "none"
    raise AdapterError(
        f"no shipped adapter fits {found.name!r} (shipped: {names}). Train one: `flux-attn train --model MODEL --out "
        "FOLDER` (SmolLM2: `make train`), then pass --adapter FOLDER"
    )


def open_session(
    model: str,
    adapter: str | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    policy: str = "router",
    min_sparsity: float = 0.0,
    max_sparsity: float = 1.0,
) -> Session:
    """Load the model, attach the adapter (None = the shipped one that fits).

    Raises:
        ValueError, OSError, ImportError: whatever is wrong with the arguments, before the model is loaded if possible.
    """
    chosen, dial = parse_policy(policy), Dial(min_sparsity, max_sparsity)
    if chosen is not None and not dial.is_open:
        raise ValueError(f"--min-sparsity and --max-sparsity turn the router's dial; policy {policy!r} has none")
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    # Read before the model is loaded: a mistyped name should not cost a minute.
    loaded = None if adapter is None else load_adapter(adapter)
    quiet()
    backbone, tokenizer = load_backbone(model, dtype=kind, device=where)
    if loaded is None:
        loaded = find_adapter(backbone)
    return Session(backbone, tokenizer, attach(backbone, loaded), loaded, chosen, dial)


def encode_prompt(session: Session, text: str, raw: bool) -> Tensor:
    """Prompt ids, by the chat template unless `raw`. Raises ValueError when the text is empty."""
    if not text.strip():
        raise ValueError("the prompt is empty")
    ids = encode_text(session.tokenizer, text if raw else chat_text(session.tokenizer, text))
    return torch.tensor(ids, dtype=torch.long)


def read_prompts(prompts: list[str] | None, files: list[Path] | None) -> list[tuple[str, str]]:
    """(label, text) of every prompt given; `-` reads standard input. Raises ValueError when there is none."""
    import sys

    found = [(" ".join(text.split())[:28], text) for text in prompts or []]
    for file in files or []:
        piped = str(file) == "-"
        try:
            found.append(("stdin", sys.stdin.read()) if piped else (file.name, file.read_text(encoding="utf-8")))
        except UnicodeDecodeError as error:
            raise ValueError(f"{'standard input' if piped else file} is not UTF-8 text: {error}") from None
    for label, text in found:
        check_text(text, f"the prompt {label.encode(errors='replace').decode()!r}")
    if not found:
        raise ValueError("give a prompt: --prompt TEXT or --file FILE (- for standard input)")
    return found


@torch.no_grad()
def route_of(session: Session, prompt: Tensor) -> Route:
    """The prompt's route; an inline router needs a prefill for it, a probe only the two ends."""
    with session.using() as controller:
        inline = controller.policy is None and controller.config.router_input == "inline"
        if not inline:
            return controller.route([prompt])
        controller.decoder(input_ids=prompt[None].to(controller.device), use_cache=False)
        assert controller.last_route is not None
        return controller.last_route


def route_row(label: str, route: Route, column: int = 0) -> RouteRow:
    p_full = None if route.p_full is None else route.p_full[:, column].tolist()
    return RouteRow(label, route.use_full[:, column].tolist(), p_full)


class Bars:
    """Progress bar for `evaluation.runner`: the running cell, on the terminal's error stream."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> Bars:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, batches: Iterable[Any], total: int, label: str) -> Iterable[Any]:
        task = self._bar.add_task(label, total=total)
        for batch in batches:
            yield batch
            self._bar.advance(task)
        # A board has hundreds of cells: only the running one is shown.
        self._bar.remove_task(task)
