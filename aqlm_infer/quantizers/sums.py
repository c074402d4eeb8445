"""Sums over the users of each codebook entry, the same bits every time on every device."""

from __future__ import annotations

import torch

SEGMENTS = 1 << 14
"""Runs that the rows are summed in on CUDA at least, so that few entries still fill the GPU."""


class CodeSums:
    """Scatter-adds rows to codebook entries, for codes that stay fixed over many calls.

    Args:
        codes: int64 [n, B], unsigned.
        count: entries of a codebook, C.

    On the CPU by ``index_add_``. On CUDA atomics would add in any order, so rows are sorted once
    and each run of equal codes within a part of the rows is summed by one thread; then the parts
    are added.
    """

    def __init__(self, codes: torch.Tensor, count: int):
        self.codes, self.count = codes.T.contiguous(), count
        self.runs = []
        if codes.device.type != "cpu":
            self.parts = max(1, SEGMENTS // count)
            size = -(-len(codes) // self.parts)
            part = torch.arange(len(codes), device=codes.device) // size
            for column in self.codes:
                key = part * count + column
                lengths = torch.bincount(key, minlength=self.parts * count)
                self.runs.append((key.argsort(stable=True), lengths))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum of ``rows`` [n, d] over the users of each entry, [B, C, d] in the rows' dtype."""
        total = rows.new_zeros(len(self.codes), self.count, rows.shape[1])
        if not self.runs:
            for book, column in enumerate(self.codes):
                total[book].index_add_(0, column, rows)
            return total
        for book, (order, lengths) in enumerate(self.runs):
            sums = torch.segment_reduce(rows[order], "sum", lengths=lengths, axis=0)
            total[book] = sums.view(self.parts, self.count, -1).sum(0)
        return total
