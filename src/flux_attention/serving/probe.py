"""The probe on vLLM's model: the two ends of new prompts, run densely, without the KV cache.

The same router, pooling and semantics as `FluxAttention.probe`; only the model is vLLM's. Queries before RoPE (and
after q-norm) are what a layer hands to its rotary embedding, which a hook reads while the probe runs.

A GPU is done with a few hundred tokens long before the host has launched their kernels. A prompt of at least
`2 * pool_tokens` tokens always gives the same shapes, so where the engine captures graphs, the probe is one too. With
tensor parallelism its graph holds the ranks' exchanges, so either all ranks replay it or none does.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import get_tp_group, graph_capture
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform

from flux_attention.kernels.api import Packing, dense_attention
from flux_attention.router import LayerRouter, PoolPlan
from flux_attention.serving.options import Deployment

logger = logging.getLogger(__name__)
# Of a probability, between a replay and the same kernels launched one by one.
_TOLERANCE = 0.01
_T = TypeVar("_T")


@dataclass(frozen=True)
class ProbeMetadata:
    """Stands for a layer's attention metadata while a probe runs: prompts' ends, back to back."""

    packing: Packing

    def attend(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float) -> Tensor:
        """Dense attention within each prompt: `query [N, Hq, D]`, `key, value [N, Hk, D]` → into `output`."""
        tokens = sum(self.packing.q_lens)
        # Rows this short gain nothing from other kernels, and this one can be captured in a graph.
        out = dense_attention(query[:tokens], key[:tokens], value[:tokens], self.packing, scale=scale, impl="sdpa")
        output[:tokens].view_as(out).copy_(out)
        return output


@dataclass(frozen=True)
class _Layout:
    """Where the prompts' ends lie in a pass.

    Attributes:
        positions: int64 `[N]`, for the rotary embedding.
        plan: which queries are pooled.
        metadata: of every attention layer, by name.
    """

    positions: Tensor
    plan: PoolPlan
    metadata: dict[str, ProbeMetadata]


@dataclass(frozen=True)
class _Replay:
    """A captured probe. Its graph reads the memory of these tensors, so they live as long as it does."""

    layout: _Layout
    ids: Tensor
    run: Callable[[], Tensor]

    def __call__(self, ids: Tensor) -> Tensor:
        self.ids[: len(ids)].copy_(ids)
        return self.run()


class Probe:
    """Scores prompts on one worker's part of the model.

    Args:
        model: vLLM's causal LM.
        vllm_config: of the engine.
        deployment: the adapter and the layers it routes.
        device: of the model.
    """

    def __init__(self, model: nn.Module, vllm_config: Any, deployment: Deployment, device: torch.device) -> None:
        self._model, self._vllm_config, self._device = model, vllm_config, device
        self._pool, self._tail = deployment.config.pool_tokens, deployment.config.tail_tokens
        decoder = model.model.layers  # type: ignore[union-attr]
        self.attention = [decoder[index].self_attn for index in deployment.decoder_layers]  # type: ignore[index,union-attr]
        self._names = [layer.self_attn.attn.layer_name for layer in decoder]  # type: ignore[union-attr]
        self.router = load_router(deployment, device)
        self._replays: list[tuple[int, _Replay]] = []

    @torch.inference_mode()
    def scores(self, ends: Sequence[Sequence[int]]) -> list[list[float]]:
        """The router's p_full of every routable layer, per prompt; `ends` are the tokens of `options.probe_ends`."""
        lengths = [len(tokens) for tokens in ends]
        ids = torch.tensor([token for tokens in ends for token in tokens], device=self._device)
        replay = self._replay_of(lengths)
        p_full = self._p_full(self._layout(lengths), ids) if replay is None else replay(ids)
        scores: list[list[float]] = p_full.T[: len(ends)].tolist()
        return scores

    def _layout(self, lengths: Sequence[int]) -> _Layout:
        """What a pass over ends of these lengths needs beside their tokens."""
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        return _Layout(
            torch.cat([torch.arange(n) for n in lengths]).to(self._device),
            PoolPlan.build(starts, lengths, self._pool, tail_tokens=self._tail, device=self._device),
            dict.fromkeys(self._names, ProbeMetadata(Packing(tuple(lengths), tuple(lengths)))),
        )

    def _p_full(self, layout: _Layout, ids: Tensor) -> Tensor:
        """`p_full [L, S]` for the tokens `[N]`; device work only."""
        with (
            self._collecting(layout.plan) as pooled,
            # No slots: nothing is written into the KV cache.
            set_forward_context(
                layout.metadata, self._vllm_config, num_tokens=len(ids), slot_mapping={}, skip_compiled=True
            ),
        ):
            self._model(input_ids=ids, positions=layout.positions)
        return self.router.p_full(mean_over_ranks(torch.stack(pooled)))

    def _replay_of(self, lengths: Sequence[int]) -> _Replay | None:
        """The captured probe that these prompts fit into, or None."""
        if any(length != 2 * self._pool for length in lengths):
            return None
        return next((replay for rows, replay in self._replays if rows >= len(lengths)), None)

    @torch.inference_mode()
    def capture(self, most: int) -> None:
        """Capture probes of 1, 2, 4, … prompts, up to `most`; those of other numbers leave rows unused.

        A probe that cannot be captured, or whose replay says something else, runs eagerly, on all ranks of a tensor
        parallel engine, and the log says so.
        """
        sizes = [1]
        while sizes[-1] < most:
            sizes.append(2 * sizes[-1])
        try:
            # The largest first: the others find its memory.
            replays = [(rows, _on_all_ranks(functools.partial(self._capture, rows))) for rows in reversed(sizes)]
            for rows, replay in replays:
                _on_all_ranks(functools.partial(self._check, rows, replay))
        except RuntimeError:
            logger.warning(
                "The probe cannot be captured as a CUDA graph: it runs eagerly, tens of milliseconds a time",
                exc_info=True,
            )
            return
        self._replays = replays[::-1]
        logger.info("Captured probes of %s prompts", sizes)

    def _capture(self, rows: int) -> _Replay:
        layout = self._layout([2 * self._pool] * rows)
        ids = torch.zeros(rows * 2 * self._pool, dtype=torch.long, device=self._device)
        return _Replay(layout, ids, captured(lambda: self._p_full(layout, ids), self._device))

    def _check(self, rows: int, replay: _Replay) -> None:
        """Raises RuntimeError for a replay that says something else than the eager pass."""
        error = self._error(rows, replay)
        if not error <= _TOLERANCE:
            raise RuntimeError(f"its scores differ from the eager pass by {error:.3g}")

    def _error(self, rows: int, replay: _Replay) -> float:
        """Largest difference from the eager pass, on random tokens."""
        lengths, vocabulary = [2 * self._pool] * rows, self._vllm_config.model_config.get_vocab_size()
        ids = torch.randint(vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(rows))
        ids = ids.to(self._device)
        found = replay(ids).clone()
        return float((found - self._p_full(self._layout(lengths), ids)).abs().max())

    @contextmanager
    def _collecting(self, plan: PoolPlan) -> Iterator[list[Tensor]]:
        """Pooled queries `[S, D]` of the routable layers, in order, from the pass inside."""
        pooled: list[Tensor] = []
        handles = on_queries(self.attention, lambda layer, queries: pooled.append(plan.mean(plan.gather(queries))))
        try:
            yield pooled
        finally:
            for handle in handles:
                handle.remove()


def _on_all_ranks(run: Callable[[], _T]) -> _T:
    """`run()`, done by every rank of a tensor parallel engine or by none.

    A rank that goes on without the others would meet their next exchange with another one. They agree on the host, as
    the device may be at an exchange that one of them did not get to.

    Raises RuntimeError where it failed on any rank.
    """
    failure: Exception | None = None
    try:
        found = run()
    except Exception as error:
        failure = error
    if get_tensor_model_parallel_world_size() > 1:
        alike = torch.tensor(failure is None, dtype=torch.int32)
        torch.distributed.all_reduce(alike, torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
        if not alike and failure is None:
            raise RuntimeError("another rank failed")
    if failure is not None:
        raise failure if isinstance(failure, RuntimeError) else RuntimeError(str(failure)) from failure
    return found


def captured(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`run` as a replay of a CUDA graph, into a tensor that is the same at every call."""
    current = torch.cuda.current_stream(device)
    # vLLM's own context for captures: its all-reduce kernels have addresses to exchange when it ends.
    with graph_capture(device=device) as context:
        for _ in range(2):
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=current_platform.get_global_graph_pool(), stream=context.stream):
            found = run()
    current.wait_stream(context.stream)

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay


def on_queries(attention: Sequence[Any], see: Callable[[int, Tensor], None]) -> list[Any]:
    """Call `see(layer, queries [N, Hq, D])` with the queries before RoPE of each attention module as it runs.

    Returns the hooks' handles. Queries before RoPE are the second argument of the rotary embedding.
    """
    running: list[int] = []

    def begin(layer: int) -> Callable[[Any, Any], None]:
        return lambda module, args: running.append(layer)

    def rotate(module: Any, args: tuple[Any, ...]) -> None:
        if running:
            layer = running.pop()
            see(layer, args[1].view(args[1].shape[0], -1, attention[layer].head_dim))

    # All layers share one rotary module, which is why their own hooks say whose queries come next.
    rotary = {id(module.rotary_emb): module.rotary_emb for module in attention}.values()
    handles = [module.register_forward_pre_hook(rotate) for module in rotary]
    return handles + [module.register_forward_pre_hook(begin(i)) for i, module in enumerate(attention)]


def mean_over_ranks(queries: Tensor) -> Tensor:
    """Pooled queries of all heads, from each rank's pooled own ones; the same on every rank, bit for bit."""
    parts = get_tensor_model_parallel_world_size()
    return queries if parts == 1 else tensor_model_parallel_all_reduce(queries) / parts


def load_router(deployment: Deployment, device: torch.device) -> LayerRouter:
    """The adapter's router, float32, on `device`."""
    backbone = deployment.config.backbone
    assert backbone is not None
    router = LayerRouter(deployment.layers, backbone.head_dim, deployment.config.full_bias)
    router.load_state_dict(deployment.adapter.state)
    return router.to(device).float().eval()
