"""A quantized output head: for a 2-bit Llama-3-8B the dense one is 38 % of the bytes of a token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
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


class RowsLinear(nn.Linear):
    """A dense head on the CPU while its model is prepared: the same tensors, read once a token.

    One token takes ``ops.dense_matvec``. Several are given to F.linear as plain rows: the last
    token of a prompt comes as a slice [B, 1, K] with the strides of the whole prompt, for which
    F.linear takes a batched product that copies the weight, transposed: 3.3 s to the first token
    of Llama-3.2-1B in bfloat16 on two cores, 0.3 s without (torch 2.13).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = x.numel() == self.in_features and x.dtype == self.weight.dtype
        if one and not torch.is_grad_enabled():
            return ops.dense_matvec(x, self.weight, self.bias)
        rows = x.clone(memory_format=torch.contiguous_format)
        return F.linear(rows, self.weight, self.bias)


def give_rows(head: nn.Module | None) -> bool:
    """Make a dense head on the CPU a ``RowsLinear``, in place; whether it is one now."""
    if type(head) is not nn.Linear or head.weight.device.type != "cpu":
        return False
    head.__class__ = RowsLinear
    return True


def take_rows(head: nn.Module | None) -> None:
    """Undo ``give_rows``."""
    if type(head) is RowsLinear:
        head.__class__ = nn.Linear


def restore_head(model: nn.Module, head: nn.Linear) -> None:
    """Undo ``quantize_head``."""
    layer = model.get_output_embeddings()
    model.set_output_embeddings(head.to(layer.scales.device, layer.scales.dtype))
