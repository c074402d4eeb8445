"""Operators of scalar grids: packed 2, 3, 4 and 8-bit codes, one scale and zero a group.

    w[n, k] = scales[n, k/G] * (q[n, k] - zeros[n, k/G])

    x [..., K]    packed: 1-D uint8 in the device's runtime layout (``scalar_pack``)
    scales, zeros [N, K/G] of one floating dtype; zeros None means (2^bits - 1)/2 everywhere
    sv float32 [N] or None    bias [N]    h, factor, block: the output rotation (``rotated.py``)

``scalar_matmul``: z = x w^T in float32, y = sv * U_N z + bias in x's dtype; x is already rotated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .library import (
    Gradient,
    OperandError,
    bias_gradient,
    check_input,
    check_vector,
    define,
    differentiate,
    fresh_bytes,
)
from .rotated import check_rotation

_SCHEMAS = (
    "scalar_pack(Tensor qweight, int bits, SymInt K) -> Tensor",
    "scalar_unpack(Tensor packed, int bits, SymInt N, SymInt K) -> Tensor",
    "scalar_matmul(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? sv,"
    " Tensor? bias, Tensor h, int bits, int group_size, SymInt N, int factor, int block,"
    " str precision) -> Tensor",
    "scalar_matmul_dx(Tensor dy, Tensor packed, Tensor scales, Tensor? zeros, Tensor? sv, Tensor h,"
    " int bits, int group_size, SymInt in_features, int factor, int block) -> Tensor",
    "scalar_dequantize(Tensor packed, Tensor scales, Tensor? zeros, int bits, int group_size,"
    " SymInt K) -> Tensor",
)


def check_scalar(scales, zeros, bits: int, group_size: int, N: int, K: int) -> None:
    """Raise OperandError unless scales and zeros describe a [N, K] weight of these groups."""
    if bits not in (2, 3, 4, 8):
        raise OperandError(f"bits={bits}, expected 2, 3, 4 or 8")
    if group_size < 1 or K % group_size:
        raise OperandError(f"K={K} is not a multiple of {group_size} (group_size)")
    if K * bits % 8:
        raise OperandError(f"K={K}: a row of {bits}-bit codes does not fill whole bytes")
    expected = [N, K // group_size]
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and list(tensor.shape) != expected:
            raise OperandError(f"{name} has shape {list(tensor.shape)}, expected {expected}")
    if not scales.is_floating_point():
        raise OperandError(f"scales have dtype {scales.dtype}, expected a floating dtype")
    if zeros is not None and zeros.dtype != scales.dtype:
        raise OperandError(f"scales are {scales.dtype} but zeros are {zeros.dtype}")


def check_scalar_matmul(x, scales, zeros, sv, bias, h, bits, group_size, N, factor, block) -> None:
    """Check the operands of ``scalar_matmul``."""
    check_input(x, bias, N)
    check_scalar(scales, zeros, bits, group_size, N, x.shape[-1])
    check_rotation(N, h, factor, block, "N")
    check_vector(sv, N, "sv")


def check_scalar_matmul_dx(
    dy, scales, zeros, sv, h, bits, group_size, in_features, factor, block
) -> None:
    """Check the operands of ``scalar_matmul_dx``."""
    check_input(dy, None, 0)
    N = dy.shape[-1]
    check_scalar(scales, zeros, bits, group_size, N, in_features)
    check_rotation(N, h, factor, block, "N")
    check_vector(sv, N, "sv")


def _pack(qweight, bits, K):
    return fresh_bytes(qweight)


def _unpack(packed, bits, N, K):
    return packed.new_empty((N, K * bits // 8))


def _matmul(x, packed, scales, zeros, sv, bias, h, bits, group_size, N, factor, block, precision):
    check_scalar_matmul(x, scales, zeros, sv, bias, h, bits, group_size, N, factor, block)
    return x.new_empty((*x.shape[:-1], N))


def _matmul_dx(dy, packed, scales, zeros, sv, h, bits, group_size, in_features, factor, block):
    check_scalar_matmul_dx(dy, scales, zeros, sv, h, bits, group_size, in_features, factor, block)
    return dy.new_empty((*dy.shape[:-1], in_features))


def _dequantize(packed, scales, zeros, bits, group_size, K):
    check_scalar(scales, zeros, bits, group_size, scales.shape[0], K)
    return scales.new_empty((scales.shape[0], K), dtype=torch.float32)


define(_SCHEMAS, (_pack, _unpack, _matmul, _matmul_dx, _dequantize))

_ops = torch.ops.aqlm_infer
scalar_pack = _ops.scalar_pack.default
scalar_unpack = _ops.scalar_unpack.default
scalar_matmul = _ops.scalar_matmul.default
scalar_matmul_dx = _ops.scalar_matmul_dx.default
scalar_dequantize = _ops.scalar_dequantize.default


def scalar_gradient(matmul_dx: Callable) -> Gradient:
    """The gradients of ``scalar_matmul`` by an operator of the signature of its ``dx``."""

    def context(ctx, inputs, output):
        x, packed, scales, zeros, sv, bias, h, bits, group_size, _, factor, block, _ = inputs
        if any(ctx.needs_input_grad[2:5]):
            raise OperandError(
                "scales, zeros or sv require grad, but scalar_matmul differentiates x and bias"
                " only: layers train values through their dequantized weight"
            )
        ctx.save_for_backward(packed, scales, zeros, sv, h)
        ctx.weight = bits, group_size, x.shape[-1], factor, block
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx, dy):
        packed, scales, zeros, sv, h = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = matmul_dx(dy, packed, scales, zeros, sv, h, *ctx.weight)
        if ctx.needs_input_grad[5]:
            dbias = bias_gradient(dy, ctx.bias_dtype)
        return (dx, None, None, None, None, dbias) + (None,) * 7

    return backward, context


differentiate("scalar_matmul", *scalar_gradient(scalar_matmul_dx))
