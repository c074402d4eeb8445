"""The operator library of this package, and the error that operators raise.

The functions that modules export are overloads (``.default``), not packets, which look the overload
up in every call: 2.4 against 4.0 us with the eight arguments of ``additive_matmul`` (Zen 5).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "aqlm_infer"

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
"""Backends register their implementations here: ``LIBRARY.impl(name, function, "CPU")``."""


class OperandError(ValueError):
    """Tensors that an operator cannot combine; the message prints their shapes or dtypes."""


def define(
    schemas: tuple[str, ...], fakes: tuple[Callable, ...], defaults: tuple[Callable, ...] = ()
) -> None:
    """Define operators with their fakes, in the same order; ``defaults`` run on every device."""
    for schema, fake in zip(schemas, fakes, strict=True):
        LIBRARY.define(schema)
        torch.library.register_fake(f"{NAMESPACE}::{_name(schema)}", fake, lib=LIBRARY)
    for schema, function in zip(schemas, defaults, strict=False):
        LIBRARY.impl(_name(schema), function, "CompositeExplicitAutograd")


def _name(schema: str) -> str:
    return schema[: schema.index("(")]


Gradient = tuple[Callable, Callable]
"""What ``register_autograd`` takes: the backward function, and what sets up its context."""


def differentiate(name: str, backward: Callable, context: Callable) -> None:
    """Register the gradient of an operator."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=context, lib=LIBRARY
    )


def fresh_bytes(like: torch.Tensor) -> torch.Tensor:
    """A fake uint8 tensor of unknown size: runtime layouts belong to the backend."""
    return like.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.uint8)


def check_input(x: torch.Tensor, bias: torch.Tensor | None, N: int) -> None:
    """Raise OperandError unless x is a floating [..., K] and bias None or [N]."""
    if not x.is_floating_point():
        raise OperandError(f"x has dtype {x.dtype}, expected float32, bfloat16 or float16")
    if x.dim() == 0:
        raise OperandError("x has no dimensions, expected [..., K]")
    check_vector(bias, N, "bias")


def check_vector(vector: torch.Tensor | None, size: int, name: str) -> None:
    """Raise OperandError unless ``vector`` is None or a floating [size]."""
    if vector is None:
        return
    if tuple(vector.shape) != (size,):
        raise OperandError(f"{name} has shape {list(vector.shape)}, expected [{size}]")
    if not vector.is_floating_point():
        raise OperandError(f"{name} has dtype {vector.dtype}, expected a floating dtype")


def bias_gradient(dy: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of dy over tokens, in float32 whatever dy's dtype."""
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(dtype)
