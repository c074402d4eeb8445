"""``ref.dequant``: dequantize and matmul in plain torch. Any format, any device, always right.

It is the slow last resort, and what forced runs compare with. It keeps the canonical tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..formats import Format, Tensors, parse_scheme
from ..ops.library import define, differentiate
from .registry import Buffers, Kernel, Partitions, Problem, register


def _named(format: Format, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    # Names and their order do not depend on the shape.
    return dict(zip(format.tensor_specs(0, 0), tensors, strict=True))


def _weight(scheme, tensors, dtype):
    format = parse_scheme(scheme)
    return format.dequantize(_named(format, tensors), dtype).contiguous()


def _weight_fake(scheme, tensors, dtype):
    format = parse_scheme(scheme)
    named = _named(format, tensors)
    return tensors[0].new_empty(
        (format.out_features(named), format.in_features(named)), dtype=dtype
    )


def _weight_context(ctx, inputs, output):
    ctx.scheme, tensors, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _weight_backward(ctx, dweight):
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
    wanted = [t for t in leaves if t.requires_grad]
    with torch.enable_grad():
        weight = _weight(ctx.scheme, leaves, ctx.dtype)
    grads = iter(torch.autograd.grad(weight, wanted, dweight, allow_unused=True))
    return None, [next(grads) if t.requires_grad else None for t in leaves], None


# One node in a compiled graph: tracing would go through the making of every table of a format.
define(
    ("reference_weight(str scheme, Tensor[] tensors, ScalarType dtype) -> Tensor",),
    (_weight_fake,),
    (_weight,),
)
differentiate("reference_weight", _weight_backward, _weight_context)


def _repack(format: Format, tensors: Tensors, partitions: Partitions, precision: str):
    return {f"packed_{name}": tensors[name] for name in format.code_names}


def _unpack(format: Format, buffers: Buffers, N: int, K: int, partitions: Partitions):
    return {name: buffers[f"packed_{name}"] for name in format.code_names}


def _dequantize(
    format: Format,
    buffers: Buffers,
    values: Tensors,
    K: int,
    partitions: Partitions,
    dtype: torch.dtype | None = None,
):
    tensors = {**values, **{n: buffers[f"packed_{n}"] for n in format.code_names}}
    parts = [tensors] if len(partitions) == 1 else format.split(tensors, partitions)
    if torch.compiler.is_compiling() and dtype is not None:
        names = list(format.tensor_specs(0, 0))
        weight = torch.ops.aqlm_infer.reference_weight
        weights = [weight(format.id, [t[n] for n in names], dtype) for t in parts]
    else:
        weights = [format.dequantize(t, dtype) for t in parts]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _matmul(format, x, buffers, values, bias, partitions, precision):
    weight = _dequantize(format, buffers, values, x.shape[-1], partitions, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _why_not(problem: Problem) -> str | None:
    if problem.precision != "exact":
        return f"precision {problem.precision!r} is not implemented (exact only)"
    return None


def _cost(problem: Problem) -> float:
    # Writes and reads the weight in 4 bytes, at about 5 GB/s: only to rank it behind real kernels.
    return 50.0 + problem.N * problem.K * 8 / 5e3


register(
    Kernel("ref.dequant", _repack, _unpack, _matmul, _dequantize, _why_not, _cost, trains=True)
)
