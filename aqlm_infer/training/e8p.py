"""Tuning E8P: eight weights a group, between the two rotations, on a lattice that does not move.

The P step trains SU and SV; the V step is the exact nearest codeword at 2 bits, and at 3 and 4 bits
the nearest codeword and then the nearest residual code to what it leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..formats import E8PFormat, Tensors
from ..formats.e8p import grid_x4, residual_x2
from ..quantizers.lattice import nearest_e8p
from ..quantizers.search import CHUNK, DEVICE_CHUNK, best_columns, encode
from .representation import Representation
from .rotated import RotatedRepresentation, rotate_back


@lru_cache(maxsize=16)
def _codebooks(format: E8PFormat, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The words of each code, float32 [65536 or 256, 8], the residual's divided by its scale."""
    grid = grid_x4().to(device).float() / 4
    if format.bits == 2:
        return (grid,)
    fine = grid if format.bits == 4 else residual_x2().to(device).float() / 2
    return (grid, fine / format.residual)


def looked_up(book: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Words of ``codes`` [...] in a codebook [C, 8], [..., 8]."""
    if codes.device.type != "cuda":
        return F.embedding(codes, book)
    from ..triton_kernels.codewords import codewords

    return codewords(book[None, None], codes.reshape(1, -1, 1)).view(*codes.shape, 8)


def _two_best(targets: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The nearest of ``words`` [C, 8] to each target [n, 8] and the next nearest, int32 [n, 2].

    By scoring every word: the lattice's structure gives the nearest one only.
    """
    half = words.square().sum(1) / -2
    chunk = CHUNK if targets.device.type == "cpu" else DEVICE_CHUNK
    parts = targets.split(max(1, chunk // len(words)))
    return torch.cat([best_columns(torch.addmm(half, t, words.T), 2).int() for t in parts])


class E8PRepresentation(RotatedRepresentation):
    """Codes int32 [L, N*K/8, 1 or 2]; values SU [L, K], SV [L, N]; Wscale and fuse_scales stay."""

    @classmethod
    def of(cls, format: E8PFormat, tensors: Sequence[Tensors], name: str) -> Representation:
        codes = [
            torch.stack(
                [c.flatten().int() for c in format.unpack_codes(t["Qidxs"]) if c is not None], 1
            )
            for t in tensors
        ]
        self = cls.rotated(format, torch.stack(codes), tensors, 8)
        ones = [{**t, "SV": torch.ones_like(t["SV"], dtype=torch.float32)} for t in tensors]
        self.scale = torch.stack([format.output_scale(t) for t in ones])
        return self

    def rotate_back(self, weights: torch.Tensor) -> torch.Tensor:
        scale = self.values["SV"] * self.scale
        return rotate_back(weights, self.format.rotation, self.values["SU"], scale)

    def decode(self, codes: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        books = _codebooks(self.format, codes.device)
        total = looked_up(books[0], codes[..., 0])
        return total if len(books) == 1 else total + looked_up(books[1], codes[..., 1])

    def search(
        self,
        targets: torch.Tensor,
        index: torch.Tensor | None = None,
        beam: int = 1,
        order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        books = _codebooks(self.format, targets.device)
        flat = targets.flatten(0, 1)
        found = [nearest_e8p(flat)]
        if len(books) == 2:
            rest = flat - books[0][found[0]]
            if self.format.bits == 4:
                found.append(nearest_e8p(rest * self.format.residual))
            else:
                found.append(encode(rest, books[1][None])[:, 0])
        return torch.stack(found, 1).int().view(*targets.shape[:2], -1)

    def two_nearest(
        self, targets: torch.Tensor, beam: int, order: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """With a residual code it is that code which differs, its first code being the nearest."""
        books = _codebooks(self.format, targets.device)
        flat = targets.flatten(0, 1)
        if len(books) == 1:
            pair = _two_best(flat, books[0])
            near, next_near = pair[:, :1], pair[:, 1:]
        else:
            first = nearest_e8p(flat)
            pair = _two_best(flat - books[0][first], books[1])
            near, next_near = (torch.stack([first.int(), z], 1) for z in pair.unbind(1))
        shape = (*targets.shape[:2], -1)
        return near.reshape(shape), next_near.reshape(shape)

    def code_tensors(self, place: int) -> dict[str, torch.Tensor]:
        codes = self.codes[place].view(self.rows, -1, self.books)
        return self.format.pack_codes(*codes.unbind(2))
