"""Parts of a linear layer that computes several at once: q, k and v, or up and gate of QuIP#.

A fused layer has one rotation of all its outputs, so it cannot be split: every part would need the
whole product. The block keeps it under its published name, and its parts slice the one result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .linear import may_pass_dispatcher
from .rotated import RotatedLinear
from .shared import SharedInBlock


def _parts_of(fused: nn.Module, x: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
    held = fused.__dict__.get("_held")
    if held is not None and _is_plain(fused) and may_pass_dispatcher(x):
        parts = held.parts(x, fused._parameters, fused._buffers, sizes)
        if parts is not None:
            return parts
    return fused(x).split_with_sizes(sizes, -1)


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or "forward" in module.__dict__
    )


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
        self._place = len(shared.sizes)
        shared.sizes.append(self.out_features)

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
        shared = self.shared
        if is_grad_enabled() or is_compiling():
            # A split could not be changed in place afterwards where a gradient is recorded.
            return shared.get(x, None, lambda: self.fused(x))[..., self.rows]
        kept = shared._parts
        if kept is None or kept[0] is not x or (kept[1] is not None and kept[1] != x._version):
            version = None if x.is_inference() else x._version
            kept = x, version, _parts_of(self._fused[0], x, shared.sizes)
            if shared._open:
                shared._parts = kept
        return kept[2][self._place]

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
