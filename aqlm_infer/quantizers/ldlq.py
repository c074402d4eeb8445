"""Rounding with feedback (LDLQ of QuIP, arXiv 2307.13304; BlockLDLQ of QuIP#, arXiv 2402.04396) and
greedy passes over its result.

OPTQ (GPTQ, arXiv 2210.17323) is the same algorithm on the columns in reverse: its left-to-right
updates with the Cholesky factor of H^-1 give, in exact arithmetic, the targets computed here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from .hessian import Curvature, block_ldl, diagonal_blocks
from .walk import Walk, columns_of, rows_of, set_columns

BUFFER = 128
"""Columns whose feedback from outside is one product; a multiple of every vector length here."""


class Rounder(ABC):
    """Rounds a weight's columns, ``size`` at a time, and keeps the codes it chose.

    ``codes`` holds them by block in its second dimension: [N, K / size, ...].
    """

    size: int
    codes: torch.Tensor

    def enter(self, columns: slice, targets: torch.Tensor) -> None:
        """Called before the blocks of ``columns`` are rounded, with their targets [N, width] as
        the columns rounded so far leave them; most rounders need no preparation."""
        return

    @abstractmethod
    def round(
        self, block: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [N, size] nearest to ``targets``, and their codes [N, ...].

        ``block`` is int64 [1]. A step of a :class:`Walk`: nothing in it may wait for the device.
        """

    def accept(self, block: torch.Tensor, rows: torch.Tensor | None, codes: torch.Tensor) -> None:
        """Keep the codes of a block, for the rows of a mask [N] (None: all)."""
        old = self.codes.index_select(1, block)
        new = codes.to(old.dtype).view_as(old)
        if rows is not None:
            new = torch.where(rows.view(-1, *[1] * (old.dim() - 1)), new, old)
        self.codes.index_copy_(1, block, new)


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
    weight = weight.contiguous()
    N, K = weight.shape
    rounded, error = torch.empty_like(weight), torch.zeros_like(weight)
    pending, local = weight.new_zeros(N, buffer), weight.new_zeros(buffer, buffer)

    def step(block: torch.Tensor) -> None:
        inside = block % (buffer // size)
        values, codes = rounder.round(block, columns_of(pending, inside, size))
        rounder.accept(block, None, codes)
        set_columns(rounded, block, size, values)
        wrong = columns_of(weight, block, size) - values
        set_columns(error, block, size, wrong)
        pending.add_(wrong @ rows_of(local, inside, size))  # L is zero from the block on

    walk = Walk(step, weight.device)
    for first in reversed(range(0, K, buffer)):
        last = min(K, first + buffer)
        targets = weight[:, first:last] + error[:, last:] @ lower[last:, first:last]
        rounder.enter(slice(first, last), targets)
        pending[:, : last - first] = targets
        local[: last - first, : last - first] = lower[first:last, first:last]
        walk(range(last // size - 1, first // size - 1, -1))
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
    rounded = rounded.contiguous().clone()
    error = (weight - rounded).contiguous()
    pull, local = weight.new_zeros(len(weight), buffer), weight.new_zeros(buffer, buffer)
    changed = torch.zeros((), dtype=torch.bool, device=weight.device)

    def step(block: torch.Tensor) -> None:
        inside = block % (buffer // size)
        pulled = columns_of(pull, inside, size)
        old = columns_of(rounded, block, size)
        target = old + pulled @ inverse.index_select(0, block)[0]
        values, codes = rounder.round(block, target)
        move = values - old
        warped = move @ rows_of(local, inside, size)
        better = (move * (2 * pulled - columns_of(warped, inside, size))).sum(1) > 0
        rounder.accept(block, better, codes)
        move = torch.where(better[:, None], move, 0.0)
        set_columns(rounded, block, size, old + move)
        set_columns(error, block, size, columns_of(error, block, size) - move)
        pull.sub_(torch.where(better[:, None], warped, 0.0))
        changed.logical_or_(better.any())

    walk = Walk(step, weight.device)
    for _ in range(passes):
        changed.fill_(False)
        for first in reversed(range(0, weight.shape[1], buffer)):
            last = min(weight.shape[1], first + buffer)
            pull[:, : last - first] = error @ matrix[:, first:last]
            local[: last - first, : last - first] = matrix[first:last, first:last]
            walk(range(last // size - 1, first // size - 1, -1))
        if not bool(changed):
            break
    return rounded
