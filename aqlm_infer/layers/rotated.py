"""Linear layers whose weight is quantized in a rotated basis, and sharing work among them.

``RotatedLinear`` is a ``QuantLinear`` that can take its rotated input from a sibling with the same
sign vector: ``share_rotations`` finds such siblings (q, k and v; gate and up).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..formats import E8PFormat, QuipFormat
from .linear import LAYER_CLASSES, QuantLinear
from .shared import SharedInBlock


class RotatedLinear(QuantLinear):
    """``y = x W^T + bias`` with W = diag(SV) U_N Wq U_K^T diag(SU) in a rotated format.

    Everything is as in ``QuantLinear``. SU, SV and Wscale train through the operators, without the
    dense weight, where the layer has a kernel with a rotation of its own.
    """

    _sharing: RotationGroup | None = None

    def prepare(self, name: str = "layer") -> RotatedLinear:
        prepared = self.kernel_id is not None
        super().prepare(name)
        if self._sharing is not None and not prepared and self.kernel_id is not None:
            self._share()
        return self

    def _share(self) -> None:
        if "su" in self._buffers:
            self.su = self._sharing.same(self.su)

    def _renew_folded(self) -> dict[str, torch.Tensor]:
        if self._sharing is not None and "su" in self._buffers:
            self.su = self.su.clone()  # siblings read the old one
        folded = super()._renew_folded()
        if self._sharing is None or "su" not in folded:
            return folded
        self._share()
        return folded | {"su": self.su}

    def _run_held(self, held, x):
        if self._sharing is None or not self._sharing.shared._open:
            return held.linear(x, self._parameters, self._buffers)
        if not held.serves(x, self._parameters, self._buffers):
            return None
        su = self._buffers["su"]
        return held.product(self._sharing.shared.get(x, su, lambda: held.rotation(x)))

    def _rotated(self, x, buffers, values):
        if self._sharing is None:
            return super()._rotated(x, buffers, values)
        return self._sharing.shared.get(
            x, buffers["su"], lambda: super(RotatedLinear, self)._rotated(x, buffers, values)
        )


LAYER_CLASSES.update({E8PFormat: RotatedLinear, QuipFormat: RotatedLinear})


class RotationGroup:
    """Sibling layers with equal sign vectors. Their ``su`` buffers are one tensor."""

    def __init__(self, block: nn.Module):
        self.shared = SharedInBlock(block)
        self._su: torch.Tensor | None = None

    def same(self, su: torch.Tensor) -> torch.Tensor:
        """The group's tensor when it equals ``su``; otherwise ``su``, which takes its place."""
        kept = self._su
        if kept is None or kept.device != su.device or not torch.equal(kept, su):
            self._su = su
        return self._su


def share_rotations(model: nn.Module) -> list[tuple[str, ...]]:
    """Let sibling layers with equal sign vectors rotate their common input once.

    Siblings are children of one module, such as q_proj, k_proj and v_proj of an attention block.
    Layers join by the values of SU, size and kind of rotation, and share when called with the same
    tensor inside the block's forward. Returns the groups, by module path. Calling it again, for
    instance after further layers were replaced, is harmless.
    """
    groups = []
    for path, block in model.named_modules():
        rotated = {
            name: layer
            for name, layer in block.named_children()
            if isinstance(layer, RotatedLinear) and layer.format.rotation != "kronecker"
        }
        for names in _alike(rotated.items()):
            layers = [rotated[name] for name in names]
            group = layers[0]._sharing
            if group is None or any(layer._sharing is not group for layer in layers):
                group = RotationGroup(block)
                for layer in layers:
                    layer._sharing = group
                    if layer.kernel_id is not None:
                        layer._share()
            groups.append(tuple(f"{path}.{name}" if path else name for name in names))
    return groups


def _alike(layers: Iterable[tuple[str, RotatedLinear]]) -> list[list[str]]:
    """Names of layers with equal sign vectors and rotations, in groups of two or more."""
    found: list[tuple[RotatedLinear, list[str]]] = []
    for name, layer in layers:
        for first, names in found:
            same = first.format.rotation == layer.format.rotation
            same = same and first.SU.device == layer.SU.device and not layer.SU.is_meta
            if same and torch.equal(first.SU, layer.SU):
                names.append(name)
                break
        else:
            found.append((layer, [name]))
    return [names for _, names in found if len(names) > 1]
