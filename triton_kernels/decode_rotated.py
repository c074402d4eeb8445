"""Norms and SwiGLU of a decode step together with the rotation of a rotated layer's input.

    y = U_K^T (su * f(inputs)) / scale      f: RMSNorm of x + delta, or silu(gate) * up

Index of a vector: r * L + l, r = a * C + c with a < F and c the top bits of the Sylvester index.
A program makes the L outputs of one r and needs nothing from the others, because in
U = (H_F x S_C) x S_L the sum over r' comes first:

    y[r, :] = S_L sum_r' H[a', a] (-1)^<c, c'> (su f)[r', :]

Every program reads the whole inputs (8 to 57 KB, from L2), so the norm's sum costs no exchange
either: the norm is linear but for one factor, which multiplies the result. Two launches less than
norm, then rotation; the norm's result is not rounded in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode import launch_options
from .hadamard import _sign

LENGTH = 512
"""Most outputs of a program: the Sylvester part that is two small products of 16 and 32."""

_TILE = 32


@triton.jit
def _rotate(x_ptr, other_ptr, weight_ptr, su_ptr, h_ptr, sum_ptr, y_ptr, eps, scale, K, R, C,
            x_m, other_m, F: tl.constexpr, LB: tl.constexpr, ROWS: tl.constexpr,
            TILES: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """The 16 * LB outputs of one r of one token. NORM: of x + other, else SwiGLU of both."""
    L: tl.constexpr = 16 * LB
    r, m = tl.program_id(0), tl.program_id(1)
    rows, cols = tl.arange(0, ROWS), tl.arange(0, L)
    a, c = r // C, r % C
    if PDL:
        gdc_launch_dependents()
    total = tl.zeros((L,), tl.float32)
    squares = tl.zeros((L,), tl.float32)
    for tile in tl.static_range(TILES):
        j = tile * ROWS + rows
        ok = (j < R)[:, None] & (cols < L)[None, :]
        at = j[:, None] * L + cols[None, :]
        # Everything but x and other was complete before the kernel before this one.
        factor = tl.load(su_ptr + at, mask=ok, other=0.0)
        if NORM:
            factor *= tl.load(weight_ptr + at, mask=ok, other=0.0).to(tl.float32)
        sign = _sign(c, j % C)
        if F > 1:
            sign *= tl.load(h_ptr + (j // C) * F + a, mask=j < R, other=0).to(tl.float32)
        factor *= sign[:, None]
        if PDL and tile == 0:
            gdc_wait()
        x = tl.load(x_ptr + m * x_m + at, mask=ok, other=0.0)
        other = tl.load(other_ptr + m * other_m + at, mask=ok, other=0.0)
        if NORM:
            x += other
            tl.store(sum_ptr + m * K + at, x, ok & (j == r)[:, None])
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
        else:
            gate = x.to(tl.float32)
            wide = ((gate / (1 + tl.exp(-gate))).to(x.dtype) * other).to(tl.float32)
        total += tl.sum(wide * factor, 0)
    if NORM:
        scale *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    i, k = tl.arange(0, 16), tl.arange(0, LB)
    grid = tl.reshape(total, (16, LB))
    grid = tl.dot(grid, _sign(k[:, None], k[None, :]), input_precision=PRECISION)
    grid = tl.dot(_sign(i[:, None], i[None, :]), grid, input_precision=PRECISION)
    y_at = y_ptr + m * K + r * L + i[:, None] * LB + k[None, :]
    tl.store(y_at, (grid * scale).to(y_ptr.dtype.element_ty))


def rotate(x, other, weight, eps: float, su, h, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """With a weight [K]: (x + other, U^T (su * norm)), without: (x, U^T (su * swiglu(x, other))).

    x, other [M, K], su float32 [K], h int8 [factor, factor], K / factor at least 256.
    """
    M, K = x.shape
    length = min(LENGTH, K // factor)
    R = K // length
    rows = min(_TILE, triton.next_power_of_2(R))
    norm = weight is not None
    y = torch.empty((M, K), dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if norm else x
    _rotate[(R, M)](
        x, other, weight if norm else x, su, h if factor > 1 else x, total, y, eps, K**-0.5, K, R,
        R // factor, x.stride(0), other.stride(0), F=factor, LB=length // 16, ROWS=rows,
        TILES=triton.cdiv(R, rows), NORM=norm, PRECISION="tf32x3",
        num_warps=max(4, min(16, rows * length // 1024)), **launch_options(x.device),
    )  # fmt: skip
    return total, y
