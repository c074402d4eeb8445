"""What every weight format provides, and the errors that formats raise.

A format is a frozen record: it knows its tensors, how codes are stored, what they cost in bits, and
how to turn them back into weights. It knows nothing of devices or kernels. ``dequantize`` is the
oracle: every kernel is tested against it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

Tensors = Mapping[str, torch.Tensor]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FormatError(ValueError):
    """A scheme id, a layer shape or a set of tensors that a format cannot accept."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and kind of one canonical tensor.

    ``dtype`` None means any floating dtype, that of the layer; another one is the tensor's own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Format(ABC):
    """Base record of a weight format for a linear layer ``y = x W^T`` with W of shape [N, K]."""

    code_names: ClassVar[tuple[str, ...]]
    """Integer tensors, which kernels repack. The others are the format's values."""

    @classmethod
    @abstractmethod
    def parse(cls, scheme: str) -> Format | None:
        """The format of a scheme id, or None when the id is of another family."""

    @property
    @abstractmethod
    def id(self) -> str:
        """Scheme id, the same string in configs, the CLI, benchmark rows and errors."""

    @abstractmethod
    def why_not_shape(self, N: int, K: int) -> str | None:
        """Reason why a [N, K] weight cannot be stored in this format, or None."""

    @abstractmethod
    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        """Canonical tensors of a [N, K] layer."""

    @abstractmethod
    def out_features(self, tensors: Tensors, name: str = "layer") -> int:
        """N of the layer that these canonical tensors belong to."""

    @abstractmethod
    def in_features(self, tensors: Tensors, name: str = "layer") -> int:
        """K of the layer that these canonical tensors belong to (only shapes are looked at)."""

    @abstractmethod
    def dequantize(self, tensors: Tensors, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The [N, K] weight; ``dtype`` None means the dtype of the stored values."""

    @abstractmethod
    def bits_per_weight(self, N: int, K: int) -> float:
        """Bits a weight with everything counted (codes, codebooks, scales in 16 bits)."""

    def check_shape(self, N: int, K: int) -> None:
        """Raise FormatError when a [N, K] weight does not fit this format."""
        reason = self.why_not_shape(N, K)
        if reason:
            raise FormatError(reason)

    def check_tensors(self, tensors: Tensors, N: int, K: int, name: str = "layer") -> None:
        """Check presence, shape, dtype and values of the canonical tensors of a [N, K] layer.

        Raises FormatError naming the tensor (prefixed with ``name``) and the offending values.
        """
        self.check_shape(N, K)
        for key, spec in self.tensor_specs(N, K).items():
            if key not in tensors:
                raise FormatError(f"{name}.{key} is missing ({self.id}, N={N}, K={K})")
            check_spec(tensors[key], spec, f"{name}.{key}", self.id)
        for key, tensor in tensors.items():
            if key in self.code_names:
                self.check_codes(tensor, f"{name}.{key}")
            elif not bool(torch.isfinite(tensor).all()):
                bad = (~torch.isfinite(tensor)).nonzero()[0].tolist()
                value = tensor[tuple(bad)].item()
                raise FormatError(f"{name}.{key} is not finite: {value} at index {bad}")

    @abstractmethod
    def check_codes(self, codes: torch.Tensor, name: str) -> None:
        """Raise FormatError when a stored code is out of range."""


def size_of(tensors: Tensors, key: str, dim: int, name: str, format_id: str) -> int:
    """Size of one dimension of ``tensors[key]``; FormatError when it has no such dimension."""
    if key not in tensors:
        raise FormatError(f"{name}.{key} is missing ({format_id})")
    shape = tensors[key].shape
    if len(shape) <= dim:
        raise FormatError(f"{name}.{key} has shape {list(shape)}, too few dimensions ({format_id})")
    return shape[dim]


def check_spec(tensor: torch.Tensor, spec: TensorSpec, name: str, format_id: str) -> None:
    """Raise FormatError unless ``tensor`` has the shape and dtype that ``spec`` asks for."""
    if tuple(tensor.shape) != spec.shape:
        raise FormatError(
            f"{name} has shape {list(tensor.shape)}, expected {list(spec.shape)} for {format_id}"
        )
    if spec.dtype is None and tensor.dtype not in FLOAT_DTYPES:
        raise FormatError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
    if spec.dtype is not None and tensor.dtype != spec.dtype:
        raise FormatError(f"{name} has dtype {tensor.dtype}, expected {spec.dtype} for {format_id}")
