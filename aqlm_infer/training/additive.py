"""Tuning additive codebooks: the code basis is the weight, a group one vector of og*ig weights.

W[group j of row o] = s_o * sum_m C_m[z_jm]
dC_m[c] = sum over groups with z_jm = c of s_o G_j        ds_o = sum_j <G_j, sum_m C_m[z_jm]>
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..formats import AdditiveFormat, Tensors
from ..quantizers.search import CHUNK, DEVICE_CHUNK, best_columns
from ..quantizers.sums import CodeSums
from .representation import Representation, taken

HOT = 1024
"""Most entries of a codebook whose sums are products with a matrix of zeros and ones on a GPU."""


class AdditiveRepresentation(Representation):
    """Codes [L, O*I, B]; values codebooks [L, B, C, og, ig] and scales [L, O, 1, 1, 1]."""

    @classmethod
    def of(
        cls, format: AdditiveFormat, tensors: Sequence[Tensors], name: str
    ) -> AdditiveRepresentation:
        dtype = torch.uint8 if format.nbits <= 8 else torch.int32
        codes = [format.unpack_codes(t["codes"]).flatten(0, 1).to(dtype) for t in tensors]
        values = {n: torch.stack([t[n] for t in tensors]) for n in ("codebooks", "scales")}
        width = format.out_group_size * format.in_group_size
        self = cls(format, torch.stack(codes), values, width)
        self.columns = tensors[0]["codes"].shape[1]
        return self

    def _books(self) -> torch.Tensor:
        """The codebooks as [L, B, C, width]."""
        return self.values["codebooks"].detach().flatten(3)

    def _scales(self, index: torch.Tensor | None = None) -> torch.Tensor:
        """Scale of each group, [L, n, 1]."""
        scales = self.values["scales"].detach().view(self.count, -1)
        if index is None:
            return scales.repeat_interleave(self.columns, 1)[..., None]
        return scales.gather(1, index // self.columns)[..., None]

    def to_basis(self, weight: torch.Tensor) -> torch.Tensor:
        """Weights [L, N, K] as groups [L, groups, width]."""
        og, ig = self.format.out_group_size, self.format.in_group_size
        tiles = weight.unflatten(2, (-1, ig)).unflatten(1, (-1, og))  # [L, O, og, I, ig]
        return tiles.transpose(2, 3).reshape(self.count, self.groups, self.width)

    def outer(self, words: torch.Tensor) -> torch.Tensor:
        og, ig = self.format.out_group_size, self.format.in_group_size
        tiles = words.view(self.count, -1, self.columns, og, ig)
        rows = tiles.shape[1] * og
        return tiles.transpose(2, 3).reshape(self.count, rows, self.columns * ig)

    def decode(self, codes: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        if codes.device.type == "cuda":
            from ..triton_kernels.codewords import codewords

            scales = self.values["scales"].detach().view(self.count, -1)
            return codewords(self._books(), codes, scales, self.columns, index)
        return summed(self._books(), codes) * self._scales(index)

    @torch.no_grad()
    def gradients(self, gradient: torch.Tensor) -> torch.Tensor:
        groups = self.to_basis(gradient)
        codebooks, scales = self.values["codebooks"], self.values["scales"]
        sums = code_sums(groups * self._scales(), self.codes, self.format.entries)
        codebooks.grad = sums.view_as(codebooks)
        dots = (groups * summed(self._books(), self.codes)).view(*scales.shape[:2], -1)
        scales.grad = dots.sum(2).view_as(scales)
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
        order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        words, codes = self._words(targets, index), taken(self.codes, index)
        return sweep(words, codes, self._books(), beam, order)[:, :, 0]

    def two_nearest(
        self, targets: torch.Tensor, beam: int, order: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = sweep(self._words(targets, None), self.codes, self._books(), beam, order, keep=2)
        return found[:, :, 0], found[:, :, 1]

    def tensors(self, place: int) -> dict[str, torch.Tensor]:
        codes = self.codes[place].view(-1, self.columns, self.books)
        return {"codes": self.format.pack_codes(codes.int()), **self.values_of(place)}


def summed(codebooks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Sum of the chosen words: codebooks [L, B, C, d], codes [L, ..., B] -> [L, ..., d]."""
    L, books, count, width = codebooks.shape
    flat = codes.reshape(L, -1, books)
    if codes.device.type == "cuda":
        from ..triton_kernels.codewords import codewords

        return codewords(codebooks, flat).view(*codes.shape[:-1], width)
    first = torch.arange(0, L * count, count, dtype=torch.int32).view(L, 1)
    total = 0.0
    for book in range(books):
        words = codebooks[:, book].reshape(L * count, width)
        total = total + F.embedding(flat[..., book].int() + first, words)
    return total.view(*codes.shape[:-1], width)


def looked_up(codebooks: torch.Tensor, book: int, codes: torch.Tensor) -> torch.Tensor:
    """Words of ``codes`` [L, ...] in one of the codebooks [L, B, C, d], [L, ..., d]."""
    return summed(codebooks[:, book : book + 1], codes[..., None])


def code_sums(rows: torch.Tensor, codes: torch.Tensor, count: int) -> torch.Tensor:
    """Sum of ``rows`` [L, n, d] over the users of each entry, [L, B, count, d] float32.

    The same bits every time. On a GPU and for small codebooks as a product with a matrix of zeros
    and ones: rows are three bfloat16 terms that add up to them, so products are exact and only the
    accumulation in float32 rounds. Else by ``CodeSums``.
    """
    L, n, width = rows.shape
    books = codes.shape[2]
    if rows.device.type == "cpu" or count > HOT:
        first = torch.arange(0, L * count, count, device=codes.device).view(L, 1, 1)
        sums = CodeSums((codes + first).flatten(0, 1), L * count)(rows.flatten(0, 1))
        return sums.view(books, L, count, width).transpose(0, 1)
    high = rows.bfloat16()
    rest = rows - high
    middle = rest.bfloat16()
    terms = torch.cat([high, middle, (rest - middle).bfloat16()], 2)
    total = rows.new_zeros(L, books, count, 3 * width)
    size = max(1, DEVICE_CHUNK // (L * count))
    for part, held in zip(terms.split(size, 1), codes.split(size, 1), strict=True):
        hot = torch.zeros(*held.shape[:2], count, dtype=torch.bfloat16, device=rows.device)
        for book, column in enumerate(held.long().split(1, 2)):
            hot.scatter_(2, column, 1.0)
            total[:, book] += torch.bmm(hot.mT, part, out_dtype=torch.float32)
            hot.scatter_(2, column, 0.0)
    return total.view(L, books, count, 3, width).sum(3)


def best_few(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """``best_columns``; on a GPU one argmax after another, which ``topk`` of a few takes 7 times
    as long as."""
    if scores.device.type == "cpu" or keep > 8:
        return best_columns(scores, keep)
    best = [scores.argmax(1, keepdim=True)]
    while len(best) < keep:
        scores.scatter_(1, best[-1], -torch.inf)
        best.append(scores.argmax(1, keepdim=True))
    return torch.cat(best, 1)


def sweep(
    targets: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    beam: int,
    order: torch.Tensor | None = None,
    keep: int = 1,
) -> torch.Tensor:
    """Codes [L, n, keep, B], best first, by one beam sweep from ``codes`` [L, n, B].

    Codebooks are visited in ``order`` [L, B]: a hypothesis gives up its word, every word of the
    codebook is scored in its place, and the ``beam`` smallest residuals go on; of the last codebook
    the ``keep`` smallest. Targets [L, n, d] and codebooks [L, B, C, d] are float32.
    """
    L, books, count, width = codebooks.shape
    if order is not None:
        codebooks = codebooks.take_along_dim(order[..., None, None], 1)
        codes = codes.take_along_dim(order[:, None], 2)
    half = codebooks.square().sum(3, keepdim=True) / -2
    columns = torch.cat([codebooks, half, torch.ones_like(half)], 3).mT.contiguous()
    widest = count * (min(beam, count) if books > 1 else 1)
    chunk = CHUNK if targets.device.type == "cpu" else DEVICE_CHUNK
    rows = max(1, chunk // (widest * L))
    parts = []
    for t, z in zip(targets.split(rows, 1), codes.split(rows, 1), strict=True):
        held = z[:, :, None].long()  # [L, n, hypotheses, B]
        residual = (t - summed(codebooks, z))[:, :, None]
        for book in range(books):
            base = residual + looked_up(codebooks, book, held[..., book])
            if books == 1:
                base = t[:, :, None]  # what the sum above is, without its rounding
            energy = base.square().sum(3, keepdim=True) / -2
            scored = torch.cat([base, torch.ones_like(energy), energy], 3)
            scores = scored.flatten(1, 2) @ columns[:, book]
            scores = scores.view(L * t.shape[1], -1)
            most = min(keep if book == books - 1 else beam, scores.shape[1])
            best = best_few(scores, most).view(L, -1, most)
            parent, word = (best // count)[..., None], best % count
            held = held.take_along_dim(parent, 2)
            held[..., book] = word
            residual = base.take_along_dim(parent, 2) - looked_up(codebooks, book, word)
        parts.append(held.to(codes.dtype))
    found = torch.cat(parts, 1)
    if order is not None:
        found = found.take_along_dim(order.argsort(1)[:, None, None], 3)
    return found
