"""``ref.dequant``: dequantize and matmul in plain torch. Any format, any device, always right.

It is the slow last resort, and what forced runs compare with. It keeps the canonical tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..formats import Format, Tensors
from .registry import Buffers, Kernel, Partitions, Problem, register


def _repack(format: Format, tensors: Tensors, partitions: Partitions, precision: str):
    return {f"packed_{name}": tensors[name] for name in format.code_names}


def _unpack(format: Format, buffers: Buffers, N: int, K: int, partitions: Partitions):
    return {name: buffers[f"packed_{name}"] for name in format.code_names}


def _dequantize(format: Format, buffers: Buffers, values: Tensors, K: int, partitions: Partitions):
    tensors = {**values, **{n: buffers[f"packed_{n}"] for n in format.code_names}}
    if len(partitions) == 1:
        return format.dequantize(tensors)
    return torch.cat([format.dequantize(t) for t in format.split(tensors, partitions)])


def _matmul(format, x, buffers, values, bias, partitions, precision):
    weight = _dequantize(format, buffers, values, x.shape[-1], partitions).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _why_not(problem: Problem) -> str | None:
    if problem.precision != "exact":
        return f"precision {problem.precision!r} is not implemented (exact only)"
    return None


def _cost(problem: Problem) -> float:
    # Writes and reads the weight in 4 bytes, at about 5 GB/s: only to rank it behind real kernels.
    return 50.0 + problem.N * problem.K * 8 / 5e3


register(Kernel("ref.dequant", _repack, _unpack, _matmul, _dequantize, _why_not, _cost))
