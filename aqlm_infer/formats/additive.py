"""Additive codebooks (AQLM, arXiv 2401.06118): B codebooks of 2^b vectors of og x ig weights.

    W[o*og + a, i*ig + c] = scales[o] * sum_k codebooks[k, codes[o, i, k], a, c]

Canonical tensors of a [N, K] layer, with O = N/og and I = K/ig (the published checkpoint layout):

    codes      int8 (b <= 8) or int16 (b <= 16)   [O, I, B]        unsigned code v stored as v - 2^b
                                                                   when v >= 2^(b-1)
    codebooks  float                              [B, 2^b, og, ig]
    scales     float                              [O, 1, 1, 1]
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .base import Format, FormatError, Tensors, TensorSpec, size_of

_ID = re.compile(r"aqlm-(\d+)x(\d+)-g(\d+)(?:-o(\d+))?")


@dataclass(frozen=True)
class AdditiveFormat(Format):
    """Scheme ``aqlm-{B}x{bits}-g{G}`` (``-o{og}`` is appended when out_group_size is not 1)."""

    num_codebooks: int
    nbits: int
    in_group_size: int
    out_group_size: int = 1

    code_names = ("codes",)

    def __post_init__(self):
        for field, low, high in (
            ("num_codebooks", 1, 64),
            ("nbits", 1, 16),
            ("in_group_size", 1, 1024),
            ("out_group_size", 1, 1024),
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                raise FormatError(f"{field}={value} is outside {low}..{high} ({self.id})")

    @classmethod
    def parse(cls, scheme: str) -> AdditiveFormat | None:
        """The format of a scheme id, or None when the id is of another family."""
        match = _ID.fullmatch(scheme)
        return cls(*(int(g) for g in match.groups(default="1"))) if match else None

    @classmethod
    def of_codebooks(cls, codebooks: torch.Tensor | torch.Size) -> AdditiveFormat:
        """The format that a codebooks tensor (or its shape) [B, 2^b, og, ig] implies."""
        shape = tuple(getattr(codebooks, "shape", codebooks))
        if len(shape) != 4:
            raise FormatError(f"codebooks has shape {list(shape)}, expected [B, 2^bits, og, ig]")
        entries = shape[1]
        if entries < 2 or entries & (entries - 1):
            raise FormatError(f"codebooks has {entries} entries a codebook, not a power of two")
        return cls(shape[0], entries.bit_length() - 1, shape[3], shape[2])

    @property
    def id(self) -> str:
        suffix = f"-o{self.out_group_size}" if self.out_group_size != 1 else ""
        return f"aqlm-{self.num_codebooks}x{self.nbits}-g{self.in_group_size}{suffix}"

    @property
    def entries(self) -> int:
        """Vectors in one codebook, 2^b."""
        return 1 << self.nbits

    @property
    def code_dtype(self) -> torch.dtype:
        """Signed container of one stored code."""
        return torch.int8 if self.nbits <= 8 else torch.int16

    def why_not_shape(self, N: int, K: int) -> str | None:
        if N <= 0 or K <= 0:
            return f"N={N}, K={K}: both must be positive"
        if K % self.in_group_size:
            return f"K={K} is not a multiple of {self.in_group_size} (in_group_size of {self.id})"
        if N % self.out_group_size:
            return f"N={N} is not a multiple of {self.out_group_size} (out_group_size of {self.id})"
        return None

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        out_groups, in_groups = N // self.out_group_size, K // self.in_group_size
        book = (self.num_codebooks, self.entries, self.out_group_size, self.in_group_size)
        return {
            "codes": TensorSpec((out_groups, in_groups, self.num_codebooks), self.code_dtype),
            "codebooks": TensorSpec(book, None),
            "scales": TensorSpec((out_groups, 1, 1, 1), None),
        }

    def out_features(self, tensors: Tensors, name: str = "layer") -> int:
        return size_of(tensors, "scales", 0, name, self.id) * self.out_group_size

    def in_features(self, tensors: Tensors, name: str = "layer") -> int:
        return size_of(tensors, "codes", 1, name, self.id) * self.in_group_size

    def check_codes(self, codes: torch.Tensor, name: str) -> None:
        half = 1 << (self.nbits - 1)
        if codes.numel() == 0 or torch.iinfo(codes.dtype).bits == self.nbits:
            return
        low, high = (int(v) for v in torch.aminmax(codes))
        if low < -half or high >= half:
            bad = low if low < -half else high
            where = (codes == bad).nonzero()[0].tolist()
            raise FormatError(
                f"{name} holds {bad} at index {where}, outside {-half}..{half - 1} "
                f"(signed storage of {self.nbits}-bit codes, {self.id})"
            )

    def pack_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Unsigned codes 0..2^b-1 (any integer dtype) -> wrap-around signed storage."""
        wide = codes.to(torch.int64)
        if wide.numel() and not (int(wide.min()) >= 0 and int(wide.max()) < self.entries):
            low, high = int(wide.min()), int(wide.max())
            raise FormatError(
                f"codes span {low}..{high}, outside 0..{self.entries - 1} ({self.id})"
            )
        return torch.where(wide >= self.entries // 2, wide - self.entries, wide).to(self.code_dtype)

    def unpack_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Signed storage -> unsigned int64 codes (the mask matters for widths but 8 and 16)."""
        return codes.to(torch.int64) & (self.entries - 1)

    def dequantize(self, tensors: Tensors, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The [N, K] weight, differentiable in codebooks and scales.

        Sums in float32 in codebook order, multiplies by the scale in float32 and rounds once to
        ``dtype`` (default: the codebooks' dtype). With ``dtype`` float64 all of it is float64.
        """
        codebooks, scales = tensors["codebooks"], tensors["scales"]
        dtype = dtype or codebooks.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        codes = self.unpack_codes(tensors["codes"])
        out_groups, in_groups, _ = codes.shape
        total = codebooks[0].to(wide)[codes[..., 0]]  # [O, I, og, ig]
        for k in range(1, self.num_codebooks):
            total = total + codebooks[k].to(wide)[codes[..., k]]
        total = total * scales.to(wide)
        N, K = out_groups * self.out_group_size, in_groups * self.in_group_size
        return total.permute(0, 2, 1, 3).reshape(N, K).to(dtype)

    def split(self, tensors: Tensors, partitions: tuple[int, ...]) -> list[Tensors]:
        """The tensors of each fused part: rows of codes and scales, and its own codebooks."""
        groups = [rows // self.out_group_size for rows in partitions]
        return [
            {"codes": codes, "scales": scales, "codebooks": codebooks}
            for codes, scales, codebooks in zip(
                tensors["codes"].split(groups),
                tensors["scales"].split(groups),
                tensors["codebooks"].split(self.num_codebooks),
                strict=True,
            )
        ]

    def bits_per_weight(self, N: int, K: int) -> float:
        weights = N * K
        vector = self.out_group_size * self.in_group_size
        codes = self.num_codebooks * self.nbits / vector
        codebooks = 16 * self.num_codebooks * self.entries * vector / weights
        return codes + codebooks + 16 * (N // self.out_group_size) / weights
