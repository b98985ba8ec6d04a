"""`attend_probe`, forward: attention and its statistics, without the matrix of probabilities.

    S = scale Q K^T + mask,   LSE = log sum_j exp S,   P = exp(S - LSE),   O = P V
    entropy  E = -sum_j P log P = log n - w / n        with n = sum_j e^(S - m), w = sum_j e^(S - m) (S - m), m = max_j S
    map      M[b, i, j] = mean over heads of P[b, h, i, keys[j]]

`probe_forward` reads the keys once and keeps m, n, w and O's numerator per row, rescaled whenever the maximum grows (online
softmax, Milakov and Gimelshein 2018, arXiv 1805.02867; FlashAttention-2, Dao 2023, arXiv 2307.08691). Entropy costs one
multiply-add an entry; relative to m it does not lose digits where logits are large, as LSE - sum P S would. `probe_map` then
visits the selected keys only; it adds heads in a fixed order, so the mean is the same each time: no atomics.

No GPU has run these kernels: they are checked by Triton's interpreter and compiled ahead of time (lock.json).

B batch, H heads, L queries, S keys, D head dimension, J selected keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genkit.attention.kernels.blocks import CLOSED, LN2, PRECISION, load_keys, load_lse2, load_rows, logits, store_rows

# Strides and sizes that a kernel is not compiled anew for.
SIZES = "q_b q_h q_l k_b k_h k_s v_b v_h v_s o_b o_h o_l m_b m_h m_l j_b H L S J".split()  # noqa: SIM905


@triton.jit(do_not_specialize=SIZES)
def probe_forward(
    Q, K, V, Mask, Out, Lse, Entropy,
    q_b, q_h, q_l, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_l, m_b, m_h, m_l,
    H, L, S, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    ALIGN: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_L rows of one head: O (B, H, L, D), LSE and entropy (B, H, L)."""
    blocks = tl.cdiv(L, BLOCK_L)
    program = tl.program_id(0)
    head = program // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows = (program % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = rows < L
    Q += (b * q_b + h * q_h) * ALIGN
    K += (b * k_b + h * k_h) * ALIGN
    V += (b * v_b + h * v_h) * ALIGN
    Out += (b * o_b + h * o_h) * ALIGN
    Mask += (b * m_b + h * m_h) * ALIGN

    q = load_rows(Q, rows, q_l * ALIGN, valid, D, BLOCK_D, UPCAST)
    m = tl.full([BLOCK_L], CLOSED, tl.float32)
    n = tl.zeros([BLOCK_L], tl.float32)
    w = tl.zeros([BLOCK_L], tl.float32)
    o = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for start in range(0, S, BLOCK_S):
        columns = start + tl.arange(0, BLOCK_S)
        k = load_rows(K, columns, k_s * ALIGN, columns < S, D, BLOCK_D, UPCAST)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s2 = logits(products, Mask, rows[:, None], m_l, columns[None, :], valid[:, None], S, scale, ALIGN, HAS_MASK)
        new = tl.maximum(m, tl.max(s2, 1))
        shrink = tl.exp2(m - new)
        below = s2 - new[:, None]
        p = tl.exp2(below)
        w = shrink * (w + n * (m - new)) + tl.sum(p * below, 1)
        n = shrink * n + tl.sum(p, 1)
        v = load_rows(V, columns, v_s * ALIGN, columns < S, D, BLOCK_D, UPCAST)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
        m = new

    empty = m < 0.5 * CLOSED  # the row sees no key
    total = tl.where(empty, 1.0, n)
    store_rows(Out, tl.where(empty[:, None], 0.0, o / total[:, None]), rows, o_l * ALIGN, valid, D, BLOCK_D)
    statistics = head.to(tl.int64) * L + rows
    tl.store(Lse + statistics, tl.where(empty, float("-inf"), (m + tl.log2(total)) * LN2), mask=valid)
    tl.store(Entropy + statistics, tl.where(empty, 0.0, (tl.log2(total) - w / total) * LN2), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def probe_map(
    Q, K, Mask, Keys, Lse, Map,
    q_b, q_h, q_l, k_b, k_h, k_s, m_b, m_h, m_l, j_b,
    H, L, S, J, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    ALIGN: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_L rows and BLOCK_S selected keys of one image, all heads: M (B, L, J). A key outside [0, S) gives 0."""
    blocks = tl.cdiv(L, BLOCK_L)
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    rows = (program % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = rows < L
    j = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    keys = load_keys(Keys + b * j_b, j, J)
    inside = (keys >= 0) & (keys < S)
    mean = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
    for h in range(0, H):
        wide = tl.cast(h, tl.int64)
        q = load_rows(Q + (b * q_b + wide * q_h) * ALIGN, rows, q_l * ALIGN, valid, D, BLOCK_D, UPCAST)
        k = load_rows(K + (b * k_b + wide * k_h) * ALIGN, keys, k_s * ALIGN, inside, D, BLOCK_D, UPCAST)
        lse2 = load_lse2(Lse, (b * H + wide) * L + rows, valid)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        bias = Mask + (b * m_b + wide * m_h) * ALIGN
        s2 = logits(products, bias, rows[:, None], m_l, keys[None, :], valid[:, None], S, scale, ALIGN, HAS_MASK)
        mean += tl.exp2(s2 - lse2[:, None])
    mean = mean / H
    tl.store(Map + (b * L + rows[:, None]) * J + j[None, :], mean, mask=valid[:, None] & (j < J)[None, :])
