"""Hadamard rotations in Triton: the kernel bodies.

U = (H_F (x) S_p)/sqrt(K) is products with matrices of +1 and -1, which tensor cores do: S_B along
the fastest digit of the index and S_A along the next one (``_rows``: S_AB, since S_p is S_{p/B} (x)
S_B), and Q = H_F (x) S_{p/AB} along the rest (``_mix``).
Sylvester entries are parities of i & j; float32 operands are two tf32 ones (TF32: NVIDIA).
"""

import triton
import triton.language as tl


@triton.jit
def _sign(i, j):
    """S[i, j] as float32: -1 where i & j has an odd number of ones, for indices below 65536."""
    v = i & j
    v = v ^ (v >> 8)
    v = v ^ (v >> 4)
    odd = 0x6996 >> (v & 15)  # bit 0: the parity of four bits
    return ((odd << 31) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _two(x):
    """x as two numbers of which tf32 keeps 22 bits together (signs are exact)."""
    high = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _product(x, sign, TF32: tl.constexpr):
    """x sign."""
    if TF32:
        high, low = _two(x)
        y = tl.dot(low, sign, input_precision="tf32")
        return tl.dot(high, sign, y, input_precision="tf32")
    else:
        return tl.dot(x, sign, input_precision="ieee")


@triton.jit
def _signed(sign, x, total, TF32: tl.constexpr):
    """total + sign x."""
    if TF32:
        # A sum of its own: what MMAs add to is truncated, so that 924 terms in one chain were 2e-6
        # off (H200; a model of that on the CPU: 3e-6, and 1e-7 as it is here).
        high, low = _two(x)
        part = tl.dot(sign, low, input_precision="tf32")
        return total + tl.dot(sign, high, part, input_precision="tf32")
    else:
        return tl.dot(sign, x, total, input_precision="ieee")


@triton.jit(do_not_specialize=["splits"])
def _rows(x_ptr, pre_ptr, post_ptr, bias_ptr, y_ptr, R, K, x_stride, splits, scale,
          A: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, PRE: tl.constexpr,
          POST: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr, TF32: tl.constexpr,
          BLOCK_R: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    """y = post * scale * S_AB (pre * x) + bias along A pieces of B, R pieces in all; y is [M, K].

    x is the sum of ``splits`` of [splits, M, K]. BP is B padded to what ``tl.dot`` takes; A divides
    BLOCK_R. Signs cost as much as products, so a program of many tokens takes STEPS blocks.
    EXACT: x is of 16 bits and neither summed nor multiplied, so one product of its type is exact.
    """
    pieces = K // B  # of a token
    j = tl.arange(0, BP)
    r = tl.arange(0, BLOCK_R)
    fastest = _sign(j[:, None], j[None, :])
    if A > 1:
        slower = _sign((r % A)[:, None], (r % A)[None, :])
        slower = tl.where((r // A)[:, None] == (r // A)[None, :], slower, 0.0)
    for step in range(STEPS):
        piece = (tl.program_id(0) * STEPS + step) * BLOCK_R + r
        ok = (piece < R)[:, None] & (j < B)[None, :]
        k = (piece % pieces)[:, None] * B + j[None, :]
        at = x_ptr + (piece // pieces).to(tl.int64)[:, None] * x_stride + k
        x = tl.load(at, mask=ok, other=0.0)
        if EXACT:
            y = tl.dot(x, fastest.to(x.dtype))
        else:
            x = x.to(tl.float32)
            for _ in range(1, splits):
                at += R // pieces * x_stride
                x += tl.load(at, mask=ok, other=0.0).to(tl.float32)
            if PRE:
                x *= tl.load(pre_ptr + k, mask=ok, other=0.0).to(tl.float32)
            y = _product(x, fastest, TF32)
        if A > 1:
            y = _signed(slower, y, tl.zeros_like(y), TF32)
        y *= scale
        if POST:
            y *= tl.load(post_ptr + k, mask=ok, other=0.0).to(tl.float32)
        if BIAS:
            y += tl.load(bias_ptr + k, mask=ok, other=0.0).to(tl.float32)
        to = y_ptr + piece.to(tl.int64)[:, None] * B + j[None, :]
        tl.store(to, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _q(h_ptr, i, j, q, a, F: tl.constexpr, TRANSPOSE: tl.constexpr):
    """Q[i, j] of Q = H_F (x) S_a [q, q]; past q anything finite."""
    sign = _sign((i % a)[:, None], (j % a)[None, :])
    if F > 1:
        row, column = (i // a)[:, None], (j // a)[None, :]
        at = column * F + row if TRANSPOSE else row * F + column
        ok = (i < q)[:, None] & (j < q)[None, :]
        sign *= tl.load(h_ptr + at, mask=ok, other=0).to(tl.float32)
    return sign


@triton.jit
def _mix(t_ptr, h_ptr, post_ptr, bias_ptr, y_ptr, M, K, q, a, b, scale, F: tl.constexpr,
         TRANSPOSE: tl.constexpr, POST: tl.constexpr, BIAS: tl.constexpr, TF32: tl.constexpr,
         BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_B: tl.constexpr,
         STEPS: tl.constexpr):  # fmt: skip
    """y[m, i, c] = post * scale * (sum over j of Q[i, j] t[m, j, c]) + bias, Q = H_F (x) S_a.

    t float32 and y are [M, q, b] with q = F*a; TRANSPOSE takes H_F^T. A program has STEPS tokens:
    0, one of more than BLOCK_J terms a sum.
    """
    first_token = tl.program_id(0).to(tl.int64) * max(STEPS, 1)
    i = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    c = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    j = tl.arange(0, BLOCK_J)
    k = i[:, None] * b + c[None, :]
    if STEPS > 0:
        signs = _q(h_ptr, i, j, q, a, F, TRANSPOSE)
    for step in range(max(STEPS, 1)):
        m = first_token + step
        columns = tl.where(m < M, b, 0)
        total = tl.zeros((BLOCK_Q, BLOCK_B), tl.float32)
        at = t_ptr + m * K + c[None, :]
        if STEPS > 0:
            ok = (j < q)[:, None] & (c < columns)[None, :]
            t = tl.load(at + j[:, None] * b, mask=ok, other=0.0)
            total = _signed(signs, t, total, TF32)
        else:
            for first in range(0, q, BLOCK_J):
                ok = (first + j < q)[:, None] & (c < b)[None, :]
                t = tl.load(at + (first + j)[:, None] * b, mask=ok, other=0.0)
                signs = _q(h_ptr, i, first + j, q, a, F, TRANSPOSE)
                total = _signed(signs, t, total, TF32)
        total *= scale
        here = (i < q)[:, None] & (c < columns)[None, :]
        if POST:
            total *= tl.load(post_ptr + k, mask=here, other=0.0).to(tl.float32)
        if BIAS:
            total += tl.load(bias_ptr + k, mask=here, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * K + k, total.to(y_ptr.dtype.element_ty), mask=here)
