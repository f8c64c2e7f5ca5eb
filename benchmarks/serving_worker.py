"""The worker of the serving benchmark: the plugin's, without foreign warm-up, and with a memory of what it was told.

A module of its own, because the ranks of a tensor parallel engine are processes that import it by name: what a program
changes in its own vLLM does not reach them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flux_attention.serving.worker import FluxWorker


class MeasuredWorker(FluxWorker):
    """`FluxWorker`, for `worker_cls`; the methods named `rank_…` are for `LLM.collective_rpc`."""

    def init_device(self) -> None:
        self._told: dict[str, list[bool]] = {}
        super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        # All that vLLM warms up on GPUs is kernels of other models. It imports packages that a text model needs nowhere
        # else (torchvision), and compiles for minutes where CUTLASS is installed.
        if torch.cuda.is_available():
            from vllm.v1.worker import gpu_worker

            gpu_worker.kernel_warmup = lambda worker: None
        return super().compile_or_warm_up_model()

    def execute_model(self, scheduler_output: Any) -> Any:
        output = super().execute_model(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            self._told[new.req_id] = self._batch._route(new.req_id).tolist()
        return output

    def rank_routes(self) -> dict[str, list[bool]]:
        """By request, which layers this rank runs in full; forgotten with the call."""
        told, self._told = self._told, {}
        return told

    def rank_scores(self, ends: Sequence[Sequence[int]]) -> list[list[float]]:
        """This rank's own scores of prompts, as `Probe.scores` gives them."""
        return self._probe.scores(ends)

    def rank_graphs(self) -> list[int]:
        """Numbers of prompts whose probes are captured; none on a processor."""
        return [rows for rows, _ in self._probe._replays]
