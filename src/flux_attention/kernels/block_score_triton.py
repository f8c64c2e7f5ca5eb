"""XAttention's scores, masses and choice of blocks in triton. Imported only when the op runs.

Variables: `i_` index, `o_` offsets, `p_` pointer, `b_` block of values, `m_` mask. A *row* is `STRIDE` tokens, `ROWS`
rows make a block. `score_kernel` writes the log-sum-exp of each (row, key block), `ROWS` times smaller than the scores;
`choose_kernel` normalises them, adds them up per query block and takes blocks until the threshold.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Lengths and chunks differ from request to request: none of them is worth a compilation of its own.
@triton.jit(do_not_specialize=["start", "n_q", "n_k", "row0", "n_rows", "n_blocks", "head0", "group"])
def score_kernel(
    p_q, p_k, p_lse, start, n_q, n_k, row0, n_rows, n_blocks, head0, group, scale2,
    stride_qn, stride_qh, stride_kn, stride_kh,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exps `[heads, n_rows, n_blocks]` of rows `row0 ..` over the causal rows of each key block.

    Queries sit at positions `start .. start + n_q`; absent tokens are zero vectors.
    """
    i_b, i_a, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    a_first = row0 + i_a * BLOCK_A
    b_first = i_b * BLOCK_B
    if b_first < a_first + BLOCK_A:
        o_a = a_first + tl.arange(0, BLOCK_A)
        o_b = b_first + tl.arange(0, BLOCK_B)
        o_d = tl.arange(0, BLOCK_D)
        i_q = head0 + i_h
        p_qh = p_q + i_q.to(tl.int64) * stride_qh
        p_kh = p_k + (i_q // group).to(tl.int64) * stride_kh
        b_s = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        for i in range(STRIDE * (D // BLOCK_D)):
            i_t = i // (D // BLOCK_D)
            i_d = i % (D // BLOCK_D) * BLOCK_D
            o_q = o_a * STRIDE + i_t - start
            # The antidiagonal: the key's tokens run backwards.
            o_k = o_b * STRIDE + (STRIDE - 1 - i_t)
            m_q = (o_q >= 0) & (o_q < n_q)
            m_k = o_k < n_k
            b_q = tl.load(
                p_qh + o_q.to(tl.int64)[:, None] * stride_qn + (i_d + o_d)[None, :], mask=m_q[:, None], other=0.0
            )
            b_k = tl.load(
                p_kh + o_k.to(tl.int64)[:, None] * stride_kn + (i_d + o_d)[None, :], mask=m_k[:, None], other=0.0
            )
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=PRECISION)
        b_s = tl.where(o_b[None, :] <= o_a[:, None], b_s * scale2, -float("inf"))
        # [BLOCK_A, blocks, ROWS]
        b_3 = tl.reshape(b_s, (BLOCK_A, BLOCK_B // ROWS, ROWS))
        b_max = tl.max(b_3, 2)
        # A wholly masked block must give -inf, not the NaN of inf - inf.
        b_safe = tl.where(b_max == -float("inf"), 0.0, b_max)
        b_sum = tl.sum(tl.exp2(b_3 - b_safe[:, :, None]), 2)
        b_lse = b_safe + tl.log2(b_sum)
        o_j = i_b * (BLOCK_B // ROWS) + tl.arange(0, BLOCK_B // ROWS)
        o_r = o_a - row0
        m_out = (o_r < n_rows)[:, None] & (o_j < n_blocks)[None, :]
        tl.store(p_lse + (i_h.to(tl.int64) * n_rows + o_r[:, None]) * n_blocks + o_j[None, :], b_lse, mask=m_out)


@triton.jit(do_not_specialize=["start", "n_q", "block0", "n_rows", "n_blocks", "head0", "n_q_blocks", "first"])
def choose_kernel(
    p_lse, p_chosen, start, n_q, block0, n_rows, n_blocks, head0, n_q_blocks, first, threshold,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Choice of key blocks, uint8 `[Hq, n_q_blocks, n_blocks]`, of query block `block0 + i` and head `head0 + h`."""
    i_i, i_h = tl.program_id(0), tl.program_id(1)
    own = block0 + i_i
    o_j = tl.arange(0, BLOCK)
    m_j = (o_j <= own) & (o_j < n_blocks)
    b_mass = tl.zeros([BLOCK], tl.float32)
    for r in range(ROWS):
        t = (own * ROWS + r) * STRIDE
        # Rows without a single query carry no mass.
        if (t + STRIDE > start) & (t < start + n_q):
            p_row = p_lse + (i_h.to(tl.int64) * n_rows + i_i * ROWS + r) * n_blocks
            b_lse = tl.load(p_row + o_j, mask=m_j, other=-float("inf"))
            b_max = tl.max(b_lse, 0)
            b_p = tl.exp2(b_lse - b_max)
            b_mass += b_p / tl.sum(b_p, 0)
    target = tl.sum(b_mass, 0) * threshold
    # Masses are not negative, so their bit patterns order like their values: bisect for the largest cut such that the
    # blocks at or above it hold the target. No sort.
    b_bits = b_mass.to(tl.int32, bitcast=True)
    low = tl.full([], 0, tl.int32)
    high = tl.max(b_bits, 0) + 1
    for _ in range(31):
        middle = low + (high - low) // 2
        held = tl.sum(tl.where(b_bits >= middle, b_mass, 0.0), 0)
        enough = held >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above = tl.sum(tl.where(b_bits > low, b_mass, 0.0), 0)
    cut = low.to(tl.float32, bitcast=True)
    # Among equal masses the earlier blocks come first.
    b_tie = ((b_bits == low) & m_j).to(tl.int32)
    b_before = above + (tl.cumsum(b_tie, 0) - b_tie).to(tl.float32) * cut
    m_take = (b_bits > low) | ((b_tie == 1) & (b_before < target))
    m_take = (m_take & m_j) | (o_j == own) | (o_j == 0)
    p_out = p_chosen + ((head0 + i_h).to(tl.int64) * n_q_blocks + own - first) * n_blocks
    tl.store(p_out + o_j, m_take.to(tl.uint8), mask=o_j < n_blocks)
