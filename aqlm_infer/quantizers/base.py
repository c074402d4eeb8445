"""The seam between quantizers and the rest: a weight in, canonical tensors out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class QuantizerError(ValueError):
    """A weight or a Hessian that a quantizer cannot take."""


class Quantizer(ABC):
    """Turns a dense weight into the canonical tensors of one format."""

    @abstractmethod
    def fit(
        self, weight: torch.Tensor, hessian: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Quantize ``weight`` [N, K].

        ``hessian`` is the second moment of the layer's input, E[x^T x], [K, K]; None means the
        plain weight norm. Returns the format's canonical tensors. Raises QuantizerError on a weight
        that is not finite or not two-dimensional, FormatError when its shape does not fit the
        format.
        """
