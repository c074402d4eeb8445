"""The ``quantization_config`` block of a checkpoint, derived from the tensors it describes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from ..formats import AdditiveFormat
from ..layers import QuantLinear, quantized_layers
from .headers import CheckpointError
from .layout import TENSORS, quantized_names
from .own import METHOD, describe_layers


def describe(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """The published config fields of a checkpoint with these tensors (only shapes are looked at).

    One scheme is all that the published fields can express: the most common one. When layers
    differ, ``layer_schemes`` lists the others as ``{module: scheme id}``; loaders that read the
    safetensors headers, like ours, need neither, and other loaders drop the extra key.

    ``tensors`` are the checkpoint's, by their names on disk; codes may be left out. Raises
    CheckpointError when there is no quantized layer.
    """
    names = [name for name in quantized_names(tensors) if f"{name}.codebooks" in tensors]
    if not names:
        raise CheckpointError("no quantized layer: no tensor is named *.codebooks")
    formats = {n: AdditiveFormat.of_codebooks(tensors[f"{n}.codebooks"]) for n in names}
    common = Counter(formats.values()).most_common(1)[0][0]
    quantized = {f"{n}.{t}" for n in names for t in (*TENSORS, "bias")}
    fields: dict[str, object] = {
        "num_codebooks": common.num_codebooks,
        "nbits_per_codebook": common.nbits,
        "in_group_size": common.in_group_size,
        "out_group_size": common.out_group_size,
        "linear_weights_not_to_quantize": sorted(n for n in tensors if n not in quantized),
    }
    others = {name: format.id for name, format in formats.items() if format != common}
    return {**fields, "layer_schemes": others} if others else fields


def checkpoint_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a transformers model on the meta device, named as ``save_pretrained`` does.

    Tied parameters appear under each of their names. Codes of prepared layers do not appear.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(
        model,
        {
            name: torch.empty_like(parameter, device="meta")
            for name, parameter in model.named_parameters(remove_duplicate=False)
        },
    )


def names_on_disk(model: nn.Module) -> dict[str, str]:
    """The name that ``save_pretrained`` gives each quantized layer, by module path."""
    from transformers.core_model_loading import revert_weight_conversion

    marks = {path: torch.empty(0, device="meta") for path, _ in quantized_layers(model)}
    saved = revert_weight_conversion(model, {f"{p}.mark": t for p, t in marks.items()})
    names = {id(tensor): key.removesuffix(".mark") for key, tensor in saved.items()}
    return {path: names[id(tensor)] for path, tensor in marks.items()}


def method_fields(model: nn.Module) -> dict[str, object]:
    """The ``quantization_config`` block of a model: AQLM's own where it can express all layers."""
    layers = dict(quantized_layers(model))
    if all(isinstance(layer.format, AdditiveFormat) for layer in layers.values()):
        return {"quant_method": "aqlm", **describe(checkpoint_parameters(model))}
    names = names_on_disk(model)
    shapes = {
        names[path]: (layer.format, layer.out_features, layer.in_features)
        for path, layer in layers.items()
    }
    return {"quant_method": METHOD, **describe_layers(shapes)}


def attach_config(model: nn.Module) -> None:
    """Make a transformers model whose layers were swapped in this process savable.

    Sets ``model.config.quantization_config`` and ``model.hf_quantizer``: ``save_pretrained`` then
    writes a checkpoint that ``from_pretrained`` loads. A quantized output head is no longer tied to
    the embedding, and the config then says so. Calling it again is harmless, and needed after
    further layers were swapped.

    Raises CheckpointError when ``model`` is no transformers model or has no quantized layer.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise CheckpointError(f"{type(model).__name__} is not a transformers model")
    if not any(True for _ in quantized_layers(model)):
        raise CheckpointError(f"{type(model).__name__} has no quantized layer")
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    fields = method_fields(model)
    config = AutoQuantizationConfig.from_dict(fields)
    # The stock class of AQLM drops layer_schemes, but saves what it holds.
    config.__dict__.update({k: v for k, v in fields.items() if k != "quant_method"})
    if isinstance(model.get_output_embeddings(), QuantLinear):
        model.config.get_text_config().tie_word_embeddings = False
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config)
    model.is_quantized = True
    model.quantization_method = config.quant_method
