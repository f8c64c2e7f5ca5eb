"""vLLM's own streaming attention, in Triton's interpreter: `python -m tests.serving.rswa RECORD`.

Its R-SWA mask ("reference sliding window": a prefix that stays visible, and a window) knows nothing of blocks: a query
at t sees k < prefix and k > t − its window. With a window of `window + t mod tile + 1` that is the definition of
streaming attention for queries that share an offset within their tile. So queries are asked about offset by offset,
over a plain cache that holds every key; nothing of the plugin takes part.

A process of its own: Triton reads its switch when it is first imported, and the engine's process has vLLM without it.
"""

from __future__ import annotations

import os
import sys

# Else this module's import alone would decide how Triton runs in the process that starts this one.
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

BLOCK = 32
EVERYTHING = 2**30


def attention(
    queries: Tensor, positions: Tensor, keys: Tensor, values: Tensor, *, sink: int, window: int, tile: int, scale: float
) -> Tensor:
    """What each query sees of one sequence.

    Args:
        queries: `[N, Hq, D]`, at `positions` `[N]` that are equal modulo `tile`.
        keys, values: `[M, Hk, D]`, of every position.
        sink: tokens at the start that all queries see; EVERYTHING = dense attention.
        window, tile: as the plugin's pattern has them.
    """
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    (offset,) = set((positions % tile).tolist())
    count, blocks = len(positions), -(-len(keys) // BLOCK)
    pages = [torch.zeros(blocks, BLOCK, *keys.shape[1:]) for _ in range(2)]
    for page, tensor in zip(pages, (keys, values), strict=True):
        page.view(-1, *keys.shape[1:])[: len(tensor)] = tensor
    output = torch.empty_like(queries)
    unified_attention(
        q=queries.contiguous(),
        k=pages[0],
        v=pages[1],
        out=output,
        cu_seqlens_q=torch.arange(count + 1, dtype=torch.int32),
        max_seqlen_q=1,
        seqused_k=(positions + 1).int(),
        max_seqlen_k=len(keys),
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1),
        block_table=torch.arange(blocks, dtype=torch.int32).repeat(count, 1),
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        rswa_prefix_lens=torch.full((count,), sink, dtype=torch.int32),
        rswa_window=window + offset + 1,
    )
    return output


def main() -> None:
    import triton
    import triton.language as tl
    import vllm.triton_utils

    from tests.kernels import interpreter

    interpreter.repair()
    # vLLM looks for a driver and leaves empty shells in their place where it finds none.
    vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl
    record = torch.load(sys.argv[1], weights_only=True)
    for part in record["parts"]:
        answers = []
        for offset in record["offsets"]:
            positions = torch.arange(offset, len(part["queries"]), record["tile"])
            found = attention(
                part["queries"][positions],
                positions,
                part["keys"],
                part["values"],
                sink=record["sink"] if part["sparse"] else EVERYTHING,
                window=record["window"],
                tile=record["tile"],
                scale=record["scale"],
            )
            answers.append((found - part["output"][positions]).abs().max().item())
        part["difference"] = max(answers)
    torch.save([part["difference"] for part in record["parts"]], sys.argv[2])


if __name__ == "__main__":
    main()
