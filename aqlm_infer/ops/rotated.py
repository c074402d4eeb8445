"""Operators of rotated weights: the Hadamard transform, and E8P matmul with an output rotation.

A rotation is two integers and a matrix (``formats.rotation.Hadamard``): ``factor`` F >= 1 with
``block`` 0 is U = (H_F (x) S_{K/F})/sqrt(K), ``block`` 128 with factor 1 is I (x) S_128/sqrt(128),
factor 0 no rotation. ``h`` is H_F, int8 [F, F] (empty [0] when F is 0 or 1).

    x [..., K]    packed: 1-D uint8 in the device's runtime layout (``e8p_pack``)
    sv float32 [N] or None: everything that multiplies an output after its rotation    bias [N]

``e8p_matmul`` takes x already rotated: z = x Wq^T in float32, y = sv * U_N z + bias in x's dtype.
``residual`` multiplies the residual code: 1/2.04 at 3 bits, 1/3.45 at 4, ignored at 2.
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

_SCHEMAS = (
    "hadamard(Tensor x, Tensor? pre, Tensor? post, Tensor h, int factor, int block,"
    " bool transpose) -> Tensor",
    "e8p_pack(Tensor Qidxs, int bits) -> Tensor",
    "e8p_unpack(Tensor packed, int bits, SymInt N, SymInt K) -> Tensor",
    "e8p_matmul(Tensor x, Tensor packed, Tensor? sv, Tensor? bias, Tensor h, int bits,"
    " float residual, SymInt N, int factor, int block, str precision) -> Tensor",
    "e8p_matmul_dx(Tensor dy, Tensor packed, Tensor? sv, Tensor h, int bits, float residual,"
    " SymInt in_features, int factor, int block) -> Tensor",
    "e8p_dequantize(Tensor packed, int bits, float residual, SymInt N, SymInt K) -> Tensor",
)


def check_rotation(size: int, h: torch.Tensor, factor: int, block: int, name: str) -> None:
    """Raise OperandError unless (factor, block, h) is a rotation of ``size`` (``name``: N or K)."""
    if factor < 0 or block not in (0, 128) or (block and factor != 1):
        raise OperandError(f"factor={factor}, block={block} is no rotation")
    expected = (factor, factor) if factor > 1 else (0,)
    if tuple(h.shape) != expected or h.dtype != torch.int8:
        raise OperandError(
            f"h is {h.dtype} {list(h.shape)}, expected int8 {list(expected)} for factor={factor}"
        )
    if block and size % block:
        raise OperandError(f"{name}={size} is not a multiple of {block} (block rotation)")
    if factor and not block:
        power = size // factor
        if size % factor or power < 1 or power & (power - 1):
            raise OperandError(f"{name}={size} is not factor={factor} times a power of two")


def check_hadamard(x, pre, post, h, factor, block) -> None:
    """Check the operands of ``hadamard``."""
    check_input(x, None, 0)
    if factor < 1:
        raise OperandError(f"factor={factor}: a transform needs at least 1")
    K = x.shape[-1]
    check_rotation(K, h, factor, block, "K")
    check_vector(pre, K, "pre")
    check_vector(post, K, "post")


def check_e8p(bits: int, N: int, K: int) -> None:
    """Raise OperandError unless E8P of ``bits`` can hold a [N, K] weight."""
    if bits not in (2, 3, 4):
        raise OperandError(f"bits={bits}, expected 2, 3 or 4")
    if N % 16 or K % 64:
        raise OperandError(f"N={N}, K={K}: E8P needs multiples of 16 and 64")


def check_e8p_matmul(x, sv, bias, h, bits, N, factor, block) -> None:
    """Check the operands of ``e8p_matmul``."""
    check_input(x, bias, N)
    check_e8p(bits, N, x.shape[-1])
    check_rotation(N, h, factor, block, "N")
    check_vector(sv, N, "sv")


def _hadamard(x, pre, post, h, factor, block, transpose):
    check_hadamard(x, pre, post, h, factor, block)
    return x.new_empty(x.shape)


def _pack(Qidxs, bits):
    return fresh_bytes(Qidxs)


def _unpack(packed, bits, N, K):
    return packed.new_empty((N, K * bits // 64), dtype=torch.int64)


def _matmul(x, packed, sv, bias, h, bits, residual, N, factor, block, precision):
    check_e8p_matmul(x, sv, bias, h, bits, N, factor, block)
    return x.new_empty((*x.shape[:-1], N))


def _matmul_dx(dy, packed, sv, h, bits, residual, in_features, factor, block):
    check_e8p_matmul_dx(dy, sv, h, bits, in_features, factor, block)
    return dy.new_empty((*dy.shape[:-1], in_features))


def check_e8p_matmul_dx(dy, sv, h, bits, in_features, factor, block) -> None:
    """Check the operands of ``e8p_matmul_dx``."""
    check_input(dy, None, 0)
    check_e8p(bits, dy.shape[-1], in_features)
    check_rotation(dy.shape[-1], h, factor, block, "N")
    check_vector(sv, dy.shape[-1], "sv")


def _dequantize(packed, bits, residual, N, K):
    check_e8p(bits, N, K)
    return packed.new_empty((N, K), dtype=torch.float32)


define(_SCHEMAS, (_hadamard, _pack, _unpack, _matmul, _matmul_dx, _dequantize))

_ops = torch.ops.aqlm_infer
hadamard = _ops.hadamard.default
e8p_pack = _ops.e8p_pack.default
e8p_unpack = _ops.e8p_unpack.default
e8p_matmul = _ops.e8p_matmul.default
e8p_matmul_dx = _ops.e8p_matmul_dx.default
e8p_dequantize = _ops.e8p_dequantize.default


def hadamard_gradient(transform: Callable) -> Gradient:
    """The gradients of ``hadamard``, and what they keep, for an operator of its signature."""

    def context(ctx, inputs, output):
        x, pre, post, h, factor, block, transpose = inputs
        # x and the transform of it are needed for the gradients of pre and post alone.
        kept = x if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept, pre, post, h)
        ctx.rotation = factor, block, transpose

    def backward(ctx, dy):
        x, pre, post, h = ctx.saved_tensors
        factor, block, transpose = ctx.rotation
        dx = dpre = dpost = None
        if ctx.needs_input_grad[0]:
            dx = transform(dy, post, pre, h, factor, block, not transpose)
        if ctx.needs_input_grad[1]:
            back = transform(dy.float(), post, None, h, factor, block, not transpose)
            dpre = bias_gradient(back * x, pre.dtype)
        if ctx.needs_input_grad[2]:
            forth = transform(x.float(), pre, None, h, factor, block, transpose)
            dpost = bias_gradient(dy * forth, post.dtype)
        return dx, dpre, dpost, None, None, None, None

    return backward, context


def e8p_gradient(matmul_dx: Callable) -> Gradient:
    """The gradients of ``e8p_matmul`` by an operator of the signature of ``e8p_matmul_dx``."""

    def context(ctx, inputs, output):
        x, packed, sv, bias, h, bits, residual, _, factor, block, _ = inputs
        if ctx.needs_input_grad[2]:
            raise OperandError(
                "sv requires grad, but e8p_matmul differentiates x and bias only: RotatedLinear"
                " trains SU and SV through its own differentiable path"
            )
        ctx.save_for_backward(packed, sv, h)
        ctx.weight = bits, residual, x.shape[-1], factor, block
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx, dy):
        packed, sv, h = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = matmul_dx(dy, packed, sv, h, *ctx.weight)
        if ctx.needs_input_grad[3]:
            dbias = bias_gradient(dy, ctx.bias_dtype)
        return (dx, None, None, dbias) + (None,) * 7

    return backward, context


differentiate("hadamard", *hadamard_gradient(hadamard))
differentiate("e8p_matmul", *e8p_gradient(e8p_matmul_dx))
