"""The probe on vLLM's model: the two ends of new prompts, run densely and eagerly, without the KV cache.

The same router, pooling and semantics as `FluxAttention.probe`; only the model is vLLM's. Queries before RoPE (and
after q-norm) are what a layer hands to its rotary embedding, which a hook reads while the probe runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import set_forward_context

from flux_attention.kernels.api import Packing, dense_attention
from flux_attention.router import LayerRouter, PoolPlan
from flux_attention.serving.options import Deployment


@dataclass(frozen=True)
class ProbeMetadata:
    """Stands for a layer's attention metadata while a probe runs: prompts' ends, back to back."""

    packing: Packing

    def attend(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float) -> Tensor:
        """Dense attention within each prompt: `query [N, Hq, D]`, `key, value [N, Hk, D]` → into `output`."""
        tokens = sum(self.packing.q_lens)
        out = dense_attention(query[:tokens], key[:tokens], value[:tokens], self.packing, scale=scale)
        output[:tokens].view_as(out).copy_(out)
        return output


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
        self._pool = deployment.config.pool_tokens
        decoder = model.model.layers  # type: ignore[union-attr]
        self.attention = [decoder[index].self_attn for index in deployment.decoder_layers]  # type: ignore[index,union-attr]
        self._names = [layer.self_attn.attn.layer_name for layer in decoder]  # type: ignore[union-attr]
        self.router = load_router(deployment, device)

    @torch.inference_mode()
    def scores(self, ends: Sequence[Sequence[int]]) -> list[list[float]]:
        """The router's p_full of every routable layer, per prompt; `ends` are the tokens of `options.probe_ends`."""
        lengths = [len(tokens) for tokens in ends]
        ids = torch.tensor([token for tokens in ends for token in tokens], device=self._device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self._device)
        packing = Packing(tuple(lengths), tuple(lengths))
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        plan = PoolPlan.build(starts, lengths, self._pool, device=self._device)
        metadata = dict.fromkeys(self._names, ProbeMetadata(packing))
        with (
            self._collecting(plan) as pooled,
            # No slots: nothing is written into the KV cache.
            set_forward_context(metadata, self._vllm_config, num_tokens=len(ids), slot_mapping={}, skip_compiled=True),
        ):
            self._model(input_ids=ids, positions=positions)
        scores: list[list[float]] = self.router.p_full(mean_over_ranks(torch.stack(pooled))).T.tolist()
        return scores

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
