"""A quantized output head: for a 2-bit Llama-3-8B the dense one is 38 % of the bytes of a token."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..formats import Format, ScalarFormat, parse_scheme
from ..layers import QuantLinear
from ..quantizers import quantizer_for
from .errors import GenerationSetupError

_ROWS = 16384
"""Rows quantized at a time: float32 copies of a whole head would take gigabytes."""


def parse_head(scheme: str | Format) -> Format:
    """The format of ``scheme``; GenerationSetupError when no head can have it."""
    format = parse_scheme(scheme)
    if not isinstance(format, ScalarFormat) or format.method != "rtn":
        raise GenerationSetupError(
            f"lm_head={format.id!r}: the head is rounded to nearest, without calibration"
            " (rtn-int8-g128, rtn-int4-g128, ...)"
        )
    return format


def head_format(model: nn.Module, scheme: str | Format) -> Format:
    """The format of a head in ``scheme``; GenerationSetupError when the head cannot have it."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        kind = "none" if head is None else type(head).__name__
        raise GenerationSetupError(f"lm_head={scheme!r}: the model's output head is {kind}")
    format = parse_head(scheme)
    format.check_shape(head.out_features, head.in_features)
    return format


def quantize_head(model: nn.Module, scheme: str | Format) -> nn.Linear:
    """Put a quantized head in the place of the dense one, which is returned (kept on the CPU).

    Tied embeddings stay as they are: the head stops sharing their weight.
    """
    format = head_format(model, scheme)
    head = model.get_output_embeddings()
    quantizer, weight = quantizer_for(format), head.weight.detach()
    pieces = [quantizer.fit(rows) for rows in weight.split(_ROWS)]
    specs = format.tensor_specs(head.out_features, head.in_features)
    tensors = {
        name: torch.cat([piece[name] for piece in pieces]).to(spec.dtype or weight.dtype)
        for name, spec in specs.items()
    }
    layer = QuantLinear.from_tensors(format, tensors, head.in_features, head.bias)
    model.set_output_embeddings(layer.train(head.training))
    tied = head.weight is getattr(model.get_input_embeddings(), "weight", None)
    return head if tied else head.to("cpu")


def give_rows(head: nn.Module) -> RemovableHandle:
    """Let a dense head on the CPU read its input as plain rows, until the handle is removed.

    The last token of a prompt comes as a slice [B, 1, K] with the strides of the whole prompt.
    F.linear then takes a batched product that copies the weight, transposed: 3.3 s to the first
    token of Llama-3.2-1B in bfloat16 on two cores, 0.3 s without (torch 2.13).
    """
    return head.register_forward_pre_hook(_plain_rows)


def _plain_rows(head: nn.Module, inputs: tuple) -> tuple:
    return (inputs[0].clone(memory_format=torch.contiguous_format),)


def restore_head(model: nn.Module, head: nn.Linear) -> None:
    """Undo ``quantize_head``."""
    layer = model.get_output_embeddings()
    model.set_output_embeddings(head.to(layer.scales.device, layer.scales.dtype))
