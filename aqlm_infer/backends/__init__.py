"""Kernels and their registry. Importing this package registers every backend's kernels."""

from . import cpu, reference
from .registry import KERNELS, Kernel, KernelError, Problem, explain, select

__all__ = ["KERNELS", "Kernel", "KernelError", "Problem", "cpu", "explain", "reference", "select"]
