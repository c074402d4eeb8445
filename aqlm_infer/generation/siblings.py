"""Layers of one block that read the same input, and the norm that makes it.

Rotated layers of the CUDA kernels take it rotated: the norm and the rotation are one launch, and
the layers' kernels are called with its result. An E8P layer before the norm is joined with it for
one token (``rotated_ops``). Other layers are called as the block calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from ..layers import FusedPart, RotatedLinear
from . import ops
from .rotated_ops import e8p_matmul_norm

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

    def of_product(
        self, x, layer: nn.Module, z, weight, eps: float, add_rms_norm: Callable
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """x + layer(z) [M, K], and the results of its norm, which ``add_rms_norm`` computes."""
        rotation = self._rotation() if x.shape[0] <= _MOST_TOKENS else None
        if rotation is None:
            x, y = add_rms_norm(x, layer(z), weight, eps)
            return x, self(y)
        su, h, factor = rotation
        product = _product_of(layer) if x.shape[0] == 1 else None
        if product is None or product[-1] != factor:
            x, y = ops.rotated_norm(x, layer(z), weight, eps, su, h, factor)
        else:
            z = layer._rotated(z, layer._buffers_of_kernel(), layer._values())
            x, y = e8p_matmul_norm(z, *product, x, weight, eps, su)
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


def _product_of(layer: nn.Module) -> tuple | None:
    """(packed, sv, h, bits, residual, factor): what ``e8p_matmul_norm`` takes of an E8P layer
    without a bias; None of other layers."""
    if _rotation_of(layer) is None or layer.kernel_id != "cuda.e8p" or layer.bias is not None:
        return None
    buffers, format = layer._buffers_of_kernel(), layer.format
    h = buffers["h_out"]
    factor = h.shape[0] if h.dim() == 2 else 1
    return buffers["packed_Qidxs"], buffers["sv"], h, format.bits, 1 / format.residual, factor
