"""CUDA backend: kernel records over ``_cuda``, whose operators are registered in C++.

Which body runs for how many tokens (look-up tables, tensor cores, gather, or dequantized slices and
cuBLAS) is decided inside the operator, so that a graph holds one node: csrc/cuda/tune.h.
"""

from __future__ import annotations

import torch

from ..formats import AdditiveFormat
from . import additive, native
from .held import can_hold
from .registry import Kernel, Problem, first_reason, register

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_PARTS = 8


def _storage(format: AdditiveFormat) -> str:
    """Which of the packed layouts of csrc/common/additive_layout.h a format takes."""
    tiles = format.out_group_size == 1 and format.in_group_size in (8, 16)
    if format.nbits <= 8:
        wide = format.out_group_size == 1 and format.in_group_size == 32
        return "bytes" if (tiles or wide) and format.num_codebooks <= 16 else "rows"
    return "words" if tiles and format.num_codebooks == 1 else "rows"


def _why_not(problem: Problem, storage: str) -> str | None:
    format = problem.format
    if not isinstance(format, AdditiveFormat):
        return f"takes additive codebooks, not {format.id}"
    return first_reason(
        native.cuda_problem,
        None if problem.device == "cuda" else f"runs on cuda, not {problem.device}",
        None if _storage(format) == storage else f"{format.id} is stored as {_storage(format)}",
        None
        if format.in_group_size % 4 == 0
        else f"in_group_size={format.in_group_size} is not a multiple of 4",
        None if problem.dtype in _DTYPES else f"takes {list(_DTYPES)}, not {problem.dtype}",
        None if problem.parts <= _MAX_PARTS else f"{problem.parts} parts, at most {_MAX_PARTS}",
        None
        if problem.precision in ("exact", "int8")
        else f"has precisions exact and int8, not {problem.precision}",
    )


def _register(storage: str, ns_per_code: float) -> None:
    """One kernel record; ``ns_per_code`` is the measured time of one code on an H200 at M = 1."""

    def cost(problem: Problem) -> float:
        vector = problem.format.in_group_size * problem.format.out_group_size
        codes = problem.N * problem.K / vector * problem.format.num_codebooks
        return 3.0 + codes * ns_per_code * 1e-3

    register(
        Kernel(
            f"cuda.additive.{storage}",
            additive.repack,
            additive.unpack,
            additive.matmul,
            additive.dequantize,
            lambda problem: _why_not(problem, storage),
            cost,
            hold=additive.hold if can_hold else None,
        )
    )


_register("bytes", 0.0005)
_register("words", 0.005)
_register("rows", 0.01)
