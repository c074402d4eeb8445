"""Sums over the users of each codebook entry, the same bits every time on every device."""

from __future__ import annotations

import torch


class CodeSums:
    """Scatter-adds rows to codebook entries, for codes that stay fixed over many calls.

    Args:
        codes: integers [n, B], unsigned.
        count: entries of a codebook, C.

    On the CPU by ``index_add_``. On a GPU that adds in any order, so rows become integers first,
    whose sum has no order: multiples of the largest value times 2^-k, with k = 62 - log2 n bits
    (39 for seven million rows), and for float64 rows twice as many.
    """

    def __init__(self, codes: torch.Tensor, count: int):
        self.codes, self.count = codes.long().T.contiguous(), count
        self.bits = 62 - len(codes).bit_length()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum of ``rows`` [n, d] over the users of each entry, [B, C, d] in the rows' dtype."""
        if rows.device.type == "cpu":
            return self._add(rows)
        peak = rows.abs().amax().double()
        unit = torch.where(peak == 0, 1.0, peak) * 2.0**-self.bits
        rest, total = rows.double() / unit, 0.0
        for _ in range(2 if rows.dtype == torch.float64 else 1):
            whole = rest.round()
            total = total + self._add(whole.long()).double() * unit
            rest, unit = (rest - whole) * 2.0**self.bits, unit * 2.0**-self.bits
        return total.to(rows.dtype)

    def _add(self, rows: torch.Tensor) -> torch.Tensor:
        total = rows.new_zeros(len(self.codes), self.count, rows.shape[1])
        for book, column in enumerate(self.codes):
            total[book].index_add_(0, column, rows)
        return total
