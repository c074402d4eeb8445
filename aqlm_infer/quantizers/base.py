"""The seam between quantizers and the rest: a weight in, canonical tensors out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..formats import Format


class QuantizerError(ValueError):
    """A weight or a Hessian that a quantizer cannot take."""


class Quantizer(ABC):
    """Turns a dense weight into the canonical tensors of one format."""

    @property
    def needs_hessian(self) -> bool:
        """Whether ``fit`` refuses to work without the second moment of the layer's input."""
        return False

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


def check_weight(weight: torch.Tensor, format: Format) -> None:
    """Raise QuantizerError unless ``weight`` is a finite floating [N, K], FormatError unless its
    shape fits the format."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise QuantizerError(
            f"weight is {weight.dtype} of shape {list(weight.shape)}, expected floating [N, K]"
        )
    format.check_shape(*weight.shape)
    bad = (~torch.isfinite(weight.float())).nonzero()
    if len(bad):
        value = weight[tuple(bad[0])].item()
        raise QuantizerError(
            f"weight is not finite in float32: {value} at {bad[0].tolist()}, {len(bad)} such "
            f"values of {weight.numel()}"
        )
