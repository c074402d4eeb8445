"""Kernels and their registry. Importing this package registers every backend's kernels."""

from . import cpu, cuda, reference
from .registry import KERNELS, Kernel, KernelError, Problem, explain, select, why_not_fast

__all__ = [
    "KERNELS",
    "Kernel",
    "KernelError",
    "Problem",
    "cpu",
    "cuda",
    "explain",
    "reference",
    "select",
    "why_not_fast",
]
