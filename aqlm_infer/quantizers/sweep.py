"""One column group after another: the code search of calibrated additive codebooks."""

from __future__ import annotations

import torch

from .hessian import diagonal_blocks
from .search import decode, encode
from .walk import columns_of, rows_of, set_columns


class Sweep:
    """The state of a sweep over column groups, in tensors that stay in place: ``search`` is a
    step for a :class:`Walk`.

    ``error`` [N, K] is W - What; ``pull`` holds the columns of (W - What) H of a window of groups,
    ``local`` that window of H: the search of a group corrects them for the groups that follow.

    Args:
        weight: float32 [N, K], contiguous.
        matrix: H, float64 [K, K].
        codebooks: float32 [B, C, og * g], codes: int64 [O, I, B]; for their shapes.
        og: rows of a group.
        beam: of the code search.
        width: groups of a window.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        matrix: torch.Tensor,
        codebooks: torch.Tensor,
        codes: torch.Tensor,
        og: int,
        beam: int,
        width: int,
    ):
        self.weight, self.og, self.beam, self.width = weight, og, beam, width
        self.g = g = codebooks.shape[2] // og
        self.narrow = matrix.float()
        roots = torch.linalg.cholesky(diagonal_blocks(matrix, g))
        self._roots, self._inverse = roots.float(), torch.cholesky_inverse(roots).float()
        self.codebooks, self.codes = torch.empty_like(codebooks), torch.empty_like(codes)
        self.error = torch.empty_like(weight)
        self.pull = weight.new_zeros(len(weight), width * g)
        self.local = weight.new_zeros(width * g, width * g)
        self.divisor = weight.new_ones(len(weight), 1)
        self.live = torch.ones(len(codes), dtype=torch.bool, device=weight.device)

    def begin(
        self,
        codebooks: torch.Tensor,
        scales: torch.Tensor,
        codes: torch.Tensor,
        error: torch.Tensor,
    ) -> None:
        """Start from a solution and its ``error`` W - What."""
        self.codebooks.copy_(codebooks)
        self.codes.copy_(codes)
        self.error.copy_(error)
        self.live.copy_(scales != 0)
        divisor = torch.where(self.live, scales, 1.0)
        self.divisor.copy_(divisor.repeat_interleave(self.og)[:, None])

    def enter(self, columns: slice) -> None:
        """Begin the window of groups in ``columns``, a multiple of its width from the left."""
        count = columns.stop - columns.start
        self.pull[:, :count] = self.error @ self.narrow[:, columns]
        self.local[:count, :count] = self.narrow[columns, columns]

    def search(self, j: torch.Tensor) -> None:
        """Give group ``j`` (int64 [1]) the codes that gain, for every row on its own."""
        g, og, inside = self.g, self.og, j % self.width
        old = columns_of(self.weight, j, g) - columns_of(self.error, j, g)
        pull = columns_of(self.pull, inside, g)
        root = self._roots.index_select(0, j)[0]
        target = (old + pull @ self._inverse.index_select(0, j)[0]) / self.divisor
        books = (self.codebooks.unflatten(2, (og, g)) @ root).flatten(2)
        found = encode((target @ root).view(-1, og * g), books, self.beam)
        move = decode(self.codebooks, found).view(-1, g) * self.divisor - old
        after = move @ rows_of(self.local, inside, g)
        gain = (move * (2 * pull - columns_of(after, inside, g))).sum(1).view(-1, og).sum(1)
        better = (gain > 0) & self.live
        codes = self.codes.index_select(1, j)[:, 0]
        codes = torch.where(better[:, None], found, codes)
        self.codes.index_copy_(1, j, codes[:, None])
        rows = better.repeat_interleave(og)[:, None]
        set_columns(self.error, j, g, columns_of(self.error, j, g) - torch.where(rows, move, 0.0))
        self.pull.sub_(torch.where(rows, after, 0.0))
