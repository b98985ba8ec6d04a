"""`attend_probe`, backward: FlashAttention's, with three more terms in the gradient of the logits.

With dO, dLSE, dE and dM the gradients of output, log-sum-exp, entropy and map, and G = dM / H at the selected keys (0 elsewhere),

    dS = P o (dO V^T + G - c - dE (S - LSE)),     c = rowsum(dO o O) + rowsum(P o G) - dLSE + dE E
    dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO

since dLSE/dS = P and dE/dS = -P o (S - LSE + E). P is computed again from Q, K and LSE, block by block. G lives on J columns only:
`probe_rows` computes c, `probe_dq` adds G's part of dQ after its loop over all keys, `probe_dk_map` computes G's part of dK
as (chunk, B, H, J, D), one chunk of rows a program, which the caller adds up and adds to the rows of dK in question. No atomics.

FlashAttention-2: Dao 2023, arXiv 2307.08691, algorithm 2. No GPU has run these kernels.

B batch, H heads, L queries, S keys, D head dimension, J selected keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genkit.attention.kernels.blocks import LN2, PRECISION, load_keys, load_lse2, load_rows, logits, store_rows
from genkit.attention.kernels.probe import SIZES

KEYS = tl.constexpr(16)  # selected keys a block: the least that a matrix product takes
SIZES_BACKWARD = [*SIZES, *"g_b g_h g_l dq_b dq_h dq_l dk_b dk_h dk_s dv_b dv_h dv_s CHUNK".split()]  # noqa: SIM905


@triton.jit(do_not_specialize=SIZES_BACKWARD)
def probe_rows(
    Q, K, Mask, Keys, Out, Lse, Entropy, dO, dLse, dEntropy, dMap, C,
    q_b, q_h, q_l, k_b, k_h, k_s, o_b, o_h, o_l, g_b, g_h, g_l, m_b, m_h, m_l, j_b,
    H, L, S, J, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    ALIGN: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_L rows of one head: c (B, H, L)."""
    blocks = tl.cdiv(L, BLOCK_L)
    program = tl.program_id(0)
    head = program // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows = (program % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = rows < L
    o = load_rows(Out + (b * o_b + h * o_h) * ALIGN, rows, o_l * ALIGN, valid, D, BLOCK_D, UPCAST).to(tl.float32)
    do = load_rows(dO + (b * g_b + h * g_h) * ALIGN, rows, g_l * ALIGN, valid, D, BLOCK_D, UPCAST).to(tl.float32)
    at = head.to(tl.int64) * L + rows
    c = tl.sum(o * do, 1) - tl.load(dLse + at, mask=valid, other=0.0)
    c += tl.load(dEntropy + at, mask=valid, other=0.0) * tl.load(Entropy + at, mask=valid, other=0.0)
    if J > 0:
        q = load_rows(Q + (b * q_b + h * q_h) * ALIGN, rows, q_l * ALIGN, valid, D, BLOCK_D, UPCAST)
        lse2 = load_lse2(Lse, at, valid)
        for start in range(0, J, BLOCK_S):
            j = start + tl.arange(0, BLOCK_S)
            keys = load_keys(Keys + b * j_b, j, J)
            inside = (keys >= 0) & (keys < S)
            k = load_rows(K + (b * k_b + h * k_h) * ALIGN, keys, k_s * ALIGN, inside, D, BLOCK_D, UPCAST)
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            bias = Mask + (b * m_b + h * m_h) * ALIGN
            s2 = logits(products, bias, rows[:, None], m_l, keys[None, :], valid[:, None], S, scale, ALIGN, HAS_MASK)
            g = tl.load(dMap + (b * L + rows[:, None]) * J + j[None, :], mask=valid[:, None] & (j < J)[None, :], other=0.0)
            c += tl.sum(tl.exp2(s2 - lse2[:, None]) * g, 1) / H
    tl.store(C + at, c, mask=valid)


@triton.jit(do_not_specialize=SIZES_BACKWARD)
def probe_dq(
    Q, K, V, Mask, Keys, Lse, C, dO, dEntropy, dMap, dQ,
    q_b, q_h, q_l, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_l, dq_b, dq_h, dq_l, m_b, m_h, m_l, j_b,
    H, L, S, J, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    ALIGN: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_L rows of one head: dQ (B, H, L, D)."""
    blocks = tl.cdiv(L, BLOCK_L)
    program = tl.program_id(0)
    head = program // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows = (program % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = rows < L
    K += (b * k_b + h * k_h) * ALIGN
    V += (b * v_b + h * v_h) * ALIGN
    Mask += (b * m_b + h * m_h) * ALIGN
    q = load_rows(Q + (b * q_b + h * q_h) * ALIGN, rows, q_l * ALIGN, valid, D, BLOCK_D, UPCAST)
    do = load_rows(dO + (b * g_b + h * g_h) * ALIGN, rows, g_l * ALIGN, valid, D, BLOCK_D, UPCAST)
    at = head.to(tl.int64) * L + rows
    lse2 = load_lse2(Lse, at, valid)
    c = tl.load(C + at, mask=valid, other=0.0)
    de2 = tl.load(dEntropy + at, mask=valid, other=0.0) * LN2
    dq = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for start in range(0, S, BLOCK_S):
        columns = start + tl.arange(0, BLOCK_S)
        k = load_rows(K, columns, k_s * ALIGN, columns < S, D, BLOCK_D, UPCAST)
        v = load_rows(V, columns, v_s * ALIGN, columns < S, D, BLOCK_D, UPCAST)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s2 = logits(products, Mask, rows[:, None], m_l, columns[None, :], valid[:, None], S, scale, ALIGN, HAS_MASK)
        log2_p = s2 - lse2[:, None]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = tl.exp2(log2_p) * (dp - c[:, None] - de2[:, None] * log2_p)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    for start in range(0, J, KEYS):
        j = start + tl.arange(0, KEYS)
        keys = load_keys(Keys + b * j_b, j, J)
        inside = (keys >= 0) & (keys < S)
        k = load_rows(K, keys, k_s * ALIGN, inside, D, BLOCK_D, UPCAST)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s2 = logits(products, Mask, rows[:, None], m_l, keys[None, :], valid[:, None], S, scale, ALIGN, HAS_MASK)
        g = tl.load(dMap + (b * L + rows[:, None]) * J + j[None, :], mask=valid[:, None] & (j < J)[None, :], other=0.0)
        ds = tl.exp2(s2 - lse2[:, None]) * g / H
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_rows(dQ + (b * dq_b + h * dq_h) * ALIGN, dq * scale, rows, dq_l * ALIGN, valid, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES_BACKWARD)
def probe_dkv(
    Q, K, V, Mask, Lse, C, dO, dEntropy, dK, dV,
    q_b, q_h, q_l, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_l, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, m_b, m_h, m_l,
    H, L, S, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    ALIGN: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_S keys of one head: dK and dV (B, H, S, D), but for the map's part of dK."""
    blocks = tl.cdiv(S, BLOCK_S)
    program = tl.program_id(0)
    head = program // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    columns = (program % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    valid = columns < S
    Q += (b * q_b + h * q_h) * ALIGN
    dO += (b * g_b + h * g_h) * ALIGN
    Mask += (b * m_b + h * m_h) * ALIGN
    k = load_rows(K + (b * k_b + h * k_h) * ALIGN, columns, k_s * ALIGN, valid, D, BLOCK_D, UPCAST)
    v = load_rows(V + (b * v_b + h * v_h) * ALIGN, columns, v_s * ALIGN, valid, D, BLOCK_D, UPCAST)
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, L, BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L)
        at = head.to(tl.int64) * L + rows
        lse2 = load_lse2(Lse, at, rows < L)
        c = tl.load(C + at, mask=rows < L, other=0.0)
        de2 = tl.load(dEntropy + at, mask=rows < L, other=0.0) * LN2
        q = load_rows(Q, rows, q_l * ALIGN, rows < L, D, BLOCK_D, UPCAST)
        do = load_rows(dO, rows, g_l * ALIGN, rows < L, D, BLOCK_D, UPCAST)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        s2 = logits(products, Mask, rows[None, :], m_l, columns[:, None], (rows < L)[None, :], S, scale, ALIGN, HAS_MASK)
        log2_p = s2 - lse2[None, :]
        p = tl.exp2(log2_p)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - c[None, :] - de2[None, :] * log2_p)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    store_rows(dK + (b * dk_b + h * dk_h) * ALIGN, dk * scale, columns, dk_s * ALIGN, valid, D, BLOCK_D)
    store_rows(dV + (b * dv_b + h * dv_h) * ALIGN, dv, columns, dv_s * ALIGN, valid, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES_BACKWARD)
def probe_dk_map(
    Q, K, Mask, Keys, Lse, dMap, Part,
    q_b, q_h, q_l, k_b, k_h, k_s, m_b, m_h, m_l, j_b,
    H, L, S, J, CHUNK, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    ALIGN: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program for CHUNK rows of one head and BLOCK_S selected keys: the map's part of dK, (chunk, B, H, J, D)."""
    chunks = tl.cdiv(L, CHUNK)
    program = tl.program_id(0)
    head, chunk = program // chunks, program % chunks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    heads = tl.num_programs(0) // chunks
    j = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    keys = load_keys(Keys + b * j_b, j, J)
    inside = (keys >= 0) & (keys < S)
    k = load_rows(K + (b * k_b + h * k_h) * ALIGN, keys, k_s * ALIGN, inside, D, BLOCK_D, UPCAST)
    Q += (b * q_b + h * q_h) * ALIGN
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    end = tl.minimum(chunk * CHUNK + CHUNK, L)
    for start in range(chunk * CHUNK, end, BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L)
        q = load_rows(Q, rows, q_l * ALIGN, rows < end, D, BLOCK_D, UPCAST)
        lse2 = load_lse2(Lse, head.to(tl.int64) * L + rows, rows < end)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        bias = Mask + (b * m_b + h * m_h) * ALIGN
        s2 = logits(products, bias, rows[None, :], m_l, keys[:, None], (rows < end)[None, :], S, scale, ALIGN, HAS_MASK)
        g = tl.load(dMap + (b * L + rows[None, :]) * J + j[:, None], mask=(rows < end)[None, :] & (j < J)[:, None], other=0.0)
        ds = tl.exp2(s2 - lse2[None, :]) * g / H
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    at = ((chunk * heads + head).to(tl.int64) * J + j) * D
    d = tl.arange(0, BLOCK_D)
    tl.store(Part + at[:, None] + d[None, :], dk * scale, mask=(j < J)[:, None] & (d < D)[None, :])
