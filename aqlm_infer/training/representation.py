"""What a weight format must offer to be tuned: its values to train and its codes to choose.

A weight is cut into *groups*, one code position each: in_group_size weights of additive codebooks,
8 of E8P, one of a scalar grid. Groups are numbered row by row. The codes are chosen in the *code
basis*, [groups, width]: the weight itself, or for rotated formats the weight between its rotations,
where the groups live. Everything here is float32, whatever the checkpoint stores.

    weight(values, codes) [N, K]        what the model computes with
    decode(codes) [groups, width]       the same in the code basis
    gradients(G) -> dL/dvalues, dL/d(code basis)      from one G = dL/dweight
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from ..formats import Format, Tensors


class TuningError(ValueError):
    """Settings, data or models that cannot be tuned together."""


class Representation(ABC):
    """Codes and values of one quantized matrix.

    Attributes:
        format: the format record.
        values: float32 parameters of the P step, by the names of the format's tensors.
        codes: int tensor [groups, codes a group], what the V step chooses.
        groups, width: size of the code basis.
    """

    def __init__(self, format: Format, codes: torch.Tensor, values: Tensors, width: int):
        self.format, self.codes = format, codes
        self.values = {name: nn.Parameter(value.float().clone()) for name, value in values.items()}
        self.groups, self.width = len(codes), width

    @classmethod
    @abstractmethod
    def of(cls, format: Format, tensors: Tensors, name: str) -> Representation:
        """From a layer's canonical tensors; ``name`` is for errors."""

    @abstractmethod
    def weight(self) -> torch.Tensor:
        """The dequantized weight, float32 [N, K], differentiable in ``values``."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """The words of ``codes`` [n, .], float32 [n, width], with the values as they are now.

        ``index`` int64 [n]: the groups that the codes are for (None: all, in order).
        """

    @abstractmethod
    def gradients(self, gradient: torch.Tensor) -> torch.Tensor:
        """Set ``.grad`` of the values from ``gradient`` = dL/dweight [N, K], float32.

        Returns the gradient in the code basis, [groups, width]. Sums run in the same order every
        time, on every device.
        """

    @abstractmethod
    def search(
        self,
        targets: torch.Tensor,
        index: torch.Tensor | None = None,
        beam: int = 1,
        order: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """New codes [n, .] for ``targets`` [n, width], the nearest words or what a beam finds.

        ``index`` as in ``decode``; the search starts from the codes that those groups have.
        ``order`` is that in which codebooks are visited, where there are several.
        """

    @abstractmethod
    def two_nearest(
        self, targets: torch.Tensor, beam: int, order: tuple[int, ...] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of the nearest word to each target [groups, width], and of the next nearest."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The canonical tensors, values in float32."""

    @property
    def books(self) -> int:
        """Codes of one group."""
        return self.codes.shape[1]

    def to_basis(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [N, K] as groups [groups, width], without any rotation."""
        return weight.reshape(self.groups, self.width)

    def from_basis(self, groups: torch.Tensor, rows: int) -> torch.Tensor:
        """The inverse of ``to_basis`` for a weight of that many rows."""
        return groups.reshape(rows, -1)


def represent(format: Format, tensors: Tensors, name: str = "layer") -> Representation:
    """The representation of a layer's canonical tensors.

    Raises TuningError when the format cannot be tuned.
    """
    from .families import REPRESENTATIONS

    family = REPRESENTATIONS.get(type(format))
    if family is None:
        known = ", ".join(sorted(f.__name__ for f in REPRESENTATIONS))
        raise TuningError(f"{name}: {format.id} cannot be tuned; families that can: {known}")
    return family.of(format, tensors, name)
