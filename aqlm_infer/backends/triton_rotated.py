"""Triton backend of rotated and scalar formats: kernel records over ``aqlm_infer.triton_kernels``.

The glue is that of every backend (``rotated``, ``scalar``) with Triton's operators, which have the
names and signatures of ``aqlm_infer.ops`` and are imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from ..formats import E8PFormat, QuipFormat, ScalarFormat
from . import rotated, scalar
from .registry import Kernel, Problem, register
from .triton import interpreted, kernels, run, why_not_here


def _operator(family: str, name: str) -> Callable:
    def operator(*args):
        return run(getattr(kernels(family), name), *args)

    return operator


_FAMILIES = {
    "hadamard": ("hadamard",),
    "e8p": ("e8p_pack", "e8p_unpack", "e8p_matmul", "e8p_matmul_dx", "e8p_dequantize"),
    "scalar": (
        "scalar_pack", "scalar_unpack", "scalar_matmul", "scalar_matmul_dx", "scalar_dequantize",
    ),
}  # fmt: skip

OPERATORS = SimpleNamespace(
    **{name: _operator(family, name) for family, names in _FAMILIES.items() for name in names}
)
"""``aqlm_infer.ops`` of these families, as Triton kernels."""


def _why_not(problem: Problem, format: type) -> str | None:
    if not isinstance(problem.format, format):
        return f"takes {format.__name__.removesuffix('Format')} weights, not {problem.format.id}"
    return why_not_here(problem, problem.N * problem.K)


def _cost(problem: Problem) -> float:
    """Behind the CUDA kernels, ahead of the reference; last of all in the interpreter."""
    if interpreted():
        return 1e9
    return 10.0 + problem.N * problem.K * problem.format.bits / 8 / 1.5e6


def _register(id: str, format: type, calls: dict) -> None:
    register(
        Kernel(
            id,
            **rotated.calls_of(OPERATORS, calls),
            why_not=lambda problem: _why_not(problem, format),
            cost=_cost,
        )
    )


_register("triton.e8p", E8PFormat, rotated.CALLS)
_register("triton.scalar", ScalarFormat, scalar.CALLS)
_register("triton.scalar.rotated", QuipFormat, scalar.QUIP_CALLS)
