"""How a layer in an E8P format calls the operators, on any device that implements them.

A kernel record takes ``**CALLS``. Runtime buffers of a layer: ``packed_Qidxs``, the factor matrices
``h_in`` and ``h_out`` (shared by all layers of a size), and, derived from the values, float32
``su`` [K] and ``sv`` [N].
"""

from __future__ import annotations

from functools import partial

import torch

from .. import ops
from ..formats import E8PFormat, Tensors
from ..formats.e8p import CODEBOOK_IDS
from ..formats.rotated import rotate_back, rotation_of
from ..formats.rotation import BLOCK
from .registry import Buffers, Partitions, call


def factor_matrices(kind: str, N: int, K: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The buffers ``h_in`` and ``h_out`` of a layer with rotations of this kind on both sides."""
    return {
        "h_in": rotation_of(kind, K).matrix(device),
        "h_out": rotation_of(kind, N).matrix(device),
    }


def rotation_numbers(kind: str, h: torch.Tensor) -> tuple[int, int]:
    """(factor, block) of the rotation whose factor matrix is ``h``, as operators take them."""
    return (h.shape[0] if h.dim() == 2 else 1), (BLOCK if kind == "block" else 0)


def repack(
    format: E8PFormat, tensors: Tensors, partitions: Partitions, precision: str, operators=ops
):
    """Canonical codes -> the device's runtime layout, and both rotations' factor matrices."""
    qidxs = tensors["Qidxs"].contiguous()
    N, K = sum(partitions), tensors["SU"].shape[0]
    packed = operators.e8p_pack(qidxs, format.bits)
    return {"packed_Qidxs": packed, **factor_matrices(format.rotation, N, K, qidxs.device)}


def fold(format: E8PFormat, values: Tensors):
    """Float32 sign vectors in fresh memory; everything that scales an output is in ``sv``."""
    return {"su": values["SU"].to(torch.float32, copy=True), "sv": format.output_scale(values)}


def unpack(
    format: E8PFormat, buffers: Buffers, N: int, K: int, partitions: Partitions, operators=ops
):
    """The canonical code tensors, bit for bit what ``repack`` was given."""
    packed = buffers["packed_Qidxs"]
    number = torch.tensor(CODEBOOK_IDS[format.bits], device=packed.device)
    return {"Qidxs": operators.e8p_unpack(packed, format.bits, N, K), "codebook_id": number}


def rotate(
    format, x: torch.Tensor, buffers: Buffers, values: Tensors, operators=ops
) -> torch.Tensor:
    """U_K^T (SU x), in x's dtype (of any format with Hadamard rotations)."""
    h = buffers["h_in"]
    factor, block = rotation_numbers(format.rotation, h)
    return call(operators.hadamard, x, buffers["su"], None, h, factor, block, True)


def matmul(
    format, x, buffers: Buffers, values: Tensors, bias, partitions, precision, operators=ops
):
    """y = sv * U_N (x Wq^T) + bias for a rotated x, through ``ops.e8p_matmul``.

    An ``sv`` that requires grad is applied by a differentiable transform of its own.
    """
    h, sv = buffers["h_out"], buffers["sv"]
    factor, block = rotation_numbers(format.rotation, h)
    if sv.requires_grad and torch.is_grad_enabled():
        none = h.new_empty(0)
        z = _product(
            format, x.float(), buffers, None, None, none, 0, 0, partitions, precision, operators
        )
        return rotate_output(z, sv, bias, h, factor, block, operators).to(x.dtype)
    return _product(
        format, x, buffers, sv, bias, h, factor, block, partitions, precision, operators
    )


def hold(format, buffers: Buffers, values: Tensors, bias, partitions: Partitions, precision: str):
    """Keep the operands of ``rotate`` and ``matmul``; their number."""
    h_in, h = buffers["h_in"], buffers["h_out"]
    in_factor, block = rotation_numbers(format.rotation, h_in)
    factor, _ = rotation_numbers(format.rotation, h)
    return ops.hold_e8p(
        buffers["packed_Qidxs"], buffers["su"], h_in, buffers["sv"], bias, h, format.bits,
        1 / format.residual, sum(partitions), in_factor, factor, block, precision,
    )  # fmt: skip


def rotate_output(z, sv, bias, h, factor: int, block: int, operators=ops) -> torch.Tensor:
    """sv * U_N z + bias in z's dtype, differentiable in sv as well."""
    y = operators.hadamard(z, None, sv, h, factor, block, False)
    return y if bias is None else y + bias.to(y.dtype)


def _product(format, x, buffers, sv, bias, h, factor, block, partitions, precision, operators):
    packed, bits, N = buffers["packed_Qidxs"], format.bits, sum(partitions)
    residual, matmul = 1 / format.residual, operators.e8p_matmul
    return call(matmul, x, packed, sv, bias, h, bits, residual, N, factor, block, precision)


def dequantize(
    format, buffers: Buffers, values: Tensors, K: int, partitions: Partitions, operators=ops
):
    """The [N, K] weight in the original basis, in SV's dtype."""
    N = sum(partitions)
    packed, residual = buffers["packed_Qidxs"], 1 / format.residual
    weight = operators.e8p_dequantize(packed, format.bits, residual, N, K)
    scale = format.output_scale(values)
    return rotate_back(weight, format.rotation, values["SU"], scale).to(values["SV"].dtype)


CALLS = {
    "repack": repack,
    "unpack": unpack,
    "matmul": matmul,
    "dequantize": dequantize,
    "fold": fold,
    "rotate": rotate,
    "trains": True,
}
"""The fields of a kernel record that are the same for every backend of the operators."""


def calls_of(operators, calls=CALLS) -> dict:
    """``calls`` with other operators of the same names and signatures (Triton's)."""
    own = ("fold", "trains")
    return {n: f if n in own else partial(f, operators=operators) for n, f in calls.items()}
