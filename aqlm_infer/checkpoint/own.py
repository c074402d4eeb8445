"""Our own method of ``quantization_config``: one scheme a layer, and how its rotations are made.

    {"quant_method": "aqlm_infer", "version": 1,
     "layers": {"model.layers.0.mlp.up_proj": "quip-e8p-2bit", ...},
     "rotations": {"hadamard": {"5120": {"factor": 20, "construction": "paley-1 q=19"}}}}

It is written for models with any layer that the published AQLM block cannot express. A file says
with it, apart from this program, which matrices its weights were rotated by.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..formats import Format, FormatError, TensorSpec, parse_scheme
from ..formats.base import check_spec
from ..formats.rotated import rotation_of
from .headers import CheckpointError
from .layout import LinearShape, StoredLayer

METHOD = "aqlm_infer"
VERSION = 1

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")}
"""Layers that QuIP# quantizes as one matrix, and their parts in order."""

MARKS = ("codes", "Qidxs", "qweight")
"""Tensors that every quantized layer has one of."""


def describe_layers(layers: Mapping[str, tuple[Format, int, int]]) -> dict[str, object]:
    """The fields of the block for layers ``{name on disk: (format, N, K)}``."""
    rotations: dict[str, dict[str, object]] = {}
    for format, *sizes in layers.values():
        kind = getattr(format, "rotation", None)
        if kind == "kronecker":
            rotations["kronecker"] = {"tensors": "U_*, V_*"}
        elif kind is not None:
            for size in sizes:
                made = rotation_of(kind, size).describe()
                rotations.setdefault(kind, {})[str(size)] = made
    schemes = {name: format.id for name, (format, *_) in layers.items()}
    return {"version": VERSION, "layers": schemes, "rotations": rotations}


def check_block(block: Mapping[str, object]) -> dict[str, Format]:
    """The layers of a block ``{name on disk: format}``.

    Raises CheckpointError when its version is not ours, when it has no layer, or when a rotation is
    made otherwise than this program makes it; FormatError for an unknown scheme.
    """
    if block.get("version") != VERSION:
        raise CheckpointError(
            f"quantization_config has version {block.get('version')!r}, this program reads"
            f" {VERSION}"
        )
    layers = block.get("layers")
    if not isinstance(layers, Mapping) or not layers:
        raise CheckpointError("quantization_config lists no quantized layer")
    for kind, sizes in (block.get("rotations") or {}).items():
        if kind == "kronecker":
            continue
        for size, recorded in sizes.items():
            made = rotation_of(kind, int(size)).describe()
            if made != recorded:
                raise CheckpointError(
                    f"the rotation of size {size} was made as {recorded}, this program makes {made}"
                )
    return {name: parse_scheme(scheme) for name, scheme in layers.items()}


def declared_layers(
    headers: Mapping[str, torch.Tensor] | None,
    formats: Mapping[str, Format],
    shapes: Mapping[str, LinearShape],
) -> dict[str, StoredLayer]:
    """Check the headers of the declared layers against the model's shapes.

    Args:
        headers: the checkpoint's tensors on the meta device by name; None: not known, not checked.
        formats: the declared layers, by their names on disk.
        shapes: what the model expects of each of them.

    Raises FormatError naming tensor and values when one is missing or does not fit, CheckpointError
    when the file has quantized layers that are not declared.
    """
    for name, shape in shapes.items():
        reason = formats[name].why_not_shape(shape.N, shape.K)
        if reason:
            raise FormatError(f"{name}: {reason}")
        if headers is not None:
            _check_layer(headers, name, formats[name], shape)
    for key in headers or ():
        name, _, tensor = key.rpartition(".")
        if tensor in MARKS and name not in formats:
            raise CheckpointError(f"{key} belongs to no layer that quantization_config lists")
    return {name: StoredLayer(formats[name], shape) for name, shape in shapes.items()}


def _check_layer(headers, name: str, format: Format, shape: LinearShape) -> None:
    specs = format.tensor_specs(shape.N, shape.K)
    if shape.bias:
        specs["bias"] = TensorSpec((shape.N,), None)
    for key, spec in specs.items():
        if f"{name}.{key}" not in headers:
            raise FormatError(
                f"{name}.{key} is missing from the checkpoint ({format.id}, N={shape.N},"
                f" K={shape.K}, bias={shape.bias})"
            )
        check_spec(headers[f"{name}.{key}"], spec, f"{name}.{key}", format.id)
