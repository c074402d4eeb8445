"""Operators of additive codebooks (AQLM). Shapes carry the format:

    x [..., K]      packed: 1-D uint8 in the device's runtime layout (``additive_pack``)
    codebooks [P*B, 2^b, og, ig]      scales [O, 1, 1, 1]      bias [N]      y [..., N] in x's dtype

``partitions`` are the out_features of P fused layers that share x (one part: ``[N]``); part p uses
``codebooks[p*B:(p+1)*B]``. ``aux`` holds codebooks in a kernel's own form (``additive_prepare``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .library import (
    Gradient,
    OperandError,
    bias_gradient,
    check_input,
    define,
    differentiate,
    fresh_bytes,
)

_SCHEMAS = (
    "additive_pack(Tensor codes, int nbits, int out_group_size, int in_group_size,"
    " int[] partitions) -> Tensor",
    "additive_unpack(Tensor packed, SymInt out_groups, SymInt in_groups, int num_codebooks,"
    " int nbits, int out_group_size, int in_group_size, int[] partitions) -> Tensor",
    "additive_prepare(Tensor codebooks, str precision, int[] partitions) -> Tensor",
    "additive_matmul(Tensor x, Tensor packed, Tensor codebooks, Tensor scales, Tensor? bias,"
    " Tensor aux, int[] partitions, str precision) -> Tensor",
    "additive_matmul_dx(Tensor dy, Tensor packed, Tensor codebooks, Tensor scales,"
    " SymInt in_features, int[] partitions) -> Tensor",
    "additive_dequantize(Tensor packed, Tensor codebooks, Tensor scales, SymInt in_features,"
    " int[] partitions) -> Tensor",
)


def check_operands(
    codebooks: torch.Tensor, scales: torch.Tensor, N: int, K: int, partitions: Sequence[int]
) -> None:
    """Raise OperandError unless codebooks and scales describe a [N, K] weight of these parts."""
    if codebooks.dim() != 4 or codebooks.shape[0] % max(len(partitions), 1):
        raise OperandError(
            f"codebooks has shape {list(codebooks.shape)}, expected"
            f" [{len(partitions)} parts * B, 2^bits, og, ig]"
        )
    out_group, in_group = codebooks.shape[2], codebooks.shape[3]
    if K % in_group:
        raise OperandError(f"K={K} is not a multiple of {in_group} (in_group_size)")
    bad = [p for p in partitions if p % out_group]
    if bad:
        raise OperandError(f"N={bad[0]} is not a multiple of {out_group} (out_group_size)")
    if scales.shape[0] * out_group != N:
        raise OperandError(f"scales has {scales.shape[0]} rows of {out_group}, expected N={N}")
    if codebooks.dtype != scales.dtype:
        raise OperandError(f"codebooks are {codebooks.dtype} but scales are {scales.dtype}")


def check_matmul(x, codebooks, scales, bias, partitions) -> int:
    """Check the operands of ``additive_matmul`` and return N."""
    N = sum(partitions)
    check_input(x, bias, N)
    check_operands(codebooks, scales, N, x.shape[-1], partitions)
    return N


def _pack(codes, nbits, out_group_size, in_group_size, partitions):
    return fresh_bytes(codes)


def _unpack(packed, out_groups, in_groups, num_codebooks, nbits, og, ig, partitions):
    dtype = torch.int8 if nbits <= 8 else torch.int16
    return packed.new_empty((out_groups, in_groups, num_codebooks), dtype=dtype)


def _prepare(codebooks, precision, partitions):
    return fresh_bytes(codebooks)


def _matmul(x, packed, codebooks, scales, bias, aux, partitions, precision):
    N = check_matmul(x, codebooks, scales, bias, partitions)
    return x.new_empty((*x.shape[:-1], N))


def _matmul_dx(dy, packed, codebooks, scales, in_features, partitions):
    check_operands(codebooks, scales, dy.shape[-1], in_features, partitions)
    return dy.new_empty((*dy.shape[:-1], in_features))


def _dequantize(packed, codebooks, scales, in_features, partitions):
    check_operands(codebooks, scales, sum(partitions), in_features, partitions)
    return codebooks.new_empty((sum(partitions), in_features))


define(_SCHEMAS, (_pack, _unpack, _prepare, _matmul, _matmul_dx, _dequantize))

_ops = torch.ops.aqlm_infer
additive_pack = _ops.additive_pack.default
additive_unpack = _ops.additive_unpack.default
additive_prepare = _ops.additive_prepare.default
additive_matmul = _ops.additive_matmul.default
additive_matmul_dx = _ops.additive_matmul_dx.default
additive_dequantize = _ops.additive_dequantize.default


def additive_gradient(matmul_dx: Callable) -> Gradient:
    """The gradients of ``additive_matmul`` by an operator of the signature of its ``dx``.

    Arguments after ``partitions``, where an operator has some, get none.
    """

    def context(ctx, inputs, output):
        x, packed, codebooks, scales, bias, _, partitions = inputs[:7]
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            raise OperandError(
                "codebooks or scales require grad, but this operator differentiates x and bias"
                " only: QuantLinear trains values through its dequantized weight"
            )
        ctx.save_for_backward(packed, codebooks, scales)
        ctx.in_features, ctx.partitions, ctx.arguments = x.shape[-1], partitions, len(inputs)
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx, dy):
        packed, codebooks, scales = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = matmul_dx(dy, packed, codebooks, scales, ctx.in_features, ctx.partitions)
        if ctx.needs_input_grad[4]:
            dbias = bias_gradient(dy, ctx.bias_dtype)
        return (dx, None, None, None, dbias) + (None,) * (ctx.arguments - 5)

    return backward, context


differentiate("additive_matmul", *additive_gradient(additive_matmul_dx))
