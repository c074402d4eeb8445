"""The final checkpoint, put together from the blocks' files and the dense rest of the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from ..checkpoint import save_quantized
from ..evaluation import load_tokenizer, resolve_model
from ..evaluation.loading import ModelError
from ..formats import Format
from ..layers import QuantLinear
from .stream import BlockStream, set_parameter


@torch.no_grad()
def write_checkpoint(
    stream: BlockStream,
    chosen: Mapping[str, Format],
    files: Sequence[Path],
    out: Path,
    dtype: torch.dtype,
) -> None:
    """Write the quantized model to ``out``: layers, norms and biases from ``files``, one a block
    and one for a quantized output head, the rest from the source, in ``dtype``. The whole is in
    host memory, quantized, meanwhile.
    """
    from transformers import GenerationConfig

    model = stream.model
    for index, file in enumerate(files):
        with safe_open(file, "pt") as saved:
            if index < len(stream.blocks):
                _fill_block(model, stream.block_name(index), chosen, saved, dtype)
            else:
                _fill_head(stream, chosen, saved)
    for name, _ in list(model.named_parameters()):
        if not name.startswith(stream.prefix + ".") and stream.weights.has(name):
            set_parameter(model, name, stream.weights.get(name).to(dtype))
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[leaf] = buffer.cpu()
    model.tie_weights()
    model.config.dtype = dtype
    source, local = resolve_model(stream.source)
    try:
        model.generation_config = GenerationConfig.from_pretrained(source, local_files_only=local)
    except OSError:  # the source has none
        model.generation_config = None
    try:
        tokenizer = load_tokenizer(stream.source)
    except ModelError:
        tokenizer = None
    save_quantized(model, out, tokenizer)


def _fill_head(stream: BlockStream, chosen: Mapping[str, Format], saved) -> None:
    """Put the quantized output head in place; it is no longer tied to the embedding."""
    name, linear = stream.head()
    format = chosen[name]
    keys = format.tensor_specs(linear.out_features, linear.in_features)
    tensors = {key: saved.get_tensor(f"{name}.{key}") for key in keys}
    stream.model.config.get_text_config().tie_word_embeddings = False
    layer = QuantLinear.from_tensors(format, tensors, linear.in_features, None)
    stream.model.set_submodule(name, layer)


def _fill_block(model, prefix: str, chosen: Mapping[str, Format], saved, dtype) -> None:
    names = set(saved.keys())
    block = model.get_submodule(prefix)
    for full, format in chosen.items():
        if not full.startswith(prefix + "."):
            continue
        name = full.removeprefix(prefix + ".")
        linear = block.get_submodule(name)
        keys = format.tensor_specs(linear.out_features, linear.in_features)
        tensors = {key: saved.get_tensor(f"{name}.{key}") for key in keys}
        bias = saved.get_tensor(f"{name}.bias") if f"{name}.bias" in names else None
        layer = QuantLinear.from_tensors(format, tensors, linear.in_features, bias)
        block.set_submodule(name, layer)
    for name, parameter in list(block.named_parameters()):
        if parameter.is_meta:
            set_parameter(block, name, saved.get_tensor(name).to(dtype))
