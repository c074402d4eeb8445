"""E8P (QuIP#, arXiv 2402.04396): rotated weights, 16 bits for 8 of them, and a residual code.

    W = diag(SV Wscale f) U_N Wq U_K^T diag(SU)
    Wq[n, 8k..8k+7] = G[c] (2 bit)    G[c] + E[b]/2.04 (3 bit)    G[c] + G[c']/3.45 (4 bit)

Canonical tensors of a [N, K] layer, under their published names (fused parts only: fuse_scales):

    Qidxs        int64    [N, K/32 (2 bit), 3K/64 (3 bit), K/16 (4 bit)]    ``pack_e8p``
    SU, SV       float    [K], [N]        sign vectors, SV holding the scale; arbitrary after tuning
    Wscale       float32  []              1 in new files
    codebook_id  int64    []              7, 18, 17 for 2, 3, 4 bits
    fuse_scales  float32  [P]             f of each of the P fused parts
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch

from .base import Format, FormatError, Tensors, TensorSpec, size_of
from .rotated import rotate_back, why_not_rotated

CODEBOOK_IDS = {2: 7, 3: 18, 4: 17}
"""The published ``codebook_id`` of each bit width."""

RESIDUAL_SCALES = {2: 1.0, 3: 2.04, 4: 3.45}
"""What the residual code is divided by, unless a config overrides it."""

POSITIONS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Vector element of each sign bit of a code (and of each nibble of the packed table)."""

_NORM_12 = """
31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133
33133311 33133131 33131331 33133113 33131313 33131133 31333311 31333131 31331331 31333113
31331313 13331133 13333311 13333131 13331331 13333113 13331313 11331333 33113331
"""

_ID = re.compile(r"quip-e8p-(\d+)bit(-b128)?(?:-r([\d.]+))?(?:-f(\d+(?:\+\d+)+))?")


@lru_cache(maxsize=1)
def source_set() -> torch.Tensor:
    """S: twice the 256 magnitude vectors, int8 [256, 8]; the row is the high byte of a code."""
    rows = [v for v in product((1, 3, 5), repeat=8) if sum(d * d for d in v) <= 40]
    rows += [tuple(map(int, digits)) for digits in _NORM_12.split()]
    return torch.tensor(rows, dtype=torch.int8)


@lru_cache(maxsize=1)
def grid_x4() -> torch.Tensor:
    """G: four times the 8 weights of every code, exact int8 [65536, 8]."""
    codes = torch.arange(65536)
    value = source_set()[codes >> 8].to(torch.int16) * 2
    signs = codes & 255
    parity = sum((signs >> b) & 1 for b in range(8)) & 1
    flips = signs ^ parity
    odd_sum = (value.sum(1) // 4) % 2  # the coordinates' sum is the sum of value over 4
    value[:, 7] *= (1 - 2 * odd_sum).to(torch.int16)
    for bit, element in enumerate(POSITIONS):
        value[:, element] *= (1 - 2 * ((flips >> bit) & 1)).to(torch.int16)
    return (value + (1 - 2 * parity).to(torch.int16)[:, None]).to(torch.int8)


@lru_cache(maxsize=1)
def packed_table() -> torch.Tensor:
    """The 256 magnitude vectors as 32-bit words, in int64 [256]: nibble t = 8 + twice the value of
    element POSITIONS[t], where an odd coordinate sum has negated element 7."""
    value = source_set().to(torch.int64).clone()
    value[:, 7] *= 1 - 2 * ((value.sum(1) // 2) % 2)
    return sum((value[:, element] + 8) << 4 * t for t, element in enumerate(POSITIONS))


@lru_cache(maxsize=1)
def residual_x2() -> torch.Tensor:
    """E: twice the 8 values of every 8-bit residual code, int8 [256, 8]."""
    rows = [v for v in product((-2, 0, 2), repeat=8) if sum(map(abs, v)) in (0, 4)]
    rows += [v for v in product((-1, 1), repeat=8) if sum(v) % 4 == 0]
    for sign, count in ((4, 8), (-4, 7)):
        rows += [tuple(sign * (i == j) for j in range(8)) for i in range(count)]
    return torch.tensor(rows, dtype=torch.int8)


def pack_e8p(codes: torch.Tensor) -> torch.Tensor:
    """16-bit codes [N, K/8] (any integer dtype) -> Qidxs int64 [N, K/32].

    A word holds four codes of a 16 x 64 tile: code i of word (r, c) covers row 2r + (i & 1) and
    columns 16c + 8(i >> 1) ..+7. Byte i is its magnitude index; bit 32 + 4j + i its sign bit j.
    """
    N, groups = codes.shape
    tiles = codes.to(torch.int64).view(N // 16, 8, 2, groups // 8, 4, 2).permute(0, 3, 1, 4, 5, 2)
    four = tiles.reshape(-1, 4)  # [it, ik, r, c] by [column pair, row] = i
    word = torch.zeros(four.shape[0], dtype=torch.int64, device=codes.device)
    for i in range(4):
        word |= (four[:, i] >> 8) << (8 * i)
        for j in range(8):
            word |= ((four[:, i] >> j) & 1) << (32 + 4 * j + i)
    return word.view(N, groups // 4)


def unpack_e8p(words: torch.Tensor) -> torch.Tensor:
    """Qidxs int64 [N, K/32] -> 16-bit codes, int32 [N, K/8]: the inverse of ``pack_e8p``."""
    N, columns = words.shape
    word = words.reshape(-1)
    four = torch.zeros((word.numel(), 4), dtype=torch.int32, device=words.device)
    for i in range(4):
        four[:, i] = ((word >> (8 * i)) & 255).int() << 8
        for j in range(8):
            four[:, i] |= ((word >> (32 + 4 * j + i)) & 1).int() << j
    tiles = four.view(N // 16, columns // 2, 8, 4, 2, 2).permute(0, 2, 5, 1, 3, 4)
    return tiles.reshape(N, columns * 4)


@dataclass(frozen=True)
class E8PFormat(Format):
    """Scheme ``quip-e8p-{2,3,4}bit``.

    Suffixes: ``-b128`` block instead of full-width rotations, ``-r{x}`` another residual scale,
    ``-f{n}+{n}..`` parts that were quantized as one matrix and have one output rotation.
    """

    bits: int
    blocks: bool = False
    residual: float = 0.0
    parts: tuple[int, ...] = ()

    code_names = ("Qidxs", "codebook_id")

    def __post_init__(self):
        if self.bits not in CODEBOOK_IDS:
            raise FormatError(f"E8P has 2, 3 or 4 bits a weight, not {self.bits}")
        object.__setattr__(self, "residual", self.residual or RESIDUAL_SCALES[self.bits])
        if self.bits == 2 and self.residual != 1.0:
            raise FormatError(f"residual scale {self.residual}: 2-bit E8P has no residual code")

    @classmethod
    def parse(cls, scheme: str) -> E8PFormat | None:
        match = _ID.fullmatch(scheme)
        if not match:
            return None
        bits, blocks, residual, parts = match.groups()
        sizes = tuple(int(p) for p in parts.split("+")) if parts else ()
        return cls(int(bits), bool(blocks), float(residual or 0), sizes)

    @property
    def id(self) -> str:
        residual = f"-r{self.residual:g}" if self.residual != RESIDUAL_SCALES[self.bits] else ""
        parts = f"-f{'+'.join(map(str, self.parts))}" if self.parts else ""
        return f"quip-e8p-{self.bits}bit{'-b128' if self.blocks else ''}{residual}{parts}"

    @property
    def rotation(self) -> str:
        """Kind of both rotations: "hadamard" or "block"."""
        return "block" if self.blocks else "hadamard"

    def why_not_shape(self, N: int, K: int) -> str | None:
        if N <= 0 or K <= 0 or N % 16 or K % 64:
            return f"N={N}, K={K}: {self.id} needs multiples of 16 and 64"
        if self.parts and sum(self.parts) != N:
            return f"N={N} is not the sum of the parts {list(self.parts)} of {self.id}"
        return why_not_rotated(self.rotation, N, K)

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        specs = {
            "Qidxs": TensorSpec((N, K * self.bits // 64), torch.int64),
            "SU": TensorSpec((K,), None),
            "SV": TensorSpec((N,), None),
            "Wscale": TensorSpec((), torch.float32),
            "codebook_id": TensorSpec((), torch.int64),
        }
        if self.parts:
            specs["fuse_scales"] = TensorSpec((len(self.parts),), torch.float32)
        return specs

    def out_features(self, tensors: Tensors, name: str = "layer") -> int:
        return size_of(tensors, "SV", 0, name, self.id)

    def in_features(self, tensors: Tensors, name: str = "layer") -> int:
        return size_of(tensors, "SU", 0, name, self.id)

    def check_codes(self, codes: torch.Tensor, name: str) -> None:
        if name.endswith("codebook_id") and int(codes) != CODEBOOK_IDS[self.bits]:
            known = ", ".join(f"{i} ({b} bit)" for b, i in CODEBOOK_IDS.items())
            raise FormatError(
                f"{name} is {int(codes)}, expected {CODEBOOK_IDS[self.bits]} for {self.id};"
                f" supported: {known}"
            )

    def pack_codes(
        self, codes: torch.Tensor, residual: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The code tensors of 16-bit codes [N, K/8] and, at 3 and 4 bits, residual codes alike."""
        words = [pack_e8p(codes)]
        if self.bits == 4:
            words.append(pack_e8p(residual))
        elif self.bits == 3:
            rows = residual.to(torch.uint8).contiguous()
            words.append(rows.view(torch.int64))
        number = torch.tensor(CODEBOOK_IDS[self.bits], device=codes.device)
        return {"Qidxs": torch.cat(words, 1).contiguous(), "codebook_id": number}

    def unpack_codes(self, qidxs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Qidxs -> (16-bit codes, residual codes or None), int32 [N, K/8] each."""
        if self.bits == 2:
            return unpack_e8p(qidxs), None
        split = qidxs.shape[1] * 2 // self.bits
        words, rest = qidxs[:, :split].contiguous(), qidxs[:, split:].contiguous()
        if self.bits == 4:
            return unpack_e8p(words), unpack_e8p(rest)
        return unpack_e8p(words), rest.view(torch.uint8).int()

    def decode(self, qidxs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Wq [N, K] in the rotated basis, without scales; ``dtype`` float32 or float64."""
        codes, residual = self.unpack_codes(qidxs)
        weight = grid_x4().to(qidxs.device)[codes].to(dtype) / 4
        if self.bits == 4:
            weight += grid_x4().to(qidxs.device)[residual].to(dtype) / 4 / self.residual
        elif self.bits == 3:
            weight += residual_x2().to(qidxs.device)[residual].to(dtype) / 2 / self.residual
        return weight.flatten(1)

    def output_scale(self, tensors: Tensors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What multiplies each output after its rotation, [N]: SV, Wscale and the parts' scales."""
        scale = tensors["SV"].to(dtype) * tensors["Wscale"].to(dtype)
        if self.parts:
            parts = torch.tensor(self.parts, device=scale.device)
            scale = scale * tensors["fuse_scales"].to(dtype).repeat_interleave(
                parts, output_size=sum(self.parts)
            )
        return scale

    def dequantize(self, tensors: Tensors, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The [N, K] weight in the original basis, differentiable in SU, SV and Wscale.

        Everything is float32 (float64 with ``dtype`` float64), rounded once to ``dtype`` (default:
        SV's dtype).
        """
        dtype = dtype or tensors["SV"].dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = self.decode(tensors["Qidxs"], wide)
        scale = self.output_scale(tensors, wide)
        return rotate_back(weight, self.rotation, tensors["SU"], scale).to(dtype)

    def bits_per_weight(self, N: int, K: int) -> float:
        scalars = 32 + 64 + 32 * len(self.parts)  # Wscale, codebook_id, fuse_scales
        return self.bits + (16 * (N + K) + scalars) / (N * K)
