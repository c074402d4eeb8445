"""Uniform grids of scalar formats: where they lie, and rounding to them."""

from __future__ import annotations

import torch

from .ldlq import GridRounder

SHRINKS = 16
"""Clipping ranges tried, from the whole range down to ``NARROWEST`` of it."""

NARROWEST = 0.35


def group_grid(
    groups: torch.Tensor, bits: int, clip: bool, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and integer zeros [N, I] of ``value = scale * (code - zero)`` for groups [N, I, G].

    From the smallest to the largest value, zero included. ``clip`` narrows the range, and moves the
    zero by at most one, to the least squared error, weighted by ``weights`` [I, G] if given: at 2
    bits the ends of the range cost more than clipping them. A group of zeros gets scale 1.
    """
    top = (1 << bits) - 1
    low = groups.amin(2).clamp_max(0)
    span = groups.amax(2).clamp_min(0) - low
    span = torch.where(span > 0, span, 1.0 * top)
    scale = span / top
    zero = (-low / scale).round().clamp(0, top)
    if not clip:
        return scale, zero
    best = torch.full_like(scale, torch.inf)
    chosen = scale, zero
    for shrink in torch.linspace(1.0, NARROWEST, SHRINKS).tolist():
        for shift in (-1, 0, 1):
            s, z = scale * shrink, (zero + shift).clamp(0, top)
            codes = (groups / s[..., None]).round_().add_(z[..., None]).clamp_(0, top)
            wrong = (codes.sub_(z[..., None]).mul_(s[..., None]) - groups).square_()
            loss = (wrong if weights is None else wrong * weights).sum(2)
            better = loss < best
            best = torch.where(better, loss, best)
            chosen = torch.where(better, s, chosen[0]), torch.where(better, z, chosen[1])
    return chosen


class GroupRounder(GridRounder):
    """One column at a time onto the grid of its group, codes kept in ``codes`` uint8 [N, K].

    Args:
        N, K: of the weight.
        bits: of a code.
        group_of: int64 [K], the group of each column in the order of rounding.
        scales, zeros: float64 [N, I]; None to fit them with ``fit(columns, targets)`` on entering
            the columns of a group.
    """

    def __init__(self, N: int, K: int, bits: int, group_of: torch.Tensor, scales, zeros, fit=None):
        self.top, self.group_of, self.fit = (1 << bits) - 1, group_of, fit
        self.scales, self.zeros = scales, zeros
        self.codes = torch.zeros(N, K, dtype=torch.uint8, device=scales.device)

    def enter(self, columns: slice, targets: torch.Tensor) -> None:
        if self.fit is not None:
            group = int(self.group_of[columns.start])
            self.scales[:, group], self.zeros[:, group] = self.fit(columns, targets)

    def round(
        self, block: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group = self.group_of.index_select(0, block)
        scale, zero = self.scales.index_select(1, group), self.zeros.index_select(1, group)
        codes = ((targets / scale).round() + zero).clamp(0, self.top)
        return (codes - zero) * scale, codes

    def grid(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        groups = self.group_of[columns]
        return self.scales[:, groups], self.zeros[:, groups]
