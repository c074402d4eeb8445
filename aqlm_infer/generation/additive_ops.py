"""An additive matmul with what follows it in a decode step, up to the next matmul's input.

z is x [M, K], or an image of it [K / 32, 4, T, 8], T >= M tokens wide, as a matmul of the tensor
cores reads it: ``image[s, c, m, 2 t + e] = x[m, 32 s + 8 t + 2 c + e]`` (csrc/cuda/wgmma.cuh).
Operators return rows, or with ``image`` = T an image; what is past M in it is not defined. With
``image`` = T + INT8 it is that of an int8 matmul, uint8 [K / 32 + 1, 2, T, 2, 16]:
``image[s, h, m, b, 4 t + e]`` = high (b = 0) and low byte of element 32 s + 8 t + 4 h + e of token
m, and in the last step the float scales of the tokens (csrc/cuda/wgmma_int8.cuh); on CUDA only. The
product is rounded to z's dtype as ``ops.additive_matmul`` rounds it, the rest as the operators of
``ops`` do.

    additive_matmul_norm: x + product [M, N], and its norm
    additive_matmul_swiglu: silu(gate) * up [M, N / 2] of the product's halves, which are its parts
    (``up_first``: up is the first)
    additive_matmul_rows: the product itself
    additive_joins: whether these take a matmul of so many tokens, before ``then`` = "norm",
    "swiglu" or "rows": -1 if not, else ``image`` of what it takes for z (0: rows only)

CUDA operators of ``_cuda``, for GPUs of sm_90 and later; elsewhere the operators that they join,
and ``additive_joins`` is -1. Inference only.
"""

from __future__ import annotations

import torch

from ..ops import additive_matmul
from ..ops.additive import check_matmul
from ..ops.library import OperandError, define
from .ops import add_rms_norm, check_image, check_rows, image_of, swiglu

INT8 = 1 << 16
"""Added to the tokens of an int8 image."""

_MATMUL = "Tensor z, Tensor packed, Tensor codebooks, Tensor scales"
_SCHEMAS = (
    "additive_joins(Tensor packed, Tensor codebooks, Tensor scales, int in_features,"
    " int[] partitions, str precision, int tokens, str then) -> int",
    f"additive_matmul_norm({_MATMUL}, Tensor aux, int[] partitions, str precision, Tensor x,"
    " Tensor weight, float eps, int image)"
    " -> (Tensor, Tensor)",
    f"additive_matmul_swiglu({_MATMUL}, Tensor aux, int[] partitions, str precision, int tokens,"
    " bool up_first, int image) -> Tensor",
    f"additive_matmul_rows({_MATMUL}, Tensor? bias, Tensor aux, int[] partitions, str precision,"
    " int tokens) -> Tensor",
)


def rows_of(z: torch.Tensor, M: int) -> torch.Tensor:
    """x [M, K] of itself or of its image (int8: float32)."""
    if z.dim() == 2:
        return z
    steps, tokens = z.shape[0], z.shape[2]
    if z.dim() == 4:
        rows = z.view(steps, 4, tokens, 4, 2).permute(2, 0, 3, 1, 4)
        return rows.reshape(tokens, steps * 32)[:M]
    scales = z[-1].flatten().view(torch.float32)[:M, None]
    bytes = z[:-1].view(torch.int8).view(steps - 1, 2, tokens, 2, 4, 4)[:, :, :M].float()
    high, low = bytes.permute(3, 2, 0, 4, 1, 5).reshape(2, M, (steps - 1) * 32)
    return (256 * high + low) * scales


def _check(z, codebooks, scales, bias, partitions, tokens: int, image: int, n: int) -> None:
    ends = {4: [4, 8], 5: [2, 2, 16]}
    if z.dim() != 2 and ends.get(z.dim()) != [*z.shape[1:2], *z.shape[3:]]:
        raise OperandError(f"z is {list(z.shape)}, expected [M, K] or an image")
    rows = z.shape[0] if z.dim() == 2 else z.shape[2]
    if rows < tokens or (z.dim() == 2 and rows > tokens):
        raise OperandError(f"z is {list(z.shape)}, with {rows} tokens instead of {tokens}")
    K = z.shape[1] if z.dim() == 2 else 32 * (z.shape[0] - (z.dim() == 5))
    check_matmul(codebooks.new_empty((0, K)), codebooks, scales, bias, partitions)
    if image:
        check_image(tokens, n, image & ~INT8)


def _made(like, tokens: int, n: int, image: int):
    if image & INT8:
        return like.new_empty((n // 32 + 1, 2, image & ~INT8, 2, 16), dtype=torch.uint8)
    return like.new_empty((n // 32, 4, image, 8) if image else (tokens, n))


def _placed(y, image: int):
    if image & INT8:
        raise OperandError(f"image={image}: int8 images are made on CUDA devices only")
    return image_of(y, image) if image else y


def _check_norm(z, codebooks, scales, partitions, x, weight, image) -> None:
    check_rows(x, weight)
    M, N = x.shape
    _check(z, codebooks, scales, None, partitions, M, image, N)
    if sum(partitions) != N or codebooks.dtype != x.dtype:
        raise OperandError(
            f"a product {codebooks.dtype} [{M}, {sum(partitions)}] beside x {x.dtype}"
            f" {list(x.shape)}"
        )


def _check_swiglu(z, codebooks, scales, partitions, tokens, image) -> None:
    if len(partitions) != 2 or partitions[0] != partitions[1]:
        raise OperandError(f"partitions {list(partitions)} are no halves")
    _check(z, codebooks, scales, None, partitions, tokens, image, partitions[0])


def _joins(packed, codebooks, scales, in_features, partitions, precision, tokens, then):
    return -1


def _norm(z, packed, codebooks, scales, aux, partitions, precision, x, weight, eps, image):
    _check_norm(z, codebooks, scales, partitions, x, weight, image)
    z = rows_of(z, x.shape[0]).to(x.dtype)
    product = additive_matmul(z, packed, codebooks, scales, None, aux, partitions, precision)
    total, y = add_rms_norm(x, product, weight, eps)
    return total, _placed(y, image)


def _norm_fake(z, packed, codebooks, scales, aux, partitions, precision, x, weight, eps, image):
    _check_norm(z, codebooks, scales, partitions, x, weight, image)
    return x.new_empty(x.shape), _made(x, *x.shape, image)


def _swiglu(z, packed, codebooks, scales, aux, partitions, precision, tokens, up_first, image):
    _check_swiglu(z, codebooks, scales, partitions, tokens, image)
    z = rows_of(z, tokens).to(codebooks.dtype)
    product = additive_matmul(z, packed, codebooks, scales, None, aux, partitions, precision)
    low, high = product.split(partitions[0], 1)
    return _placed(swiglu(high, low) if up_first else swiglu(low, high), image)


def _swiglu_fake(z, packed, codebooks, scales, aux, partitions, precision, tokens, up_first,
                 image):  # fmt: skip
    _check_swiglu(z, codebooks, scales, partitions, tokens, image)
    return _made(codebooks, tokens, partitions[0], image)


def _rows(z, packed, codebooks, scales, bias, aux, partitions, precision, tokens):
    _check(z, codebooks, scales, bias, partitions, tokens, 0, sum(partitions))
    z = rows_of(z, tokens).to(codebooks.dtype)
    return additive_matmul(z, packed, codebooks, scales, bias, aux, partitions, precision)


def _rows_fake(z, packed, codebooks, scales, bias, aux, partitions, precision, tokens):
    _check(z, codebooks, scales, bias, partitions, tokens, 0, sum(partitions))
    return codebooks.new_empty((tokens, sum(partitions)))


define(
    _SCHEMAS, (_joins, _norm_fake, _swiglu_fake, _rows_fake), (_joins, _norm, _swiglu, _rows)
)  # fmt: skip

_ops = torch.ops.aqlm_infer
additive_joins = _ops.additive_joins.default
additive_matmul_norm = _ops.additive_matmul_norm.default
additive_matmul_swiglu = _ops.additive_matmul_swiglu.default
additive_matmul_rows = _ops.additive_matmul_rows.default
