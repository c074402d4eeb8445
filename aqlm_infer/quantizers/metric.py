"""Where calibrated codebooks start: residual k-means in the metric that feedback rounding leaves.

The idea is OA-EM's (arXiv 2604.08118): after plain k-means, reassign and refit each codebook in the
layer's own metric. Two differences: the metric of column group j is the block D_j of the LDL
factorisation, what remains of X2 once the other groups may still compensate, and the M step is the
exact weighted least-squares solution instead of Adam steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .kmeans import kmeans
from .search import encode
from .sums import CodeSums
from .walk import Walk

RIDGE = 1e-6
"""Of an entry's mean diagonal, added to its normal equations."""


def assigner(
    vectors: torch.Tensor, entries: int, roots: torch.Tensor, og: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of targets [O, I, d], shaped as ``vectors``, and a codebook [entries, d].

    It returns the entry nearest to each target, int64 [O, I], under ``D_j = R_j R_j^T``; ``roots``
    R is float32 [I, g, g] with d = og * g.
    """
    targets, codebook = torch.empty_like(vectors), vectors.new_empty(entries, vectors.shape[2])
    codes = torch.zeros(vectors.shape[:2], dtype=torch.int64, device=vectors.device)

    def step(j: torch.Tensor) -> None:
        root = roots.index_select(0, j)[0]
        warped = targets.index_select(1, j)[:, 0].unflatten(1, (og, -1)) @ root
        words = codebook.unflatten(1, (og, -1)) @ root
        codes.index_copy_(1, j, encode(warped.flatten(1), words.flatten(1)[None]))

    walk = Walk(step, vectors.device)

    def assign(residual: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
        targets.copy_(residual)
        codebook.copy_(book)
        walk(range(len(roots)))
        return codes.clone()

    return assign


def refit(
    targets: torch.Tensor,
    weights: torch.Tensor,
    codebook: torch.Tensor,
    codes: torch.Tensor,
    metric: torch.Tensor,
    og: int,
) -> torch.Tensor:
    """Least-squares entries [C, d] for fixed codes [O, I]; an unused entry stays.

    ``weights`` float64 [O] weigh rows; ``metric`` float64 [I, g, g] is D.
    """
    (count, width), groups = codebook.shape, len(metric)
    size = width // og
    flat = (codes * groups + torch.arange(groups, device=codes.device)).flatten()
    rows = weights.repeat_interleave(groups)[:, None]
    mass = CodeSums(flat[:, None], count * groups)(rows)
    system = (mass.view(count, groups) @ metric.reshape(groups, -1)).view(count, size, size)
    moments = codebook.new_zeros(count, width, dtype=torch.float64)
    rows = max(1, (1 << 24) // (groups * width))
    for part, w, z in zip(targets.split(rows), weights.split(rows), codes.split(rows), strict=True):
        wide = part.double().unflatten(2, (og, size)).transpose(0, 1).flatten(1, 2)  # [I, o*og, g]
        warped = (wide @ metric).unflatten(1, (-1, og)).transpose(0, 1).flatten(2)
        moments += CodeSums(z.view(-1, 1), count)((warped * w[:, None, None]).flatten(0, 1))[0]
    scale = system.diagonal(dim1=1, dim2=2).mean(1)
    unused = scale == 0
    unit = torch.eye(size, dtype=torch.float64, device=codebook.device)
    system = system + torch.where(unused, 1.0, RIDGE * scale)[:, None, None] * unit
    solved = torch.linalg.solve(system, moments.view(count, og, size).mT).mT.reshape(count, width)
    return torch.where(unused[:, None], codebook, solved.float())


def metric_kmeans(
    vectors: torch.Tensor,
    scales: torch.Tensor,
    metric_roots: torch.Tensor,
    og: int,
    books: int,
    entries: int,
    *,
    plain_rounds: int,
    metric_rounds: int,
    sample: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codebooks [B, C, d] and codes [O, I, B] of row-normalised ``vectors`` [O, I, d].

    Args:
        scales: float32 [O], what rows were divided by: a row weighs its square.
        metric_roots: float64 [I, g, g], R_j of ``D_j = R_j R_j^T``.
        plain_rounds, metric_rounds: of plain k-means on ``sample`` (indices of vectors), then of
            reassignment and refit on all vectors.
    """
    weights = scales.double().square()
    metric, roots = metric_roots @ metric_roots.mT, metric_roots.float()
    groups = vectors.shape[1]
    assign = assigner(vectors, entries, roots, og)
    residual, codebooks, codes = vectors, [], []
    for _ in range(books):
        training = residual.flatten(0, 1)[sample]
        book, _ = kmeans(training, weights[sample // groups], entries, plain_rounds, generator)
        code = assign(residual, book)
        for _ in range(metric_rounds):
            book = refit(residual, weights, book, code, metric, og)
            code = assign(residual, book)
        residual = residual - book[code]
        codebooks.append(book)
        codes.append(code)
    return torch.stack(codebooks), torch.stack(codes, 2)
