"""CUDA backend of rotated and scalar formats: kernel records over ``_cuda``.

The operators are registered in C++ (csrc/ops_cuda_rotated.cpp). Which body runs for how many tokens
(mma.sync, Hopper's warpgroup MMAs, or dequantized slices and cuBLAS) is decided inside them:
csrc/cuda/rotated_tune.h. The MMA bodies quantize activations to 16-bit integers and accumulate
exactly.
"""

from __future__ import annotations

import torch

from ..formats import E8PFormat, QuipFormat, ScalarFormat
from . import native, rotated, scalar
from .held import can_hold
from .registry import Kernel, Problem, first_reason, register

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _why_not(problem: Problem, format: type) -> str | None:
    if not isinstance(problem.format, format):
        return f"takes {format.__name__.removesuffix('Format')} weights, not {problem.format.id}"
    return first_reason(
        native.cuda_problem,
        None if problem.device == "cuda" else f"runs on cuda, not {problem.device}",
        None if problem.dtype in _DTYPES else f"takes {list(_DTYPES)}, not {problem.dtype}",
        None
        if problem.precision == "exact"
        else f"has precision exact alone, not {problem.precision}",
    )


def _register(id: str, format: type, calls: dict, hold) -> None:
    """One kernel record; the cost is the codes' time at the 3 TB/s measured on an H200 at M = 1."""
    register(
        Kernel(
            id,
            **calls,
            hold=hold if can_hold else None,
            why_not=lambda problem: _why_not(problem, format),
            cost=lambda problem: 4.0 + problem.N * problem.K * problem.format.bits / 8 / 3e6,
        )
    )


_register("cuda.e8p", E8PFormat, rotated.CALLS, rotated.hold)
_register("cuda.scalar", ScalarFormat, scalar.CALLS, scalar.hold)
_register("cuda.scalar.rotated", QuipFormat, scalar.QUIP_CALLS, scalar.quip_hold)
