"""How layers on scalar grids call the operators: GPTQ, round to nearest, QuIP's rotated grid.

A kernel record takes ``**CALLS`` (``ScalarFormat``) or ``**QUIP_CALLS`` (``QuipFormat``). Kronecker
rotations are two small dense products a side, which torch does on every device.
"""

from __future__ import annotations

import torch

from .. import ops
from ..formats import QuipFormat, ScalarFormat, Tensors
from ..formats.rotation import kronecker_product
from ..formats.scalar import pack_bits
from . import rotated
from .registry import Buffers, Partitions, call


def repack(
    format: ScalarFormat, tensors: Tensors, partitions: Partitions, precision: str, operators=ops
):
    """Canonical codes -> the device's runtime layout; zeros as floats in the scales' dtype."""
    qweight, scales = tensors["qweight"].contiguous(), tensors["scales"]
    K = scales.shape[1] * format.group_size
    return {
        "packed_qweight": operators.scalar_pack(qweight, format.bits, K),
        "packed_zeros": format.zero_points(tensors, scales.dtype),
        "h_out": torch.empty(0, dtype=torch.int8, device=qweight.device),
    }


def unpack(
    format: ScalarFormat, buffers: Buffers, N: int, K: int, partitions: Partitions, operators=ops
):
    """The canonical codes and zeros, bit for bit what ``repack`` was given."""
    qweight = operators.scalar_unpack(buffers["packed_qweight"], format.bits, N, K)
    zeros = pack_bits(buffers["packed_zeros"].to(torch.uint8), format.bits)
    return {"qweight": qweight, "zeros": zeros}


def matmul(
    format, x, buffers: Buffers, values: Tensors, bias, partitions, precision, operators=ops
):
    """y = x W^T + bias through ``ops.scalar_matmul``, without a rotation."""
    return call(
        operators.scalar_matmul,
        x,
        buffers["packed_qweight"],
        values["scales"],
        buffers["packed_zeros"],
        None,
        bias,
        buffers["h_out"],
        format.bits,
        format.group_size,
        sum(partitions),
        0,
        0,
        precision,
    )


def hold(format, buffers: Buffers, values: Tensors, bias, partitions: Partitions, precision: str):
    """Keep the operands of ``matmul``; their number."""
    none = buffers["h_out"]
    return ops.hold_scalar(
        buffers["packed_qweight"], values["scales"], buffers["packed_zeros"], None, none, None,
        bias, none, format.bits, format.group_size, sum(partitions), 0, 0, 0, precision,
    )  # fmt: skip


def dequantize(
    format, buffers: Buffers, values: Tensors, K: int, partitions: Partitions, operators=ops
):
    """The [N, K] weight in the scales' dtype."""
    packed, zeros, scales = buffers["packed_qweight"], buffers["packed_zeros"], values["scales"]
    weight = operators.scalar_dequantize(packed, scales, zeros, format.bits, format.group_size, K)
    return weight.to(scales.dtype)


CALLS = {"repack": repack, "unpack": unpack, "matmul": matmul, "dequantize": dequantize}
"""Fields of a kernel record for gptq-* and rtn-* formats."""


def quip_repack(
    format: QuipFormat, tensors: Tensors, partitions: Partitions, precision: str, operators=ops
):
    """Canonical codes -> the device's runtime layout, and what both rotations need besides."""
    qweight = tensors["qweight"].contiguous()
    N, K = sum(partitions), tensors["SU"].shape[0]
    buffers = {
        "packed_qweight": operators.scalar_pack(qweight, format.bits, K),
        "grid_step": torch.full((N, 1), format.step, device=qweight.device),
    }
    if format.rotation != "kronecker":
        return buffers | rotated.factor_matrices(format.rotation, N, K, qweight.device)
    for name in ("U_p_in", "U_p_out", "V_p_in", "V_p_out"):
        buffers[f"packed_{name}"] = tensors[name]
    for name in ("U_p_in", "U_p_out"):
        buffers[f"inverse_{name}"] = torch.argsort(tensors[name])
    return buffers | {"h_out": torch.empty(0, dtype=torch.int8, device=qweight.device)}


def quip_fold(format: QuipFormat, values: Tensors):
    """Float32 sign vectors in fresh memory; everything that scales an output is in ``sv``."""
    scale = values["SV"].float() * values["Wscale"].float()
    return {"su": values["SU"].to(torch.float32, copy=True), "sv": scale}


def quip_unpack(
    format: QuipFormat, buffers: Buffers, N: int, K: int, partitions: Partitions, operators=ops
):
    """The canonical code tensors, bit for bit what ``quip_repack`` was given."""
    qweight = operators.scalar_unpack(buffers["packed_qweight"], format.bits, N, K)
    return {"qweight": qweight, **_permutations(format, buffers)}


def _permutations(format: QuipFormat, buffers: Buffers) -> dict[str, torch.Tensor]:
    return {n: buffers[f"packed_{n}"] for n in format.code_names if n != "qweight"}


def quip_rotate(
    format: QuipFormat, x: torch.Tensor, buffers: Buffers, values: Tensors, operators=ops
):
    """The input in the rotated basis, in x's dtype: U_K^T (SU x), or V (SU x) for Kronecker."""
    if format.rotation != "kronecker":
        return rotated.rotate(format, x, buffers, values, operators)
    B0, B1 = values["V_B0"], values["V_B1"]
    first, last = buffers["packed_V_p_in"], buffers["packed_V_p_out"]
    return kronecker_product(x.float() * buffers["su"], B0, B1, first, last).to(x.dtype)


def quip_matmul(
    format, x, buffers: Buffers, values: Tensors, bias, partitions, precision, operators=ops
):
    """y = sv * U_N (x Wq^T) + bias for a rotated x, through ``ops.scalar_matmul``.

    An ``sv`` that requires grad is applied by a differentiable transform of its own.
    """
    h, sv = buffers["h_out"], buffers["sv"]
    numbers = 0, 0
    if format.rotation != "kronecker":
        numbers = rotated.rotation_numbers(format.rotation, h)
        if not (sv.requires_grad and torch.is_grad_enabled()):
            return _product(
                format, x, buffers, sv, bias, h, numbers, partitions, precision, operators
            )
    # In float32: z is not scaled yet, and is rounded to x's dtype at the end.
    none = h.new_empty(0)
    z = _product(
        format, x.float(), buffers, None, None, none, (0, 0), partitions, precision, operators
    )
    if format.rotation != "kronecker":
        return rotated.rotate_output(z, sv, bias, h, *numbers, operators).to(x.dtype)
    B0, B1 = values["U_B0"].T, values["U_B1"].T
    first, last = buffers["inverse_U_p_out"], buffers["inverse_U_p_in"]
    y = kronecker_product(z, B0, B1, first, last) * sv
    return (y if bias is None else y + bias.float()).to(x.dtype)


def quip_hold(
    format, buffers: Buffers, values: Tensors, bias, partitions: Partitions, precision: str
):
    """Keep the operands of ``quip_rotate`` and ``quip_matmul``; their number, or None."""
    if format.rotation == "kronecker":
        return None
    h_in, h, su = buffers["h_in"], buffers["h_out"], buffers["su"]
    in_factor, block = rotated.rotation_numbers(format.rotation, h_in)
    factor, _ = rotated.rotation_numbers(format.rotation, h)
    return ops.hold_scalar(
        buffers["packed_qweight"], buffers["grid_step"], None, su, h_in, buffers["sv"], bias, h,
        format.bits, su.shape[0], sum(partitions), in_factor, factor, block, precision,
    )  # fmt: skip


def _product(format, x, buffers: Buffers, sv, bias, h, numbers, partitions, precision, operators):
    packed, step = buffers["packed_qweight"], buffers["grid_step"]
    bits, K, N = format.bits, x.shape[-1], sum(partitions)
    matmul = operators.scalar_matmul
    return call(matmul, x, packed, step, None, sv, bias, h, bits, K, N, *numbers, precision)


def quip_dequantize(
    format, buffers: Buffers, values: Tensors, K: int, partitions: Partitions, operators=ops
):
    """The [N, K] weight in the original basis, in SV's dtype."""
    packed, step = buffers["packed_qweight"], buffers["grid_step"]
    weight = operators.scalar_dequantize(packed, step, None, format.bits, K, K) * values["Wscale"]
    return format.rotate_back(weight, {**values, **_permutations(format, buffers)}).to(
        values["SV"].dtype
    )


QUIP_CALLS = {
    "repack": quip_repack,
    "unpack": quip_unpack,
    "matmul": quip_matmul,
    "dequantize": quip_dequantize,
    "fold": quip_fold,
    "rotate": quip_rotate,
    "trains": True,
}
"""Fields of a kernel record for quip-int* formats."""
