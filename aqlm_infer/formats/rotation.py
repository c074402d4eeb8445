"""Rotations of the input and output space of a weight, and their plain-torch transforms.

    U_K = (H_F (x) S_{K/F}) / sqrt(K)     full width: vector index = a*(K/F) + b, a indexes H_F
    U_K = I (x) S_128 / sqrt(128)         block: any multiple of 128, its own inverse
    y = ((B0 (x) B1) x[p_in])[p_out]      Kronecker: two random orthogonal factors (QuIP)

The transforms here are the oracle and the reference path; kernels have their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from .base import FormatError
from .hadamard import construction, factor_matrix, factor_of, sylvester

BLOCK = 128
"""Size of the blocks of a block rotation."""


@dataclass(frozen=True)
class Hadamard:
    """A Hadamard rotation of one size, as operators take it: two integers and a matrix.

    ``factor`` F >= 1 with ``block`` 0 is the full width; factor 1 with block 128 the block form;
    factor 0 is no rotation.
    """

    size: int
    factor: int
    block: int = 0

    @classmethod
    def full(cls, size: int) -> Hadamard:
        """The full-width rotation; FormatError when no factor is known for the size."""
        return cls(size, factor_of(size))

    @classmethod
    def blocks(cls, size: int) -> Hadamard:
        """The block rotation; FormatError unless 128 divides the size."""
        if size % BLOCK:
            raise FormatError(f"a block rotation of size {size}: not a multiple of {BLOCK}")
        return cls(size, 1, BLOCK)

    def matrix(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """H_F as operators take it: int8 [F, F], or an empty [0] when F is 0 or 1. Shared."""
        return _device_factor(self.factor, torch.device(device))

    def describe(self) -> dict[str, int | str]:
        """What a config records, enough to make the same matrix from its closed form."""
        if self.block:
            return {"family": "block-hadamard", "block": self.block}
        made = construction(self.factor) if self.factor else "none"
        return {"family": "hadamard", "factor": self.factor, "construction": made}

    def apply(self, x: torch.Tensor, transpose: bool = False) -> torch.Tensor:
        """U x (or U^T x) along the last dimension, in x's floating dtype, differentiable."""
        return hadamard_transform(x, self.factor, self.block, transpose)


@lru_cache(maxsize=256)
def _device_factor(factor: int, device: torch.device) -> torch.Tensor:
    if factor <= 1:
        return torch.empty(0, dtype=torch.int8, device=device)
    return factor_matrix(factor).to(device)


@lru_cache(maxsize=64)
def _device_sylvester(order: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """S_q where it is used: a copy on every call would wait for the device."""
    with torch.inference_mode(False):
        return sylvester(order).to(device=device, dtype=dtype)


def hadamard_transform(
    x: torch.Tensor, factor: int, block: int, transpose: bool = False, h: torch.Tensor | None = None
) -> torch.Tensor:
    """U x (or U^T x) along the last dimension, in x's floating dtype.

    ``h`` is H_F when the caller has it (default: by its closed form). Raises FormatError when the
    size is not factor times a power of two, or not a multiple of the block.
    """
    K = x.shape[-1]
    if factor == 0:
        return x
    if block:
        if K % block:
            raise FormatError(f"a block rotation of size {K}: not a multiple of {block}")
        y = _sylvester_last(x.reshape(-1, block))
        return (y * block**-0.5).reshape(x.shape)
    power = K // factor
    if K % factor or power & (power - 1):
        raise FormatError(f"a rotation of size {K} is not {factor} times a power of two")
    y = _sylvester_last(x.reshape(-1, power)) if power > 1 else x
    if factor > 1:
        h = _device_factor(factor, x.device) if h is None else h
        h = h.to(device=x.device, dtype=x.dtype)
        y = torch.matmul(h.T if transpose else h, y.reshape(-1, factor, power))
    return (y * K**-0.5).reshape(x.shape)


def _sylvester_last(rows: torch.Tensor) -> torch.Tensor:
    """S_p along the last dimension of [R, p], as products with S_q, q <= 64.

    Products are several times faster than log2(p) passes of butterflies over the memory.
    """
    R, p = rows.shape
    done = 1
    while done < p:
        q = min(64, p // done)
        s = _device_sylvester(q, rows.device, rows.dtype)
        # S is symmetric; the first factor acts on the fastest digit of the index.
        rows = rows.reshape(-1, q) @ s if done == 1 else s @ rows.reshape(-1, q, done)
        done *= q
    return rows.reshape(R, p)


def kronecker_transform(
    x: torch.Tensor, parts: Mapping[str, torch.Tensor], transpose: bool = False
) -> torch.Tensor:
    """U x (or U^T x) along the last dimension with U = P_out (B0 (x) B1) P_in, differentiable.

    ``parts`` holds B0 [p, p], B1 [q, q] and the permutations p_in, p_out (int, [p*q]); the product
    is taken in x's dtype.
    """
    B0, B1, p_in, p_out = (parts[name] for name in ("B0", "B1", "p_in", "p_out"))
    if transpose:
        return kronecker_product(x, B0.T, B1.T, torch.argsort(p_out), torch.argsort(p_in))
    return kronecker_product(x, B0, B1, p_in, p_out)


def kronecker_product(
    x: torch.Tensor, B0: torch.Tensor, B1: torch.Tensor, first: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """((B0 (x) B1) x[first])[last] along the last dimension, in x's dtype."""
    grid = x[..., first].unflatten(-1, (B0.shape[0], B1.shape[0]))
    return (B0.to(x.dtype) @ grid @ B1.to(x.dtype).T).flatten(-2)[..., last]


def kronecker_sizes(n: int) -> tuple[int, int]:
    """(p, q) with p*q = n of QuIP's two-factor rotation, such as 4096 = 64 * 64, 14336 = 64 * 224.

    p is the product of every other prime factor in ascending order, beginning with the first.
    """
    primes, rest, d = [], n, 2
    while rest > 1:
        while rest % d == 0:
            primes.append(d)
            rest //= d
        d += 1
    p = prod(primes[::2])
    return p, n // p
