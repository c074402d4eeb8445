"""Many tokens, and gradients of inputs: the weight is decoded in slices for the device's GEMM."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

SLICE_BYTES = 72 << 20
"""Slices need not stay in the L2 cache: GEMMs of few rows cost more (docs/notes/cuda.md)."""

Fill = Callable[[int, torch.Tensor], None]
"""Decodes the rows from its first argument on into its second, [rows, K]."""


def slices(
    N: int, K: int, fill: Fill, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (first row, weight slice [rows, K]); the scratch is reused."""
    count = max(1, SLICE_BYTES // (K * dtype.itemsize) // 64) * 64
    scratch = torch.empty((min(count, N), K), dtype=dtype, device=device)
    for first in range(0, N, count):
        weight = scratch[: min(count, N - first)]
        fill(first, weight)
        yield first, weight


def sliced_matmul(
    x: torch.Tensor, y: torch.Tensor, fill: Fill, bias: torch.Tensor | None = None
) -> None:
    """Fill y [M, N] (any row stride) with x W^T + bias."""
    for first, weight in slices(y.shape[1], x.shape[1], fill, x.dtype, x.device):
        end = first + weight.shape[0]
        if bias is None:
            torch.mm(x, weight.t(), out=y[:, first:end])
        else:
            torch.addmm(bias[first:end].to(x.dtype), x, weight.t(), out=y[:, first:end])


def sliced_dx(dy: torch.Tensor, K: int, fill: Fill) -> torch.Tensor:
    """dy W, float32 [M, K]: slices are added in float32."""
    dx = torch.zeros((dy.shape[0], K), dtype=torch.float32, device=dy.device)
    for first, weight in slices(dy.shape[1], K, fill, dy.dtype, dy.device):
        dx = dx + torch.mm(dy[:, first : first + weight.shape[0]], weight)
    return dx
