"""What rotated formats share: a code basis between two rotations, W = diag(SV ..) U Wq V diag(SU).

The gradients of SU, SV and Wq are those of autograd through the rotations, which are matrix
products: there is nothing to scatter.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from ..formats import Format, Tensors
from .representation import Representation

TRAINED = ("SU", "SV")


class RotatedRepresentation(Representation):
    """Values SU [K] and SV [N]; ``fixed`` holds the format's other tensors that are no codes."""

    fixed: dict[str, torch.Tensor]

    @classmethod
    def rotated(
        cls, format: Format, codes: torch.Tensor, tensors: Tensors, width: int
    ) -> RotatedRepresentation:
        """From codes [groups, .] and the other canonical tensors."""
        self = cls(format, codes, {n: tensors[n] for n in TRAINED}, width)
        remade = self.code_tensors()
        self.fixed = {n: t for n, t in tensors.items() if n not in (*TRAINED, *remade)}
        return self

    @abstractmethod
    def rotate_back(self, weight: torch.Tensor) -> torch.Tensor:
        """Wq [N, K] in the original basis, differentiable in it and in the values."""

    @abstractmethod
    def code_tensors(self) -> dict[str, torch.Tensor]:
        """The canonical tensors that the codes make."""

    def _inner(self) -> torch.Tensor:
        """Wq [N, K] float32."""
        return self.decode(self.codes).view(len(self.values["SV"]), -1)

    def weight(self) -> torch.Tensor:
        return self.rotate_back(self._inner())

    def gradients(self, gradient: torch.Tensor) -> torch.Tensor:
        inner = self._inner().requires_grad_()
        with torch.enable_grad():
            outer = self.rotate_back(inner)
        found = torch.autograd.grad(outer, [inner, *self.values.values()], gradient)
        for value, grad in zip(self.values.values(), found[1:], strict=True):
            value.grad = grad
        return self.to_basis(found[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        values = {n: v.detach() for n, v in self.values.items()}
        return {**self.code_tensors(), **self.fixed, **values}
