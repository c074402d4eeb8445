"""Layers that read one input, quantized so that they can share its rotation at inference.

Their quantizers draw the same signs from the same seed; balanced by the same column energies too,
they arrive at equal SU vectors, which is what ``share_rotations`` looks for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..formats import E8PFormat, Format, QuipFormat
from ..generation.stack import SIBLINGS
from ..quantizers.rotate import column_energy


def rotation_kind(format: Format) -> str | None:
    """Which Hadamard rotation a format puts on its input; None where there is none to share."""
    rotated = isinstance(format, E8PFormat | QuipFormat)
    return format.rotation if rotated and format.rotation != "kronecker" else None


def shared_options(
    block: nn.Module, siblings: Mapping[str, Format], format: Format
) -> dict[str, torch.Tensor]:
    """Quantizer options that give ``format``'s layers among ``siblings`` the same SU.

    ``siblings`` are all layers of ``block`` that read one input, by name. Layers join whose inputs
    are rotated alike; a layer alone keeps its own balance, and the result is empty.
    """
    kind = rotation_kind(format)
    names = [n for n, other in siblings.items() if kind and rotation_kind(other) == kind]
    if len(names) < 2:
        return {}
    energies = [column_energy(block.get_submodule(n).weight.detach()) for n in names]
    return {"energy": torch.stack(energies).sum(0)}


def shared_by_name(model: nn.Module, chosen: Mapping[str, Format]) -> dict[str, dict]:
    """``shared_options`` of every layer of ``chosen`` that has some, by name.

    For quantization without calibration, in which nobody sees who reads what: the siblings are
    those that SIBLINGS names.
    """
    options = {}
    for parent in {name.rpartition(".")[0] for name in chosen}:
        for names in SIBLINGS:
            found = {n: f"{parent}.{n}" if parent else n for n in names}
            found = {n: chosen[full] for n, full in found.items() if full in chosen}
            for name, format in found.items():
                full = f"{parent}.{name}" if parent else name
                options[full] = shared_options(model.get_submodule(parent), found, format)
    return {name: shared for name, shared in options.items() if shared}
