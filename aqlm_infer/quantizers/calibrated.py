"""The calibrated refit: codebooks, scales and codes in the norm of the layer's input (AQLM, arXiv
2401.06118, sections 3.2-3.3), each step exact or accepted only where it lowers the objective

    L(C, s, z) = tr((What - W) H (What - W)^T),   H = E[x^T x], slightly damped

* Codebooks: the least-squares problem in B*C*g unknowns, by preconditioned conjugate gradients.
* Scales: least squares, row by row.
* Codes: sweeps over column groups in random order. With all other groups fixed, the best words of a
  group are the nearest, in the metric H_jj, to one target, so a group's codebooks are searched
  jointly by the same Euclidean beam search as without calibration, on targets and codebooks
  multiplied by a root of H_jj. ``(W - What) H`` is one product per block of columns, corrected
  exactly inside the block.
"""

from __future__ import annotations

import torch

from .hessian import row_losses
from .search import decode
from .sums import CodeSums
from .sweep import Sweep
from .walk import Walk

BLOCK = 128
"""Columns that share one product with H during a sweep."""

SETTLED = 1e-7
"""Conjugate gradients end when the squared residual falls to this fraction: what float32 holds."""


class CalibratedRefit:
    """A solution under refinement: each step lowers its ``error`` or leaves it as it was.

    Args:
        weight: float32 [N, K].
        matrix: H, float64 [K, K], positive definite.
        og, g: the format's group sizes, d = og * g.
        codebooks: float32 [B, C, d] to start from.
        scales: float32 [O].
        codes: int64 [O, I, B].
        beam: of the code search within a group.
        generator: draws the order of groups.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        matrix: torch.Tensor,
        og: int,
        codebooks: torch.Tensor,
        scales: torch.Tensor,
        codes: torch.Tensor,
        beam: int,
        generator: torch.Generator,
    ):
        self.weight, self.matrix, self.og = weight.contiguous(), matrix, og
        self.g = codebooks.shape[2] // og
        self.codebooks, self.scales, self.codes = codebooks, scales, codes
        self.generator = generator
        width = max(1, BLOCK // self.g)
        self._sweeper = Sweep(self.weight, matrix, codebooks, codes, og, beam, width)
        self._walk = Walk(self._sweeper.search, weight.device)
        self.narrow = self._sweeper.narrow
        self._losses = self.losses(codebooks, scales, codes)

    @property
    def error(self) -> float:
        """The objective L."""
        return float(self._losses.sum())

    def losses(
        self, codebooks: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor
    ) -> torch.Tensor:
        """Objective of every out group, float64 [O]."""
        change = self._rows(codebooks, scales, codes) - self.weight
        return row_losses(change, self.matrix).view(-1, self.og).sum(1)

    def step_codebooks(self, steps: int = 10) -> None:
        codebooks = self.codebooks + self._conjugate_gradients(steps)
        losses = self.losses(codebooks, self.scales, self.codes)
        if losses.sum() < self._losses.sum():
            self.codebooks, self._losses = codebooks, losses

    def step_scales(self) -> None:
        """Least-squares scales, for the rows that they serve better."""
        ones = torch.ones_like(self.scales)
        words, fits = self._rows(self.codebooks, ones, self.codes), []
        for part, target in zip(words.split(1 << 13), self.weight.split(1 << 13), strict=True):
            wide = part.double()
            warped = wide @ self.matrix
            both = torch.stack([(warped * target).sum(1), (warped * wide).sum(1)])
            fits.append(both)
        top, energy = torch.cat(fits, 1).view(2, -1, self.og).sum(2)
        scales = torch.where(energy > 0, top / energy, self.scales.double()).float()
        self._keep_better(scales, self.codes)

    def step_codes(self) -> None:
        """One sweep over all column groups, for the rows that it serves better."""
        self._keep_better(self.scales, self._sweep())

    def _keep_better(self, scales: torch.Tensor, codes: torch.Tensor) -> None:
        losses = self.losses(self.codebooks, scales, codes)
        better = losses < self._losses
        self.scales = torch.where(better, scales, self.scales)
        self.codes = torch.where(better[:, None, None], codes, self.codes)
        self._losses = torch.minimum(losses, self._losses)

    def _rows(
        self, codebooks: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor
    ) -> torch.Tensor:
        """The decoded weight [N, K]."""
        words = decode(codebooks, codes) * scales[:, None, None]
        return words.unflatten(2, (self.og, self.g)).transpose(1, 2).reshape(self.weight.shape)

    def _vectors(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, K] as vectors [O * I, d]: the adjoint of the layout in ``_rows``."""
        groups = rows.view(-1, self.og, rows.shape[1] // self.g, self.g)
        return groups.transpose(1, 2).reshape(-1, self.og * self.g)

    def _conjugate_gradients(self, steps: int) -> torch.Tensor:
        """A change of the codebooks [B, C, d] that lowers L, preconditioned by the diagonal."""
        count, groups = self.codebooks.shape[1], self.codes.shape[1]
        sums = CodeSums(self.codes.flatten(0, 1), count)
        scales = self.scales.repeat_interleave(groups)[:, None]

        def adjoint(rows: torch.Tensor) -> torch.Tensor:
            return sums(self._vectors(rows @ self.narrow) * scales)

        diagonal = self.narrow.diagonal().view(1, groups, 1, self.g)
        diagonal = diagonal.expand(len(self.scales), -1, self.og, -1).reshape(-1, self.og * self.g)
        diagonal = sums(diagonal * scales.square())
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)

        residual = adjoint(self.weight - self._rows(self.codebooks, self.scales, self.codes))
        change, direction = torch.zeros_like(residual), inverse * residual
        power = first = (residual.double() * direction).sum()
        for _ in range(steps):
            curve = adjoint(self._rows(direction, self.scales, self.codes))
            bend = (direction.double() * curve).sum()
            if not (bool(bend > 0) and bool(power > SETTLED * first)):
                break
            length = (power / bend).float()
            change = change + length * direction
            residual = residual - length * curve
            steepest = inverse * residual
            previous, power = power, (residual.double() * steepest).sum()
            direction = steepest + (power / previous).float() * direction
        return change

    def _order(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()

    def _sweep(self) -> torch.Tensor:
        """New codes [O, I, B] of all groups, each given the newest codes of the others."""
        g, groups = self.g, self.codes.shape[1]
        rows = self._rows(self.codebooks, self.scales, self.codes)
        self._sweeper.begin(self.codebooks, self.scales, self.codes, self.weight - rows)
        width = max(1, BLOCK // g)
        for block in self._order(-(-groups // width)):
            first = block * width
            last = min(groups, first + width)
            self._sweeper.enter(slice(first * g, last * g))
            self._walk([first + k for k in self._order(last - first)])
        return self._sweeper.codes.clone()
