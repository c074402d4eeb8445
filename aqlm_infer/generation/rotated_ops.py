"""A rotated E8P matmul with the rotated norm that follows it in a decode step: a launch less.

z [M, K] is the input as the layer's matmul takes it, rotated. The product U_N (z Wq^T) * sv of
``ops.e8p_matmul`` is rounded to x's dtype as that operator rounds it.

    e8p_matmul_norm: x + product [M, N], and the rotated norm of it (``rotated_norm``): the layers'
    rotations are of one size, with one factor matrix

A CUDA operator of ``_cuda``; elsewhere the operators that it joins. Inference only.
"""

from __future__ import annotations

import torch

from ..ops.library import OperandError, define
from ..ops.rotated import check_e8p_matmul, e8p_matmul
from .ops import check_rotated, rotated_norm

_SCHEMAS = (
    "e8p_matmul_norm(Tensor z, Tensor packed, Tensor? sv, Tensor h, int bits, float residual,"
    " int factor, Tensor x, Tensor weight, float eps, Tensor su) -> (Tensor, Tensor)",
)


def _check_norm(z, sv, h, bits, factor, x, weight, su) -> None:
    check_rotated(x, x, weight, su, h, factor)
    check_e8p_matmul(z, sv, None, h, bits, x.shape[1], factor, 0)
    if z.dim() != 2 or z.shape[0] != x.shape[0] or z.dtype != x.dtype:
        raise OperandError(f"z {z.dtype} {list(z.shape)} beside x {x.dtype} {list(x.shape)}")


def _norm(z, packed, sv, h, bits, residual, factor, x, weight, eps, su):
    _check_norm(z, sv, h, bits, factor, x, weight, su)
    N = x.shape[1]
    product = e8p_matmul(z, packed, sv, None, h, bits, residual, N, factor, 0, "exact")
    return rotated_norm(x, product, weight, eps, su, h, factor)


def _norm_fake(z, packed, sv, h, bits, residual, factor, x, weight, eps, su):
    _check_norm(z, sv, h, bits, factor, x, weight, su)
    return x.new_empty(x.shape), x.new_empty(x.shape)


define(_SCHEMAS, (_norm_fake,), (_norm,))

e8p_matmul_norm = torch.ops.aqlm_infer.e8p_matmul_norm
