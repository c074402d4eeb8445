"""Models of published shapes with random weights, made in packed form on the device.

Speed does not depend on the weights' values, so it can be measured without downloading them. No
dense weight of a quantized layer ever exists: a 70B model at 2 bits takes 18 GB, not 140.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ..checkpoint import FUSED
from ..formats import E8PFormat, Format, parse_scheme
from ..layers import QuantLinear, place_fused
from .layers import BenchError, random_tensors

SHAPES: dict[str, dict] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama-2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "llama-3-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Fields of the Llama configuration of each shape (the models' own config.json)."""


def shape_config(shape: str, layers: int | None = None) -> LlamaConfig:
    """The configuration of a shape, with fewer ``layers`` if asked for; BenchError if unknown."""
    if shape not in SHAPES:
        raise BenchError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    fields = dict(SHAPES[shape])
    if layers is not None:
        if not 1 <= layers <= fields["num_hidden_layers"]:
            raise BenchError(f"layers={layers} is outside 1..{fields['num_hidden_layers']}")
        fields["num_hidden_layers"] = layers
    theta = 10000.0 if shape == "llama-2-7b" else 500000.0
    return LlamaConfig(
        **fields,
        max_position_embeddings=8192,
        rope_theta=theta,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=None,
    )


def random_model(
    config: LlamaConfig,
    scheme: str | Format | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    precision: str = "exact",
) -> LlamaForCausalLM:
    """A model of ``config`` with random weights, its blocks' layers in ``scheme`` (None: dense).

    E8P layers are fused as published QuIP# checkpoints fuse them (q/k/v, up/gate). ``precision``
    is what the kernels may round.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    if scheme is not None:
        make = partial(_layer, dtype=dtype, device=device, precision=precision)
        _place_quantized(model, parse_scheme(scheme), make, seed)
    # The inverse frequencies are computed, not stored: made anew on the device.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                module.register_parameter(name, _random(value, dtype, device, generator))
    model.tie_weights()
    return model.eval()


def _random(value: torch.Tensor, dtype, device, generator) -> nn.Parameter:
    if value.dim() == 1:  # norms
        made = torch.ones(value.shape, dtype=dtype, device=device)
    else:
        made = torch.empty(value.shape, dtype=dtype, device=device)
        made.normal_(std=value.shape[-1] ** -0.5, generator=generator)
    return nn.Parameter(made, requires_grad=False)


def _place_quantized(model: nn.Module, format: Format, make, seed: int) -> None:
    """Random quantized layers in the places of all linear layers but the head."""
    fused = FUSED if isinstance(format, E8PFormat) else {}
    taken = set()
    for path, block in list(model.named_modules()):
        for name, parts in fused.items():
            linears = [getattr(block, part, None) for part in parts]
            if all(isinstance(linear, nn.Linear) for linear in linears):
                sizes = tuple(linear.out_features for linear in linears)
                whole = E8PFormat(format.bits, format.blocks, format.residual, sizes)
                seed += 1
                layer = make(whole, sum(sizes), linears[0].in_features, seed)
                place_fused(block, name, layer, parts)
                taken.update(f"{path}.{part}" for part in parts)
    head = model.get_output_embeddings()
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not head and path not in taken:
            seed += 1
            layer = make(format, linear.out_features, linear.in_features, seed)
            model.set_submodule(path, layer)


def _layer(format: Format, N: int, K: int, seed: int, *, dtype, device, precision) -> QuantLinear:
    tensors = random_tensors(format, N, K, dtype, seed, device)
    return QuantLinear.from_tensors(format, tensors, K, precision=precision)
