"""The elementwise work around attention, and matrix-vector products with it folded in, in triton.

Imported only when an op runs. Variables: `i_` index, `o_` offsets, `p_` pointer, `b_` block of values, `m_` mask.
Arithmetic is float32; values are rounded where transformers rounds them, or later.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

# ------------------------------------------------------------------------------------------------ rows of tokens


@triton.jit
def rms_norm_kernel(
    p_x, p_add, p_weight, p_out, p_sum, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """A row of `p_out` is the normalised row of `p_x`, or of `p_x + p_add`, which then goes to `p_sum`."""
    i_row = tl.program_id(0).to(tl.int64) * N
    o = tl.arange(0, BLOCK)
    m = o < N
    b_x = tl.load(p_x + i_row + o, mask=m, other=0.0).to(tl.float32)
    if ADD:
        b_x += tl.load(p_add + i_row + o, mask=m, other=0.0).to(tl.float32)
        b_rounded = b_x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + i_row + o, b_rounded, mask=m)
        b_x = b_rounded.to(tl.float32)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) / N + eps)
    b_weight = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + i_row + o, (b_x * b_weight).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def silu_mul_kernel(p_gate, p_up, p_out, n, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_gate = tl.load(p_gate + o, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + o, (b_gate * tl.sigmoid(b_gate) * b_up).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _rotated(
    p_x, o_x, m_x, p_cos, p_sin, p_weight, eps,
    HALF: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Heads at offsets `o_x [H, 1]`, normalised and rotated: their two halves `[H, HALF]`, float32."""
    o_d = tl.arange(0, HALF)[None, :]
    b_1 = tl.load(p_x + o_x + o_d, mask=m_x, other=0.0).to(tl.float32)
    b_2 = tl.load(p_x + o_x + HALF + o_d, mask=m_x, other=0.0).to(tl.float32)
    if NORM:
        b_scale = tl.rsqrt((tl.sum(b_1 * b_1, 1) + tl.sum(b_2 * b_2, 1)) / (2 * HALF) + eps)[:, None]
        b_1 = b_1 * b_scale * tl.load(p_weight + o_d).to(tl.float32)
        b_2 = b_2 * b_scale * tl.load(p_weight + HALF + o_d).to(tl.float32)
    b_cos1, b_sin1 = tl.load(p_cos + o_d).to(tl.float32), tl.load(p_sin + o_d).to(tl.float32)
    b_cos2, b_sin2 = tl.load(p_cos + HALF + o_d).to(tl.float32), tl.load(p_sin + HALF + o_d).to(tl.float32)
    return b_1 * b_cos1 - b_2 * b_sin1, b_2 * b_cos2 + b_1 * b_sin2


@triton.jit
def rotary_kernel(
    p_q, p_k, p_cos, p_sin, p_q_weight, p_k_weight, p_q_out, p_k_out, eps, stride_q, stride_k,
    HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Queries `[N, HQ * D]` and keys `[N, HK * D]`, their heads normalised and rotated. A program takes HEADS heads.

    What is read may lie in wider rows, of `stride_q` and `stride_k` values; what is written is contiguous.
    """
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    D: tl.constexpr = 2 * HALF
    QUERY_PROGRAMS: tl.constexpr = (HQ + HEADS - 1) // HEADS
    p_c, p_s = p_cos + i_t * D, p_sin + i_t * D
    o_d = tl.arange(0, HALF)[None, :]
    if i_h < QUERY_PROGRAMS:
        o_h = i_h * HEADS + tl.arange(0, HEADS)[:, None]
        m_h, o_out = o_h < HQ, (i_t * HQ + o_h) * D
        b_1, b_2 = _rotated(p_q, i_t * stride_q + o_h * D, m_h, p_c, p_s, p_q_weight, eps, HALF, NORM)
        tl.store(p_q_out + o_out + o_d, b_1.to(p_q_out.dtype.element_ty), mask=m_h)
        tl.store(p_q_out + o_out + HALF + o_d, b_2.to(p_q_out.dtype.element_ty), mask=m_h)
    else:
        o_h = (i_h - QUERY_PROGRAMS) * HEADS + tl.arange(0, HEADS)[:, None]
        m_h, o_out = o_h < HK, (i_t * HK + o_h) * D
        b_1, b_2 = _rotated(p_k, i_t * stride_k + o_h * D, m_h, p_c, p_s, p_k_weight, eps, HALF, NORM)
        tl.store(p_k_out + o_out + o_d, b_1.to(p_k_out.dtype.element_ty), mask=m_h)
        tl.store(p_k_out + o_out + HALF + o_d, b_2.to(p_k_out.dtype.element_ty), mask=m_h)


@triton.jit(do_not_specialize=["stride_table"])
def rotary_append_kernel(
    p_q, p_k, p_v, p_cos, p_sin, p_q_weight, p_k_weight, p_q_out, p_k_pages, p_v_pages, p_table, p_count, eps,
    stride_table, stride_p, stride_t, stride_h,
    HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One token a row: its queries rotated to `p_q_out`, its keys and values put behind the row's keys in its pages."""
    i_s, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    D: tl.constexpr = 2 * HALF
    p_c, p_s = p_cos + i_s * D, p_sin + i_s * D
    o_d = tl.arange(0, HALF)[None, :]
    o_0 = tl.zeros([1, 1], tl.int64)
    m_all = o_0 == 0
    if i_h < HQ:
        o_x = o_0 + (i_s * HQ + i_h) * D
        b_1, b_2 = _rotated(p_q, o_x, m_all, p_c, p_s, p_q_weight, eps, HALF, NORM)
        tl.store(p_q_out + o_x + o_d, b_1.to(p_q_out.dtype.element_ty))
        tl.store(p_q_out + o_x + HALF + o_d, b_2.to(p_q_out.dtype.element_ty))
    else:
        i_k = i_h - HQ
        n = tl.load(p_count + i_s)
        i_page = tl.load(p_table + i_s * stride_table + n // PAGE).to(tl.int64)
        o_out = i_page * stride_p + (n % PAGE).to(tl.int64) * stride_t + o_d
        if i_k < HK:
            o_x = o_0 + (i_s * HK + i_k) * D
            b_1, b_2 = _rotated(p_k, o_x, m_all, p_c, p_s, p_k_weight, eps, HALF, NORM)
            tl.store(p_k_pages + i_k * stride_h + o_out, b_1.to(p_k_pages.dtype.element_ty))
            tl.store(p_k_pages + i_k * stride_h + o_out + HALF, b_2.to(p_k_pages.dtype.element_ty))
        else:
            i_v = i_k - HK
            p_row = p_v + (i_s * HK + i_v) * D
            tl.store(p_v_pages + i_v * stride_h + o_out, tl.load(p_row + o_d))
            tl.store(p_v_pages + i_v * stride_h + o_out + HALF, tl.load(p_row + HALF + o_d))


# ------------------------------------------------------------------------------------------------ router


@triton.jit
def _pooled(
    p_q, p_index, p_token, p_weight, i_first, k, eps,
    HQ: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Weighted sum `[D]`, over TOKENS of a sequence's k tokens, of the mean of a token's normalised heads."""
    o_h, o_d = tl.arange(0, HEADS), tl.arange(0, D)
    b_out = tl.zeros([D], tl.float32)
    for i in tl.static_range(TOKENS):
        i_k = i_first + i
        m_k = i_k < k
        i_t = tl.load(p_index + i_k, mask=m_k, other=0).to(tl.int64)
        b_token = tl.load(p_token + i_k, mask=m_k, other=0.0)
        o_x = i_t * HQ * D + o_h[:, None] * D + o_d[None, :]
        m_h = o_h < tl.where(m_k, HQ, 0)
        b_x = tl.load(p_q + o_x, mask=m_h[:, None], other=0.0).to(tl.float32)
        if NORM:
            b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
            b_x = b_x * tl.load(p_weight + o_d).to(tl.float32)[None, :]
        b_out += tl.sum(b_x, 0) * (b_token / HQ)
    return b_out


@triton.jit
def pool_kernel(
    p_q, p_index, p_token, p_weight, p_out, k, eps,
    HQ: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Queries pooled in parts of TOKENS tokens.

    `p_q [N, HQ * D]`, `p_index, p_token [S, k]`: which tokens, and their weights; `p_out [S, ceil(k / TOKENS), D]`.
    """
    i_c, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b_out = _pooled(
        p_q, p_index + i_s * k, p_token + i_s * k, p_weight, i_c * TOKENS, k, eps, HQ, HEADS, D, TOKENS, NORM
    )
    tl.store(p_out + (i_s * tl.num_programs(0) + i_c) * D + tl.arange(0, D), b_out)


@triton.jit
def _router_input(
    p_x, p_shift, p_scale, parts,
    K: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, WHITEN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Sum of the rows of `[parts, K]`, whitened or with the bias and the SiLU of the product that it comes from."""
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    b_x = tl.zeros([BK], tl.float32)
    # Eight rows a load, none of which waits for the one before.
    for i in tl.static_range(0, PARTS, 8):
        o_p = i + tl.arange(0, 8)
        m = (o_p < parts)[:, None] & m_k[None, :]
        b_x += tl.sum(tl.load(p_x + o_p[:, None] * K + o_k[None, :], mask=m, other=0.0), 0)
    b_shift = tl.load(p_shift + o_k, mask=m_k, other=0.0)
    if WHITEN:
        b_x = (b_x - b_shift) * tl.load(p_scale + o_k, mask=m_k, other=0.0)
    else:
        b_x += b_shift
    if SILU:
        b_x = b_x * tl.sigmoid(b_x)
    return b_x


@triton.jit
def router_pair_kernel(
    p_x, p_shift, p_scale, p_first, p_bias, p_second, p_out, parts,
    K: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    M: tl.constexpr, BM: tl.constexpr, WHITEN: tl.constexpr, SILU_IN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Two products of the router's MLP, float32: a program takes BN of the N hidden values from input to output.

    `p_x [L, S, parts, K]`, `p_first [L, N, K]`, `p_second [L, M, N]` → `p_out [L, S, N / BN, M]`, whose sum over the
    programs is the second product, its bias and activation left to whoever reads it.
    """
    i_n, i_s, i_l = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_l * tl.num_programs(1) + i_s
    o_n, o_k, o_m = i_n * BN + tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BM)
    m_n, m_m = o_n < N, o_m < M
    m_w = m_n[:, None] & (o_k < K)[None, :]
    m_v = m_m[:, None] & m_n[None, :]
    # Weights wait for nothing, so they are on their way before the input is put together.
    b_w = tl.load(p_first + i_l * N * K + o_n[:, None] * K + o_k[None, :], mask=m_w, other=0.0)
    b_v = tl.load(p_second + i_l * M * N + o_m[:, None] * N + o_n[None, :], mask=m_v, other=0.0)
    b_bias = tl.load(p_bias + i_l * N + o_n, mask=m_n, other=0.0)
    b_x = _router_input(
        p_x + i_row * parts * K, p_shift + i_l * K, p_scale + i_l * K, parts, K, BK, PARTS, WHITEN, SILU_IN
    )
    b_h = tl.sum(b_w * b_x[None, :], 1) + b_bias
    if SILU:
        b_h = b_h * tl.sigmoid(b_h)
    tl.store(p_out + (i_row * tl.num_programs(0) + i_n) * M + o_m, tl.sum(b_v * b_h[None, :], 1), mask=m_m)


@triton.jit
def router_last_kernel(
    p_x, p_shift, p_weight, p_bias, p_out, parts,
    K: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, SILU_IN: tl.constexpr,
):  # fmt: skip
    """The router's two logits, `p_out [L, S, 2]`, from `p_x [L, S, parts, K]`."""
    i_s, i_l = tl.program_id(0), tl.program_id(1)
    i_row = i_l * tl.num_programs(0) + i_s
    b_x = _router_input(p_x + i_row * parts * K, p_shift + i_l * K, p_shift, parts, K, BK, PARTS, False, SILU_IN)
    o_n, o_k = tl.arange(0, 2), tl.arange(0, BK)
    m_k = (o_k < K)[None, :]
    b_w = tl.load(p_weight + i_l * 2 * K + o_n[:, None] * K + o_k[None, :], mask=m_k, other=0.0)
    b_out = tl.sum(b_w * b_x[None, :], 1) + tl.load(p_bias + i_l * 2 + o_n)
    tl.store(p_out + i_row * 2 + o_n, b_out)


@triton.jit
def _wait_for_all(p_count, PROGRAMS: tl.constexpr):
    """Wait until every program has come here. All must be resident at once, and what they stored before is seen."""
    tl.debug_barrier()
    tl.atomic_add(p_count, 1)
    # Plain loads do not hold up the others' additions; the last one, an addition of nothing, is the acquire.
    while tl.load(p_count, volatile=True) < PROGRAMS:
        pass
    tl.atomic_add(p_count, 0)


@triton.jit
def _sum_of_parts(p_x, K: tl.constexpr, PARTS: tl.constexpr):
    """Sum of the rows of `[PARTS, K]`, which other programs of this launch have just written."""
    o_p, o_k = tl.arange(0, PARTS), tl.arange(0, K)
    # Past the first cache, which does not see what other multiprocessors write.
    return tl.sum(tl.load(p_x + o_p[:, None] * K + o_k[None, :], cache_modifier=".cg"), 0)


@triton.jit(do_not_specialize=["layer"])
def decide_kernel(
    p_q, p_index, p_token, p_norm, p_mean, p_scale, p_w0, p_b0, p_w1, p_b1, p_w2, p_b2, p_w3, p_b3, p_w4, p_b4,
    p_work, p_count, p_out, layer, k, eps,
    HQ: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, PROGRAMS: tl.constexpr,
    NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A layer's queries to its router's two logits in one launch: pooling and five products, float32.

    A program pools TOKENS tokens, takes its share of the hidden values of the first two products and of the next two,
    and waits for the others in between; the last to finish takes the last product. Weights depend on nothing that is
    waited for, so they are on their way from the start.

    `p_q [N, HQ * D]`, `p_index, p_token [S, k]`; a `LayerRouter`'s weights `[L, ...]`; `p_work [S, PROGRAMS, 4, D]`;
    `p_count` int32 `[S, 3]`, 0 before and after; `p_out [S, 2]`.
    """
    i, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_mean, p_scale = p_mean + layer * D, p_scale + layer * D
    p_w0, p_b0 = p_w0 + layer * 8 * D * D, p_b0 + layer * 8 * D
    p_w1, p_b1 = p_w1 + layer * 16 * D * D, p_b1 + layer * 2 * D
    p_w2, p_b2 = p_w2 + layer * 8 * D * D, p_b2 + layer * 4 * D
    p_w3, p_b3 = p_w3 + layer * 4 * D * D, p_b3 + layer * D
    p_w4, p_b4 = p_w4 + layer * 2 * D, p_b4 + layer * 2
    N1: tl.constexpr = 8 * D // PROGRAMS
    N2: tl.constexpr = 4 * D // PROGRAMS
    o_d, o_2d = tl.arange(0, D), tl.arange(0, 2 * D)
    o_1, o_2 = i * N1 + tl.arange(0, N1), i * N2 + tl.arange(0, N2)
    b_w0 = tl.load(p_w0 + o_1[:, None] * D + o_d[None, :])
    b_w1 = tl.load(p_w1 + o_2d[:, None] * (8 * D) + o_1[None, :])
    b_w2 = tl.load(p_w2 + o_2[:, None] * (2 * D) + o_2d[None, :])
    b_w3 = tl.load(p_w3 + o_d[:, None] * (4 * D) + o_2[None, :])
    b_mean, b_scale, b_b0 = tl.load(p_mean + o_d), tl.load(p_scale + o_d), tl.load(p_b0 + o_1)
    b_b1, b_b2 = tl.load(p_b1 + o_2d), tl.load(p_b2 + o_2)
    if OVERLAP:
        cuda.gdc_wait()

    b_pooled = _pooled(
        p_q, p_index + i_s * k, p_token + i_s * k, p_norm, i * TOKENS, k, eps, HQ, HEADS, D, TOKENS, NORM
    )
    p_pooled = p_work + i_s * PROGRAMS * 4 * D
    p_first, p_second = p_pooled + PROGRAMS * D, p_pooled + PROGRAMS * 3 * D
    p_count += i_s * 3
    tl.store(p_pooled + i * D + o_d, b_pooled)
    _wait_for_all(p_count, PROGRAMS)

    b_x = (_sum_of_parts(p_pooled, D, PROGRAMS) - b_mean) * b_scale
    b_h = tl.sum(b_w0 * b_x[None, :], 1) + b_b0
    b_h *= tl.sigmoid(b_h)
    tl.store(p_first + i * 2 * D + o_2d, tl.sum(b_w1 * b_h[None, :], 1))
    _wait_for_all(p_count + 1, PROGRAMS)

    b_y = _sum_of_parts(p_first, 2 * D, PROGRAMS) + b_b1
    b_g = tl.sum(b_w2 * b_y[None, :], 1) + b_b2
    b_g *= tl.sigmoid(b_g)
    tl.store(p_second + i * D + o_d, tl.sum(b_w3 * b_g[None, :], 1))
    tl.debug_barrier()
    if tl.atomic_add(p_count + 2, 1) == PROGRAMS - 1:
        b_z = _sum_of_parts(p_second, D, PROGRAMS) + tl.load(p_b3 + o_d)
        b_z *= tl.sigmoid(b_z)
        o_n = tl.arange(0, 2)
        b_w4 = tl.load(p_w4 + o_n[:, None] * D + o_d[None, :])
        tl.store(p_out + i_s * 2 + o_n, tl.sum(b_w4 * b_z[None, :], 1) + tl.load(p_b4 + o_n))
        # Everybody is past the first two by now.
        o_c = tl.arange(0, 4)
        tl.store(p_count + o_c, tl.zeros([4], tl.int32), mask=o_c < 3)


# ------------------------------------------------------------------------------------------------ one token


@triton.jit
def _products(
    p_x, p_norm, p_weight, o_n, m_n, eps,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Products of rows `o_n` of a weight `[N, K]` with the vector `p_x [K]`, normalised first if NORM; float32 `[BN]`.

    The norm's scale is applied to the products, so that no load of a weight waits for it.
    """
    b_acc = tl.zeros([BN, BK], tl.float32)
    b_square = tl.zeros([BK], tl.float32)
    p_rows = p_weight + o_n.to(tl.int64)[:, None] * K
    for i in tl.static_range((K + BK - 1) // BK):
        o_k = i * BK + tl.arange(0, BK)
        if K % BK == 0:
            b_w = tl.load(p_rows + o_k[None, :], mask=m_n[:, None], other=0.0)
        else:
            b_w = tl.load(p_rows + o_k[None, :], mask=m_n[:, None] & (o_k < K)[None, :], other=0.0)
        if K % BK == 0:
            b_x = tl.load(p_x + o_k).to(tl.float32)
        else:
            b_x = tl.load(p_x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        if NORM:
            b_square += b_x * b_x
            b_x *= tl.load(p_norm + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_acc += b_w.to(tl.float32) * b_x[None, :]
    b_out = tl.sum(b_acc, 1)
    if NORM:
        b_out *= tl.rsqrt(tl.sum(b_square, 0) / K + eps)
    return b_out


@triton.jit
def _vector(
    p_x, p_norm, p_weight, p_bias, p_add, p_out, i_n, n, eps,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < n
    b_out = _products(p_x, p_norm, p_weight, o_n, m_n, eps, K, BN, BK, NORM)
    if BIAS:
        b_out += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    if ADD:
        b_out += tl.load(p_add + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_out + o_n, b_out.to(p_out.dtype.element_ty), mask=m_n)


@triton.jit
def vector_kernel(
    p_x, p_norm, p_weight, p_bias, p_add, p_out, n, eps,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """`weight [n, K] @ x + bias + add`, x normalised first if NORM."""
    _vector(p_x, p_norm, p_weight, p_bias, p_add, p_out, tl.program_id(0), n, eps, K, BN, BK, NORM, BIAS, ADD)


@triton.jit
def three_kernel(
    p_x, p_norm, p_weight_a, p_weight_b, p_weight_c, p_bias_a, p_bias_b, p_bias_c, p_out_a, p_out_b, p_out_c,
    n_a, n_b, n_c, eps,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Three products of one normalised vector in one launch: queries, keys and values."""
    i = tl.program_id(0)
    i_b = i - (n_a + BN - 1) // BN
    i_c = i_b - (n_b + BN - 1) // BN
    # Written out three times: a pointer chosen at run time would lose its alignment, and with it the wide loads.
    if i_b < 0:
        _vector(p_x, p_norm, p_weight_a, p_bias_a, p_x, p_out_a, i, n_a, eps, K, BN, BK, True, BIAS, False)
    elif i_c < 0:
        _vector(p_x, p_norm, p_weight_b, p_bias_b, p_x, p_out_b, i_b, n_b, eps, K, BN, BK, True, BIAS, False)
    else:
        _vector(p_x, p_norm, p_weight_c, p_bias_c, p_x, p_out_c, i_c, n_c, eps, K, BN, BK, True, BIAS, False)


@triton.jit
def gated_kernel(
    p_x, p_norm, p_gate, p_up, p_out, n, eps,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`silu(gate @ x) * (up @ x)` of one normalised vector."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < n
    b_gate = _products(p_x, p_norm, p_gate, o_n, m_n, eps, K, BN, BK, True)
    b_up = _products(p_x, p_norm, p_up, o_n, m_n, eps, K, BN, BK, True)
    tl.store(p_out + o_n, (b_gate * tl.sigmoid(b_gate) * b_up).to(p_out.dtype.element_ty), mask=m_n)
