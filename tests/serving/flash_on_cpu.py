"""The GPU's backend in an engine on a processor: `python -m tests.serving.flash_on_cpu`.

vLLM's own builder and implementation run, with their two kernels and the plugin's written out in PyTorch; so what is
checked is everything between the engine and the kernels: plans, tables, lengths, the order of launches. Prints the
largest difference in log-probability from the transformers path and how often tables were written for decode.

A process of its own: it gives vLLM's modules kernels that processors lack.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# First: sets what vLLM reads when it is imported.
from tests.serving.harness import Engines, differences, free_blocks, generate, mixed_asks, random_ids, tiny

COUNTS = {"decode": 0}


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    seqused_k: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: list[int],
    block_table: Tensor,
    out: Tensor,
    scheduler_metadata: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """What FlashAttention computes over pages `[P, page, Hk, D]`, with the demands that it has on its arguments."""
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert causal and list(window_size) == [-1, -1] and scheduler_metadata is None
    assert max(b - a for a, b in itertools.pairwise(starts)) <= max_seqlen_q
    assert max(lengths) <= max_seqlen_k
    assert block_table.dtype == seqused_k.dtype == torch.int32 and block_table.stride(-1) == 1
    for row, length in enumerate(lengths):
        first, last = starts[row : row + 2]
        if first == last or length == 0:
            continue
        blocks = block_table[row, : -(-length // k.shape[1])].long()
        keys, values = (pages[blocks].flatten(0, 1)[:length] for pages in (k, v))
        group = q.shape[1] // keys.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q[first:last], keys.repeat_interleave(group, 1)) * softmax_scale
        hidden = torch.arange(length) > torch.arange(length - (last - first), length)[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1))
    return out


def append(key: Tensor, value: Tensor, k: Tensor, v: Tensor, slots: Tensor, *scales: Any) -> None:
    """Write keys and values `[N, Hk, D]` to their slots of the pages."""
    for page, tensor in ((k, key), (v, value)):
        page[slots // page.shape[1], slots % page.shape[1]] = tensor[: len(slots)]


def compact_decode(
    blocks: Tensor,
    lengths: Tensor,
    sparse: Tensor,
    tables: Tensor,
    out_lengths: Tensor,
    *,
    sink: int,
    window: int,
    tile: int,
    block_size: int,
) -> None:
    """`compact_triton.compact_decode`, which has a test of its own, row by row."""
    COUNTS["decode"] += 1
    for layer in range(len(tables)):
        for row, length in enumerate(lengths.tolist()):
            start = max(length - 1, 0) // tile * tile - window
            gap = max(start - sink, 0) // block_size if sparse[layer, row] else 0
            out_lengths[layer, row] = length - gap * block_size
            column = torch.arange(-(-length // block_size) - gap)
            source = column + torch.where(column < sink // block_size, 0, gap)
            tables[layer, row, : len(column)] = blocks[row, source]


def install() -> None:
    """Put the GPU's backend, with these kernels, in the place of the CPU's."""
    from vllm.v1.attention.backends import fa_utils

    fa_utils.flash_attn_varlen_func = paged_attention
    fa_utils.reshape_and_cache_flash = append
    fa_utils.get_scheduler_metadata = None
    fa_utils.flash_attn_supports_sinks = lambda: True
    fa_utils.flash_attn_supports_quant_query_input = lambda: False
    fa_utils.is_flash_attn_varlen_func_available = lambda: True
    fa_utils.get_flash_attn_version = lambda *args, **kwargs: 3
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    load_general_plugins()  # else it would put the CPU's backend back
    from flux_attention.serving import flash

    flash.compact_decode = compact_decode
    flash.RoutedFlashBackend.get_name = staticmethod(lambda: "CPU_ATTN")  # type: ignore[method-assign]
    register_backend(AttentionBackendEnum.CPU_ATTN, "flux_attention.serving.flash.RoutedFlashBackend")


def main() -> None:
    install()
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder, Engines() as engines:
        reference = tiny("qwen3", Path(folder))
        arguments = {"max_num_batched_tokens": 128, "max_model_len": 1024, "enable_prefix_caching": True}
        llm = engines.start(reference, flux={"kv_bundle": 2}, **arguments)
        lengths = (5, 96, 97, 128, 160, 161, 200, 255, 257, 300, 333, 400, 511, 640, 700, 129)
        asks = mixed_asks(reference, random_ids(4000), lengths, tokens=40)
        for _ in range(2):  # the second time from a warm prefix cache
            worst = max(worst, *differences(reference, asks, generate(llm, asks)))
        free, every = free_blocks(llm)
    print(json.dumps({"difference": worst, "decode": COUNTS["decode"], "lost": every - free}))


if __name__ == "__main__":
    main()
