"""How a checkpoint stores each quantized layer: its format, and whether its codes are transposed.

Everything is decided from headers, before a module exists, and every disagreement is an error here:
a loader that goes on from this point cannot end with a half-loaded model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ..formats import AdditiveFormat, Format, FormatError, TensorSpec
from ..formats.base import check_spec
from .headers import CheckpointError

TENSORS = ("codes", "codebooks", "scales")
"""Tensors that every quantized layer has in a published checkpoint."""


@dataclass(frozen=True)
class LinearShape:
    """What the model expects of a linear layer: out_features, in_features, whether it is biased."""

    N: int
    K: int
    bias: bool


@dataclass(frozen=True)
class StoredLayer:
    """One quantized layer of a checkpoint; ``transposed`` AQLM codes are stored [I, O, B]."""

    format: Format
    shape: LinearShape
    transposed: bool = False


def quantized_names(names: Iterable[str]) -> list[str]:
    """Modules that have any tensor of a quantized layer, in order of appearance."""
    found: dict[str, None] = {}
    for name in names:
        module, _, tensor = name.rpartition(".")
        if module and tensor in TENSORS:
            found[module] = None
    return list(found)


def stored_layers(
    headers: Mapping[str, torch.Tensor], shapes: Mapping[str, LinearShape]
) -> dict[str, StoredLayer]:
    """Check the headers of the layers in ``shapes`` and say how each is stored.

    Args:
        headers: tensors of the checkpoint on the meta device, by name.
        shapes: the model's linear layers to load, under their checkpoint names.

    Raises FormatError naming tensor and values when a tensor is missing or has another shape, rank
    or dtype than the layer and its codebooks ask for; CheckpointError when square layers cannot be
    told apart.
    """
    layers: dict[str, StoredLayer] = {}
    square: list[str] = []
    for name, shape in shapes.items():
        format = _check_layer(headers, name, shape)
        rows, columns, _ = format.tensor_specs(shape.N, shape.K)["codes"].shape
        stored = tuple(headers[f"{name}.codes"].shape[:2])
        transposed = rows != columns and stored == (columns, rows)
        layers[name] = StoredLayer(format, shape, transposed)
        if rows == columns:
            square.append(name)
    for name in square:
        # The reference CPU path, which transposed them, did so per container: 8-bit codes only.
        dtype = layers[name].format.code_dtype
        seen = {
            layer.transposed
            for other, layer in layers.items()
            if other not in square and layer.format.code_dtype == dtype
        }
        if len(seen) == 2:
            shape = list(headers[f"{name}.codes"].shape)
            raise CheckpointError(
                f"{name}.codes has shape {shape}, which reads both ways, and other layers of the"
                " checkpoint are stored both as [O, I, B] and as [I, O, B]"
            )
        if seen == {True}:
            layers[name] = replace(layers[name], transposed=True)
    return layers


def _check_layer(
    headers: Mapping[str, torch.Tensor], name: str, shape: LinearShape
) -> AdditiveFormat:
    """The layer's format, once all its headers agree with it and with the model's shape."""
    needed = (*TENSORS, "bias") if shape.bias else TENSORS
    for tensor in needed:
        if f"{name}.{tensor}" not in headers:
            raise FormatError(
                f"{name}.{tensor} is missing from the checkpoint"
                f" (quantized layer N={shape.N}, K={shape.K}, bias={shape.bias})"
            )
    codes, codebooks, scales = (headers[f"{name}.{tensor}"] for tensor in TENSORS)
    try:
        format = AdditiveFormat.of_codebooks(codebooks)
        format.check_shape(shape.N, shape.K)
    except FormatError as error:
        raise FormatError(f"{name}: {error} (codebooks {list(codebooks.shape)})") from error
    specs = format.tensor_specs(shape.N, shape.K)
    groups, columns, _ = specs["codes"].shape
    if columns > 1 and tuple(scales.shape) == (groups, columns, 1, 1):
        raise FormatError(
            f"{name}.scales has shape {list(scales.shape)}: grouped scales, one per vector, are not"
            f" part of the published format, expected [{groups}, 1, 1, 1]"
        )
    if tuple(codes.shape[:2]) == (columns, groups) and codes.dim() == 3:
        codes = codes.transpose(0, 1)
    check_spec(codes, specs["codes"], f"{name}.codes", format.id)
    check_spec(codebooks, specs["codebooks"], f"{name}.codebooks", format.id)
    check_spec(scales, specs["scales"], f"{name}.scales", format.id)
    if shape.bias:
        check_spec(headers[f"{name}.bias"], TensorSpec((shape.N,), None), f"{name}.bias", format.id)
    return format
