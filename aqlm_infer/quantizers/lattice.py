"""Nearest points of the E8P codebook (QuIP#, arXiv 2402.04396), exactly, and rounding to them.

A code is a row of the magnitude set S, signs of a fixed parity, and a shift of +-1/4 that the sign
byte's parity says. For one shift y = x -+ 1/4 the best signs are those of y; where their parity is
wrong for a row, the cheapest element to flip costs ``2 min_i |y_i| s_i``. The 256 rows are made of
32 distinct halves, so that minimum takes two tables of 32 columns.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..formats.e8p import POSITIONS, E8PFormat, grid_x4, residual_x2, source_set
from .ldlq import Rounder
from .search import best_columns

CHUNK = 1 << 11
"""Vectors searched at a time, for both shifts at once: on the CPU their scores stay in cache."""


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> dict[str, torch.Tensor]:
    rows = source_set().double() / 2  # [256, 8]
    halves, where = torch.unique(rows.view(-1, 4), dim=0, return_inverse=True)
    where = where.view(-1, 2)
    tables = {
        "rows": rows.T.float().contiguous(),  # [8, 256]
        "minus_half_norm": (rows.square().sum(1) / -2).float(),
        "odd": rows.sum(1).long() % 2 == 1,
        "halves": halves.T.float().contiguous(),  # [4, 32]
        "first": where[:, 0].contiguous(),
        "second": where[:, 1].contiguous(),
        "grid": grid_x4().float() / 4,
        "bits": torch.tensor([1 << POSITIONS.index(i) for i in range(8)]),
        "residual": (residual_x2().float() / 2).contiguous(),
        "points": rows.float().contiguous(),
    }
    tables["odd_sum"], tables["places"] = tables["odd"].int(), tables["bits"].int()
    return {name: table.to(device) for name, table in tables.items()}


def _cheapest(half: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
    """min_i half_i * halves_i: of [n, 4] and [4, 32], [n, 32]."""
    low = half[:, :1] * halves[0]
    for i in range(1, 4):
        low = torch.minimum(low, half[:, i : i + 1] * halves[i])
    return low


def _of_shift(y: torch.Tensor, odd_flips: torch.Tensor, tables) -> torch.Tensor:
    """Best code [n] for ``y`` = x - shift [n, 8], where the sign byte has parity ``odd_flips``."""
    size = y.abs()
    negative = y < 0
    parity = negative.sum(1) % 2 == 1
    scores = torch.addmm(tables["minus_half_norm"], size, tables["rows"])
    first = _cheapest(size[:, :4], tables["halves"]).index_select(1, tables["first"])
    second = _cheapest(size[:, 4:], tables["halves"]).index_select(1, tables["second"])
    wrong = parity[:, None] != tables["odd"]
    scores.sub_(torch.minimum(first, second, out=first).mul_(wrong), alpha=2)
    row = best_columns(scores)[:, 0]
    magnitude = tables["rows"].T[row]
    flip = (size * magnitude).argmin(1)
    odd = tables["odd"][row]
    flips = negative.clone()
    flips[torch.arange(len(y), device=y.device), flip] ^= parity != odd
    flips[:, 7] ^= odd  # an odd coordinate sum negates element 7 before the sign bits do
    byte = (flips * tables["bits"]).sum(1)
    return (row << 8) | (byte ^ odd_flips)


def nearest_e8p(targets: torch.Tensor) -> torch.Tensor:
    """16-bit codes int64 [n] of the codebook points nearest to float32 ``targets`` [n, 8]."""
    tables, codes = _tables(targets.device), []
    if targets.device.type == "cuda":
        from ..triton_kernels.points import nearest_points

        return nearest_points(targets.contiguous(), tables).long()
    for x in targets.split(CHUNK):
        # Bit 0 of the sign byte is toggled where its parity is odd, and then the shift is -1/4.
        odd = torch.arange(2, device=x.device).repeat_interleave(len(x))
        pair = _of_shift(torch.cat([x - 0.25, x + 0.25]), odd, tables).view(2, -1)
        wrong = (tables["grid"][pair] - x).square().sum(2)
        codes.append(torch.where(wrong[0] <= wrong[1], pair[0], pair[1]))
    return torch.cat(codes)


class E8PRounder(Rounder):
    """Eight columns at a time onto the codebook of an E8P format, with its residual code."""

    size = 8

    def __init__(self, N: int, K: int, format: E8PFormat, device: torch.device):
        self.format, self.tables = format, _tables(torch.device(device))
        count = 1 if format.bits == 2 else 2
        self.codes = torch.zeros(N, K // 8, count, dtype=torch.int64, device=device)

    def round(
        self, block: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = targets.float()
        code = nearest_e8p(x)
        value = self.tables["grid"][code]
        if self.format.bits == 2:
            return value.double(), code[:, None]
        rest = (x - value) * self.format.residual
        if self.format.bits == 4:
            second = nearest_e8p(rest)
            fine = self.tables["grid"][second]
        else:
            words = self.tables["residual"]
            second = best_columns(rest @ words.T - words.square().sum(1) / 2)[:, 0]
            fine = words[second]
        value = value.double() + fine.double() / self.format.residual
        return value, torch.stack([code, second], 1)

    def round_window(self, pull, local, weight, rounded, inverse, columns) -> None:
        from ..triton_kernels.lattice import round_window

        round_window(
            pull, local, weight, rounded, self.codes, inverse, columns, self.tables,
            self.format.bits, self.format.residual or 1.0,
        )  # fmt: skip
