"""Attention on packed sequences: one function per op, validation and explicit dispatch.

Legend: `S` sequences, `N` query tokens and `M` key tokens over all of them, `Hq` query heads, `Hk` key/value heads
(`Hq % Hk == 0`), `D` head dim, `A` block tokens, `P` pages. Layouts: `q [N, Hq, D]`, `k, v [M, Hk, D]`.

`impl` is a name or `"auto"`. `"auto"` picks the fastest implementation that supports the request; a name is used as
given and raises when it cannot serve the request. Implementations import lazily: neither triton nor flash_attn is
loaded before an op that needs it runs.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Packing:
    """Lengths of the sequences packed along the token axis. Host integers; device copies are made once and kept.

    Queries are the last `q_lens[s]` tokens of sequence s. Its key array holds positions
    `[0, sink) ∪ [sink + gaps[s], n)` with `n = k_lens[s] + gaps[s]`; `gaps[s] = 0` is an unbroken sequence.

    Raises ValueError when the tuples differ in length, or a length is negative, or `q_lens[s] > k_lens[s]`.
    """

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    gaps: tuple[int, ...] = ()
    _device: dict[tuple[str, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    def __post_init__(self) -> None:
        # Lists are accepted for convenience; stored as tuples so that the packing hashes.
        for name in ("q_lens", "k_lens", "gaps"):
            object.__setattr__(self, name, tuple(int(x) for x in getattr(self, name)))
        if not self.gaps:
            object.__setattr__(self, "gaps", (0,) * len(self.k_lens))
        if not len(self.q_lens) == len(self.k_lens) == len(self.gaps):
            raise ValueError(
                "Packing: q_lens, k_lens and gaps must have one entry per sequence, got "
                f"{len(self.q_lens)}, {len(self.k_lens)} and {len(self.gaps)} entries"
            )
        for s, (q, k, g) in enumerate(zip(self.q_lens, self.k_lens, self.gaps, strict=True)):
            if not 0 <= q <= k:
                raise ValueError(f"Packing: sequence {s} needs 0 <= q_len <= k_len, got q_len={q}, k_len={k}")
            if g < 0:
                raise ValueError(f"Packing: gaps[{s}] must be >= 0, got {g}")

    def __len__(self) -> int:
        return len(self.q_lens)

    @functools.cached_property
    def max_q(self) -> int:
        """Longest query length, tokens."""
        return max(self.q_lens, default=0)

    @functools.cached_property
    def max_k(self) -> int:
        """Longest key length, tokens (keys held, dropped ones not counted)."""
        return max(self.k_lens, default=0)

    @functools.cached_property
    def totals(self) -> tuple[int, int]:
        """(N, M): query and key tokens over all sequences."""
        return sum(self.q_lens), sum(self.k_lens)

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """Position of the first query of each sequence."""
        return tuple(k + g - q for q, k, g in zip(self.q_lens, self.k_lens, self.gaps, strict=True))

    @functools.cached_property
    def uniform(self) -> bool:
        """Whether all sequences have the same query length, key length and gap."""
        return len(set(zip(self.q_lens, self.k_lens, self.gaps, strict=True))) <= 1

    @functools.cached_property
    def q_offsets(self) -> tuple[int, ...]:
        """S + 1 host offsets of the sequences in the packed queries."""
        return _offsets(self.q_lens)

    @functools.cached_property
    def k_offsets(self) -> tuple[int, ...]:
        """S + 1 host offsets of the sequences in the packed keys."""
        return _offsets(self.k_lens)

    def cu_q(self, device: torch.device | str) -> Tensor:
        """int32 [S + 1] query offsets on `device`, made once per device."""
        return self._on("q", self.q_offsets, device)

    def cu_k(self, device: torch.device | str) -> Tensor:
        """int32 [S + 1] key offsets on `device`, made once per device."""
        return self._on("k", self.k_offsets, device)

    def _on(self, name: str, values: tuple[int, ...], device: torch.device | str) -> Tensor:
        key = (name, torch.device(device))
        if key not in self._device:
            self._device[key] = torch.tensor(values, dtype=torch.int32, device=device)
        return self._device[key]


def _offsets(lens: tuple[int, ...]) -> tuple[int, ...]:
    out = [0]
    for n in lens:
        out.append(out[-1] + n)
    return tuple(out)


# ------------------------------------------------------------------------------------------------ ops


def dense_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, scale: float, impl: str = "auto") -> Tensor:
    """Causal attention of each sequence over itself: the query at position t sees keys `k <= t`.

    `q [N, Hq, D]`, `k, v [M, Hk, D]` → `[N, Hq, D]`. `scale` multiplies the scores (usually `D ** -0.5`).
    Differentiable with every impl. Raises ValueError on shapes that do not match `packing` or a packing with gaps.
    """
    _check_qkv("dense_attention", q, k, v, packing)
    _no_gaps("dense_attention", packing)
    impl = _resolve("dense_attention", impl, q)
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
    _check_qkv("streaming_attention", q, k, v, packing)
    _check_streaming("streaming_attention", packing, sink, window, block)
    impl = _resolve("streaming_attention", impl, q, block)
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
    _check_qkv("triangle_attention", q, k, v, packing)
    _no_gaps("triangle_attention", packing)
    _check_streaming("triangle_attention", packing, sink, window, block)
    if len(dense_from) != len(packing):
        raise ValueError(
            f"triangle_attention: dense_from needs one position per sequence ({len(packing)}), got {len(dense_from)}"
        )
    impl = _resolve("triangle_attention", impl, q, block)
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
    impl = _resolve("xattention", impl, q, block)
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
    _check_qkv("select_blocks", q, k, k, packing)
    _no_gaps("select_blocks", packing)
    _check_block("select_blocks", block)
    if stride < 1 or block % stride:
        raise ValueError(f"select_blocks: stride must be a positive divisor of block={block}, got {stride}")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"select_blocks: threshold must be in (0, 1], got {threshold}")
    impl = _resolve("select_blocks", impl, q)
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
    _check_qkv("block_sparse_attention", q, k, v, packing)
    _no_gaps("block_sparse_attention", packing)
    _check_block("block_sparse_attention", block)
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
    impl = _resolve("block_sparse_attention", impl, q, block)
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
    if q.dim() != 3 or k_pages.dim() != 4 or v_pages.shape != k_pages.shape:
        raise ValueError(
            "paged_decode: expected q [S, Hq, D] and k_pages, v_pages [P, page, Hk, D], got "
            f"{list(q.shape)}, {list(k_pages.shape)}, {list(v_pages.shape)}"
        )
    rows, hq, dim = q.shape
    page, hk = k_pages.shape[1], k_pages.shape[2]
    if k_pages.shape[3] != dim or hk == 0 or hq % hk:
        raise ValueError(
            f"paged_decode: q has {hq} heads of {dim}, k_pages {hk} heads of {k_pages.shape[3]}; the head dims must "
            "agree and the query heads be a multiple of the key heads"
        )
    if page % 16:
        raise ValueError(f"paged_decode: the page size (k_pages.shape[1]) must be a multiple of 16, got {page}")
    if page_table.dim() != 2 or page_table.shape[0] != rows or lengths.shape != (rows,):
        raise ValueError(
            f"paged_decode: expected page_table [{rows}, max_pages] and lengths [{rows}], got "
            f"{list(page_table.shape)} and {list(lengths.shape)}"
        )
    for name, index in (("page_table", page_table), ("lengths", lengths)):
        if index.dtype != torch.int32:
            raise ValueError(f"paged_decode: {name} must be int32, got {index.dtype}")
    if not (k_pages.dtype == v_pages.dtype == q.dtype and q.is_floating_point()):
        raise ValueError(
            f"paged_decode: q, k_pages and v_pages must share a floating dtype, got {q.dtype}, {k_pages.dtype}, "
            f"{v_pages.dtype}"
        )
    if any(t.device != q.device for t in (k_pages, v_pages, page_table, lengths)):
        raise ValueError(
            f"paged_decode: all tensors must be on q's device {q.device}, got k_pages on {k_pages.device}, v_pages on "
            f"{v_pages.device}, page_table on {page_table.device}, lengths on {lengths.device}"
        )
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or out.device != q.device):
        raise ValueError(
            f"paged_decode: out must be {list(q.shape)} {q.dtype} on {q.device}, got {list(out.shape)} {out.dtype} on "
            f"{out.device}"
        )
    impl = _resolve("paged_decode", impl, q)
    if impl == "reference":
        from flux_attention.kernels import reference

        result = reference.paged_decode(q, k_pages, v_pages, page_table, lengths, scale=scale)
        return result if out is None else out.copy_(result)
    from flux_attention.kernels import paged_decode as paged

    fn = paged.paged_decode_sdpa if impl == "sdpa" else paged.paged_decode_triton
    return fn(q, k_pages, v_pages, page_table, lengths, scale=scale, out=out)


# ------------------------------------------------------------------------------------------------ dispatch


@functools.cache
def _importable(module: str) -> bool:
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
        if not _importable("triton"):
            return "triton is not installed; `pip install triton` (it comes with torch on Linux + CUDA)"
        if q.device.type != "cuda" and not _triton_interprets():
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
        if not _importable("flash_attn.cute"):
            return "flash-attn-4 is not installed; `pip install --pre flash-attn-4`"
    if impl in ("flash4", "flex") and block is not None:
        if op in ("xattention", "block_sparse_attention") and block != 128:
            return f"block-sparse {impl} takes block=128, got {block}"
        if block % 128:
            return f"{impl} takes blocks that are multiples of 128, got {block}"
    if impl == "flex" and (q.shape[-1] < 16 or q.shape[-1] & (q.shape[-1] - 1)):
        return f"flex takes head dims that are powers of two from 16, got {q.shape[-1]}"
    return None


def _triton_interprets() -> bool:
    """Whether triton runs kernels on the CPU (TRITON_INTERPRET=1), as the tests do."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _resolve(op: str, impl: str, q: Tensor, block: int | None = None) -> str:
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


# ------------------------------------------------------------------------------------------------ validation


def _check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise ValueError(
            f"{op}: expected q [N, Hq, D] and k, v [M, Hk, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    n, m = packing.totals
    if q.shape[0] != n or k.shape[0] != m:
        raise ValueError(
            f"{op}: packing holds {n} query and {m} key tokens, got q with {q.shape[0]} and k with {k.shape[0]}"
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"{op}: q and k must share the head dim, got {q.shape[2]} and {k.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: query heads must be a multiple of key heads, got {q.shape[1]} and {k.shape[1]}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"{op}: q, k and v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"{op}: q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")


def _no_gaps(op: str, packing: Packing) -> None:
    if any(packing.gaps):
        raise ValueError(f"{op}: needs every key of a sequence, got a packing with gaps {packing.gaps}")


def _check_block(op: str, block: int) -> None:
    if block < 1:
        raise ValueError(f"{op}: block must be >= 1, got {block}")


def _check_streaming(op: str, packing: Packing, sink: int, window: int, block: int) -> None:
    _check_block(op, block)
    if window < 0 or window % block:
        raise ValueError(f"{op}: window must be a non-negative multiple of block={block}, got {window}")
    if sink < 0 or sink % block:
        raise ValueError(f"{op}: sink must be a non-negative multiple of block={block}, got {sink}")
    if not any(packing.gaps):
        return
    for s, (gap, start) in enumerate(zip(packing.gaps, packing.starts, strict=True)):
        if gap and packing.q_lens[s] and start // block * block - window < sink + gap:
            raise ValueError(
                f"{op}: sequence {s} dropped keys [{sink}, {sink + gap}), but its first query at position {start} sees "
                f"keys from {max(sink, start // block * block - window)}; gaps[{s}] may be at most "
                f"{max(0, start // block * block - window - sink)}"
            )
