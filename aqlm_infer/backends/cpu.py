"""CPU backend: the operators over ``_cpu`` (torch-free C++ on raw buffers), and kernel records.

Small M goes to the fused kernels. At an M that they decline the weight is decoded in row slices
that stay in the cache and multiplied by torch's GEMM, so that it is never dense as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import ops
from ..formats import AdditiveFormat
from . import additive, native
from .registry import Kernel, Problem, first_reason, register

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# Decoded slice of the weight for large M: about this many bytes stay in the cache for the GEMM, and
# whole multiples of this many rows keep torch's GEMM bitwise equal for any number of threads (it
# splits narrower products differently; tests/test_kernels_cpu.py checks it on this machine).
_SLICE_BYTES = 2 << 20
_SLICE_ROWS = 128


def _threads() -> int:
    return torch.get_num_threads()


def _dtype_name(tensor: torch.Tensor, what: str) -> str:
    name = _NAMES.get(tensor.dtype)
    if name is None:
        raise ops.OperandError(
            f"{what} has dtype {tensor.dtype}; the CPU kernels take {list(_NAMES)}"
        )
    return name


def _part_bytes(rows, out_group, in_groups, books, nbits) -> int:
    return native.cpu.packed_nbytes(rows // out_group, in_groups, books, nbits)


class _Part:
    """Pointers and sizes of one fused part (one layer) inside the concatenated operands."""

    def __init__(self, packed, codebooks, scales, K, partitions: Sequence[int]):
        self.books = codebooks.shape[0] // len(partitions)
        self.nbits = codebooks.shape[1].bit_length() - 1
        self.out_group, self.in_group = codebooks.shape[2], codebooks.shape[3]
        self.K = K
        self.packed, self.codebooks = packed, codebooks.contiguous()
        self.scales = scales.contiguous()
        self.param_dtype = _dtype_name(codebooks, "codebooks")
        expected = sum(self.nbytes(rows) for rows in partitions)
        if packed.dtype != torch.uint8 or packed.numel() != expected:
            raise ops.OperandError(
                f"packed holds {packed.numel()} x {packed.dtype}, expected {expected} bytes"
                f" for partitions {list(partitions)}, K={K}"
            )

    def nbytes(self, rows: int) -> int:
        in_groups = self.K // self.in_group
        return _part_bytes(rows, self.out_group, in_groups, self.books, self.nbits)

    def pointers(self, partitions: Sequence[int]):
        """Yields (first row, rows, packed, codebooks, scales) pointers, part by part."""
        packed, book, scale = (t.data_ptr() for t in (self.packed, self.codebooks, self.scales))
        row = 0
        for rows in partitions:
            yield row, rows, packed, book, scale
            row += rows
            packed += self.nbytes(rows)
            book += self.codebooks.nbytes // len(partitions)
            scale += rows // self.out_group * self.scales.element_size()

    def decode(self, pointers, out, first_group, last_group):
        """Dequantize out groups [first, last) of one part into ``out`` [rows, K]."""
        _, rows, packed, codebooks, scales = pointers
        native.cpu.additive_dequantize(
            packed=packed, codebooks=codebooks, scales=scales, param_dtype=self.param_dtype,
            out=out.data_ptr(), out_row_stride=out.stride(0), out_dtype=_dtype_name(out, "out"),
            N=rows, K=self.K, num_codebooks=self.books, nbits=self.nbits,
            in_group_size=self.in_group, out_group_size=self.out_group,
            out_group_begin=first_group, out_group_end=last_group, apply_scales=True,
            num_threads=_threads(),
        )  # fmt: skip

    def slices(self, partitions: Sequence[int], dtype: torch.dtype):
        """Yields (first row, rows, scratch [R, K]): the weight, decoded slice by slice.

        The slice is scratch[:rows]; R is a multiple of _SLICE_ROWS and what follows is left over.
        """
        tile = _SLICE_ROWS * self.out_group
        most = max(1, _SLICE_BYTES // (tile * self.K * dtype.itemsize)) * tile
        largest = -(-max(partitions) // tile) * tile
        scratch = torch.zeros((min(most, largest), self.K), dtype=dtype)
        for pointers in self.pointers(partitions):
            first_row, size = pointers[0], pointers[1]
            for begin in range(0, size, scratch.shape[0]):
                rows = min(scratch.shape[0], size - begin)
                first = begin // self.out_group
                self.decode(pointers, scratch, first, first + rows // self.out_group)
                yield first_row + begin, rows, scratch[: -(-rows // tile) * tile]


def _gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    # float16 products are emulated on most CPUs, and float32 keeps their accuracy.
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [M, K] whose last dimension is contiguous and whose rows do not overlap."""
    x = x.reshape(-1, x.shape[-1])
    dense = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if dense and x.stride(0) >= x.shape[-1] else x.contiguous()


@dataclass(frozen=True)
class _Plan:
    """What is the same in every call on tensors of given shapes and dtypes."""

    N: int
    native: object  # _cpu.AdditivePlan


# By shapes and dtypes alone: an entry can never be wrong, and a model has a handful of them.
_PLANS: dict[tuple, _Plan] = {}


def _make_plan(x, packed, codebooks, scales, bias, aux, partitions, precision) -> _Plan:
    N = ops.check_matmul(x, codebooks, scales, bias, partitions)
    if precision not in ("exact", "fast"):
        raise ops.OperandError(f"precision {precision!r}: the CPU kernels have 'exact' and 'fast'")
    _Part(packed, codebooks, scales, x.shape[-1], partitions)  # checks packed
    plan = _native_plan(codebooks, x.shape[-1], partitions, _dtype_name(x, "x"), precision)
    if aux.numel() not in (0, plan.prepared_bytes):
        raise ops.OperandError(
            f"aux holds {aux.numel()} bytes, expected 0 or {plan.prepared_bytes} (additive_prepare)"
        )
    return _Plan(N, plan)


def _native_plan(codebooks, K, partitions, x_dtype: str, precision: str):
    return native.cpu.AdditivePlan(
        partitions=list(partitions), K=K, num_codebooks=codebooks.shape[0] // len(partitions),
        nbits=codebooks.shape[1].bit_length() - 1, in_group_size=codebooks.shape[3],
        out_group_size=codebooks.shape[2], param_dtype=_dtype_name(codebooks, "codebooks"),
        x_dtype=x_dtype, precision=precision,
    )  # fmt: skip


def _matmul(x, packed, codebooks, scales, bias, aux, partitions, precision):
    # The call is on the path of every token: 5 us of Python in all, so it asks for little twice.
    key = (
        x.shape[-1:], x.dtype, packed.shape, packed.dtype, codebooks.shape, codebooks.dtype,
        scales.shape, scales.dtype, None if bias is None else bias.shape, aux.shape,
        tuple(partitions), precision,
    )  # fmt: skip
    plan = _PLANS.get(key)
    if plan is None:
        args = (x, packed, codebooks, scales, bias, aux, partitions, precision)
        plan = _PLANS[key] = _make_plan(*args)
    N, K = plan.N, x.shape[-1]
    if bias is not None:
        bias = bias.to(codebooks.dtype).contiguous()
    if x.is_contiguous() and K:
        rows, M, stride = x, x.numel() // K, K
    else:
        rows = _rows(x)
        M, stride = rows.shape[0], rows.stride(0)
    codebooks, scales = codebooks.contiguous(), scales.contiguous()
    y = x.new_empty((*x.shape[:-1], N))
    done = plan.native.matmul(
        rows.data_ptr(), stride, packed.data_ptr(), codebooks.data_ptr(), scales.data_ptr(),
        0 if bias is None else bias.data_ptr(), aux.data_ptr(), y.data_ptr(), N, M, _threads(),
    )  # fmt: skip
    if not done:
        part = _Part(packed, codebooks, scales, K, partitions)
        _sliced_matmul(rows.view(M, K), part, bias, partitions, y.view(M, N))
    return y


def _sliced_matmul(rows, part, bias, partitions, y):
    dtype = _gemm_dtype(rows.dtype)
    left = rows.to(dtype)
    for first, count, weight in part.slices(partitions, dtype):
        product = torch.mm(left, weight.t())[:, :count]
        if bias is not None:
            product = product.float() + bias[first : first + count].float()
        y[:, first : first + count] = product


def _matmul_dx(dy, packed, codebooks, scales, in_features, partitions):
    ops.check_operands(codebooks, scales, dy.shape[-1], in_features, partitions)
    part = _Part(packed, codebooks, scales, in_features, partitions)
    dtype = _gemm_dtype(dy.dtype)
    rows = _rows(dy).to(dtype)
    dx = torch.zeros((rows.shape[0], in_features), dtype=torch.float32)
    if rows.shape[0]:
        for first, count, weight in part.slices(partitions, dtype):
            dx += torch.mm(rows[:, first : first + count], weight[:count])
    return dx.to(dy.dtype).reshape(*dy.shape[:-1], in_features)


def _dequantize(packed, codebooks, scales, in_features, partitions):
    ops.check_operands(codebooks, scales, sum(partitions), in_features, partitions)
    part = _Part(packed, codebooks, scales, in_features, partitions)
    weight = torch.empty((sum(partitions), in_features), dtype=codebooks.dtype)
    for pointers in part.pointers(partitions):
        first, rows = pointers[0], pointers[1]
        part.decode(pointers, weight[first : first + rows], 0, rows // part.out_group)
    return weight


def _pack(codes, nbits, out_group_size, in_group_size, partitions):
    out_groups, in_groups, books = codes.shape
    if sum(partitions) != out_groups * out_group_size:
        raise ops.OperandError(
            f"codes has {out_groups} out groups of {out_group_size},"
            f" but partitions {list(partitions)} sum to {sum(partitions)}"
        )
    sizes = [_part_bytes(p, out_group_size, in_groups, books, nbits) for p in partitions]
    packed = torch.empty(sum(sizes), dtype=torch.uint8)
    native.cpu.advise_huge_pages(packed.data_ptr(), packed.numel())
    codes = codes.contiguous()
    group = offset = 0
    for rows, size in zip(partitions, sizes, strict=True):
        part = codes[group:]
        native.cpu.additive_pack(
            codes=part.data_ptr(), code_bytes=codes.element_size(),
            out_groups=rows // out_group_size, in_groups=in_groups, num_codebooks=books,
            nbits=nbits, packed=packed.data_ptr() + offset, num_threads=_threads(),
        )  # fmt: skip
        group, offset = group + rows // out_group_size, offset + size
    return packed


def _unpack(
    packed, out_groups, in_groups, num_codebooks, nbits, out_group_size, in_group_size, partitions
):
    dtype = torch.int8 if nbits <= 8 else torch.int16
    codes = torch.empty((out_groups, in_groups, num_codebooks), dtype=dtype)
    group = offset = 0
    for rows in partitions:
        native.cpu.additive_unpack(
            packed=packed.data_ptr() + offset, out_groups=rows // out_group_size,
            in_groups=in_groups, num_codebooks=num_codebooks, nbits=nbits,
            codes=codes[group:].data_ptr(), code_bytes=codes.element_size(),
            num_threads=_threads(),
        )  # fmt: skip
        group += rows // out_group_size
        offset += _part_bytes(rows, out_group_size, in_groups, num_codebooks, nbits)
    return codes


def _prepare(codebooks, precision, partitions):
    # K and x's dtype do not matter for what is prepared.
    plan = _native_plan(codebooks, codebooks.shape[3], partitions, "float32", precision)
    aux = torch.empty(plan.prepared_bytes, dtype=torch.uint8)
    if aux.numel():
        plan.prepare(codebooks.contiguous().data_ptr(), aux.data_ptr())
    return aux


def _dense_matvec(x, weight, bias):
    ops.check_matvec(x, weight, bias)
    x, weight = x.contiguous(), weight if weight.stride(1) == 1 else weight.contiguous()
    N, K = weight.shape
    if bias is not None:
        bias = bias.contiguous()
    y = x.new_empty((*x.shape[:-1], N))
    native.cpu.dense_matvec(
        x=x.data_ptr(), weight=weight.data_ptr(), row_stride=weight.stride(0),
        bias=0 if bias is None else bias.data_ptr(), y=y.data_ptr(), dtype=_dtype_name(x, "x"),
        N=N, K=K, num_threads=_threads(),
    )  # fmt: skip
    return y


if native.cpu is not None:
    for _name, _function in {
        "additive_pack": _pack,
        "additive_unpack": _unpack,
        "additive_prepare": _prepare,
        "additive_matmul": _matmul,
        "additive_matmul_dx": _matmul_dx,
        "additive_dequantize": _dequantize,
        "dense_matvec": _dense_matvec,
    }.items():
        ops.LIBRARY.impl(_name, _function, "CPU")


def _why_not(problem: Problem, low: int, high: int) -> str | None:
    format = problem.format
    if not isinstance(format, AdditiveFormat):
        return f"takes additive codebooks, not {format.id}"
    return first_reason(
        native.cpu_problem,
        None if problem.device == "cpu" else f"runs on cpu, not {problem.device}",
        None if low <= format.nbits <= high else f"takes {low}..{high} bits, not {format.nbits}",
        None if problem.dtype in _NAMES else f"takes {list(_NAMES)}, not {problem.dtype}",
        None
        if problem.precision in ("exact", "fast")
        else f"has precisions exact and fast, not {problem.precision}",
    )


def _register(family: str, low: int, high: int, ns_per_code: float) -> None:
    """One kernel record; ``ns_per_code`` is the measured time of one code on one Zen 5 core."""

    def cost(problem: Problem) -> float:
        vector = problem.format.in_group_size * problem.format.out_group_size
        codes = problem.N * problem.K / vector * problem.format.num_codebooks
        return 5.0 + codes * ns_per_code * 1e-3 * max(problem.M or 1, 1)

    register(
        Kernel(
            f"cpu.additive.{family}",
            additive.repack,
            additive.unpack,
            additive.matmul,
            additive.dequantize,
            lambda problem: _why_not(problem, low, high),
            cost,
        )
    )


_register("lut", 1, 8, 0.07)
_register("direct", 9, 16, 1.0)
