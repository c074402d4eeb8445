"""Torch operators: schemas, fakes (= the shape contract) and autograd, once for every backend.

Backends register their implementations for a device key: ``backends/cpu.py`` for CPU,
``csrc/ops_cuda.cpp`` for CUDA. All operators are functional; shapes carry the format:

    x [..., K]      packed: 1-D uint8 in the device's runtime layout (``additive_pack``)
    codebooks [P*B, 2^b, og, ig]      scales [O, 1, 1, 1]      bias [N]      y [..., N] in x's dtype

``partitions`` are the out_features of P fused layers that share x (one part: ``[N]``); part p uses
``codebooks[p*B:(p+1)*B]``. ``aux`` holds codebooks in a kernel's own form (``additive_prepare``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

NAMESPACE = "aqlm_infer"

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

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
for _schema in _SCHEMAS:
    LIBRARY.define(_schema)

_ops = torch.ops.aqlm_infer
additive_pack = _ops.additive_pack
additive_unpack = _ops.additive_unpack
additive_prepare = _ops.additive_prepare
additive_matmul = _ops.additive_matmul
additive_matmul_dx = _ops.additive_matmul_dx
additive_dequantize = _ops.additive_dequantize


class OperandError(ValueError):
    """Tensors that an operator cannot combine; the message prints their shapes or dtypes."""


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
    if not x.is_floating_point():
        raise OperandError(f"x has dtype {x.dtype}, expected float32, bfloat16 or float16")
    if x.dim() == 0:
        raise OperandError("x has no dimensions, expected [..., K]")
    check_operands(codebooks, scales, N, x.shape[-1], partitions)
    if bias is not None and tuple(bias.shape) != (N,):
        raise OperandError(f"bias has shape {list(bias.shape)}, expected [{N}]")
    return N


def _register_fakes() -> None:
    def pack(codes, nbits, out_group_size, in_group_size, partitions):
        # The runtime layout's size belongs to the backend: a fresh unbacked size.
        return codes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.uint8)

    def unpack(packed, out_groups, in_groups, num_codebooks, nbits, og, ig, partitions):
        dtype = torch.int8 if nbits <= 8 else torch.int16
        return packed.new_empty((out_groups, in_groups, num_codebooks), dtype=dtype)

    def prepare(codebooks, precision, partitions):
        return codebooks.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.uint8)

    def matmul(x, packed, codebooks, scales, bias, aux, partitions, precision):
        N = check_matmul(x, codebooks, scales, bias, partitions)
        return x.new_empty((*x.shape[:-1], N))

    def matmul_dx(dy, packed, codebooks, scales, in_features, partitions):
        check_operands(codebooks, scales, dy.shape[-1], in_features, partitions)
        return dy.new_empty((*dy.shape[:-1], in_features))

    def dequantize(packed, codebooks, scales, in_features, partitions):
        check_operands(codebooks, scales, sum(partitions), in_features, partitions)
        return codebooks.new_empty((sum(partitions), in_features))

    fakes = (pack, unpack, prepare, matmul, matmul_dx, dequantize)
    for schema, fake in zip(_SCHEMAS, fakes, strict=True):
        name = schema[: schema.index("(")]
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def _refuse_value_gradients(needs_input_grad) -> None:
    if needs_input_grad[2] or needs_input_grad[3]:
        raise OperandError(
            "codebooks or scales require grad, but this operator differentiates x and bias only:"
            " QuantLinear trains values through its dequantized weight"
        )


def _matmul_context(ctx, inputs, output):
    x, packed, codebooks, scales, bias, aux, partitions, _ = inputs
    _refuse_value_gradients(ctx.needs_input_grad)
    ctx.save_for_backward(packed, codebooks, scales)
    ctx.in_features, ctx.partitions = x.shape[-1], partitions
    ctx.bias_dtype = None if bias is None else bias.dtype


def _matmul_backward(ctx, dy):
    packed, codebooks, scales = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = additive_matmul_dx(dy, packed, codebooks, scales, ctx.in_features, ctx.partitions)
    if ctx.needs_input_grad[4]:
        # float32 sum over tokens, whatever dy's dtype.
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, None, None, dbias, None, None, None


_register_fakes()
torch.library.register_autograd(
    f"{NAMESPACE}::additive_matmul", _matmul_backward, setup_context=_matmul_context, lib=LIBRARY
)
