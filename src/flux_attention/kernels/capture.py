"""CUDA graphs of work on one device."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(run: Callable[[], object], device: torch.device, *, warm_up: int = 0) -> torch.cuda.CUDAGraph:
    """What `run` launches on a GPU, captured: a replay launches it again, on the same memory.

    Args:
        run: device work alone; what it reads and writes has to live as long as the graph.
        device: may be another than the current one. Left to itself, torch captures on a stream that the process keeps
            from its first capture on, on whatever device that was.
        warm_up: runs before it, on the same stream: they compile kernels and fill caches.
    """
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                run()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    return graph
