"""How a layer in an additive format calls the operators, on any device that implements them."""

from __future__ import annotations

from .. import ops
from ..formats import AdditiveFormat, Tensors
from .registry import Buffers, Partitions, call


def repack(format: AdditiveFormat, tensors: Tensors, partitions: Partitions, precision: str):
    """Canonical codes -> the device's runtime layout, plus codebooks in the kernel's own form."""
    codes = tensors["codes"]
    packed = ops.additive_pack(
        codes, format.nbits, format.out_group_size, format.in_group_size, list(partitions)
    )
    aux = ops.additive_prepare(tensors["codebooks"], precision, list(partitions))
    return {"packed_codes": packed, "aux": aux}


def unpack(format: AdditiveFormat, buffers: Buffers, N: int, K: int, partitions: Partitions):
    """The canonical codes [O, I, B], bit for bit what ``repack`` was given."""
    codes = ops.additive_unpack(
        buffers["packed_codes"],
        N // format.out_group_size,
        K // format.in_group_size,
        format.num_codebooks,
        format.nbits,
        format.out_group_size,
        format.in_group_size,
        list(partitions),
    )
    return {"codes": codes}


def matmul(format, x, buffers: Buffers, values: Tensors, bias, partitions, precision):
    """y = x W^T + bias through ``ops.additive_matmul``."""
    return call(
        ops.additive_matmul,
        x,
        buffers["packed_codes"],
        values["codebooks"],
        values["scales"],
        bias,
        buffers["aux"],
        partitions,
        precision,
    )


def hold(format, buffers: Buffers, values: Tensors, bias, partitions: Partitions, precision: str):
    """Keep the operands of ``matmul``; their number."""
    packed, aux = buffers["packed_codes"], buffers["aux"]
    books, scales = values["codebooks"], values["scales"]
    return ops.hold_additive(packed, books, scales, bias, aux, list(partitions), precision)


def dequantize(format, buffers: Buffers, values: Tensors, K: int, partitions: Partitions):
    """The [N, K] weight in the codebooks' dtype."""
    return ops.additive_dequantize(
        buffers["packed_codes"], values["codebooks"], values["scales"], K, list(partitions)
    )
