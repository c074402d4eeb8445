"""Hadamard rotations in Triton: the operator, with the signature of ``aqlm_infer.ops.hadamard``.

One launch for powers of two up to 1024 (block rotations among them), two for everything longer.
"""

from __future__ import annotations

import torch
import triton
from torch.library import triton_op, wrap_triton

from ..ops.rotated import check_hadamard, hadamard_gradient
from . import hadamard as bodies
from .fields import dot_precision
from .partial import unit_rows

PIECE = 32  # the fastest digit of the index
PIECES = 32  # of a program's step, and at most the next digit
MANY = 8192  # steps from which on a program takes several
STEPS = 8


def rotated(
    x: torch.Tensor,
    pre: torch.Tensor | None,
    post: torch.Tensor | None,
    h: torch.Tensor,
    factor: int,
    block: int,
    transpose: bool,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """post * U (pre * x) + bias (U^T with ``transpose``) of x [M, K], in ``dtype`` or x's own.

    x may be partial sums [S, M, K], whose sum in order is taken.
    """
    M, K = x.shape[-2:]
    splits = x.shape[0] if x.dim() == 3 else 1
    x = unit_rows(x)
    pre, post, bias = (None if v is None else v.contiguous() for v in (pre, post, bias))
    power = block or K // factor
    b = min(power, PIECE)
    a = min(power // b, PIECES)
    q = 1 if block else K // (a * b)
    y = torch.empty((M, K), dtype=dtype or x.dtype, device=x.device)
    t = y if q == 1 else torch.empty((M, K), dtype=torch.float32, device=x.device)
    pieces, scale = M * (K // b), (block or K) ** -0.5
    last, tf32 = q == 1, dot_precision(x) != "ieee"
    steps = STEPS if pieces >= MANY * PIECES else 1
    wrap_triton(bodies._rows)[(triton.cdiv(pieces, PIECES * steps),)](
        x, x if pre is None else pre, x if post is None else post, x if bias is None else bias, t,
        pieces, K, x.stride(0), splits, scale if last else 1.0, A=a, B=b, BP=max(16, b),
        PRE=pre is not None, POST=last and post is not None, BIAS=last and bias is not None,
        EXACT=x.dtype.itemsize == 2 and pre is None and splits == 1, TF32=tf32, BLOCK_R=PIECES,
        STEPS=steps, num_warps=2,
    )  # fmt: skip
    if not last:
        rows = 32 if 16 < q <= 32 else 16 if M < 16 or q <= 16 else 64
        columns = 32 if q > 32 else 64
        terms = min(rows, 32)  # of a step of the sum
        steps = 0 if q > terms else steps
        grid = (triton.cdiv(M, max(1, steps)), triton.cdiv(q, rows), triton.cdiv(a * b, columns))
        wrap_triton(bodies._mix)[grid](
            t, h if factor > 1 else t, t if post is None else post, t if bias is None else bias, y,
            M, K, q, q // factor, a * b, scale, F=factor, TRANSPOSE=transpose,
            POST=post is not None, BIAS=bias is not None, TF32=tf32, BLOCK_Q=rows, BLOCK_J=terms,
            BLOCK_B=columns, STEPS=steps, num_warps=4,
        )  # fmt: skip
    return y


@triton_op("aqlm_infer_triton::hadamard", mutates_args={})
def hadamard(
    x: torch.Tensor,
    pre: torch.Tensor | None,
    post: torch.Tensor | None,
    h: torch.Tensor,
    factor: int,
    block: int,
    transpose: bool,
) -> torch.Tensor:
    """post * U (pre * x) along the last dimension, as ``aqlm_infer.ops.hadamard``."""
    check_hadamard(x, pre, post, h, factor, block)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return rotated(rows, pre, post, h, factor, block, transpose).view(x.shape)


_backward, _context = hadamard_gradient(hadamard)
hadamard.register_autograd(_backward, setup_context=_context)
