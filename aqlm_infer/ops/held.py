"""Calls of layers whose operands a backend keeps: for eager inference, where a call is host time.

``hold_additive``, ``hold_e8p`` and ``hold_scalar`` keep the operands of one layer, input rotation
included, and return their number; ``release`` gives it back. Then

    held_linear(x [..., K], number) -> y [..., N]
    held_rotation(x, number) -> z [..., K], held_product(z, number) -> y: its two halves

are the same launches as ``hadamard`` and the matmul, with the same results bit for bit. They have
neither a gradient nor a fake, and no place in a graph that outlives the numbers.
"""

from __future__ import annotations

import torch

from .library import LIBRARY

for _schema in (
    "hold_additive(Tensor packed, Tensor codebooks, Tensor scales, Tensor? bias, Tensor aux,"
    " int[] partitions, str precision) -> int",
    "hold_e8p(Tensor packed, Tensor su, Tensor h_in, Tensor? sv, Tensor? bias, Tensor h, int bits,"
    " float residual, int N, int in_factor, int factor, int block, str precision) -> int",
    "hold_scalar(Tensor packed, Tensor scales, Tensor? zeros, Tensor? su, Tensor h_in, Tensor? sv,"
    " Tensor? bias, Tensor h, int bits, int group_size, int N, int in_factor, int factor,"
    " int block, str precision) -> int",
    "held_linear(Tensor x, int layer) -> Tensor",
    "held_rotation(Tensor x, int layer) -> Tensor",
    "held_product(Tensor z, int layer) -> Tensor",
    "release(int layer) -> ()",
):
    LIBRARY.define(_schema)

_ops = torch.ops.aqlm_infer
hold_additive = _ops.hold_additive.default
hold_e8p = _ops.hold_e8p.default
hold_scalar = _ops.hold_scalar.default
held_linear = _ops.held_linear.default
held_rotation = _ops.held_rotation.default
held_product = _ops.held_product.default
release = _ops.release.default
