"""The data-free joint refit: exact steps on codebooks, scales and codes, each for the others fixed
(AQLM, arXiv 2401.06118, section 3.3, with the identity in place of the input's second moment).

Notation: the weight is cut into O rows (out groups) of I vectors x of d = og*ig weights; row o has
the scale s_o, the codebooks are C_m [B, C, d], the codes z [O, I, B]. The objective is

    L(C, s, z) = sum_oi | x_oi - s_o * sum_m C_m[z_oim] |^2

so a vector weighs s_o^2 in the codebooks' normal equations. Sums run in float64 over chunks of
rows, in an order that does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .search import CHUNK, decode, encode

JOINT_LIMIT = 4096
"""Largest B*C whose [B*C, B*C] system is built and factorised: 128 MiB and about a second."""

DAMPING = 1e-8
"""Added to the unit diagonal of the scaled normal equations, which shifts between codebooks, and
entries that always occur together, leave singular."""


class Refit:
    """A solution under refinement: each step lowers its ``error`` or leaves it as it was.

    Args:
        vectors: float32 [O, I, d].
        codebooks: float32 [B, C, d] to start from.
        scales: float32 [O] to start from; a row of scale 0 decodes to zero.
        beam: of the code search.
    """

    def __init__(
        self, vectors: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, beam: int
    ):
        self.vectors, self.codebooks, self.scales, self.beam = vectors, codebooks, scales, beam
        self.codes = self._search()
        self._errors = vector_errors(vectors, codebooks, scales, self.codes)

    @property
    def error(self) -> float:
        """The objective L."""
        return float(self._errors.sum(1).sum())

    def step_codebooks(self) -> None:
        codebooks = fit_codebooks(self.vectors, self.codebooks, self.scales, self.codes)
        errors = vector_errors(self.vectors, codebooks, self.scales, self.codes)
        if errors.sum(1).sum() < self._errors.sum(1).sum():
            self.codebooks, self._errors = codebooks, errors

    def step_scales(self) -> None:
        scales = fit_scales(self.vectors, self.codebooks, self.scales, self.codes)
        errors = vector_errors(self.vectors, self.codebooks, scales, self.codes)
        if errors.sum(1).sum() < self._errors.sum(1).sum():
            self.scales, self._errors = scales, errors

    def step_codes(self) -> None:
        """New codes for the vectors that they serve strictly better."""
        codes = self._search()
        errors = vector_errors(self.vectors, self.codebooks, self.scales, codes)
        self.codes = torch.where((errors < self._errors)[..., None], codes, self.codes)
        self._errors = torch.minimum(errors, self._errors)

    def _search(self) -> torch.Tensor:
        """Codes [O, I, B] of the vectors over their scales."""
        dead = (self.scales == 0)[:, None, None]
        scales = torch.where(dead, 1.0, self.scales[:, None, None])
        targets = torch.where(dead, 0.0, self.vectors / scales)
        codes = encode(targets.flatten(0, 1), self.codebooks, self.beam)
        return codes.view(*self.vectors.shape[:2], -1)


def row_chunks(
    vectors: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Chunks of whole rows: vectors [o, I, d] and scales [o, 1, 1] in float64, codes [o, I, B]."""
    rows = max(1, CHUNK // vectors[0].numel())
    parts = zip(vectors.split(rows), scales.split(rows), codes.split(rows), strict=True)
    for x, s, z in parts:
        yield x.double(), s.double()[:, None, None], z


def vector_errors(
    vectors: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Squared error of each vector, float64 [O, I]: their sum is the objective L."""
    wide = codebooks.double()
    chunks = row_chunks(vectors, scales, codes)
    return torch.cat([(x - s * decode(wide, z)).square().sum(2) for x, s, z in chunks])


def fit_scales(
    vectors: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Least-squares scales [O] for fixed codebooks and codes (kept where a row decodes to zero)."""
    wide, parts = codebooks.double(), []
    for x, s, z in row_chunks(vectors, scales, codes):
        words = decode(wide, z)
        energy = words.square().sum((1, 2))
        parts.append(torch.where(energy > 0, (words * x).sum((1, 2)) / energy, s[:, 0, 0]))
    return torch.cat(parts).float()


def fit_codebooks(
    vectors: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Least-squares codebooks [B, C, d] for fixed codes and scales.

    All codebooks jointly, unless there is one (each entry is then a weighted mean) or B*C is beyond
    ``JOINT_LIMIT`` (then one sweep, each codebook solved exactly given the others).
    """
    wide = codebooks.double()
    books, count, _ = codebooks.shape
    if books > 1 and books * count <= JOINT_LIMIT:
        return (wide + _joint_step(vectors, wide, scales, codes)).float()
    for book in range(books):
        gradient = _gradient(vectors, wide, scales, codes, (book,))[book]
        mass = wide.new_zeros(count)
        for _, s, z in row_chunks(vectors, scales, codes):
            mass.index_add_(0, z[..., book].flatten(), _weights(s, z))
        wide[book] += torch.where(mass > 0, 1 / mass, 0.0)[:, None] * gradient
    return wide.float()


def _weights(scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Weight s^2 of each vector in the normal equations, [o * I]."""
    return scales.square().expand(-1, codes.shape[1], 1).flatten()


def _gradient(
    vectors: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    codes: torch.Tensor,
    which: Iterable[int],
) -> torch.Tensor:
    """Sum of s * residual over the users of each entry, [B, C, d] (zero but in ``which``)."""
    total = torch.zeros_like(codebooks)
    for x, s, z in row_chunks(vectors, scales, codes):
        residual = (s * (x - s * decode(codebooks, z))).flatten(0, 1)
        for book in which:
            total[book].index_add_(0, z[..., book].flatten(), residual)
    return total


def _joint_step(
    vectors: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Change of all codebooks that minimises L: normal equations over B*C one-hot features.

    Solved for the change, by Cholesky with the diagonal scaled to one, so that the damping pulls
    towards the codebooks as they are and entries that nothing uses do not move.
    """
    books, count, width = codebooks.shape
    size = books * count
    system = codebooks.new_zeros(books, books, count * count)
    for _, s, z in row_chunks(vectors, scales, codes):
        z, weights = z.flatten(0, 1), _weights(s, z)
        for a in range(books):
            for b in range(a, books):
                system[a, b].index_add_(0, z[:, a] * count + z[:, b], weights)
    system = system.view(books, books, count, count).permute(0, 2, 1, 3).reshape(size, size)
    norm = system.diagonal().sqrt()
    inverse = torch.where(norm > 0, 1 / norm, 0.0)[:, None]
    system = (system * inverse * inverse.T).triu()
    system.diagonal().fill_(1 + DAMPING)
    gradient = _gradient(vectors, codebooks, scales, codes, range(books)).view(size, width)
    factor = torch.linalg.cholesky(system, upper=True)
    step = torch.cholesky_solve(gradient * inverse, factor, upper=True) * inverse
    return step.view(books, count, width)
