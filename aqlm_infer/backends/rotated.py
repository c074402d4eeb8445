"""How a layer in an E8P format calls the operators, on any device that implements them.

A kernel record takes ``**CALLS``. Runtime buffers of a layer: ``packed_Qidxs``, the factor matrices
``h_in`` and ``h_out`` (shared by all layers of a size), and, derived from the values, float32
``su`` [K] and ``sv`` [N].
"""

from __future__ import annotations

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


def repack(format: E8PFormat, tensors: Tensors, partitions: Partitions, precision: str):
    """Canonical codes -> the device's runtime layout, and both rotations' factor matrices."""
    qidxs = tensors["Qidxs"].contiguous()
    N, K = sum(partitions), tensors["SU"].shape[0]
    packed = ops.e8p_pack(qidxs, format.bits)
    return {"packed_Qidxs": packed, **factor_matrices(format.rotation, N, K, qidxs.device)}


def fold(format: E8PFormat, values: Tensors):
    """Float32 sign vectors in fresh memory; everything that scales an output is in ``sv``."""
    return {"su": values["SU"].to(torch.float32, copy=True), "sv": format.output_scale(values)}


def unpack(format: E8PFormat, buffers: Buffers, N: int, K: int, partitions: Partitions):
    """The canonical code tensors, bit for bit what ``repack`` was given."""
    packed = buffers["packed_Qidxs"]
    number = torch.tensor(CODEBOOK_IDS[format.bits], device=packed.device)
    return {"Qidxs": ops.e8p_unpack(packed, format.bits, N, K), "codebook_id": number}


def rotate(format, x: torch.Tensor, buffers: Buffers, values: Tensors) -> torch.Tensor:
    """U_K^T (SU x), in x's dtype (of any format with Hadamard rotations)."""
    h = buffers["h_in"]
    factor, block = rotation_numbers(format.rotation, h)
    return call(ops.hadamard, x, buffers["su"], None, h, factor, block, True)


def matmul(format, x, buffers: Buffers, values: Tensors, bias, partitions, precision):
    """y = sv * U_N (x Wq^T) + bias for a rotated x, through ``ops.e8p_matmul``.

    An ``sv`` that requires grad is applied by a differentiable transform of its own.
    """
    h, sv = buffers["h_out"], buffers["sv"]
    factor, block = rotation_numbers(format.rotation, h)
    if sv.requires_grad and torch.is_grad_enabled():
        z = _product(
            format, x.float(), buffers, None, None, h.new_empty(0), 0, 0, partitions, precision
        )
        return rotate_output(z, sv, bias, h, factor, block).to(x.dtype)
    return _product(format, x, buffers, sv, bias, h, factor, block, partitions, precision)


def rotate_output(z, sv, bias, h, factor: int, block: int) -> torch.Tensor:
    """sv * U_N z + bias in z's dtype, differentiable in sv as well."""
    y = ops.hadamard(z, None, sv, h, factor, block, False)
    return y if bias is None else y + bias.to(y.dtype)


def _product(format, x, buffers, sv, bias, h, factor, block, partitions, precision):
    packed, bits, N = buffers["packed_Qidxs"], format.bits, sum(partitions)
    residual = 1 / format.residual
    return call(ops.e8p_matmul, x, packed, sv, bias, h, bits, residual, N, factor, block, precision)


def dequantize(format, buffers: Buffers, values: Tensors, K: int, partitions: Partitions):
    """The [N, K] weight in the original basis, in SV's dtype."""
    N = sum(partitions)
    weight = ops.e8p_dequantize(buffers["packed_Qidxs"], format.bits, 1 / format.residual, N, K)
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
