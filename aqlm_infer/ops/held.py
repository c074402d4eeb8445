"""Give a layer's operands to a backend that keeps them, input rotation included.

The number that comes back is for ``backends.held.Held`` to take, once. Calls of kept operands are
no operators: they neither have a gradient nor a place in a graph.
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
):
    LIBRARY.define(_schema)

_ops = torch.ops.aqlm_infer
hold_additive = _ops.hold_additive.default
hold_e8p = _ops.hold_e8p.default
hold_scalar = _ops.hold_scalar.default
