"""Torch operators: schemas, fakes (= the shape contract) and autograd, once for every backend.

Backends register their implementations for a device key: ``backends/cpu*.py`` for CPU,
``csrc/ops_cuda*.cpp`` for CUDA. One file a family: ``additive`` (AQLM), ``rotated`` (Hadamard,
E8P), ``scalar`` (QuIP's grid, GPTQ, round to nearest), ``dense``: functional, all of them. ``held``
calls layers whose operands CUDA keeps.
"""

from .additive import (
    additive_dequantize,
    additive_matmul,
    additive_matmul_dx,
    additive_pack,
    additive_prepare,
    additive_unpack,
    check_matmul,
    check_operands,
)
from .dense import check_matvec, dense_matvec
from .held import hold_additive, hold_e8p, hold_scalar
from .library import LIBRARY, NAMESPACE, OperandError
from .rotated import (
    check_e8p,
    check_e8p_matmul,
    check_e8p_matmul_dx,
    check_hadamard,
    check_rotation,
    e8p_dequantize,
    e8p_matmul,
    e8p_matmul_dx,
    e8p_pack,
    e8p_unpack,
    hadamard,
)
from .scalar import (
    check_scalar,
    check_scalar_matmul,
    check_scalar_matmul_dx,
    scalar_dequantize,
    scalar_matmul,
    scalar_matmul_dx,
    scalar_pack,
    scalar_unpack,
)

__all__ = [
    "LIBRARY",
    "NAMESPACE",
    "OperandError",
    "additive_dequantize",
    "additive_matmul",
    "additive_matmul_dx",
    "additive_pack",
    "additive_prepare",
    "additive_unpack",
    "check_e8p",
    "check_e8p_matmul",
    "check_e8p_matmul_dx",
    "check_hadamard",
    "check_matmul",
    "check_matvec",
    "check_operands",
    "check_rotation",
    "check_scalar",
    "check_scalar_matmul",
    "check_scalar_matmul_dx",
    "dense_matvec",
    "e8p_dequantize",
    "e8p_matmul",
    "e8p_matmul_dx",
    "e8p_pack",
    "e8p_unpack",
    "hadamard",
    "hold_additive",
    "hold_e8p",
    "hold_scalar",
    "scalar_dequantize",
    "scalar_matmul",
    "scalar_matmul_dx",
    "scalar_pack",
    "scalar_unpack",
]
