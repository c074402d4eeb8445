"""Tuning additive codebooks: the code basis is the weight, a group one vector of og*ig weights.

W[group j of row o] = s_o * sum_m C_m[z_jm]
dC_m[c] = sum over groups with z_jm = c of s_o G_j        ds_o = sum_j <G_j, sum_m C_m[z_jm]>
"""

from __future__ import annotations

import torch

from ..formats import AdditiveFormat, Tensors
from ..quantizers.search import CHUNK, DEVICE_CHUNK, best_columns, decode, encode
from ..quantizers.sums import CodeSums
from .representation import Representation


class AdditiveRepresentation(Representation):
    """Codes int32 [O*I, B]; values codebooks [B, C, og, ig] and scales [O, 1, 1, 1]."""

    @classmethod
    def of(cls, format: AdditiveFormat, tensors: Tensors, name: str) -> AdditiveRepresentation:
        codes = format.unpack_codes(tensors["codes"]).flatten(0, 1).int()
        values = {n: tensors[n] for n in ("codebooks", "scales")}
        self = cls(format, codes, values, format.out_group_size * format.in_group_size)
        self.columns = tensors["codes"].shape[1]
        return self

    def _books(self) -> torch.Tensor:
        """The codebooks as [B, C, width]."""
        return self.values["codebooks"].detach().flatten(2)

    def _scales(self, index: torch.Tensor | None = None) -> torch.Tensor:
        """Scale of each group, [n, 1]."""
        scales = self.values["scales"].detach().view(-1, 1)
        if index is None:
            return scales.repeat_interleave(self.columns, 0)
        return scales[index // self.columns]

    def to_basis(self, weight: torch.Tensor) -> torch.Tensor:
        og, ig = self.format.out_group_size, self.format.in_group_size
        tiles = weight.unflatten(1, (-1, ig)).unflatten(0, (-1, og))  # [O, og, I, ig]
        return tiles.transpose(1, 2).reshape(self.groups, self.width)

    def from_basis(self, groups: torch.Tensor, rows: int) -> torch.Tensor:
        og, ig = self.format.out_group_size, self.format.in_group_size
        tiles = groups.view(rows // og, self.columns, og, ig)
        return tiles.transpose(1, 2).reshape(rows, self.columns * ig)

    def weight(self) -> torch.Tensor:
        words = decode(self.values["codebooks"].flatten(2), self.codes)
        scaled = words * self.values["scales"].view(-1, 1).repeat_interleave(self.columns, 0)
        return self.from_basis(scaled, len(self.values["scales"]) * self.format.out_group_size)

    def decode(self, codes: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        return decode(self._books(), codes) * self._scales(index)

    @torch.no_grad()
    def gradients(self, gradient: torch.Tensor) -> torch.Tensor:
        groups = self.to_basis(gradient)
        codebooks, scales = self.values["codebooks"], self.values["scales"]
        sums = CodeSums(self.codes, self.format.entries)
        codebooks.grad = sums(groups * self._scales()).view_as(codebooks)
        dots = (groups * decode(self._books(), self.codes)).view(len(scales), -1)
        scales.grad = dots.sum(1).view_as(scales)
        return groups

    def _words(self, targets: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """Targets over their scales; zero in rows of scale zero, where every code is as good."""
        scales = self._scales(index)
        return torch.where(scales == 0, 0.0, targets / torch.where(scales == 0, 1.0, scales))

    def search(
        self,
        targets: torch.Tensor,
        index: torch.Tensor | None = None,
        beam: int = 1,
        order: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        words, books = self._words(targets, index), self._books()
        if len(books) == 1:
            return encode(words, books).int()
        codes = self.codes if index is None else self.codes[index]
        return sweep(words, codes, books, beam, order or tuple(range(len(books))))[:, 0]

    def two_nearest(
        self, targets: torch.Tensor, beam: int, order: tuple[int, ...] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        words, books = self._words(targets, None), self._books()
        found = sweep(words, self.codes, books, beam, order or tuple(range(len(books))), keep=2)
        return found[:, 0], found[:, 1]

    def tensors(self) -> dict[str, torch.Tensor]:
        values = {n: v.detach() for n, v in self.values.items()}
        codes = self.codes.view(-1, self.columns, self.books)
        return {"codes": self.format.pack_codes(codes), **values}


def sweep(
    targets: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    beam: int,
    order: tuple[int, ...],
    keep: int = 1,
) -> torch.Tensor:
    """Codes int32 [n, keep, B], best first, by one beam sweep from ``codes`` [n, B].

    Codebooks are visited in ``order``: a hypothesis gives up its word, every word of the codebook
    is scored in its place, and the ``beam`` smallest residuals go on; of the last codebook the
    ``keep`` smallest. Targets [n, d] and codebooks [B, C, d] are float32.
    """
    books, count, width = codebooks.shape
    half = codebooks.square().sum(2, keepdim=True) / -2
    columns = torch.cat([codebooks, half, torch.ones_like(half)], 2).mT.contiguous()
    widest = count * (min(beam, count) if books > 1 else 1)
    chunk = CHUNK if targets.device.type == "cpu" else DEVICE_CHUNK
    rows = max(1, chunk // widest)
    parts = []
    for t, z in zip(targets.split(rows), codes.split(rows), strict=True):
        held = z[:, None].long()  # [n, hypotheses, B]
        residual = (t - decode(codebooks, z))[:, None]
        for place, book in enumerate(order):
            base = residual + codebooks[book][held[..., book]]
            energy = base.square().sum(2, keepdim=True) / -2
            scored = torch.cat([base, torch.ones_like(energy), energy], 2)
            scores = (scored.flatten(0, 1) @ columns[book]).view(len(t), -1)
            most = min(keep if place == books - 1 else beam, scores.shape[1])
            best = best_columns(scores, most)
            parent, word = (best // count)[..., None], best % count
            held = held.gather(1, parent.expand(-1, -1, books))
            held[..., book] = word
            residual = base.gather(1, parent.expand(-1, -1, width)) - codebooks[book][word]
        parts.append(held.int())
    return torch.cat(parts)
