"""Which implementation serves a request: by name, or the fastest that can.

A name is used as given and raises where it cannot serve the request; only `"auto"` chooses.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

#: Implementations of each op, by name. `"auto"` is accepted everywhere.
IMPLS: dict[str, tuple[str, ...]] = {
    "dense_attention": ("reference", "sdpa", "flash4"),
    "streaming_attention": ("reference", "sdpa", "flash4", "flex"),
    "triangle_attention": ("reference", "sdpa", "flash4", "flex"),
    "xattention": ("reference", "sdpa", "flash4", "flex"),
    "select_blocks": ("reference", "torch", "triton"),
    "block_sparse_attention": ("reference", "sdpa", "flash4", "flex"),
    "paged_decode": ("reference", "sdpa", "triton"),
}


class UnsupportedKernelError(ValueError):
    """A named implementation cannot serve this device, dtype or shape; the message names one that can."""


@functools.cache
def importable(module: str) -> bool:
    """Whether a package is installed; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_unusable(op: str, impl: str, q: Tensor, block: int | None = None) -> str | None:
    """Reason why `impl` cannot serve `op` on queries like `q` (device, dtype, head dim, block, package), or None."""
    if impl == "triton":
        if not importable("triton"):
            return "triton is not installed; `pip install triton` (it comes with torch on Linux + CUDA)"
        if q.device.type != "cuda" and not triton_interprets():
            return f"triton kernels need a CUDA device, got tensors on {q.device}"
        if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"triton kernels take float16, bfloat16 or float32, got {q.dtype}"
        if q.shape[-1] not in (64, 128, 256):
            return f"triton kernels take head dim 64, 128 or 256, got {q.shape[-1]}"
        return None
    if impl in ("flash4", "flex") and q.device.type != "cuda":
        return f"{impl} needs a CUDA device, got tensors on {q.device}"
    if impl == "flash4":
        major, minor = _capability(q.device)
        if major not in (9, 10):
            return f"flash-attn-4 runs here on Hopper and Blackwell (compute capability 9.x, 10.x), got {major}.{minor}"
        if q.dtype not in (torch.float16, torch.bfloat16):
            return f"flash-attn-4 takes float16 or bfloat16, got {q.dtype}"
        if op != "dense_attention" and major != 9:
            return f"{op} on flash-attn-4 runs on Hopper (compute capability 9.x), got {major}.{minor}"
        if q.shape[-1] > 128 or q.shape[-1] % 16:
            return f"flash-attn-4 takes head dims up to 128 that are multiples of 16, got {q.shape[-1]}"
        if not importable("flash_attn.cute"):
            return "flash-attn-4 is not installed; `pip install --pre flash-attn-4`"
    if impl in ("flash4", "flex") and block is not None:
        if op in ("xattention", "block_sparse_attention") and block != 128:
            return f"block-sparse {impl} takes block=128, got {block}"
        if block % 128:
            return f"{impl} takes blocks that are multiples of 128, got {block}"
    if impl == "flex" and (q.shape[-1] < 16 or q.shape[-1] & (q.shape[-1] - 1)):
        return f"flex takes head dims that are powers of two from 16, got {q.shape[-1]}"
    return None


def triton_interprets() -> bool:
    """Whether triton runs kernels on the CPU (TRITON_INTERPRET=1), as the tests do."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def resolve(op: str, impl: str, q: Tensor, block: int | None = None) -> str:
    """The implementation that runs: `impl`, or what "auto" stands for here.

    Raises ValueError for a name that `op` does not have, UnsupportedKernelError for one that cannot run, naming others.
    """
    names = IMPLS[op]
    if impl == "auto":
        if q.device.type == "cuda":
            preferred = "triton" if "triton" in names else "flash4"
            if why_unusable(op, preferred, q, block) is None:
                return preferred
        return "torch" if "torch" in names else "sdpa"
    if impl not in names:
        raise ValueError(f'{op}: impl must be "auto" or one of {", ".join(names)}, got {impl!r}')
    reason = why_unusable(op, impl, q, block)
    if reason is not None:
        works = [n for n in names if n != impl and why_unusable(op, n, q, block) is None]
        raise UnsupportedKernelError(f"{op}: impl={impl!r} cannot run: {reason}. These can: {', '.join(works)}")
    return impl
