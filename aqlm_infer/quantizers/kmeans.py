"""Weighted k-means and residual k-means: where additive codebooks start (AQLM, arXiv 2401.06118,
section 3.1)."""

from __future__ import annotations

import torch

from .search import encode
from .sums import CodeSums


def nearest(vectors: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Index of the centre [C, d] nearest to each vector [n, d], int64 [n]."""
    return encode(vectors, centres[None])[:, 0]


def distinct_start(
    vectors: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, bool]:
    """``count`` distinct random vectors, and whether there were that many.

    Where there are fewer, every distinct vector is a centre and zeros fill the rest.
    """
    order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    for tried in (4 * count, len(vectors)):
        pool = torch.unique(vectors[order[:tried]], dim=0)
        if len(pool) >= count:
            break
    pick = torch.randperm(len(pool), generator=generator)[:count].to(vectors.device)
    start = vectors.new_zeros(count, vectors.shape[1])
    start[: len(pick)] = pool[pick]
    return start, len(pick) == count


def weighted_means(
    vectors: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, centres: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean [C, d] of each cluster (an empty one keeps its centre), and its weight [C]."""
    rows = torch.cat([vectors.double() * weights[:, None], weights[:, None]], 1)
    total, mass = CodeSums(codes[:, None], len(centres))(rows)[0].tensor_split([-1], 1)
    mass = mass[:, 0]
    return torch.where(mass[:, None] > 0, total / mass[:, None], centres.double()).float(), mass


def kmeans(
    vectors: torch.Tensor,
    weights: torch.Tensor,
    count: int,
    rounds: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's k-means: centres [count, d] and the code of every vector, int64 [n].

    Args:
        vectors: float32 [n, d], n >= 1.
        weights: float64 [n], positive: how much the squared error of each vector counts.
        count: number of centres.
        rounds: at most this many; a fixed point ends it earlier.
        generator: draws the distinct vectors to start from.

    A centre that lost all its vectors moves onto one of the worst-served vectors.
    """
    centres, enough = distinct_start(vectors, count, generator)
    codes = nearest(vectors, centres)
    for _ in range(rounds if enough else 0):
        centres, mass = weighted_means(vectors, weights, codes, centres)
        empty = (mass == 0).nonzero()[:, 0]
        if len(empty):
            error = (vectors - centres[codes]).square().sum(1) * weights
            centres[empty] = vectors[error.topk(len(empty)).indices]
        previous, codes = codes, nearest(vectors, centres)
        if torch.equal(previous, codes):
            break
    return centres, codes


def residual_kmeans(
    vectors: torch.Tensor,
    weights: torch.Tensor,
    books: int,
    count: int,
    rounds: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Codebooks [books, count, d], each fitted by :func:`kmeans` to what the ones before left."""
    residual, codebooks = vectors, []
    for _ in range(books):
        centres, codes = kmeans(residual, weights, count, rounds, generator)
        residual = residual - centres[codes]
        codebooks.append(centres)
    return torch.stack(codebooks)
