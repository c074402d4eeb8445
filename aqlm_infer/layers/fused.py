"""Parts of a linear layer that computes several at once: q, k and v, or up and gate of QuIP#.

A fused layer has one rotation of all its outputs, so it cannot be split: every part would need the
whole product. The block keeps it under its published name, and its parts slice the one result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .rotated import RotatedLinear
from .shared import SharedInBlock


class FusedPart(nn.Module):
    """Output columns of a fused layer, in the place of an ``nn.Linear``.

    It has no parameters: they are the fused layer's. Inside the block's forward the fused layer
    runs once for all parts that are called with the same tensor; elsewhere each part runs it.
    """

    def __init__(self, fused: RotatedLinear, rows: slice, shared: SharedInBlock):
        super().__init__()
        self._fused = (fused,)  # hidden from nn.Module, which would register it a second time
        self.rows, self.shared = rows, shared
        self.in_features, self.out_features = fused.in_features, rows.stop - rows.start

    @property
    def fused(self) -> RotatedLinear:
        """The layer that computes all parts."""
        return self._fused[0]

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight of this part (the whole layer is dequantized at every access)."""
        return self.fused.weight[self.rows]

    @property
    def bias(self) -> torch.Tensor | None:
        """The part's bias, or None."""
        return None if self.fused.bias is None else self.fused.bias[self.rows]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.get(x, None, lambda: self.fused(x))[..., self.rows]

    def extra_repr(self) -> str:
        rows = f"{self.rows.start}:{self.rows.stop}"
        return f"in_features={self.in_features}, out_features={self.out_features}, rows={rows}"


def place_fused(
    block: nn.Module, name: str, fused: RotatedLinear, parts: Sequence[str]
) -> list[FusedPart]:
    """Put ``fused`` into ``block`` as ``name``, and its parts in the places of dense layers.

    ``parts`` are the children of ``block`` to replace, in the order of ``fused.format.parts``.
    """
    shared = SharedInBlock(block)
    setattr(block, name, fused)
    made, start = [], 0
    for part, rows in zip(parts, fused.format.parts, strict=True):
        made.append(FusedPart(fused, slice(start, start + rows), shared))
        setattr(block, part, made[-1])
        start += rows
    return made
