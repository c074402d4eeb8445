"""Layers of one block that read the same input, and the norm that makes it.

Rotated layers of the CUDA kernels take it rotated: the norm and the rotation are one launch, and
the layers' kernels are called with its result. Before a norm or SwiGLU an E8P layer
of few tokens is joined with it (``rotated_ops``). Other layers are called as the block calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from ..layers import FusedPart, RotatedLinear
from . import ops
from .rotated_ops import e8p_matmul_norm, e8p_matmul_swiglu

_KERNELS = ("cuda.e8p", "cuda.scalar.rotated")

_JOINED = ("cuda.e8p",)
"""Kernels whose matmul the operators of ``rotated_ops`` do."""

_MOST_TOKENS = 64
"""``ops.rotated_norm`` reads a token's vector once for every row of its matrix of Hadamard sums:
what makes it fast for one token makes it slow for a prompt."""

_MOST_JOINED = 16
"""Most tokens for which the operators of ``rotated_ops`` join anything."""

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

    def norm_of_product(
        self, x, layer: nn.Module, z, turned: bool, weight, eps: float, add_rms_norm: Callable
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """x + layer(z) [M, K]; its norm, by ``add_rms_norm``; and whether that is rotated for the
        layers. ``turned``: z is rotated for ``layer``."""
        rotation = self._rotation() if x.shape[0] <= _MOST_TOKENS else None
        if rotation is None:
            return *add_rms_norm(x, product_of(layer, z, turned), weight, eps), False
        su, h, factor = rotation
        operands = _operands_of(layer) if x.shape[0] <= _MOST_JOINED else None
        if operands is None or operands[-1] != factor:
            y = product_of(layer, z, turned)
            return *ops.rotated_norm(x, y, weight, eps, su, h, factor), True
        if not turned:
            z = layer._rotated(z, layer._buffers_of_kernel(), layer._values())
        return *e8p_matmul_norm(z, *operands, x, weight, eps, su), True

    def of_norm(self, y: torch.Tensor, rotated: bool) -> list[torch.Tensor]:
        """Of what ``norm_of_product`` returned."""
        return self._of_rotated(y) if rotated else self(y)

    def gated(
        self, y: torch.Tensor, rotated: bool, down: nn.Module, swiglu: Callable
    ) -> tuple[torch.Tensor, bool]:
        """SwiGLU of gate and up of the norm, and whether it is rotated for ``down``."""
        joins = rotated and y.shape[0] <= _MOST_JOINED and _are_halves(self.layers)
        operands = _operands_of(_whole(self.layers[0])) if joins else None
        rotation = _rotation_of(down) if operands else None
        if rotation is None:
            return swiglu(*self.of_norm(y, rotated)), False
        up_first = self.layers[0].rows.start > 0
        return e8p_matmul_swiglu(y, *operands, up_first, *rotation), True

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
                products[whole] = product_of(whole, y, True)
            product = products[whole]
            results.append(product[..., layer.rows] if layer is not whole else product)
        return results


def product_of(layer: nn.Module, z: torch.Tensor, turned: bool) -> torch.Tensor:
    """layer(z); ``turned``: z is rotated for the layer already."""
    if not turned:
        return layer(z)
    return layer.kernel.matmul(
        layer.format, z, layer._buffers_of_kernel(), layer._values(), layer.bias,
        (layer.out_features,), layer.precision,
    )  # fmt: skip


def _are_halves(layers: Sequence[nn.Module]) -> bool:
    """Whether these two layers are the halves of one, in any order."""
    if not all(isinstance(layer, FusedPart) for layer in layers):
        return False
    whole, sizes = layers[0].fused, {layer.out_features for layer in layers}
    return all(layer.fused is whole for layer in layers) and sizes == {whole.out_features // 2}


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


def _operands_of(layer: nn.Module) -> tuple | None:
    """(packed, sv, h, bits, residual, factor): what joined operators take of an E8P layer without
    a bias; None of other layers."""
    if _rotation_of(layer) is None or layer.kernel_id not in _JOINED or layer.bias is not None:
        return None
    buffers, format = layer._buffers_of_kernel(), layer.format
    h = buffers["h_out"]
    factor = h.shape[0] if h.dim() == 2 else 1
    return buffers["packed_Qidxs"], buffers["sv"], h, format.bits, 1 / format.residual, factor
