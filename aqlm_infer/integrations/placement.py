"""Which modules of a transformers model become quantized layers, and putting empty ones there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..checkpoint import (
    CheckpointError,
    LinearShape,
    StoredLayer,
    check_block,
    declared_layers,
    quantized_names,
    stored_layers,
)
from ..formats import AdditiveFormat, FormatError
from ..layers import QuantLinear
from .fused import check_parts, fused_slots, place
from .moe import LAYOUTS, QuantExperts


def linear_slots(model: nn.Module) -> dict[str, LinearShape]:
    """Every place of the model that a quantized layer can take, by module path."""
    slots = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bias = module.bias is not None
            slots[path] = LinearShape(module.out_features, module.in_features, bias)
        elif type(module).__name__ in LAYOUTS:
            shapes = LAYOUTS[type(module).__name__].shapes(module)
            slots.update({f"{path}.{name}": shape for name, shape in shapes.items()})
    return slots


def model_paths(model: nn.Module, names: Iterable[str], slots: Iterable[str]) -> dict[str, str]:
    """Where the loader will put each quantized module of the checkpoint: ``{name: slot path}``.

    The loader's own rules decide: renamings of the model type, and the base model's prefix added or
    removed. A path that is no slot belongs to a module that this model does not have.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known = {f"{path}.codes": True for path in slots}
    paths = {}
    for name in names:
        target, _ = rename_source_key(
            f"{name}.codes", renamings, converters, model.base_model_prefix, known
        )
        paths[name] = target.removesuffix(".codes")
    return paths


def header_layers(
    model: nn.Module, headers: Mapping[str, torch.Tensor], slots: Mapping[str, LinearShape]
) -> dict[str, StoredLayer]:
    """The layers that the checkpoint's headers say are quantized, by module path.

    Modules that the model lacks are left to the loader, which reports them as unexpected. Raises
    CheckpointError when the model has the module in a form that has no place for codes, since its
    weights would then stay random; FormatError when the headers disagree.
    """
    paths = model_paths(model, quantized_names(headers), slots)
    for name, path in paths.items():
        if path not in slots and f"{name}.codes" in headers:
            _refuse_unplaced(model, name, path)
    placed = {name: path for name, path in paths.items() if path in slots}
    stored = stored_layers(headers, {name: slots[path] for name, path in placed.items()})
    return {placed[name]: layer for name, layer in stored.items()}


def _refuse_unplaced(model: nn.Module, name: str, path: str) -> None:
    """Raise CheckpointError when the module at ``path``, or its holder, keeps weights its way."""
    modules = dict(model.named_modules())
    while path and path not in modules:
        path = path.rpartition(".")[0]
    if path and any(True for _ in modules[path].parameters(recurse=False)):
        raise CheckpointError(
            f"{name}.codes: {path} of the model is {type(modules[path]).__name__}, which has no"
            " place for quantized layers"
        )


def block_layers(
    model: nn.Module,
    block: Mapping,
    headers: Mapping[str, torch.Tensor] | None,
    slots: Mapping[str, LinearShape],
) -> dict[str, StoredLayer]:
    """The layers that our own config block lists, by module path; ``headers`` None: not checked.

    Raises CheckpointError when the model has no place for one, or when block, headers and model
    disagree; FormatError naming a tensor that does not fit.
    """
    formats = check_block(block)
    fused = fused_slots(slots)
    paths = model_paths(model, formats, (*slots, *fused))
    shapes = {}
    for name, path in paths.items():
        if path in fused and path not in slots:
            check_parts(path, formats[name], fused[path])
            shapes[name] = fused[path].shape
        elif path in slots:
            shapes[name] = slots[path]
        else:
            raise CheckpointError(
                f"{name} is quantized ({formats[name].id}), but {type(model).__name__} has no"
                " linear layer of that name"
            )
    stored = declared_layers(headers, formats, shapes)
    return {paths[name]: layer for name, layer in stored.items()}


def listed_layers(
    model: nn.Module, config, slots: Mapping[str, LinearShape]
) -> dict[str, StoredLayer]:
    """The layers that a config alone says are quantized, for loads from a state dict in memory.

    A linear layer P stays dense if and only if the list names ``P.weight`` (or P itself: newer
    code writes that). Every other one has the config's scheme.
    """
    format = AdditiveFormat(
        config.num_codebooks, config.nbits_per_codebook, config.in_group_size, config.out_group_size
    )
    listed = [entry.removesuffix(".weight") for entry in config.linear_weights_not_to_quantize]
    dense = set(model_paths(model, listed, slots).values())
    layers = {}
    for path, shape in slots.items():
        if path in dense:
            continue
        reason = format.why_not_shape(shape.N, shape.K)
        if reason:
            raise FormatError(f"{path}: {reason}")
        layers[path] = StoredLayer(format, shape)
    return layers


def refuse_tied(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise CheckpointError when the config ties one of the layers to another parameter."""
    for path in layers:
        source = (model.all_tied_weights_keys or {}).get(f"{path}.weight")
        if source:
            raise CheckpointError(
                f"{path}: the config ties {path}.weight to {source}, a quantized layer cannot be"
                " tied (tie_word_embeddings must be false)"
            )


def replace_modules(model: nn.Module, layers: Mapping[str, StoredLayer]) -> None:
    """Put empty quantized layers on the meta device into their places (dtype: the ambient one)."""
    empty = {path: _empty(stored) for path, stored in layers.items()}
    for path, module in list(model.named_modules()):
        layout = LAYOUTS.get(type(module).__name__)
        if layout is None:
            continue
        slots = {name: empty.pop(f"{path}.{name}", None) for name in layout.shapes(module)}
        absent = [name for name, layer in slots.items() if layer is None]
        if len(absent) == len(slots):
            continue
        if absent:
            raise CheckpointError(
                f"{path}.{absent[0]} is missing from the checkpoint, which quantizes"
                f" {len(slots) - len(absent)} of the {len(slots)} matrices of these experts"
            )
        model.set_submodule(path, QuantExperts(module, slots))
    modules = dict(model.named_modules())
    for path, layer in empty.items():
        if path in modules:
            model.set_submodule(path, layer)
        else:
            place(model, path, layer)


def _empty(stored: StoredLayer) -> QuantLinear:
    N, K, bias = stored.shape.N, stored.shape.K, stored.shape.bias
    layer = QuantLinear.class_for(stored.format)(K, N, stored.format, bias, device="meta")
    if stored.transposed:
        layer.codes = nn.Parameter(layer.codes.transpose(0, 1), requires_grad=False)
    return layer
