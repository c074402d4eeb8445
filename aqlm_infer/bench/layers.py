"""Random layers to time, distinct copies to outrun the caches, and the check before any timing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..formats import AdditiveFormat, Format
from ..layers import QuantLinear

DRAM_BYTES = 256 << 20
"""Distinct packed weights that a "dram" measurement rotates through."""

_MAX_COPIES = 512

# 2-norm of the error over that of the result, against float64 on the same inputs.
_TOLERANCE = {torch.float32: 5e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_FAST_TOLERANCE = 3e-2


class BenchError(RuntimeError):
    """A case that cannot be timed, or whose result is wrong."""


def random_tensors(
    format: Format, N: int, K: int, dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    """Canonical tensors of a random [N, K] layer whose output has about unit variance."""
    if not isinstance(format, AdditiveFormat):
        raise BenchError(f"no random layer of {format.id}: additive formats only")
    format.check_shape(N, K)
    generator = torch.Generator().manual_seed(seed)
    specs = format.tensor_specs(N, K)
    limits = torch.iinfo(format.code_dtype)
    half = min(1 << (format.nbits - 1), limits.max + 1)
    codes = torch.randint(
        -half, half, specs["codes"].shape, dtype=format.code_dtype, generator=generator
    )
    codebooks = torch.randn(specs["codebooks"].shape, generator=generator)
    spread = 1.0 / math.sqrt(K * format.num_codebooks)
    scales = spread * (0.5 + torch.rand(specs["scales"].shape, generator=generator))
    return {"codes": codes, "codebooks": codebooks.to(dtype), "scales": scales.to(dtype)}


def packed_bytes(layer: QuantLinear) -> int:
    """Bytes of a prepared layer's packed codes, which every matmul has to read."""
    return sum(b.nbytes for name, b in layer.named_buffers() if name.startswith("packed_"))


def copies_for(cache: str, nbytes: int) -> int:
    """How many distinct weights of ``nbytes`` a measurement rotates through."""
    if cache == "warm":
        return 1
    return max(2, min(_MAX_COPIES, math.ceil(DRAM_BYTES / nbytes)))


def relative_error(y: torch.Tensor, x: torch.Tensor, weight64: torch.Tensor) -> float:
    """2-norm of ``y - x W^T`` over that of ``x W^T``, in float64."""
    exact = x.double() @ weight64.T
    return float(((y.double() - exact).norm() / exact.norm()).item())


def verified_error(y, x, weight64, precision: str, what: str) -> float:
    """``relative_error``; BenchError when it is above what the dtype and precision allow."""
    error = relative_error(y, x, weight64)
    limit = _TOLERANCE[x.dtype] if precision == "exact" else _FAST_TOLERANCE
    if not error <= limit:
        raise BenchError(f"{what}: relative error {error:.2e} exceeds {limit:.0e}; nothing timed")
    return error


def rotation(
    make: Callable[[int], Callable[[], object]], cache: str, nbytes: int
) -> list[Callable[[], object]]:
    """One call, or enough calls over distinct weights: ``make(seed)`` builds each."""
    return [make(seed) for seed in range(copies_for(cache, nbytes))]
