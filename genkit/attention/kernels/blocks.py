"""What the kernels share: loading rows, and scaled, masked logits. Written in Triton.

Logits are kept in base 2, since the hardware's exponential is 2^x: `s2 = log2(e) (scale q.k + mask)`. CLOSED stands for minus
infinity: it is small enough that 2^(CLOSED - m) is 0 for any real logit m, and finite, so that 0 * CLOSED is 0 and no NaN arises
in a row that sees no key.

Strides come divided by ALIGN (8 where all of them are multiples of 8, else 1), and are multiplied again in the kernels: this
tells the compiler that a row starts on a 16-byte boundary, which it cannot know of a number that is not a multiple of 16 (head
dimensions 40 and 72).
"""

from __future__ import annotations

import triton
import triton.language as tl

CLOSED = tl.constexpr(-1.0e20)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Three TF32 products for one of float32 operands: their error is that of float32. Half precision operands ignore it.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def load_rows(pointer, rows, stride, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """(rows, BLOCK_D): rows of a matrix whose last dimension is contiguous; 0 where not valid, and beyond D."""
    d = tl.arange(0, BLOCK_D)
    keep = valid[:, None]
    if BLOCK_D > D:
        keep = keep & (d < D)[None, :]
    x = tl.load(pointer + rows[:, None] * stride + d[None, :], mask=keep, other=0.0)
    # Triton's interpreter multiplies bfloat16 matrices wrongly.
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def store_rows(pointer, x, rows, stride, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_rows`, in the type of the memory."""
    d = tl.arange(0, BLOCK_D)
    keep = valid[:, None]
    if BLOCK_D > D:
        keep = keep & (d < D)[None, :]
    tl.store(pointer + rows[:, None] * stride + d[None, :], x.to(pointer.dtype.element_ty), mask=keep)


@triton.jit
def logits(products, bias, rows, row_stride, columns, valid_row, S, scale, ALIGN: tl.constexpr, HAS_MASK: tl.constexpr):
    """Base-2 logits of the products of queries and keys; CLOSED where the column is not in [0, S).

    `rows` and `columns` have the shape of `products` up to broadcasting: (R, 1) and (1, C), or (1, R) and (C, 1) of transposed
    products. The mask's rows start at multiples of ALIGN and are readable up to the next multiple of 8 of S, so that they are
    read 8 numbers at a time.
    """
    s2 = products * (scale * LOG2E)
    if HAS_MASK:
        readable = (columns >= 0) & (columns < tl.cdiv(S, 8) * 8)
        added = tl.load(bias + rows * (row_stride * ALIGN) + columns, mask=valid_row & readable, other=0.0)
        s2 = tl.maximum(s2 + added.to(tl.float32) * LOG2E, CLOSED)
    return tl.where((columns >= 0) & (columns < S), s2, CLOSED)


@triton.jit
def load_lse2(Lse, at, valid):
    """Base-2 log-sum-exp; where there is none, so large that every probability is 0."""
    lse = tl.load(Lse + at, mask=valid, other=float("-inf"))
    return tl.where(lse == float("-inf"), -CLOSED, lse * LOG2E)


@triton.jit
def load_keys(Keys, j, J):
    """Positions of selected keys j; -1 beyond J."""
    return tl.load(Keys + j, mask=j < J, other=-1).to(tl.int32)
