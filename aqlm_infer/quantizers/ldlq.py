"""Rounding with feedback (LDLQ of QuIP, arXiv 2307.13304; BlockLDLQ of QuIP#, arXiv 2402.04396) and
greedy passes over its result.

OPTQ (GPTQ, arXiv 2210.17323) is the same algorithm on the columns in reverse: its left-to-right
updates with the Cholesky factor of H^-1 give, in exact arithmetic, the targets computed here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from .hessian import Curvature, block_ldl, diagonal_blocks

BUFFER = 128
"""Columns whose feedback from outside is one product; a multiple of every vector length here."""


class Rounder(ABC):
    """Rounds a weight's columns, ``size`` at a time, and keeps the codes it chose."""

    size: int

    def enter(self, columns: slice, targets: torch.Tensor) -> None:
        """Called before the blocks of ``columns`` are rounded, with their targets [N, width] as
        the columns rounded so far leave them; most rounders need no preparation."""
        return

    @abstractmethod
    def round(self, block: int, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [N, size] nearest to ``targets``, and their codes [N, ...]."""

    @abstractmethod
    def accept(self, block: int, rows: torch.Tensor | None, codes: torch.Tensor) -> None:
        """Keep the codes of a block, for the rows of a mask [N] (None: all)."""


def feedback_round(
    weight: torch.Tensor, curvature: Curvature, rounder: Rounder, buffer: int = BUFFER
) -> torch.Tensor:
    """Round float64 ``weight`` [N, K], blocks of columns from last to first.

    ``target_k = W_k + sum_{j > k} (W_j - What_j) L[j, k]``: every block makes up for the errors
    behind it. Returns What, float64. ``buffer``, a multiple of the rounder's size, changes the
    order of sums, not what is computed.
    """
    size = rounder.size
    lower, _ = block_ldl(curvature, size)
    N, K = weight.shape
    rounded, error = torch.empty_like(weight), torch.zeros_like(weight)
    for first in reversed(range(0, K, buffer)):
        last = min(K, first + buffer)
        targets = weight[:, first:last] + error[:, last:] @ lower[last:, first:last]
        rounder.enter(slice(first, last), targets)
        for start in reversed(range(first, last, size)):
            here, inside = slice(start, start + size), slice(start - first, start - first + size)
            values, codes = rounder.round(start // size, targets[:, inside])
            rounder.accept(start // size, None, codes)
            rounded[:, here] = values
            error[:, here] = weight[:, here] - values
            before = slice(first, start)
            targets[:, : start - first] += error[:, here] @ lower[here, before]
    return rounded


def greedy_passes(
    weight: torch.Tensor,
    rounded: torch.Tensor,
    curvature: Curvature,
    rounder: Rounder,
    passes: int,
    buffer: int = BUFFER,
) -> torch.Tensor:
    """Coordinate descent on tr(dW H dW^T) from ``rounded``, blocks of columns from last to first.

    The target of a block is its unconstrained minimum with all others fixed,
    ``What_k + (W - What) H[:, k] H_kk^-1``; a row takes the value nearest to it only where that
    lowers its loss. Ends when nothing changes. Returns What, float64.
    """
    size, matrix = rounder.size, curvature.matrix
    inverse = torch.linalg.inv(diagonal_blocks(matrix, size))
    rounded = rounded.clone()
    error = weight - rounded
    for _ in range(passes):
        changed = torch.zeros((), dtype=torch.bool, device=weight.device)
        for first in reversed(range(0, weight.shape[1], buffer)):
            last = min(weight.shape[1], first + buffer)
            pull = error @ matrix[:, first:last]
            for start in reversed(range(first, last, size)):
                here = slice(start, start + size)
                inside = slice(start - first, start - first + size)
                pulled = pull[:, inside]
                target = rounded[:, here] + pulled @ inverse[start // size]
                values, codes = rounder.round(start // size, target)
                move = values - rounded[:, here]
                better = (move * (2 * pulled - move @ matrix[here, here])).sum(1) > 0
                rounder.accept(start // size, better, codes)
                move = torch.where(better[:, None], move, 0.0)
                rounded[:, here] += move
                error[:, here] -= move
                pull -= move @ matrix[here, first:last]
                changed |= better.any()
        if not bool(changed):
            break
    return rounded
