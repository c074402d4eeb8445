"""Sums over the users of each codebook entry, the same bits every time on every device."""

from __future__ import annotations

import torch

CHUNK = 1 << 22
"""Rows that become integers at a time: four float64 copies of them."""


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
        shape = (len(self.codes), self.count, rows.shape[1])
        if rows.device.type == "cpu":
            total = rows.new_zeros(shape)
            self._add(total, self.codes, rows)
            return total
        low, high = rows.aminmax()
        peak = torch.maximum(-low, high).double()
        unit = torch.where(peak == 0, 1.0, peak) * 2.0**-self.bits
        levels = 2 if rows.dtype == torch.float64 else 1
        sums = rows.new_zeros((levels, *shape), dtype=torch.int64)
        for part, codes in zip(rows.split(CHUNK), self.codes.split(CHUNK, 1), strict=True):
            rest = part.double() / unit
            for level in range(levels):
                whole = rest.round()
                self._add(sums[level], codes, whole.long())
                if level + 1 < levels:
                    rest = (rest - whole) * 2.0**self.bits
        total = sums[0].double() * unit
        if levels == 2:
            total = total + sums[1].double() * (unit * 2.0**-self.bits)
        return total.to(rows.dtype)

    @staticmethod
    def _add(total: torch.Tensor, codes: torch.Tensor, rows: torch.Tensor) -> None:
        for book, column in enumerate(codes):
            total[book].index_add_(0, column, rows)
