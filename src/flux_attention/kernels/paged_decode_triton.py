"""Split-KV paged decode in triton: two kernels, one over stretches of keys, one that combines them.

Imported only when the op runs. Variables: `i_` index, `o_` offsets, `p_` pointer, `b_` block of values, `m_` mask.

A program takes a fixed number of tokens (`split`) of one row and one key head, for all query heads of the group at
once. Rows differ in length, so programs past a row's end return at once: work follows the keys held, whatever the mix
of routes, and the host never reads a length.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(
    b_q, p_k, p_v, p_table, b_max, b_sum, b_acc, t, n, scale,
    stride_kp, stride_kt, stride_vp, stride_vt,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over tokens `t .. t + BLOCK`; MASKED when the row ends among them."""
    o_d = tl.arange(0, D)
    o_t = t + tl.arange(0, BLOCK)
    if PAGE % BLOCK == 0:
        # The tile lies in one page.
        i_page = tl.load(p_table + t // PAGE).to(tl.int64)
        o_k = i_page * stride_kp + (o_t % PAGE).to(tl.int64) * stride_kt
        o_v = i_page * stride_vp + (o_t % PAGE).to(tl.int64) * stride_vt
    else:
        i_page = tl.load(p_table + o_t // PAGE, mask=o_t < n, other=0).to(tl.int64)
        o_k = i_page * stride_kp + (o_t % PAGE).to(tl.int64) * stride_kt
        o_v = i_page * stride_vp + (o_t % PAGE).to(tl.int64) * stride_vt
    if MASKED:
        # Memory behind a row's end may hold NaN, which a zero weight would not silence.
        b_k = tl.load(p_k + o_k[:, None] + o_d[None, :], mask=(o_t < n)[:, None], other=0.0)
        b_v = tl.load(p_v + o_v[:, None] + o_d[None, :], mask=(o_t < n)[:, None], other=0.0)
    else:
        b_k = tl.load(p_k + o_k[:, None] + o_d[None, :])
        b_v = tl.load(p_v + o_v[:, None] + o_d[None, :])
    # [GROUP, BLOCK]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    if MASKED:
        b_s = tl.where((o_t < n)[None, :], b_s, -float("inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_decay = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_acc = b_acc * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_new, b_sum, b_acc


# Table widths and splits differ from request to request: none of them is worth a compilation of its own.
@triton.jit(do_not_specialize=["stride_table", "n_splits", "split"])
def decode_kernel(
    p_q, p_k, p_v, p_table, p_length, p_part, p_lse, scale,
    stride_qs, stride_qh, stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh, stride_table,
    n_splits, split,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial outputs `[S, Hk, n_splits, GROUP, D]` and base-2 log-sum-exps `[S, Hk, n_splits, GROUP]`, float32."""
    i_split, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(p_length + i_s)
    # A split is a multiple of BLOCK, and whole tiles lie in one page.
    t0 = i_split * (split // BLOCK) * BLOCK
    if t0 < n:
        t1 = tl.minimum(t0 + split, n)
        o_g = tl.arange(0, ROWS)
        o_d = tl.arange(0, D)
        m_g = o_g < GROUP
        p_qh = p_q + i_s.to(tl.int64) * stride_qs + i_h * GROUP * stride_qh
        b_q = tl.load(p_qh + o_g[:, None] * stride_qh + o_d[None, :], mask=m_g[:, None], other=0.0)
        p_kh = p_k + i_h.to(tl.int64) * stride_kh
        p_vh = p_v + i_h.to(tl.int64) * stride_vh
        p_row = p_table + i_s.to(tl.int64) * stride_table
        b_max = tl.full([ROWS], -float("inf"), tl.float32)
        b_sum = tl.zeros([ROWS], tl.float32)
        b_acc = tl.zeros([ROWS, D], tl.float32)
        # Scores in base 2: exp2 is one instruction.
        scale2 = scale * LOG2_E
        t_full = t0 + (t1 - t0) // BLOCK * BLOCK
        for t in tl.range(t0, t_full, BLOCK, num_stages=STAGES):
            b_max, b_sum, b_acc = _tile(
                b_q, p_kh, p_vh, p_row, b_max, b_sum, b_acc, t, n, scale2,
                stride_kp, stride_kt, stride_vp, stride_vt, D, PAGE, BLOCK, False, PRECISION,
            )  # fmt: skip
        if t_full < t1:
            b_max, b_sum, b_acc = _tile(
                b_q, p_kh, p_vh, p_row, b_max, b_sum, b_acc, t_full, n, scale2,
                stride_kp, stride_kt, stride_vp, stride_vt, D, PAGE, BLOCK, True, PRECISION,
            )  # fmt: skip
        i_out = (i_s * tl.num_programs(1) + i_h).to(tl.int64) * n_splits + i_split
        p_out = p_part + (i_out * GROUP + o_g[:, None]) * D + o_d[None, :]
        tl.store(p_out, b_acc / b_sum[:, None], mask=m_g[:, None])
        tl.store(p_lse + i_out * GROUP + o_g, b_max + tl.log2(b_sum), mask=m_g)


@triton.jit(do_not_specialize=["n_splits", "split"])
def combine_kernel(
    p_part, p_lse, p_length, p_out, n_splits, split, stride_os, stride_oh,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weighted mean of a row's partial outputs; splits that its length does not reach are never read."""
    i_s, i_q, i_d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(p_length + i_s)
    n_used = (n + split - 1) // split
    heads = tl.num_programs(1) // GROUP
    i_row = (i_s * heads + i_q // GROUP).to(tl.int64) * n_splits
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    # Starts low but finite, so that a row of length 0 ends at 0 / 1 and not at a NaN.
    b_max = tl.full([1], -1.0e30, tl.float32)
    b_sum = tl.zeros([1], tl.float32)
    b_acc = tl.zeros([BLOCK_D], tl.float32)
    for i in range(0, n_used, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        m_i = o_i < n_used
        i_part = (i_row + o_i) * GROUP + i_q % GROUP
        b_lse = tl.load(p_lse + i_part, mask=m_i, other=-float("inf"))
        b_part = tl.load(p_part + i_part[:, None] * D + o_d[None, :], mask=m_i[:, None], other=0.0)
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_decay = tl.exp2(b_max - b_new)
        b_w = tl.exp2(b_lse - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_w, 0)
        b_acc = b_acc * b_decay + tl.sum(b_w[:, None] * b_part, 0)
        b_max = b_new
    b_sum = tl.where(n > 0, b_sum, 1.0)
    p_o = p_out + i_s.to(tl.int64) * stride_os + i_q * stride_oh + o_d
    tl.store(p_o, (b_acc / b_sum).to(p_out.dtype.element_ty))
