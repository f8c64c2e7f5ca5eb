"""Small tensors of the host on their way to a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(host: Tensor, device: torch.device) -> Tensor:
    """`host` on a device. From pinned memory: any other copy would wait for all work before it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
