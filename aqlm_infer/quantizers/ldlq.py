"""Rounding with feedback (LDLQ of QuIP, arXiv 2307.13304; BlockLDLQ of QuIP#, arXiv 2402.04396) and
greedy passes over its result.

OPTQ (GPTQ, arXiv 2210.17323) is the same algorithm on the columns in reverse: its left-to-right
updates with the Cholesky factor of H^-1 give, in exact arithmetic, the targets computed here.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod

import torch

from .hessian import Curvature, block_ldl, diagonal_blocks, row_losses
from .walk import Walk, columns_of, rows_of, set_columns

BUFFER = 128
"""Columns whose feedback from outside is one product; a multiple of every vector length here."""


SETTLED = 2e-3
"""Greedy passes end when one lowers the loss by no more than this fraction."""


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

    def round_window(
        self,
        pull: torch.Tensor,
        local: torch.Tensor,
        weight: torch.Tensor,
        rounded: torch.Tensor,
        inverse: torch.Tensor | None,
        columns: slice,
    ) -> None:
        """Round the blocks of ``columns`` in one Triton kernel, where ``one_kernel`` says so.

        With ``inverse`` None as ``feedback_round`` does: ``pull`` [N, width] are the targets,
        ``local`` the window of L. Else as ``greedy_passes``: of (W - What) H and of H, and
        ``inverse`` [blocks, size, size] is that of its diagonal blocks.
        """
        raise NotImplementedError

    def accept(self, block: torch.Tensor, rows: torch.Tensor | None, codes: torch.Tensor) -> None:
        """Keep the codes of a block, for the rows of a mask [N] (None: all)."""
        old = self.codes.index_select(1, block)
        new = codes.to(old.dtype).view_as(old)
        if rows is not None:
            new = torch.where(rows.view(-1, *[1] * (old.dim() - 1)), new, old)
        self.codes.index_copy_(1, block, new)


class GridRounder(Rounder):
    """Rounds one column at a time to an affine grid, to codes uint8 [N, K] in 0..top."""

    size = 1
    top: int

    @abstractmethod
    def grid(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and zero point [N, width] (or less, to broadcast) of ``value = step * (code -
        zero)``: what ``round`` rounds to."""

    def round_window(self, pull, local, weight, rounded, inverse, columns) -> None:
        from ..triton_kernels.rounding import round_window

        width = columns.stop - columns.start
        grid = [torch.ones_like(pull) for _ in range(2)]
        for whole, part in zip(grid, self.grid(columns), strict=True):
            whole[:, :width] = part
        flat = None if inverse is None else inverse.view(-1)
        round_window(pull, local, weight, rounded, self.codes, grid, flat, columns, self.top)


def one_kernel(weight: torch.Tensor, buffer: int) -> bool:
    """Whether a window is one Triton kernel: on a GPU, where there is Triton."""
    return (
        weight.device.type == "cuda"
        and buffer & (buffer - 1) == 0
        and importlib.util.find_spec("triton") is not None
    )


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
        here = slice(first, last)
        targets = weight[:, here] + error[:, last:] @ lower[last:, here]
        rounder.enter(here, targets)
        pending[:, : last - first] = targets
        local[: last - first, : last - first] = lower[here, here]
        if one_kernel(weight, buffer):
            rounder.round_window(pending, local, weight, rounded, None, here)
            error[:, here] = weight[:, here] - rounded[:, here]
        else:
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
    lowers its loss. Ends after a pass that gains less than ``SETTLED``. Returns What, float64.
    """
    size, matrix = rounder.size, curvature.matrix
    inverse = torch.linalg.inv(diagonal_blocks(matrix, size))
    rounded = rounded.contiguous().clone()
    pull, local = weight.new_zeros(len(weight), buffer), weight.new_zeros(buffer, buffer)

    def step(block: torch.Tensor) -> None:
        inside = block % (buffer // size)
        pulled, old = columns_of(pull, inside, size), columns_of(rounded, block, size)
        target = torch.addmm(old, pulled, inverse.index_select(0, block)[0])
        values, codes = rounder.round(block, target)
        move = values - old
        warped = move @ rows_of(local, inside, size)
        gain = move * pulled.sub(columns_of(warped, inside, size), alpha=0.5)
        better = gain.sum(1, keepdim=True) > 0
        rounder.accept(block, better[:, 0], codes)
        set_columns(rounded, block, size, torch.where(better, values, old))
        pull.sub_(torch.where(better, warped, 0.0))

    walk = Walk(step, weight.device)
    lost = row_losses(weight - rounded, matrix).sum()
    for _ in range(passes):
        for first in reversed(range(0, weight.shape[1], buffer)):
            last = min(weight.shape[1], first + buffer)
            here = slice(first, last)
            pull[:, : last - first] = (weight - rounded) @ matrix[:, here]
            local[: last - first, : last - first] = matrix[here, here]
            if one_kernel(weight, buffer):
                of_window = inverse[first // size : last // size]
                rounder.round_window(pull, local, weight, rounded, of_window, here)
            else:
                walk(range(last // size - 1, first // size - 1, -1))
        before, lost = lost, row_losses(weight - rounded, matrix).sum()
        if not bool(lost < (1 - SETTLED) * before):
            break
    return rounded
