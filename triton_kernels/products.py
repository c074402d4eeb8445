"""Products with a weight W and an output rotation, whatever the weight's format.

A weight has ``N``, ``K``, ``partial(x, y)`` (partial sums [S, M, N] of up to 64 tokens, or of one
split in y [M, N] if it is given) and ``dequantize(first, out, factor)`` (``factor`` times the rows
from ``first`` on).
"""

from __future__ import annotations

import torch

from . import tuning
from .hadamard_ops import rotated
from .partial import finish, unit_rows
from .slices import sliced_dx, sliced_matmul


def rotated_product(x, weight, sv, bias, h, factor: int, block: int) -> torch.Tensor:
    """sv * U_N (x W^T) + bias of x [..., K], in x's dtype [M, N]."""
    rows, N = unit_rows(x), weight.N
    y = torch.empty((rows.shape[0], N), dtype=x.dtype, device=x.device)
    if rows.shape[0] == 0:
        return y
    if rows.shape[0] <= tuning.DOT_TOKENS:
        plain = factor == 0 and sv is None and bias is None
        partial = weight.partial(rows, y if plain else None)
        if factor == 0:
            if not (plain and partial.shape[0] == 1):
                finish(partial, y, scales=sv, bias=bias)
            return y
        return rotated(partial, None, sv, h, factor, block, False, bias, x.dtype)
    if factor == 0 and sv is None:
        sliced_matmul(rows, y, weight.dequantize, bias)
        return y
    # z is not scaled yet and is rounded to x's dtype: a power of two keeps it in range.
    shrink = 2.0 ** -((weight.K.bit_length() + 1) // 2)
    sliced_matmul(rows, y, lambda first, out: weight.dequantize(first, out, shrink))
    post = torch.full((N,), 1 / shrink, device=x.device) if sv is None else sv / shrink
    if factor:
        return rotated(y, None, post, h, factor, block, False, bias)
    y = y * post
    return (y if bias is None else y + bias).to(x.dtype)


def rotated_dx(dy, weight, sv, h, factor: int, block: int) -> torch.Tensor:
    """(U_N^T (sv * dy)) W of dy [..., N], in dy's dtype [M, K]."""
    rows = unit_rows(dy)
    if rows.shape[0] == 0:
        return torch.empty((0, weight.K), dtype=dy.dtype, device=dy.device)
    if factor:
        rows = rotated(rows, sv, None, h, factor, block, True)
    elif sv is not None:
        rows = (rows * sv).to(dy.dtype)
    return sliced_dx(rows, weight.K, weight.dequantize).to(dy.dtype)
