"""What rotated formats share: their pair of Hadamard rotations, and undoing it on a weight."""

from __future__ import annotations

import torch

from .base import FormatError
from .rotation import Hadamard


def rotation_of(kind: str, size: int) -> Hadamard:
    """The rotation of a side of this size; ``kind`` is "hadamard" (full width) or "block"."""
    return Hadamard.blocks(size) if kind == "block" else Hadamard.full(size)


def why_not_rotated(kind: str, N: int, K: int) -> str | None:
    """Reason why a [N, K] weight has no rotations of this kind, or None."""
    for name, size in (("N", N), ("K", K)):
        try:
            rotation_of(kind, size)
        except FormatError as error:
            return f"{name}={size}: {error}"
    return None


def rotate_back(
    weight: torch.Tensor, kind: str, su: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """diag(scale) U_N Wq U_K^T diag(su): a weight of the rotated basis in the original one."""
    N, K = weight.shape
    weight = rotation_of(kind, K).apply(weight) * su.to(weight.dtype)
    return rotation_of(kind, N).apply(weight.T).T * scale[:, None]
