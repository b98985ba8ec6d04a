"""`attend_jvp`: attention and its directional derivative in one pass (forward mode), for sCM and MeanFlow.

    S = scale Q K^T + mask,          P = softmax(S),   O = P V
    tS = scale (tQ K^T + Q tK^T),    tO = P tV + (P o tS) V - rowsum(P o tS) O

Six products of blocks instead of two. The reader of each key block keeps the maximum, the sum n of e^(S - m), r = sum_j e^(S - m)
tS, and the numerators of O and of P tV + (P o tS) V, rescaled whenever the maximum grows. The mask has no tangent. No GPU has run
this kernel.

sCM: Lu and Song 2024, arXiv 2410.11081, section 4 (the same derivative, for D = 64 and 128). MeanFlow: Geng et al. 2025, arXiv
    2505.13447.

B batch, H heads, L queries, S keys, D head dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genkit.attention.kernels.blocks import CLOSED, LN2, PRECISION, load_rows, logits, store_rows
from genkit.attention.kernels.probe import SIZES

SIZES_TANGENT = [*SIZES, *"tq_b tq_h tq_l tk_b tk_h tk_s tv_b tv_h tv_s".split()]  # noqa: SIM905


@triton.jit(do_not_specialize=SIZES_TANGENT)
def tangent_forward(
    Q, K, V, tQ, tK, tV, Mask, Out, tO, Lse,
    q_b, q_h, q_l, k_b, k_h, k_s, v_b, v_h, v_s, tq_b, tq_h, tq_l, tk_b, tk_h, tk_s, tv_b, tv_h, tv_s, o_b, o_h, o_l, m_b, m_h, m_l,
    H, L, S, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    ALIGN: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_L rows of one head: O and tO (B, H, L, D), LSE (B, H, L)."""
    blocks = tl.cdiv(L, BLOCK_L)
    program = tl.program_id(0)
    head = program // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows = (program % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = rows < L
    K += (b * k_b + h * k_h) * ALIGN
    V += (b * v_b + h * v_h) * ALIGN
    tK += (b * tk_b + h * tk_h) * ALIGN
    tV += (b * tv_b + h * tv_h) * ALIGN
    Mask += (b * m_b + h * m_h) * ALIGN

    q = load_rows(Q + (b * q_b + h * q_h) * ALIGN, rows, q_l * ALIGN, valid, D, BLOCK_D, UPCAST)
    tq = load_rows(tQ + (b * tq_b + h * tq_h) * ALIGN, rows, tq_l * ALIGN, valid, D, BLOCK_D, UPCAST)
    m = tl.full([BLOCK_L], CLOSED, tl.float32)
    n = tl.zeros([BLOCK_L], tl.float32)
    r = tl.zeros([BLOCK_L], tl.float32)
    o = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    to = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for start in range(0, S, BLOCK_S):
        columns = start + tl.arange(0, BLOCK_S)
        k = load_rows(K, columns, k_s * ALIGN, columns < S, D, BLOCK_D, UPCAST)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s2 = logits(products, Mask, rows[:, None], m_l, columns[None, :], valid[:, None], S, scale, ALIGN, HAS_MASK)
        ts = tl.dot(tq, tl.trans(k), input_precision=PRECISION)
        tk = load_rows(tK, columns, tk_s * ALIGN, columns < S, D, BLOCK_D, UPCAST)
        ts = tl.dot(q, tl.trans(tk), ts, input_precision=PRECISION) * scale
        new = tl.maximum(m, tl.max(s2, 1))
        shrink = tl.exp2(m - new)
        p = tl.exp2(s2 - new[:, None])
        pts = p * ts
        n = shrink * n + tl.sum(p, 1)
        r = shrink * r + tl.sum(pts, 1)
        v = load_rows(V, columns, v_s * ALIGN, columns < S, D, BLOCK_D, UPCAST)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
        to = tl.dot(pts.to(v.dtype), v, to * shrink[:, None], input_precision=PRECISION)
        tv = load_rows(tV, columns, tv_s * ALIGN, columns < S, D, BLOCK_D, UPCAST)
        to = tl.dot(p.to(v.dtype), tv, to, input_precision=PRECISION)
        m = new

    empty = m < 0.5 * CLOSED  # the row sees no key
    total = tl.where(empty, 1.0, n)
    o = tl.where(empty[:, None], 0.0, o / total[:, None])
    to = tl.where(empty[:, None], 0.0, (to - r[:, None] * o) / total[:, None])
    offset = (b * o_b + h * o_h) * ALIGN
    store_rows(Out + offset, o, rows, o_l * ALIGN, valid, D, BLOCK_D)
    store_rows(tO + offset, to, rows, o_l * ALIGN, valid, D, BLOCK_D)
    tl.store(Lse + head.to(tl.int64) * L + rows, tl.where(empty, float("-inf"), (m + tl.log2(total)) * LN2), mask=valid)
