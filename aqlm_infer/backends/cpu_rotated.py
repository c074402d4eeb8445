"""CPU backend of rotated and scalar formats: the operators over ``_cpu``, and kernel records.

Tiles of 64 x 128 weights are decoded to bytes in the L1 cache and multiplied with tokens quantized
to 16-bit integers (csrc/cpu/tile.h); the rotation of the outputs, ``sv`` and the bias are applied
in the same call. Many bfloat16 tokens meet slices of the decoded weight in torch's GEMM instead.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .. import ops
from ..formats import E8PFormat, QuipFormat, ScalarFormat
from . import native, rotated, scalar
from .cpu import _NAMES, _dtype_name, _gemm_dtype, _rows, _threads
from .registry import Kernel, Problem, first_reason, register

# Decoded slices of the weight: about this many bytes stay in the cache for the GEMM, and whole
# multiples of this many rows keep torch's GEMM bitwise equal for any number of threads (cpu.py).
_SLICE_BYTES = 2 << 20
_SLICE_ROWS = 128

# Past so many bfloat16 tokens decoding and a dense GEMM wins. E8P 2 bit, 4096 x 4096, one thread,
# ms fused / dense GEMM, without decoding (11 on Zen 5): Zen 5 M=128 11.4 / 10.9; M=512 46 (at 0.089
# a token) / 38, sliced as a whole 46; Xeon with AMX M=512 58 / 26. float32 stays fused.
_FUSED_BFLOAT16 = 256


@lru_cache(maxsize=1024)
def _e8p(bits: int, residual: float, N: int, K: int):
    return native.cpu.TiledWeight.e8p(bits, residual, N, K)


@lru_cache(maxsize=1024)
def _scalar(bits: int, group_size: int, N: int, K: int):
    return native.cpu.TiledWeight.scalar(bits, group_size, N, K)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float32(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.to(torch.float32).contiguous()


def _check_packed(packed: torch.Tensor, weight) -> None:
    if packed.dtype != torch.uint8 or packed.numel() != weight.packed_bytes:
        raise ops.OperandError(
            f"packed holds {packed.numel()} x {packed.dtype}, expected {weight.packed_bytes} bytes"
        )


def _empty_packed(weight) -> torch.Tensor:
    packed = torch.empty(weight.packed_bytes, dtype=torch.uint8)
    native.cpu.advise_huge_pages(packed.data_ptr(), packed.numel())
    return packed


def _token_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """(x or a copy of it, M, elements from token to token)."""
    K = x.shape[-1]
    if x.is_contiguous() and K:
        return x, x.numel() // K, K
    rows = _rows(x)
    return rows, rows.shape[0], rows.stride(0)


def _hadamard(x, pre, post, h, factor, block, transpose):
    ops.check_hadamard(x, pre, post, h, factor, block)
    dtype = _dtype_name(x, "x")
    rows, M, stride = _token_rows(x)
    pre, post, h = _float32(pre), _float32(post), h.contiguous()
    y = x.new_empty(x.shape)
    native.cpu.hadamard(
        rows.data_ptr(), stride, dtype, _pointer(pre), _pointer(post), h.data_ptr(), factor, block,
        transpose, y.data_ptr(), M, x.shape[-1], _threads(),
    )  # fmt: skip
    return y


def _product(weight, x, packed, scales, zeros, sv, bias, h, N, factor, block, precision):
    """y [..., N] = sv * U (x Wq^T) + bias, for checked operands."""
    if precision not in ("exact", "fast"):
        raise ops.OperandError(f"precision {precision!r}: the CPU kernels have 'exact' and 'fast'")
    _check_packed(packed, weight)
    dtype = _dtype_name(x, "x")
    values = "float32" if scales is None else _dtype_name(scales, "scales")
    bias_dtype = "float32" if bias is None else _dtype_name(bias, "bias")
    rows, M, stride = _token_rows(x)
    scales, zeros, bias = (t if t is None else t.contiguous() for t in (scales, zeros, bias))
    sv, h = _float32(sv), h.contiguous()
    if M > _FUSED_BFLOAT16 and x.dtype == torch.bfloat16:
        return _sliced_product(weight, x, packed, scales, zeros, sv, bias, h, N, factor, block)
    y = x.new_empty((*x.shape[:-1], N))
    weight.matmul(
        rows.data_ptr(), stride, dtype, packed.data_ptr(), _pointer(scales), _pointer(zeros),
        values, _pointer(sv), _pointer(bias), bias_dtype, h.data_ptr(), factor, block,
        y.data_ptr(), M, precision, _threads(),
    )  # fmt: skip
    return y


def _decode(weight, packed, scales, zeros, out, first, last):
    """Rows [first, last) of Wq into ``out`` [rows, K]."""
    values = "float32" if scales is None else _dtype_name(scales, "scales")
    weight.decode(
        packed.data_ptr(), _pointer(scales), _pointer(zeros), values, out.data_ptr(),
        out.stride(0), _dtype_name(out, "out"), first, last, _threads(),
    )  # fmt: skip


def _slices(weight, packed, scales, zeros, N, K, dtype):
    """Yields (first row, rows, scratch [R, K]): Wq in ``dtype``, decoded slice by slice.

    The slice is scratch[:rows]; R is a multiple of _SLICE_ROWS and what follows is left over.
    """
    most = max(1, _SLICE_BYTES // (_SLICE_ROWS * max(K, 1) * dtype.itemsize)) * _SLICE_ROWS
    scratch = torch.zeros((min(most, -(-N // _SLICE_ROWS) * _SLICE_ROWS), K), dtype=dtype)
    for first in range(0, N, max(len(scratch), 1)):
        last = min(first + len(scratch), N)
        _decode(weight, packed, scales, zeros, scratch, first, last)
        yield first, last - first, scratch[: -(-(last - first) // _SLICE_ROWS) * _SLICE_ROWS]


def _sliced_product(weight, x, packed, scales, zeros, sv, bias, h, N, factor, block):
    """``_product`` by dense GEMMs in x's dtype; rotation, sv and bias in float32."""
    rows = _rows(x)
    z = torch.empty((rows.shape[0], N), dtype=torch.float32)
    for first, count, slice_ in _slices(weight, packed, scales, zeros, N, x.shape[-1], x.dtype):
        z[:, first : first + count] = torch.mm(rows, slice_.t())[:, :count]
    if factor:
        z = _hadamard(z, None, sv, h, factor, block, False)
    elif sv is not None:
        z *= sv
    if bias is not None:
        z += bias.float()
    return z.to(x.dtype).reshape(*x.shape[:-1], N)


def _product_dx(weight, dy, packed, scales, zeros, sv, h, K, factor, block):
    """dx of ``_product``: the outputs' rotation backwards, then slices of the decoded weight."""
    _check_packed(packed, weight)
    scales, zeros = (t if t is None else t.contiguous() for t in (scales, zeros))
    N = dy.shape[-1]
    dz = dy.float()
    if factor:
        dz = _hadamard(dz, sv, None, h, factor, block, True)
    elif sv is not None:
        dz = dz * sv
    dtype = _gemm_dtype(dy.dtype)
    dz = dz.reshape(-1, N).to(dtype)
    dx = torch.zeros((dz.shape[0], K), dtype=torch.float32)
    if dz.shape[0]:
        for first, count, slice_ in _slices(weight, packed, scales, zeros, N, K, dtype):
            dx += torch.mm(dz[:, first : first + count], slice_[:count])
    return dx.to(dy.dtype).reshape(*dy.shape[:-1], K)


def _dequantize(weight, packed, scales, zeros, N, K):
    _check_packed(packed, weight)
    scales, zeros = (t if t is None else t.contiguous() for t in (scales, zeros))
    out = torch.empty((N, K), dtype=torch.float32)
    _decode(weight, packed, scales, zeros, out, 0, N)
    return out


# ---- E8P -----------------------------------------------------------------------------------------


def _e8p_parts(Qidxs: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The words of the codes and, at 3 and 4 bits, of the residual codes."""
    if bits == 2:
        return Qidxs.contiguous(), None
    split = Qidxs.shape[1] * 2 // bits
    return Qidxs[:, :split].contiguous(), Qidxs[:, split:].contiguous()


def _e8p_pack(Qidxs, bits):
    if Qidxs.dtype != torch.int64 or Qidxs.dim() != 2:
        raise ops.OperandError(
            f"Qidxs is {Qidxs.dtype} {list(Qidxs.shape)}, expected int64 [N, K * {bits} / 64]"
        )
    N, K = Qidxs.shape[0], Qidxs.shape[1] * 64 // bits
    ops.check_e8p(bits, N, K)
    weight = _e8p(bits, 1.0, N, K)
    words, rest = _e8p_parts(Qidxs, bits)
    packed = _empty_packed(weight)
    native.cpu.e8p_pack(weight, words.data_ptr(), _pointer(rest), packed.data_ptr(), _threads())
    return packed


def _e8p_unpack(packed, bits, N, K):
    ops.check_e8p(bits, N, K)
    weight = _e8p(bits, 1.0, N, K)
    _check_packed(packed, weight)
    words = torch.empty((N, K // 32), dtype=torch.int64)
    rest = torch.empty((N, (bits - 2) * K // 64), dtype=torch.int64)
    native.cpu.e8p_unpack(
        weight, packed.data_ptr(), words.data_ptr(), rest.data_ptr() if bits > 2 else 0, _threads()
    )
    return torch.cat([words, rest], 1)


def _e8p_matmul(x, packed, sv, bias, h, bits, residual, N, factor, block, precision):
    ops.check_e8p_matmul(x, sv, bias, h, bits, N, factor, block)
    weight = _e8p(bits, residual, N, x.shape[-1])
    return _product(weight, x, packed, None, None, sv, bias, h, N, factor, block, precision)


def _e8p_matmul_dx(dy, packed, sv, h, bits, residual, in_features, factor, block):
    ops.check_e8p_matmul_dx(dy, sv, h, bits, in_features, factor, block)
    weight = _e8p(bits, residual, dy.shape[-1], in_features)
    return _product_dx(weight, dy, packed, None, None, sv, h, in_features, factor, block)


def _e8p_dequantize(packed, bits, residual, N, K):
    ops.check_e8p(bits, N, K)
    return _dequantize(_e8p(bits, residual, N, K), packed, None, None, N, K)


# ---- scalar grids --------------------------------------------------------------------------------


def _scalar_pack(qweight, bits, K):
    if qweight.dtype != torch.uint8 or qweight.dim() != 2 or qweight.shape[1] * 8 != K * bits:
        raise ops.OperandError(
            f"qweight is {qweight.dtype} {list(qweight.shape)}, expected uint8 [N, {K}*{bits}/8]"
        )
    weight = _scalar(bits, K, qweight.shape[0], K)
    packed = _empty_packed(weight)
    qweight = qweight.contiguous()
    native.cpu.scalar_pack(weight, qweight.data_ptr(), packed.data_ptr(), _threads())
    return packed


def _scalar_unpack(packed, bits, N, K):
    weight = _scalar(bits, K, N, K)
    _check_packed(packed, weight)
    qweight = torch.empty((N, K * bits // 8), dtype=torch.uint8)
    native.cpu.scalar_unpack(weight, packed.data_ptr(), qweight.data_ptr(), _threads())
    return qweight


def _scalar_matmul(
    x, packed, scales, zeros, sv, bias, h, bits, group_size, N, factor, block, precision
):
    ops.check_scalar_matmul(x, scales, zeros, sv, bias, h, bits, group_size, N, factor, block)
    weight = _scalar(bits, group_size, N, x.shape[-1])
    return _product(weight, x, packed, scales, zeros, sv, bias, h, N, factor, block, precision)


def _scalar_matmul_dx(
    dy, packed, scales, zeros, sv, h, bits, group_size, in_features, factor, block
):
    ops.check_scalar_matmul_dx(
        dy, scales, zeros, sv, h, bits, group_size, in_features, factor, block
    )
    weight = _scalar(bits, group_size, dy.shape[-1], in_features)
    return _product_dx(weight, dy, packed, scales, zeros, sv, h, in_features, factor, block)


def _scalar_dequantize(packed, scales, zeros, bits, group_size, K):
    N = scales.shape[0]
    ops.check_scalar(scales, zeros, bits, group_size, N, K)
    return _dequantize(_scalar(bits, group_size, N, K), packed, scales, zeros, N, K)


if native.cpu is not None:
    for _name, _function in {
        "hadamard": _hadamard,
        "e8p_pack": _e8p_pack,
        "e8p_unpack": _e8p_unpack,
        "e8p_matmul": _e8p_matmul,
        "e8p_matmul_dx": _e8p_matmul_dx,
        "e8p_dequantize": _e8p_dequantize,
        "scalar_pack": _scalar_pack,
        "scalar_unpack": _scalar_unpack,
        "scalar_matmul": _scalar_matmul,
        "scalar_matmul_dx": _scalar_matmul_dx,
        "scalar_dequantize": _scalar_dequantize,
    }.items():
        ops.LIBRARY.impl(_name, _function, "CPU")


def _why_not(problem: Problem, format: type) -> str | None:
    if not isinstance(problem.format, format):
        return f"takes {format.__name__.removesuffix('Format')} weights, not {problem.format.id}"
    return first_reason(
        native.cpu_problem,
        None if problem.device == "cpu" else f"runs on cpu, not {problem.device}",
        None if problem.dtype in _NAMES else f"takes {list(_NAMES)}, not {problem.dtype}",
        None
        if problem.precision in ("exact", "fast")
        else f"has precisions exact and fast, not {problem.precision}",
    )


def _register(id: str, format: type, calls: dict, ns_per_weight: float) -> None:
    """One kernel record; ``ns_per_weight``: measured at one token on one Zen 5 core."""
    register(
        Kernel(
            id,
            **calls,
            why_not=lambda problem: _why_not(problem, format),
            cost=lambda problem: (
                8.0
                + problem.N
                * problem.K
                * ns_per_weight
                * 1e-3
                * (0.5 + 0.5 * max(problem.M or 1, 1))
            ),
        )
    )


_register("cpu.e8p", E8PFormat, rotated.CALLS, 0.012)
_register("cpu.scalar", ScalarFormat, scalar.CALLS, 0.008)
_register("cpu.scalar.rotated", QuipFormat, scalar.QUIP_CALLS, 0.008)
