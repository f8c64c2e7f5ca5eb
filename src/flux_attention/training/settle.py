"""Stop training when the routes have settled: what is decided no longer moves, and the targets are met."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flux_attention.data.sample import TASK_CLASSES


class RouteWindow(nn.Module):
    """Noise-free decisions summed over the steps of a window, by class; part of the trained module so that it is saved.

    Shapes: `C` classes, `L` layers. `sums [C, L]` and `counts [C]` are this rank's, `previous [C, L]` (the share of
    documents that ran full, NaN before the first window) is every rank's.
    """

    sums: Tensor
    counts: Tensor
    previous: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        classes = len(TASK_CLASSES)
        self.register_buffer("sums", torch.zeros(classes, layers))
        self.register_buffer("counts", torch.zeros(classes))
        self.register_buffer("previous", torch.full((classes, layers), torch.nan))

    def add(self, decisions: Tensor, class_index: Tensor) -> None:
        """`decisions [L, S]` of 0 and 1, `class_index [S]`."""
        self.sums.index_add_(0, class_index, decisions.T.to(self.sums.dtype))
        self.counts.index_add_(0, class_index, torch.ones_like(class_index, dtype=self.counts.dtype))

    def close(self) -> tuple[Tensor, Tensor]:
        """End the window: (change since the last one, Ω), `[C]` each and NaN where it is not known."""
        total = torch.cat([self.sums, self.counts[:, None]], 1)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        share = total[:, :-1] / total[:, -1:]
        change = (share - self.previous).abs().mean(1)
        self.previous.copy_(share)
        self.sums.zero_()
        self.counts.zero_()
        return change, 1 - share.mean(1)


class StopWhenSettled(TrainerCallback):
    """Ends training after a window in which every class kept its routes and met its target.

    Args:
        window: decisions of the run.
        targets: Ω wanted of each class, `[C]`.
        steps: of a window.
        change: largest mean change of a layer's share between two windows.
        slack: largest distance of Ω from its target.
    """

    def __init__(self, window: RouteWindow, targets: Tensor, *, steps: int, change: float, slack: float) -> None:
        self._window, self._targets = window, targets
        self._steps, self._change, self._slack = steps, change, slack

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._steps:
            return
        change, omega = self._window.close()
        # NaN compares false: a class without documents in two windows has not settled.
        settled = (change <= self._change) & ((omega - self._targets.to(omega)).abs() <= self._slack)
        if bool(settled.all()):
            control.should_training_stop = True
