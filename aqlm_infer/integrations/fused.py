"""Layers that QuIP# checkpoints quantize as one: where a model has their parts.

A fused module is no module of the transformers model. Its place is the block that has all of its
parts; there it goes under its published name, with ``layers.FusedPart`` modules for the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..checkpoint import FUSED, CheckpointError, LinearShape
from ..formats import Format
from ..layers import QuantLinear, place_fused


@dataclass(frozen=True)
class FusedSlot:
    """The place of a fused layer: the shape of the whole, and the outputs of each part."""

    shape: LinearShape
    sizes: tuple[int, ...]


def fused_slots(slots: Mapping[str, LinearShape]) -> dict[str, FusedSlot]:
    """Every place of the model that a fused layer can take, by the path that it would have."""
    found = {}
    for path in slots:
        block, _, leaf = path.rpartition(".")
        for name, parts in FUSED.items():
            paths = [f"{block}.{part}" for part in parts]
            if leaf != parts[0] or not all(p in slots for p in paths):
                continue
            shapes = [slots[p] for p in paths]
            if len({(s.K, s.bias) for s in shapes}) == 1:
                sizes = tuple(s.N for s in shapes)
                whole = LinearShape(sum(sizes), shapes[0].K, shapes[0].bias)
                found[f"{block}.{name}"] = FusedSlot(whole, sizes)
    return found


def check_parts(path: str, format: Format, slot: FusedSlot) -> None:
    """Raise CheckpointError unless the parts of a fused layer are those of the model."""
    parts = getattr(format, "parts", ())
    if parts != slot.sizes:
        names = FUSED[path.rpartition(".")[2]]
        raise CheckpointError(
            f"{path} ({format.id}) has the parts {list(parts)}, the model's {', '.join(names)} have"
            f" {list(slot.sizes)} outputs"
        )


def place(model: nn.Module, path: str, layer: QuantLinear) -> None:
    """Put a fused layer and its parts into the model."""
    block, _, name = path.rpartition(".")
    place_fused(model.get_submodule(block), name, layer, FUSED[name])
