"""The second moment of a layer's input, made safe to factorise, and its block LDL factors.

Notation: H = E[x^T x] [K, K]; the proxy loss of a change dW of the weight is tr(dW H dW^T). With
``H = (L + I) D (L + I)^T``, L strictly block-lower and D block-diagonal, it splits into
``sum_k e_k D_k e_k^T`` where ``e = dW (L + I)``: what rounding with feedback minimises (QuIP,
arXiv 2307.13304; the same order as OPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from .base import QuantizerError

DAMPING = 1e-2
"""Of the mean diagonal, the usual start (OPTQ); doubled while the factorisation fails."""

ATTEMPTS = 10

PANEL = 1024
"""Columns or rows that are copied at a time: a matrix of a 70B model takes 6.6 GB."""


class HessianWarning(UserWarning):
    """A second moment that needed more than its usual damping; lands in a layer's report."""


@dataclass(frozen=True)
class Curvature:
    """A positive definite ``matrix`` = ``factor`` factor^T, float64 [K, K], factor lower."""

    matrix: torch.Tensor
    factor: torch.Tensor
    damping: float


def regularise(hessian: torch.Tensor, K: int, damping: float = DAMPING) -> Curvature:
    """``hessian`` [K, K] with ``damping`` times its mean diagonal added, factorised in float64.

    A dead column (zero diagonal) gets the mean diagonal and no correlations, so that its weights
    are rounded plainly. When the factorisation fails the damping doubles, with a HessianWarning,
    ``ATTEMPTS`` times; then the diagonal alone is used, with another. Raises QuantizerError for a
    wrong shape or values that are not finite.
    """
    if tuple(hessian.shape) != (K, K):
        raise QuantizerError(f"hessian has shape {list(hessian.shape)}, expected [{K}, {K}]")
    wide = hessian.double()
    wide = (wide + wide.T).mul_(0.5)  # a new matrix: the caller's stays as it is
    if not all(bool(torch.isfinite(part).all()) for part in wide.split(PANEL)):
        where = (~torch.isfinite(wide)).nonzero()[0].tolist()
        raise QuantizerError(f"hessian is not finite: {wide[tuple(where)].item()} at {where}")
    diagonal = wide.diagonal().clone()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    if bool(dead.any()):
        count = int(dead.sum())
        warnings.warn(f"{count} of {K} inputs never fire", HessianWarning, stacklevel=2)
        wide[dead] = 0.0
        wide[:, dead] = 0.0
        diagonal[dead] = mean
    for attempt in range(ATTEMPTS):
        added = damping * 2.0**attempt
        wide.diagonal().copy_(diagonal + added * mean)
        factor, failed = torch.linalg.cholesky_ex(wide)
        if int(failed) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            if attempt:
                warnings.warn(f"damping raised to {added:g}", HessianWarning, stacklevel=2)
            return Curvature(wide, factor, added)
    message = f"not positive definite even with damping {added:g}: its diagonal is used instead"
    warnings.warn(message, HessianWarning, stacklevel=2)
    diagonal = diagonal.clamp_min(0) + damping * mean
    return Curvature(diagonal.diag(), diagonal.sqrt().diag(), damping)


def diagonal_blocks(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """The diagonal blocks [K/size, size, size] of a [K, K] matrix."""
    count = len(matrix) // size
    blocks = matrix.view(count, size, count, size)
    index = torch.arange(count, device=matrix.device)
    return blocks[index, :, index]


def block_ldl(curvature: Curvature, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L [K, K], strictly block-lower with blocks of ``size``, and R [K/size, size, size] with
    ``D_k = R_k R_k^T``, both float64."""
    factor = curvature.factor
    blocks = diagonal_blocks(factor, size)
    unit = torch.eye(size, dtype=factor.dtype, device=factor.device).expand_as(blocks)
    inverse = torch.linalg.solve_triangular(blocks, unit, upper=False)
    lower, step = torch.empty_like(factor), max(1, PANEL // size)
    for first in range(0, len(blocks), step):
        here = slice(first * size, (first + step) * size)
        panel = factor[:, here].unflatten(1, (-1, size)).transpose(0, 1)
        lower[:, here] = (panel @ inverse[first : first + step]).transpose(0, 1).flatten(1)
    lower.diagonal().sub_(1.0)
    index = torch.arange(len(blocks), device=factor.device)
    lower.view(len(blocks), size, len(blocks), size)[index, :, index] = 0.0
    return lower, blocks


def row_losses(change: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``dW_i H dW_i^T`` of every row of ``change`` [N, K], float64 [N], in chunks of rows."""
    rows = max(1, (1 << 26) // change.shape[1])
    parts = []
    for part in change.split(rows):
        wide = part.double()
        parts.append(((wide @ matrix) * wide).sum(1))
    return torch.cat(parts)


def relative_loss(weight: torch.Tensor, approximation: torch.Tensor, matrix: torch.Tensor) -> float:
    """tr(dW H dW^T) / tr(W H W^T), 0 for a weight without energy."""
    wide = weight.double()
    energy = float(row_losses(wide, matrix).sum())
    lost = float(row_losses(approximation.double() - wide, matrix).sum())
    return lost / energy if energy else 0.0
