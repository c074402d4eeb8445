"""Dense products of one token, for the output head: ``dense_matvec(x [..., K], weight [N, K])``.

Inference only: no gradient. On the CPU it is native (``csrc/cpu/dense.h``), elsewhere torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .library import OperandError, check_input, define

_SCHEMAS = ("dense_matvec(Tensor x, Tensor weight, Tensor? bias) -> Tensor",)


def check_matvec(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise OperandError unless x is one row [..., K] of the dtype of weight [N, K], bias [N]."""
    if weight.dim() != 2:
        raise OperandError(f"weight is {list(weight.shape)}, expected [N, K]")
    check_input(x, bias, weight.shape[0])
    K = weight.shape[1]
    if x.shape[-1] != K or x.numel() != K:
        raise OperandError(f"x is {list(x.shape)}, expected one row [..., {K}]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise OperandError(f"{name} has dtype {tensor.dtype}, x {x.dtype}")


def _matvec(x, weight, bias):
    check_matvec(x, weight, bias)
    return F.linear(x, weight, bias)


def _matvec_fake(x, weight, bias):
    check_matvec(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


define(_SCHEMAS, (_matvec_fake,), (_matvec,))
dense_matvec = torch.ops.aqlm_infer.dense_matvec.default
