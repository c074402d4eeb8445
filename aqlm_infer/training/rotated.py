"""What rotated formats share: a code basis between two rotations, W = diag(SV ..) U Wq V diag(SU).

The gradients of SU, SV and Wq are those of autograd through the rotations, which are matrix
products: there is nothing to scatter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from ..formats import Format, Tensors
from ..formats.rotated import rotation_of
from .representation import Representation

TRAINED = ("SU", "SV")


def rotate_back(
    weights: torch.Tensor, kind: str, su: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """diag(scale) U_N Wq U_K^T diag(su) of each of ``weights`` [L, N, K]: in the original basis."""
    N, K = weights.shape[1:]
    weights = rotation_of(kind, K).apply(weights) * su[:, None]
    return rotation_of(kind, N).apply(weights.mT).mT * scale[..., None]


class RotatedRepresentation(Representation):
    """Values SU [L, K] and SV [L, N]; ``fixed`` holds each matrix's other tensors, no codes."""

    fixed: list[dict[str, torch.Tensor]]

    @classmethod
    def rotated(
        cls, format: Format, codes: torch.Tensor, tensors: Sequence[Tensors], width: int
    ) -> RotatedRepresentation:
        """From codes [L, groups, .] and the other canonical tensors."""
        values = {n: torch.stack([t[n] for t in tensors]) for n in TRAINED}
        self = cls(format, codes, values, width)
        gone = {*TRAINED, *self.code_tensors(0)}
        self.fixed = [{n: t for n, t in one.items() if n not in gone} for one in tensors]
        return self

    @abstractmethod
    def rotate_back(self, weights: torch.Tensor) -> torch.Tensor:
        """Wq [L, N, K] in the original basis, differentiable in it and in the values."""

    @abstractmethod
    def code_tensors(self, place: int) -> dict[str, torch.Tensor]:
        """The canonical tensors that the codes of one matrix make."""

    @property
    def rows(self) -> int:
        """N of the weights."""
        return self.values["SV"].shape[1]

    def outer(self, words: torch.Tensor) -> torch.Tensor:
        return self.rotate_back(words.reshape(self.count, self.rows, -1))

    def gradients(self, gradient: torch.Tensor) -> torch.Tensor:
        inner = self.decode(self.codes).view(gradient.shape).requires_grad_()
        with torch.enable_grad():
            outer = self.rotate_back(inner)
        found = torch.autograd.grad(outer, [inner, *self.values.values()], gradient)
        for value, grad in zip(self.values.values(), found[1:], strict=True):
            value.grad = grad
        return found[0].reshape(self.count, self.groups, self.width)

    def tensors(self, place: int) -> dict[str, torch.Tensor]:
        return {**self.code_tensors(place), **self.fixed[place], **self.values_of(place)}
