"""Tuning scalar grids: one weight a group, its code the grid point.

gptq-int / rtn-int: W = s (q - z), s and z of G weights of a row. The P step trains s; z is stored
as an integer of the format and stays. quip-int: the code basis is the weight between its
rotations, on a grid of fixed step; the P step trains SU and SV.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from ..formats import QuipFormat, ScalarFormat, Tensors
from ..formats.scalar import unpack_bits
from .representation import Representation
from .rotated import RotatedRepresentation, rotate_back


class GridRepresentation(Representation):
    """One code a weight, uint8 [L, N*K, 1], on the grid ``step * (q - zero)`` of each group.

    Attributes:
        tile: neighbouring weights of one step and zero.
    """

    tile: int = 1

    @abstractmethod
    def grid(self, index: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(step, zero) of the weights ``index``, [L, n, 1], or (None) of all tiles, [L, m, 1]."""

    def tiled(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """Codes or weights [L, n, 1] as a grid of the same ``index`` broadcasts over them."""
        return x if index is not None else x.reshape(self.count, -1, self.tile)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.format.bits) - 1

    def decode(self, codes: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        step, zero = self.grid(index)
        return ((self.tiled(codes, index) - zero) * step).view(codes.shape)

    def _position(self, targets: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """Where targets lie on the grid, in codes; a group of step zero keeps to its zero."""
        step, zero = self.grid(index)
        over = self.tiled(targets, index) / torch.where(step == 0, torch.inf, step)
        return (over + zero).view(targets.shape)

    def search(
        self,
        targets: torch.Tensor,
        index: torch.Tensor | None = None,
        beam: int = 1,
        order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._position(targets, index).round_().clamp_(0, self.top).to(torch.uint8)

    def two_nearest(
        self, targets: torch.Tensor, beam: int, order: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        place = self._position(targets, None)
        first = place.round().clamp_(0, self.top)
        side = torch.where(place >= first, 1.0, -1.0)
        second = first + torch.where((first + side < 0) | (first + side > self.top), -side, side)
        return first.to(torch.uint8), second.to(torch.uint8)


class ScalarRepresentation(GridRepresentation):
    """``gptq-int*`` and ``rtn-int*``: values scales [L, N, K/G]."""

    @classmethod
    def of(
        cls, format: ScalarFormat, tensors: Sequence[Tensors], name: str
    ) -> ScalarRepresentation:
        rows, groups = tensors[0]["scales"].shape
        size = format.group_size
        codes = [unpack_bits(t["qweight"], format.bits, groups * size) for t in tensors]
        scales = torch.stack([t["scales"] for t in tensors])
        codes = torch.stack(codes).view(len(tensors), -1, 1)
        self = cls(format, codes, {"scales": scales}, 1)
        self.tile = size
        zeros = [unpack_bits(t["zeros"], format.bits, groups) for t in tensors]
        self.zeros = torch.stack(zeros).float()
        return self

    def grid(self, index: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        both = [t.view(self.count, -1, 1) for t in (self.values["scales"].detach(), self.zeros)]
        if index is not None:
            both = [t.take_along_dim(index[..., None] // self.tile, 1) for t in both]
        return both[0], both[1]

    def outer(self, words: torch.Tensor) -> torch.Tensor:
        return words.view(self.count, self.zeros.shape[1], -1)

    @torch.no_grad()
    def gradients(self, gradient: torch.Tensor) -> torch.Tensor:
        groups = gradient.reshape(self.count, self.groups, 1)
        _, zero = self.grid()
        scales = self.values["scales"]
        centred = self.tiled(self.codes) - zero
        scales.grad = (centred * self.tiled(groups)).sum(2).view_as(scales)
        return groups

    def tensors(self, place: int) -> dict[str, torch.Tensor]:
        zeros = self.zeros[place]
        packed = self.format.pack_codes(
            self.codes[place].view(len(zeros), -1), zeros.to(torch.uint8)
        )
        return {**packed, **self.values_of(place)}


class QuipRepresentation(GridRepresentation, RotatedRepresentation):
    """``quip-int*``: values SU [L, K] and SV [L, N]; Wscale and the rotations stay."""

    @classmethod
    def of(cls, format: QuipFormat, tensors: Sequence[Tensors], name: str) -> Representation:
        codes = [unpack_bits(t["qweight"], format.bits, len(t["SU"])) for t in tensors]
        codes = torch.stack(codes).view(len(tensors), -1, 1)
        self = cls.rotated(format, codes, tensors, 1)
        scales = torch.stack([t["Wscale"].float().view(1, 1) for t in tensors])
        self.step, self.zero = scales * format.step, torch.full_like(scales, self.top / 2)
        return self

    def grid(self, index: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.step, self.zero

    def rotate_back(self, weights: torch.Tensor) -> torch.Tensor:
        if self.format.rotation != "kronecker":
            return rotate_back(weights, self.format.rotation, self.values["SU"], self.values["SV"])
        each = [
            {**fixed, **{n: v[place] for n, v in self.values.items()}}
            for place, fixed in enumerate(self.fixed)
        ]
        pairs = zip(weights, each, strict=True)
        return torch.stack([self.format.rotate_back(w, tensors) for w, tensors in pairs])

    def code_tensors(self, place: int) -> dict[str, torch.Tensor]:
        return self.format.pack_codes(self.codes[place].view(self.rows, -1))
