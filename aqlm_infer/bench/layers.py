"""Random layers to time, distinct copies to outrun the caches, and the check before any timing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..formats import AdditiveFormat, E8PFormat, Format, QuipFormat, ScalarFormat, TensorSpec
from ..formats.e8p import CODEBOOK_IDS
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
    format: Format, N: int, K: int, dtype: torch.dtype, seed: int, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Canonical tensors of a random [N, K] layer whose output has about unit variance."""
    format.check_shape(N, K)
    generator = torch.Generator(device).manual_seed(seed)
    draw = _Draw(format.tensor_specs(N, K), {"generator": generator, "device": device})
    values = _VALUES[type(format)](format, draw, N, K)
    return {n: t if draw.specs[n].dtype else t.to(dtype) for n, t in values.items()}


@dataclass(frozen=True)
class _Draw:
    """Random tensors of a format's shapes."""

    specs: dict[str, TensorSpec]
    options: dict

    def normal(self, name: str) -> torch.Tensor:
        return torch.randn(self.specs[name].shape, **self.options)

    def signs(self, name: str) -> torch.Tensor:
        return torch.randint(0, 2, self.specs[name].shape, **self.options) * 2.0 - 1.0

    def near(self, value: float, name: str) -> torch.Tensor:
        """Uniform in value/2 .. 3 value/2."""
        return value * (0.5 + torch.rand(self.specs[name].shape, **self.options))

    def codes(self, name: str, nbits: int) -> torch.Tensor:
        """Any stored code of ``nbits`` in the tensor's own (signed or unsigned) container."""
        spec = self.specs[name]
        limits = torch.iinfo(spec.dtype)
        low = 0 if limits.min == 0 else -min(1 << (nbits - 1), limits.max + 1)
        high = min(low + (1 << nbits), limits.max + 1)
        return torch.randint(low, high, spec.shape, dtype=spec.dtype, **self.options)


def _additive(format: AdditiveFormat, draw: _Draw, N: int, K: int) -> dict[str, torch.Tensor]:
    return {
        "codes": draw.codes("codes", format.nbits),
        "codebooks": draw.normal("codebooks"),
        "scales": draw.near((K * format.num_codebooks) ** -0.5, "scales"),
    }


def _e8p(format: E8PFormat, draw: _Draw, N: int, K: int) -> dict[str, torch.Tensor]:
    device = draw.options["device"]
    tensors = {
        "Qidxs": draw.codes("Qidxs", 63),
        "SU": draw.signs("SU"),
        "SV": draw.signs("SV") * K**-0.5,
        "Wscale": torch.ones((), device=device),
        "codebook_id": torch.tensor(CODEBOOK_IDS[format.bits], device=device),
    }
    return tensors | {n: draw.near(1.0, n) for n in draw.specs if n == "fuse_scales"}


def _scalar(format: ScalarFormat, draw: _Draw, N: int, K: int) -> dict[str, torch.Tensor]:
    return {
        "qweight": draw.codes("qweight", 8),
        "scales": draw.near(K**-0.5 / (1 << format.bits), "scales"),
        "zeros": draw.codes("zeros", 8),
    }


def _quip(format: QuipFormat, draw: _Draw, N: int, K: int) -> dict[str, torch.Tensor]:
    if format.rotation == "kronecker":
        raise BenchError(f"no random layer of {format.id}: its rotations are dense torch products")
    return {
        "qweight": draw.codes("qweight", 8),
        "SU": draw.signs("SU"),
        "SV": draw.signs("SV") * K**-0.5,
        "Wscale": torch.ones((), device=draw.options["device"]),
    }


_VALUES = {AdditiveFormat: _additive, E8PFormat: _e8p, ScalarFormat: _scalar, QuipFormat: _quip}


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
