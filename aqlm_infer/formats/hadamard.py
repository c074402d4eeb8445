"""Hadamard matrices H_F by closed form: the factors of randomized Hadamard rotations.

The twelve published orders are those of QuIP# and QTIP checkpoints, bit for bit. The others come
from the same Paley constructions and make rotations for the sizes that the published rule refuses.
All entries are +1 or -1 and H H^T = F I; only some matrices are symmetric.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .base import FormatError

PUBLISHED = (172, 156, 140, 124, 116, 108, 60, 52, 36, 28, 20, 12)
"""The published factors, in the order in which the published rule tries them."""

LARGEST = 1024
"""Largest factor that is searched for: H_F is applied as a dense product, F terms an element."""

# First halves of the first rows of the symmetric circulants A, B, C, D (each of size F/4).
_WILLIAMSON = {
    52: "+-+--++ +---+++ ++-+--+ +----+-",
    116: "++--+--+-+++-++ ++++-++-+---+++ +-+---++--+-+++ +++---++--+-+--",
    124: "+--+++-+--+----+ +--+++-+--+----+ +-----+++-+-+--+ ++++++---+-+-++-",
    156: "+++--+-+-----+--++-- ++++---+--++----+-+- +++--++-+---+-+--+-- +---++-+-+-----+++-+",
    172: "+---++--++++-+-+++-++- ++-++++++----+-+--++-+ +++-+-++--+-+-++++-+-- "
    "++---++++-+--+--++----",
}


@lru_cache(maxsize=256)
def factor_matrix(F: int) -> torch.Tensor:
    """H_F, int8 [F, F] of +1 and -1 (do not modify it: calls share it).

    Raises FormatError when no construction is known for the order.
    """
    if F in _WILLIAMSON:
        return _williamson(F)
    if F in (1, 2):
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)[:F, :F].contiguous()
    name = construction(F)
    if name is None:
        raise FormatError(f"no Hadamard matrix of order {F} is known here")
    return _paley_two(F // 2 - 1) if name.startswith("paley-2") else _paley_one(F - 1)


def construction(F: int) -> str | None:
    """How H_F is made, for configs and ``info``: such as ``"paley-1 q=19"``; None when it is not.

    Paley I needs a prime q = F-1 of the form 4k+3, Paley II a prime or squared prime q = F/2-1 of
    the form 4k+1; where both exist I is taken.
    """
    if F in (1, 2):
        return "sylvester"
    if F in _WILLIAMSON:
        return "williamson"
    if F % 4:
        return None
    if _is_prime(F - 1):
        return f"paley-1 q={F - 1}"
    q = F // 2 - 1
    root = round(q**0.5)
    if q % 4 == 1 and (_is_prime(q) or (root * root == q and _is_prime(root))):
        return f"paley-2 q={q}"
    return None


@lru_cache(maxsize=256)
def factor_of(K: int) -> int:
    """F of the full-width rotation of size K = F * 2^p.

    The published rule first (checkpoints do not store F); where it refuses K, the smallest order
    F = 4k with a construction here such that K/F is a power of two. Raises FormatError when there
    is none up to LARGEST.
    """
    if K < 1:
        raise FormatError(f"a rotation of size {K} does not exist")
    if K & (K - 1) == 0:
        return 1
    published = next((f for f in PUBLISHED if K % f == 0), None)
    if published and _is_power_of_two(K // published):
        return published
    F = 4 * (K // (K & -K))
    while K % F == 0 and F <= LARGEST:
        if construction(F):
            return F
        F *= 2
    raise FormatError(
        f"no Hadamard rotation of size {K}: it is no power of two times a known order up to"
        f" {LARGEST} (published: {', '.join(map(str, reversed(PUBLISHED)))}; Paley: q+1 and 2(q+1)"
        " for prime q); a block rotation (-b128) takes every multiple of 128"
    )


def sylvester(p: int) -> torch.Tensor:
    """S_p in natural order, int8 [p, p]; p is a power of two."""
    matrix = torch.ones((1, 1), dtype=torch.int8)
    while matrix.shape[0] < p:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _character(q: int) -> torch.Tensor:
    """chi(j - i) over GF(q), int8 [q, q]: 0 for i = j, +1 for squares, -1 for the others.

    For q = p^2 element number a + p*b stands for a + b*w, where w^2 is the least non-residue r.
    """
    if _is_prime(q):
        squares = {x * x % q for x in range(1, q)}
        chi = torch.tensor([0] + [1 if x in squares else -1 for x in range(1, q)])
        index = torch.arange(q)
        return chi[(index[None, :] - index[:, None]) % q].to(torch.int8)
    p = round(q**0.5)
    r = next(r for r in range(2, p) if r not in {x * x % p for x in range(1, p)})
    a, b = torch.arange(q) % p, torch.arange(q) // p
    chi = torch.full((q,), -1)
    chi[(a * a + r * b * b) % p + p * (2 * a * b % p)] = 1  # (a + b w)^2
    chi[0] = 0
    difference = (a[None, :] - a[:, None]) % p + p * ((b[None, :] - b[:, None]) % p)
    return chi[difference].to(torch.int8)


def _paley_one(q: int) -> torch.Tensor:
    matrix = torch.ones((q + 1, q + 1), dtype=torch.int8)
    matrix[0, 1:] = -1
    matrix[1:, 1:] = torch.eye(q, dtype=torch.int8) - _character(q)
    return matrix


def _paley_two(q: int) -> torch.Tensor:
    conference = torch.ones((q + 1, q + 1), dtype=torch.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _character(q)
    one = torch.eye(q + 1, dtype=torch.int8)
    plus, minus = conference + one, conference - one
    return torch.cat([torch.cat([plus, minus], 1), torch.cat([minus, -plus], 1)])


def _williamson(F: int) -> torch.Tensor:
    size = F // 4
    index = torch.arange(size)
    parts = []
    for half in _WILLIAMSON[F].split():
        first = [1 if sign == "+" else -1 for sign in half + half[:0:-1]]
        parts.append(
            torch.tensor(first, dtype=torch.int8)[(index[None, :] - index[:, None]) % size]
        )
    A, B, C, D = parts
    rows = ((A, B, C, D), (-B, A, -D, C), (-C, D, A, -B), (-D, -C, B, A))
    return torch.cat([torch.cat(row, 1) for row in rows])
