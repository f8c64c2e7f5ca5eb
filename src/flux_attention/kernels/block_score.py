"""XAttention's choice of key blocks (Xu et al., arXiv 2503.16428): antidiagonal scores, block masses, threshold.

Shapes and definition as in `flux_attention.kernels.api.select_blocks`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flux_attention.kernels.packing import Packing

#: Query blocks scored at once by the torch version; bounds its scores to [Hq, 32 * block/stride, n/stride].
_BLOCKS_A_CALL = 32
#: Bytes of partial sums the triton version holds at once.
_WORKSPACE = 1 << 29


def select_blocks_torch(
    q: Tensor, k: Tensor, packing: Packing, *, block: int, stride: int, threshold: float, scale: float
) -> list[Tensor]:
    """`api.select_blocks` in plain torch, a stretch of query blocks at a time."""
    chosen = []
    for s in range(len(packing)):
        q_s = q[packing.q_offsets[s] : packing.q_offsets[s + 1]]
        k_s = k[packing.k_offsets[s] : packing.k_offsets[s + 1]]
        start, n_k = packing.starts[s], -(-k_s.shape[0] // block)
        first = start // block
        out = torch.zeros(q.shape[1], n_k - first if len(q_s) else 0, n_k, dtype=torch.bool, device=q.device)
        chosen.append(out)
        if not len(q_s):
            continue
        q_rows, k_rows = strided_rows(q_s, k_s, start, block, stride)
        rows = block // stride
        for i in range(0, out.shape[1], _BLOCKS_A_CALL):
            n = min(_BLOCKS_A_CALL, out.shape[1] - i)
            masses = _masses(
                q_rows[:, i * rows : (i + n) * rows],
                k_rows[:, : (first + i + n) * rows],
                start,
                k_s.shape[0],
                first + i,
                block,
                stride,
                scale,
            )
            out[:, i : i + n, : first + i + n] = choose(masses, first + i, threshold)
    return chosen


def strided_rows(q: Tensor, k: Tensor, start: int, block: int, stride: int) -> tuple[Tensor, Tensor]:
    """Rows of `stride` tokens laid end to end, the keys' tokens in reverse, so that one product sums antidiagonals.

    `q [n, Hq, D]`, `k [m, Hk, D]` → `[Hq, a, stride*D]`, `[Hk, b, stride*D]`; absent tokens are zeros.
    """
    n_k = -(-k.shape[0] // block) * block
    base = start // block * block
    q_full = q.new_zeros(n_k - base, *q.shape[1:])
    q_full[start - base : start - base + q.shape[0]] = q
    k_full = k.new_zeros(n_k, *k.shape[1:])
    k_full[: k.shape[0]] = k
    q_rows = q_full.view(-1, stride, *q.shape[1:]).permute(2, 0, 1, 3).flatten(2)
    k_rows = k_full.view(-1, stride, *k.shape[1:]).flip(1).permute(2, 0, 1, 3).flatten(2)
    return q_rows, k_rows


def _masses(
    q_rows: Tensor, k_rows: Tensor, start: int, end: int, first: int, block: int, stride: int, scale: float
) -> Tensor:
    """Softmax mass per key block, `[Hq, nq, nk]` float32 (or wider), of query blocks `first ..`."""
    heads, n, width = q_rows.shape
    hk = k_rows.shape[0]
    rows = block // stride
    # Query heads of a group share their keys: [Hk, G * a, W] @ [Hk, W, b]
    scores = torch.bmm(q_rows.reshape(hk, -1, width), k_rows.transpose(1, 2)).view(heads, n, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * (scale / stride)
    a = first * rows + torch.arange(n, device=scores.device)
    b = torch.arange(scores.shape[2], device=scores.device)
    weights = scores.masked_fill_(b > a[:, None], float("-inf")).softmax(-1)
    present = ((a + 1) * stride > start) & (a * stride < end)
    weights *= present[:, None]
    return weights.view(heads, n // rows, rows, -1, rows).sum((2, 4))


def choose(masses: Tensor, first: int, threshold: float) -> Tensor:
    """Blocks by descending mass until they hold `threshold` of it, block 0 and the own block; bool like `masses`."""
    order = masses.sort(dim=-1, descending=True, stable=True)
    before = order.values.cumsum(-1) - order.values
    taken = before < threshold * order.values.sum(-1, keepdim=True)
    chosen = torch.zeros_like(masses, dtype=torch.bool).scatter_(-1, order.indices, taken)
    j = torch.arange(masses.shape[2], device=masses.device)
    i = first + torch.arange(masses.shape[1], device=masses.device)[:, None]
    return chosen.logical_and_(j <= i).logical_or_(j == i).logical_or_(j == 0)


def select_blocks_triton(
    q: Tensor, k: Tensor, packing: Packing, *, block: int, stride: int, threshold: float, scale: float
) -> list[Tensor]:
    """`api.select_blocks` by two triton kernels; holds at most about `_WORKSPACE` bytes of partial sums.

    Raises ValueError when `block / stride` is not a power of two up to 64 or the head dim is not contiguous.
    """
    import triton

    from flux_attention.kernels import block_score_triton as kernels

    rows = block // stride
    if rows > 64 or rows & (rows - 1):
        raise ValueError(
            f"select_blocks: impl='triton' needs block / stride to be a power of two up to 64, got {block} / {stride}; "
            "impl='torch' takes any"
        )
    for name, t in (("q", q), ("k", k)):
        if t.numel() and t.stride(-1) != 1:
            raise ValueError(f"select_blocks: {name}'s last dimension must be contiguous, got strides {t.stride()}")
    heads, dim = q.shape[1:]
    group = heads // k.shape[1]
    chosen = []
    for s in range(len(packing)):
        q_s = q[packing.q_offsets[s] : packing.q_offsets[s + 1]]
        k_s = k[packing.k_offsets[s] : packing.k_offsets[s + 1]]
        start, n_k = packing.starts[s], -(-k_s.shape[0] // block)
        first = start // block
        n_q = n_k - first if len(q_s) else 0
        out = torch.empty(heads, n_q, n_k, dtype=torch.uint8, device=q.device)
        chosen.append(out.view(torch.bool))
        if not n_q:
            continue
        # Heads and query blocks at a time, so that the workspace stays bounded at any length.
        n_blocks = max(1, min(n_q, _WORKSPACE // (4 * rows * n_k)))
        n_heads = max(1, min(heads, _WORKSPACE // (4 * rows * n_k * n_blocks)))
        lse = torch.empty(n_heads * n_blocks * rows * n_k, dtype=torch.float32, device=q.device)
        for i in range(0, n_q, n_blocks):
            blocks = min(n_blocks, n_q - i)
            last_row = (first + i + blocks) * rows
            for h in range(0, heads, n_heads):
                some = min(n_heads, heads - h)
                kernels.score_kernel[(triton.cdiv(last_row, 128), triton.cdiv(blocks * rows, 128), some)](
                    q_s,
                    k_s,
                    lse,
                    start,
                    q_s.shape[0],
                    k_s.shape[0],
                    (first + i) * rows,
                    blocks * rows,
                    n_k,
                    h,
                    group,
                    scale / stride * 1.4426950408889634,
                    q_s.stride(0),
                    q_s.stride(1),
                    k_s.stride(0),
                    k_s.stride(1),
                    STRIDE=stride,
                    ROWS=rows,
                    D=dim,
                    BLOCK_A=128,
                    BLOCK_B=128,
                    BLOCK_D=min(64, dim) if q.element_size() <= 2 else 32,
                    PRECISION="ieee",
                    num_warps=8,
                    num_stages=4,
                )
                kernels.choose_kernel[(blocks, some)](
                    lse,
                    out,
                    start,
                    q_s.shape[0],
                    first + i,
                    blocks * rows,
                    n_k,
                    h,
                    n_q,
                    first,
                    threshold,
                    STRIDE=stride,
                    ROWS=rows,
                    # Below one block a thread nothing gets cheaper, and each power of two is compiled.
                    BLOCK=max(128, triton.next_power_of_2(n_k)),
                    num_warps=4 if n_k <= 2048 else 8,
                )
    return chosen
