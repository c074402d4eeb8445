"""Tuning scalar grids: one weight a group, its code the grid point.

gptq-int / rtn-int: W = s (q - z), s and z of G weights of a row. The P step trains s; z is stored
as an integer of the format and stays. quip-int: the code basis is the weight between its
rotations, on a grid of fixed step; the P step trains SU and SV.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from ..formats import QuipFormat, ScalarFormat, Tensors
from ..formats.scalar import unpack_bits
from .representation import Representation
from .rotated import RotatedRepresentation


class GridRepresentation(Representation):
    """One code a weight, uint8 [N*K, 1], on the grid ``step * (q - zero)`` of each group."""

    @abstractmethod
    def grid(self, index: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(step, zero) of the weights ``index`` (None: all), float32, broadcastable to [n, 1]."""

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.format.bits) - 1

    def decode(self, codes: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        step, zero = self.grid(index)
        return (codes - zero) * step

    def _position(self, targets: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """Where targets lie on the grid, in codes; a group of step zero keeps to its zero."""
        step, zero = self.grid(index)
        return torch.where(step == 0, 0.0, targets / torch.where(step == 0, 1.0, step)) + zero

    def search(
        self,
        targets: torch.Tensor,
        index: torch.Tensor | None = None,
        beam: int = 1,
        order: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        return self._position(targets, index).round_().clamp_(0, self.top).to(torch.uint8)

    def two_nearest(
        self, targets: torch.Tensor, beam: int, order: tuple[int, ...] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        place = self._position(targets, None)
        first = place.round().clamp_(0, self.top)
        side = torch.where(place >= first, 1.0, -1.0)
        second = first + torch.where((first + side < 0) | (first + side > self.top), -side, side)
        return first.to(torch.uint8), second.to(torch.uint8)


class ScalarRepresentation(GridRepresentation):
    """``gptq-int*`` and ``rtn-int*``: values scales [N, K/G]."""

    @classmethod
    def of(cls, format: ScalarFormat, tensors: Tensors, name: str) -> ScalarRepresentation:
        groups = tensors["scales"].shape[1]
        codes = unpack_bits(tensors["qweight"], format.bits, groups * format.group_size)
        self = cls(format, codes.view(-1, 1), {"scales": tensors["scales"]}, 1)
        self.zeros = unpack_bits(tensors["zeros"], format.bits, groups).float()
        return self

    def grid(self, index: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        scales, zeros = self.values["scales"].detach().view(-1, 1), self.zeros.view(-1, 1)
        size = self.format.group_size
        if index is None:
            return scales.repeat_interleave(size, 0), zeros.repeat_interleave(size, 0)
        return scales[index // size], zeros[index // size]

    def _centred(self) -> torch.Tensor:
        """q - z as float32 [N, K/G, G]."""
        N, groups = self.zeros.shape
        codes = self.codes.view(N, groups, self.format.group_size)
        return codes - self.zeros[..., None]

    def weight(self) -> torch.Tensor:
        return (self._centred() * self.values["scales"][..., None]).flatten(1)

    @torch.no_grad()
    def gradients(self, gradient: torch.Tensor) -> torch.Tensor:
        centred = self._centred()
        self.values["scales"].grad = (centred * gradient.view_as(centred)).sum(2)
        return self.to_basis(gradient)

    def tensors(self) -> dict[str, torch.Tensor]:
        codes = self.codes.view(len(self.zeros), -1)
        packed = self.format.pack_codes(codes, self.zeros.to(torch.uint8))
        return {**packed, "scales": self.values["scales"].detach()}


class QuipRepresentation(GridRepresentation, RotatedRepresentation):
    """``quip-int*``: values SU [K] and SV [N]; Wscale and the rotations stay."""

    @classmethod
    def of(cls, format: QuipFormat, tensors: Tensors, name: str) -> Representation:
        codes = unpack_bits(tensors["qweight"], format.bits, len(tensors["SU"]))
        return cls.rotated(format, codes.view(-1, 1), tensors, 1)

    def grid(self, index: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.fixed["Wscale"].float()
        return scale * self.format.step, torch.full_like(scale, self.top / 2)

    def rotate_back(self, weight: torch.Tensor) -> torch.Tensor:
        return self.format.rotate_back(weight, {**self.fixed, **self.values})

    def code_tensors(self) -> dict[str, torch.Tensor]:
        return self.format.pack_codes(self.codes.view(len(self.values["SV"]), -1))
