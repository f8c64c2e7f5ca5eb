"""Attention on packed sequences: one function per op. Validation is `checks.py`, the choice of kernels `dispatch.py`.

Legend: `S` sequences, `N` query tokens and `M` key tokens over all of them, `Hq` query heads, `Hk` key/value heads
(`Hq % Hk == 0`), `D` head dim, `A` block tokens, `P` pages. Layouts: `q [N, Hq, D]`, `k, v [M, Hk, D]`.

`impl` is a name or `"auto"`. `"auto"` picks the fastest implementation that supports the request; a name is used as
given and raises when it cannot serve the request. Implementations import lazily: neither triton nor flash_attn is
loaded before an op that needs it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flux_attention.kernels.checks import check_block, check_pages, check_qkv, check_streaming, no_gaps
from flux_attention.kernels.dispatch import IMPLS, UnsupportedKernelError, resolve, why_unusable
from flux_attention.kernels.packing import Packing

__all__ = [
    "IMPLS",
    "Packing",
    "UnsupportedKernelError",
    "block_sparse_attention",
    "dense_attention",
    "paged_decode",
    "prepare",
    "select_blocks",
    "streaming_attention",
    "triangle_attention",
    "why_unusable",
    "xattention",
]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, scale: float, impl: str = "auto") -> Tensor:
    """Causal attention of each sequence over itself: the query at position t sees keys `k <= t`.

    `q [N, Hq, D]`, `k, v [M, Hk, D]` → `[N, Hq, D]`. `scale` multiplies the scores (usually `D ** -0.5`).
    Differentiable with every impl. Raises ValueError on shapes that do not match `packing` or a packing with gaps.
    """
    check_qkv("dense_attention", q, k, v, packing)
    no_gaps("dense_attention", packing)
    impl = resolve("dense_attention", impl, q)
    if impl == "reference":
        from flux_attention.kernels import reference

        return reference.dense_attention(q, k, v, packing, scale=scale)
    from flux_attention.kernels import dense

    fn = dense.dense_sdpa if impl == "sdpa" else dense.dense_flash4
    return fn(q, k, v, packing, scale=scale)


def streaming_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    sink: int,
    window: int,
    block: int,
    scale: float,
    impl: str = "auto",
) -> Tensor:
    """Sinks + block-aligned window: position t sees `k <= t` with `k < sink` or `k >= block*(t//block) - window`.

    `q [N, Hq, D]`, `k, v [M, Hk, D]` → `[N, Hq, D]`; `sink`, `window`, `block` in tokens, the first two multiples of
    `block`. Keys a packing dropped (`gaps`) must be outside what its queries see. Differentiable with every impl.
    Raises ValueError on bad shapes, sizes or gaps.
    """
    check_qkv("streaming_attention", q, k, v, packing)
    check_streaming("streaming_attention", packing, sink, window, block)
    impl = resolve("streaming_attention", impl, q, block)
    if impl == "reference":
        from flux_attention.kernels import reference

        return reference.streaming_attention(q, k, v, packing, sink=sink, window=window, block=block, scale=scale)
    from flux_attention.kernels import streaming

    fn = {
        "sdpa": streaming.streaming_sdpa,
        "flash4": streaming.streaming_flash4,
        "flex": streaming.streaming_flex,
    }[impl]
    return fn(q, k, v, packing, sink=sink, window=window, block=block, scale=scale)


def prepare(
    op: str,
    run: Callable[[], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    impl: str = "auto",
    block: int | None = None,
) -> Callable[[], Tensor]:
    """`run`, to be called once it is known to be wanted; where that is possible, with all done but its launch.

    `run` is `dense_attention` or `streaming_attention` (its name is `op`) on these inputs. With flash-attn-4 and
    without gradients it is called here and only its launches are held back; otherwise it comes back as it is.
    """
    if resolve(op, impl, q, block) != "flash4":
        return run
    from flux_attention.kernels import dense, held, streaming_tiles

    # Over lists of blocks, and under gradients, results are put together by what follows the launches.
    plain = not dense.needs_grad(q, k, v)
    if op == "streaming_attention":
        assert block is not None
        plain = streaming_tiles.serves(q, k, v, packing, block)
    return held.hold(run) if plain else run


def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    sink: int,
    window: int,
    block: int,
    dense_from: tuple[int, ...],
    scale: float,
    impl: str = "auto",
) -> Tensor:
    """Streaming attention, but queries at positions `>= dense_from[s]` of sequence s attend densely.

    Shapes and errors as `streaming_attention`; gaps are refused, because the dense rows see every key.
    """
    check_qkv("triangle_attention", q, k, v, packing)
    no_gaps("triangle_attention", packing)
    check_streaming("triangle_attention", packing, sink, window, block)
    if len(dense_from) != len(packing):
        raise ValueError(
            f"triangle_attention: dense_from needs one position per sequence ({len(packing)}), got {len(dense_from)}"
        )
    impl = resolve("triangle_attention", impl, q, block)
    if impl == "reference":
        from flux_attention.kernels import reference

        return reference.triangle_attention(
            q, k, v, packing, sink=sink, window=window, block=block, dense_from=dense_from, scale=scale
        )
    from flux_attention.kernels import dense, streaming

    sparse_fn = {
        "sdpa": streaming.streaming_sdpa,
        "flash4": streaming.streaming_flash4,
        "flex": streaming.streaming_flex,
    }[impl]
    dense_fn = dense.dense_flash4 if impl == "flash4" else dense.dense_sdpa
    # Dense queries are the tail of each sequence, so they form a packing of their own over the same keys.
    tails = tuple(
        max(0, min(n, start + n - first))
        for n, start, first in zip(packing.q_lens, packing.starts, dense_from, strict=True)
    )
    if tails == packing.q_lens:
        return dense_fn(q, k, v, packing, scale=scale)
    out = sparse_fn(q, k, v, packing, sink=sink, window=window, block=block, scale=scale)
    if not any(tails):
        return out
    spans = [(end - tail, end) for tail, end in zip(tails, packing.q_offsets[1:], strict=True)]
    q_tail = q[spans[0][0] : spans[0][1]] if len(spans) == 1 else torch.cat([q[a:b] for a, b in spans])
    tail_out = dense_fn(q_tail, k, v, Packing(tails, packing.k_lens), scale=scale)
    parts = list(zip(spans, tail_out.split(tails), strict=True))
    if not out.requires_grad:
        for (a, b), part in parts:
            out[a:b] = part
        return out
    pieces = []
    for s, ((a, _), part) in enumerate(parts):
        pieces += [out[packing.q_offsets[s] : a], part]
    return torch.cat(pieces)


def xattention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    block: int,
    stride: int,
    threshold: float,
    scale: float,
    impl: str = "auto",
) -> Tensor:
    """Block-sparse attention over the blocks `select_blocks` picks (XAttention, Xu et al., arXiv 2503.16428).

    Shapes as `dense_attention`. Gradients flow through the attention, not through the choice of blocks. Raises
    ValueError on bad shapes, sizes or gaps.
    """
    impl = resolve("xattention", impl, q, block)
    select = {"reference": "reference", "flash4": "triton", "sdpa": "torch"}.get(impl, "auto")
    blocks = select_blocks(q, k, packing, block=block, stride=stride, threshold=threshold, scale=scale, impl=select)
    return block_sparse_attention(q, k, v, packing, blocks, block=block, scale=scale, impl=impl)


def select_blocks(
    q: Tensor,
    k: Tensor,
    packing: Packing,
    *,
    block: int,
    stride: int,
    threshold: float,
    scale: float,
    impl: str = "auto",
) -> list[Tensor]:
    """Key blocks each query block attends to, per head, by antidiagonal scores (arXiv 2503.16428).

    Rows of `stride` tokens are scored by `Σ_s q[stride*a + s] · k[stride*b + stride-1-s] * scale/stride`, softmaxed
    over causal rows `b <= a`, and summed per key block and query block. Blocks are taken by descending mass (ties: the
    earlier block) until they hold `threshold` of it; block 0 and the query's own block are always taken. Tokens that
    are not there (before a chunk, after the end) count as zero vectors.

    Returns one bool `[Hq, nq, nk]` per sequence: `nq` blocks that hold a query, `nk = ceil(n / block)` key blocks.
    A chunk that starts on a block boundary selects what the whole sequence would. Not differentiable. Raises
    ValueError on bad shapes, sizes or gaps.
    """
    check_qkv("select_blocks", q, k, k, packing)
    no_gaps("select_blocks", packing)
    check_block("select_blocks", block)
    if stride < 1 or block % stride:
        raise ValueError(f"select_blocks: stride must be a positive divisor of block={block}, got {stride}")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"select_blocks: threshold must be in (0, 1], got {threshold}")
    impl = resolve("select_blocks", impl, q)
    with torch.no_grad():
        if impl == "reference":
            from flux_attention.kernels import reference

            return reference.select_blocks(q, k, packing, block=block, stride=stride, threshold=threshold, scale=scale)
        from flux_attention.kernels import block_score

        fn = block_score.select_blocks_torch if impl == "torch" else block_score.select_blocks_triton
        return fn(q, k, packing, block=block, stride=stride, threshold=threshold, scale=scale)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    blocks: Sequence[Tensor],
    *,
    block: int,
    scale: float,
    impl: str = "auto",
) -> Tensor:
    """Causal attention over chosen key blocks; a query's own block is always attended to, chosen or not.

    `blocks`: one bool `[Hq, nq, nk]` per sequence, as `select_blocks` returns. Shapes and gradients as `xattention`.
    Raises ValueError on bad shapes, sizes or gaps.
    """
    check_qkv("block_sparse_attention", q, k, v, packing)
    no_gaps("block_sparse_attention", packing)
    check_block("block_sparse_attention", block)
    if len(blocks) != len(packing):
        raise ValueError(
            f"block_sparse_attention: blocks needs one tensor per sequence ({len(packing)}), got {len(blocks)}"
        )
    for s, (chosen, start, n_k) in enumerate(zip(blocks, packing.starts, packing.k_lens, strict=True)):
        n_k_blocks = -(-n_k // block)
        n_q_blocks = n_k_blocks - start // block if packing.q_lens[s] else 0
        expected = (q.shape[1], n_q_blocks, n_k_blocks)
        if chosen.dtype != torch.bool or tuple(chosen.shape) != expected:
            raise ValueError(
                f"block_sparse_attention: blocks[{s}] must be bool {list(expected)}, "
                f"got {chosen.dtype} {list(chosen.shape)}"
            )
    impl = resolve("block_sparse_attention", impl, q, block)
    if impl == "reference":
        from flux_attention.kernels import reference

        return reference.block_sparse_attention(q, k, v, packing, blocks, block=block, scale=scale)
    from flux_attention.kernels import block_sparse

    fn = {
        "sdpa": block_sparse.block_sparse_sdpa,
        "flash4": block_sparse.block_sparse_flash4,
        "flex": block_sparse.block_sparse_flex,
    }[impl]
    return fn(q, k, v, packing, blocks, block=block, scale=scale)


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    impl: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """One query token per row over the keys in that row's pages.

    `q [S, Hq, D]`, `k_pages, v_pages [P, page, Hk, D]` (page tokens, a multiple of 16), `page_table [S, max_pages]`
    int32, `lengths [S]` int32 keys held → `[S, Hq, D]`, in `out` when given. Row s reads entries
    `0 .. ceil(lengths[s]/page) - 1` of its page table in order, so a compacted table serves a streaming row. A row of
    length 0 gives zeros. Nothing beyond a row's length is used, whatever it holds. Not differentiable.

    `impl="triton"` never synchronises with the host and can be captured in a CUDA graph; `"sdpa"` is for CPU (on CUDA
    it gathers `max_pages` for every row). Raises ValueError on bad shapes, dtypes or page sizes.
    """
    check_pages(q, k_pages, v_pages, page_table, lengths, out)
    impl = resolve("paged_decode", impl, q)
    if impl == "reference":
        from flux_attention.kernels import reference

        result = reference.paged_decode(q, k_pages, v_pages, page_table, lengths, scale=scale)
        return result if out is None else out.copy_(result)
    from flux_attention.kernels import paged_decode as paged

    fn = paged.paged_decode_sdpa if impl == "sdpa" else paged.paged_decode_triton
    return fn(q, k_pages, v_pages, page_table, lengths, scale=scale, out=out)
