"""`flux-attn serve`: vLLM's own server with the plugin's options filled in."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from flux_attention.models.adapter import load_adapter
from flux_attention.models.backbones import SMOLLM2, converted_folder
from flux_attention.serving.compat import check_version
from flux_attention.serving.options import CONFIG_KEY, EngineOptions

# What the plugin sets itself; given twice, one of the two would be ignored silently.
_OURS = ("--additional-config", "--scheduler-cls", "--worker-cls", "--attention-backend")


def engine_arguments(adapter: str, *, on_cpu: bool, asynchronous: bool, flux: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` (and, as options, of `vllm serve`) that make an engine route.

    Args:
        adapter: folder, shipped name or Hub id.
        on_cpu: whether vLLM runs on a processor.
        asynchronous: whether the engine schedules a step ahead (vLLM's default on GPUs).
        flux: further fields of `EngineOptions`.
    """
    EngineOptions(adapter=adapter, **flux)
    name = "FluxAsyncScheduler" if asynchronous else "FluxScheduler"
    arguments: dict[str, Any] = {
        "additional_config": {CONFIG_KEY: {"adapter": adapter, **flux}},
        "scheduler_cls": f"flux_attention.serving.scheduler.{name}",
        "worker_cls": "flux_attention.serving.worker.FluxWorker",
    }
    if not on_cpu:
        arguments["attention_backend"] = "CUSTOM"
        # Rows of different routes have no prefix in common that one pass could serve.
        arguments["disable_cascade_attn"] = True
    return arguments


def command_line(model: str, adapter: str, further: Sequence[str], *, on_cpu: bool, flux: dict[str, Any]) -> list[str]:
    """The arguments of vLLM's server that serve `model` with `adapter`; `further` are vLLM's own options.

    Raises:
        ValueError: `further` sets what the plugin sets; or no such adapter.
    """
    # vLLM takes underscores in options as well, and dotted ones that set a part of a JSON value.
    options = (argument.split("=")[0] for argument in further if argument.startswith("--"))
    names = {option.split(".")[0].replace("_", "-") for option in options}
    if taken := sorted(names & set(_OURS)):
        raise ValueError(f"{', '.join(taken)}: set by flux-attn serve; to set them yourself, use vllm serve")
    config = load_adapter(adapter).config
    asynchronous = not on_cpu and "--no-async-scheduling" not in names
    arguments = engine_arguments(adapter, on_cpu=on_cpu, asynchronous=asynchronous, flux=flux)
    line = ["--model", str(converted_folder()) if model == SMOLLM2 else model]
    if model == SMOLLM2 and "--served-model-name" not in names:
        line += ["--served-model-name", SMOLLM2]
    for name, value in arguments.items():
        line.append("--" + name.replace("_", "-"))
        if value is not True:
            line.append(value if isinstance(value, str) else json.dumps(value))
    if "--block-size" not in names:
        line += ["--block-size", str(config.block_tokens)]
    return [*line, *further]


def serve(model: str, adapter: str, further: Sequence[str] = (), flux: dict[str, Any] | None = None) -> None:
    """Run the server until it is stopped.

    Args:
        model: "smollm2", a folder or a Hub id.
        adapter: folder, shipped name or Hub id.
        further: options of `vllm serve`, as they are.
        flux: further fields of `EngineOptions`.

    Raises:
        UnsupportedVLLMError: vLLM is missing or of another version.
        ValueError: bad options.
    """
    check_version()
    # Engine and server are processes of their own: prometheus_client joins their metrics through this folder.
    os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="flux-attn-metrics-"))
    # The plugin's hooks are those of vLLM's first model runner.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    # The server's own module: `vllm serve` reads its version from a package that processors install under another name.
    import uvloop
    from vllm.entrypoints.openai.api_server import (
        FlexibleArgumentParser,
        cli_env_setup,
        make_arg_parser,
        run_server,
        validate_parsed_serve_args,
    )
    from vllm.platforms import current_platform

    line = command_line(model, adapter, further, on_cpu=current_platform.is_cpu(), flux=flux or {})
    cli_env_setup()
    parsed = make_arg_parser(FlexibleArgumentParser(prog="flux-attn serve")).parse_args(line)
    validate_parsed_serve_args(parsed)
    uvloop.run(run_server(parsed))
