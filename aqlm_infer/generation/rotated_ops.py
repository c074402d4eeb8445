"""A rotated E8P matmul with what follows it in a decode step, up to the next layer's rotated input.

z [M, K] is the input as the layer's matmul takes it, rotated. The product U_N (z Wq^T) * sv of
``ops.e8p_matmul`` is rounded to x's dtype as that operator rounds it.

    e8p_matmul_norm: x + product [M, N], and the rotated norm of it (``rotated_norm``): the layers'
    rotations are of one size, with one factor matrix
    e8p_matmul_swiglu: silu(gate) * up [M, N / 2] of the halves of the product (``up_first``: up is
    the first), each rounded as ``swiglu`` does, rotated for the layer that reads it: U^T (su *
    that), with its factor matrix

CUDA operators of ``_cuda``; elsewhere the operators that they join. Inference only.
"""

from __future__ import annotations

import torch

from ..ops.library import OperandError, define
from ..ops.rotated import check_e8p_matmul, check_rotation, e8p_matmul, hadamard
from .ops import check_rotated, rotated_norm, swiglu

_SCHEMAS = (
    "e8p_matmul_norm(Tensor z, Tensor packed, Tensor? sv, Tensor h, int bits, float residual,"
    " int factor, Tensor x, Tensor weight, float eps, Tensor su) -> (Tensor, Tensor)",
    "e8p_matmul_swiglu(Tensor z, Tensor packed, Tensor? sv, Tensor h, int bits, float residual,"
    " int factor, bool up_first, Tensor su, Tensor next_h, int next_factor) -> Tensor",
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


def _check_swiglu(z, sv, h, bits, factor, su, next_h, next_factor) -> None:
    if su.dim() != 1 or su.dtype != torch.float32:
        raise OperandError(f"su is {su.dtype} {list(su.shape)}, expected float32 [N / 2]")
    if z.dim() != 2:
        raise OperandError(f"z is {list(z.shape)}, expected [M, K]")
    n = su.shape[0]
    check_e8p_matmul(z, sv, None, h, bits, 2 * n, factor, 0)
    check_rotation(n, next_h, next_factor, 0, "N / 2")


def _swiglu(z, packed, sv, h, bits, residual, factor, up_first, su, next_h, next_factor):
    _check_swiglu(z, sv, h, bits, factor, su, next_h, next_factor)
    n = su.shape[0]
    product = e8p_matmul(z, packed, sv, None, h, bits, residual, 2 * n, factor, 0, "exact")
    low, high = product[:, :n], product[:, n:]
    gated = swiglu(high, low) if up_first else swiglu(low, high)
    return hadamard(gated, su, None, next_h, next_factor, 0, True)


def _swiglu_fake(z, packed, sv, h, bits, residual, factor, up_first, su, next_h, next_factor):
    _check_swiglu(z, sv, h, bits, factor, su, next_h, next_factor)
    return z.new_empty((z.shape[0], su.shape[0]))


define(_SCHEMAS, (_norm_fake, _swiglu_fake), (_norm, _swiglu))

e8p_matmul_norm = torch.ops.aqlm_infer.e8p_matmul_norm.default
e8p_matmul_swiglu = torch.ops.aqlm_infer.e8p_matmul_swiglu.default
