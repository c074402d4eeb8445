"""Layers of one block that read the same input, and the norm that makes it.

Rotated layers of the CUDA kernels take it rotated: the norm and the rotation are one launch, and
the layers' kernels are called with its result. Other layers are called as the block calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from ..layers import FusedPart, RotatedLinear
from . import ops

_KERNELS = ("cuda.e8p", "cuda.scalar.rotated")

_MOST_TOKENS = 64
"""``ops.rotated_norm`` reads a token's vector once for every row of its matrix of Hadamard sums:
what makes it fast for one token makes it slow for a prompt."""

_SHORTEST = 128
"""Least Sylvester part of a rotation that ``ops.rotated_norm`` takes."""


class Siblings:
    """q, k and v; or gate and up. Every method returns a result for each of them."""

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = layers

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Of x [M, K]. A fused product or a rotated input is computed once."""
        with ExitStack() as stack:
            for layer in self.layers:
                if isinstance(layer, FusedPart):
                    stack.enter_context(layer.shared.kept_open())
                elif isinstance(layer, RotatedLinear) and layer._sharing is not None:
                    stack.enter_context(layer._sharing.shared.kept_open())
            return [layer(x) for layer in self.layers]

    def of_norm(self, x, delta, weight, eps: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """x + delta [M, K], and the results of its norm."""
        rotation = self._rotation() if x.shape[0] <= _MOST_TOKENS else None
        if rotation is None:
            x, y = ops.add_rms_norm(x, delta, weight, eps)
            return x, self(y)
        x, y = ops.rotated_norm(x, delta, weight, eps, *rotation)
        return x, self._of_rotated(y)

    def _rotation(self) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """(su, h, factor) of the one rotation of the layers' input; None where there is none."""
        found = None
        for layer in map(_whole, self.layers):
            rotation = _rotation_of(layer)
            if rotation is None or (found is not None and rotation[0] is not found[0]):
                return None
            found = rotation
        return found

    def _of_rotated(self, y: torch.Tensor) -> list[torch.Tensor]:
        results, products = [], {}
        for layer in self.layers:
            whole = _whole(layer)
            if whole not in products:
                products[whole] = whole.kernel.matmul(
                    whole.format, y, whole._buffers_of_kernel(), whole._values(), whole.bias,
                    (whole.out_features,), whole.precision,
                )  # fmt: skip
            product = products[whole]
            results.append(product[..., layer.rows] if layer is not whole else product)
        return results


def _whole(layer: nn.Module) -> nn.Module:
    return layer.fused if isinstance(layer, FusedPart) else layer


def _rotation_of(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """(su, h, factor) of a layer whose kernel takes an input rotated by a long enough Hadamard."""
    if not isinstance(layer, RotatedLinear) or layer.format.rotation != "hadamard":
        return None
    if layer.kernel_id not in _KERNELS or layer.trains_values:
        return None
    if layer._folded != layer._versions():
        layer._renew_folded()
    su, h = layer._buffers["su"], layer._buffers["h_in"]
    factor = h.shape[0] if h.dim() == 2 else 1
    return (su, h, factor) if layer.in_features // factor >= _SHORTEST else None
