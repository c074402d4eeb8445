"""Kernels and their registry. Importing this package registers every backend's kernels."""

from . import cpu, cpu_rotated, cuda, cuda_rotated, reference, triton, triton_rotated
from .registry import KERNELS, Kernel, KernelError, Problem, explain, select, why_not_fast

__all__ = [
    "KERNELS",
    "Kernel",
    "KernelError",
    "Problem",
    "cpu",
    "cpu_rotated",
    "cuda",
    "cuda_rotated",
    "explain",
    "reference",
    "select",
    "triton",
    "triton_rotated",
    "why_not_fast",
]
