"""What a weight format must offer to be tuned: its values to train and its codes to choose.

A representation is of L matrices of one format and shape: every tensor has a first dimension L, so
that one call works on all of them (on a GPU a layer alone is too small to fill it).

A weight is cut into *groups*, one code position each: in_group_size weights of additive codebooks,
8 of E8P, one of a scalar grid. Groups are numbered row by row. The codes are chosen in the *code
basis*, [L, groups, width]: the weight itself, or for rotated formats the weight between its
rotations, where the groups live. Everything here is float32, whatever the checkpoint stores.

    decode(codes) [L, groups, width]    the words of codes, in the code basis
    outer(words) [L, N, K]              the weight that the model computes with
    gradients(G) -> dL/dvalues, dL/d(code basis)      from one G = dL/dweight
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from ..formats import Format, Tensors


class TuningError(ValueError):
    """Settings, data or models that cannot be tuned together."""


class Representation(ABC):
    """Codes and values of L quantized matrices.

    Attributes:
        format: the format record.
        values: float32 parameters [L, ...] of the P step, by the names of the format's tensors.
        codes: int tensor [L, groups, codes a group], what the V step chooses, in place.
        count, groups, width: L and the size of the code basis.
    """

    def __init__(self, format: Format, codes: torch.Tensor, values: Tensors, width: int):
        self.format, self.codes = format, codes
        self.values = {name: nn.Parameter(value.float().clone()) for name, value in values.items()}
        self.count, self.groups, self.width = *codes.shape[:2], width

    @classmethod
    @abstractmethod
    def of(cls, format: Format, tensors: Sequence[Tensors], name: str) -> Representation:
        """From the canonical tensors of each layer; ``name`` is for errors."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """The words of ``codes`` [L, n, .], float32 [L, n, width], with the values as they are.

        ``index`` int64 [L, n]: the groups that the codes are for (None: all, in order).
        """

    @abstractmethod
    def outer(self, words: torch.Tensor) -> torch.Tensor:
        """The weights [L, N, K] whose code basis is ``words`` [L, groups, width]."""

    @abstractmethod
    def gradients(self, gradient: torch.Tensor) -> torch.Tensor:
        """Set ``.grad`` of the values from ``gradient`` = dL/dweight [L, N, K], float32.

        Returns the gradient in the code basis, [L, groups, width]. Sums run in the same order every
        time, on every device.
        """

    @abstractmethod
    def search(
        self,
        targets: torch.Tensor,
        index: torch.Tensor | None = None,
        beam: int = 1,
        order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """New codes [L, n, .] for ``targets`` [L, n, width]: the nearest words, or a beam's.

        ``index`` as in ``decode``; the search starts from the codes that those groups have.
        ``order`` int64 [L, codes a group]: that in which codebooks are visited (None: by number).
        """

    @abstractmethod
    def two_nearest(
        self, targets: torch.Tensor, beam: int, order: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of the nearest word to each target [L, groups, width], and of the next nearest."""

    @abstractmethod
    def tensors(self, place: int) -> dict[str, torch.Tensor]:
        """The canonical tensors of one matrix, values in float32."""

    @property
    def books(self) -> int:
        """Codes of one group."""
        return self.codes.shape[2]

    def weight(self) -> torch.Tensor:
        """The dequantized weights, float32 [L, N, K]."""
        return self.outer(self.decode(self.codes))

    def values_of(self, place: int) -> dict[str, torch.Tensor]:
        """The values of one matrix."""
        return {name: value.detach()[place] for name, value in self.values.items()}


def taken(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """The groups ``index`` [L, n] of ``x`` [L, groups, .]; None is all of them."""
    return x if index is None else x.take_along_dim(index[..., None], 1)


def represent(format: Format, tensors: Sequence[Tensors], name: str = "layer") -> Representation:
    """The representation of layers of one format and shape, from their canonical tensors.

    Raises TuningError when the format cannot be tuned.
    """
    from .families import REPRESENTATIONS

    family = REPRESENTATIONS.get(type(format))
    if family is None:
        known = ", ".join(sorted(f.__name__ for f in REPRESENTATIONS))
        raise TuningError(f"{name}: {format.id} cannot be tuned; families that can: {known}")
    return family.of(format, tensors, name)
