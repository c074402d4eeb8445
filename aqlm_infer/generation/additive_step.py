"""Blocks whose layers are all additive, as four joined matmuls and an attention (additive_ops).

Every matmul hands the next one its input in the layout which that reads, so a block is nine
launches instead of fifteen. A model takes this form as a whole, for one batch size, or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..formats import AdditiveFormat
from ..layers import QuantLinear
from .additive_ops import (
    INT8,
    additive_joins,
    additive_matmul_norm,
    additive_matmul_rows,
    additive_matmul_swiglu,
)
from .stack import StackedLinear, StackedPart


class AdditiveBlock:
    """The matmuls of a block for ``tokens`` rows; ``image`` of each: what it takes for its input,
    as ``additive_joins`` says it."""

    def __init__(self, block, tokens: int):
        whole = block.gate_up.layers
        self.qkv = _Matmul(_stack_of(block.qkv.layers), "rows", tokens)
        self.o = _Matmul(block.attention.o_proj, "norm", tokens)
        self.gate_up = _Matmul(_stack_of(whole), "swiglu", tokens)
        self.down = _Matmul(block.down, "norm", tokens)
        self.up_first = isinstance(whole[0], StackedPart) and whole[0].index > 0
        self.norm = block.norm
        self.attended = 0 if self.o.image >= INT8 else self.o.image
        """The image that attention makes: an int8 one has a scale that no head knows."""

    def joins(self) -> bool:
        """Whether every matmul is one of the joined operators and takes an image. (Those of rows
        leave the sums no room beside them: one token 1666 us a step instead of 1660.)"""
        return all(m.image > 0 for m in (self.qkv, self.o, self.gate_up, self.down))

    def __call__(
        self, x, z, norm: nn.Module, following: AdditiveBlock | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [M, K], attention's result as ``o`` takes it -> (x of the next block, its ``norm`` as
        the next block's qkv takes it; rows after the last)."""
        x, y = self.o.norm(z, x, self.norm, self.gate_up.image)
        y = self.gate_up.swiglu(y, self.up_first, self.down.image)
        return self.down.norm(y, x, norm, following.qkv.image if following else 0)

    def products(self, y) -> tuple[torch.Tensor, ...]:
        """q, k and v [M, heads * D]."""
        return self.qkv.rows(y).split(self.qkv.partitions, 1)


def joined_blocks(blocks: Sequence, tokens: int) -> list[AdditiveBlock] | None:
    """The blocks in this form, or None where any layer does not take it."""
    made = []
    for block in blocks:
        joined = AdditiveBlock(block, tokens)
        if not joined.joins():
            return None
        made.append(joined)
    return made


def _stack_of(layers: Sequence[nn.Module]) -> nn.Module | None:
    """The stack whose parts these are, all of them; None where there is none."""
    if not all(isinstance(layer, StackedPart) for layer in layers):
        return None
    whole = layers[0].fused
    indices = sorted(layer.index for layer in layers if layer.fused is whole)
    return whole if indices == list(range(len(whole.sizes))) else None


class _Matmul:
    """An additive layer or stack, before what is joined with it (``then``)."""

    def __init__(self, layer: nn.Module | None, then: str, tokens: int):
        self.layer, self.tokens, self.image = layer, tokens, -1
        if not isinstance(layer, (QuantLinear, StackedLinear)) or layer.kernel is None:
            return
        additive = isinstance(layer.format, AdditiveFormat)
        if not additive or not layer.kernel.id.startswith("cuda.additive."):
            return
        if layer.bias is not None and then != "rows":
            return
        stacked = isinstance(layer, StackedLinear)
        self.partitions = list(layer.partitions if stacked else (layer.out_features,))
        packed, codebooks, scales, _ = self._operands()
        self.image = additive_joins(
            packed, codebooks, scales, layer.in_features, self.partitions, layer.precision, tokens,
            then,
        )  # fmt: skip

    def _operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        layer, values = self.layer, self.layer._values()
        packed = layer._packed() if isinstance(layer, StackedLinear) else layer._buffers_of_kernel()
        return packed["packed_codes"], values["codebooks"], values["scales"], packed["aux"]

    def norm(self, z, x, norm: nn.Module, image: int):
        packed, codebooks, scales, aux = self._operands()
        return additive_matmul_norm(
            z, packed, codebooks, scales, aux, self.partitions, self.layer.precision, x,
            norm.weight, norm.variance_epsilon, image,
        )  # fmt: skip

    def swiglu(self, z, up_first: bool, image: int) -> torch.Tensor:
        packed, codebooks, scales, aux = self._operands()
        return additive_matmul_swiglu(
            z, packed, codebooks, scales, aux, self.partitions, self.layer.precision, self.tokens,
            up_first, image,
        )  # fmt: skip

    def rows(self, z) -> torch.Tensor:
        packed, codebooks, scales, aux = self._operands()
        return additive_matmul_rows(
            z, packed, codebooks, scales, self.layer.bias, aux, self.partitions,
            self.layer.precision, self.tokens,
        )  # fmt: skip
