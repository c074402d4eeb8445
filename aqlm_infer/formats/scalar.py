"""Scalar grids: packed 2, 3, 4 and 8-bit codes. GPTQ and round to nearest in groups, QuIP rotated.

    gptq-int{b}-g{G}, rtn-int{b}-g{G}    w[n, k] = scales[n, k/G] * (q[n, k] - z[n, k/G])
    quip-int{b}                          Wq = Wscale * (2 q / (2^b - 1) - 1), rotated as E8P is
    quip-int{b}-kron                     W = diag(SV) U^T Wq V diag(SU) with QuIP's U and V

Codes of a row are a little-endian bit stream: code k is bits k*b .. k*b+b-1 of the row's bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .base import Format, FormatError, Tensors, TensorSpec, size_of
from .rotated import rotate_back, why_not_rotated
from .rotation import kronecker_sizes, kronecker_transform


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes 0..2^bits-1 [R, n] (any integer dtype) -> uint8 [R, ceil(n*bits/8)], padded with 0."""
    if codes.numel():
        low, high = (int(v) for v in torch.aminmax(codes))
        if low < 0 or high >= 1 << bits:
            raise FormatError(f"codes span {low}..{high}, outside 0..{(1 << bits) - 1}")
    R, n = codes.shape
    eights = torch.zeros((R, -(-n // 8) * 8), dtype=torch.uint8, device=codes.device)
    eights[:, :n] = codes
    word = torch.zeros((R, eights.shape[1] // 8), dtype=torch.int64, device=codes.device)
    for i in range(8):
        word |= eights[:, i::8].to(torch.int64) << (bits * i)
    stream = torch.stack([(word >> (8 * j)) & 255 for j in range(bits)], -1)
    return stream.to(torch.uint8).flatten(1)[:, : -(-n * bits // 8)].contiguous()


def unpack_bits(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """uint8 [R, ceil(n*bits/8)] -> codes uint8 [R, n]: the inverse of ``pack_bits``."""
    R = packed.shape[0]
    words = -(-n // 8)
    stream = torch.zeros((R, words * bits), dtype=torch.uint8, device=packed.device)
    stream[:, : packed.shape[1]] = packed
    word = torch.zeros((R, words), dtype=torch.int64, device=packed.device)
    for j in range(bits):
        word |= stream[:, j::bits].to(torch.int64) << (8 * j)
    codes = [(word >> (bits * i)) & ((1 << bits) - 1) for i in range(8)]
    return torch.stack(codes, -1).to(torch.uint8).flatten(1)[:, :n].contiguous()


def _why_not_bytes(id: str, bits: int, N: int, K: int) -> str | None:
    if N <= 0 or K <= 0:
        return f"N={N}, K={K}: both must be positive"
    if K * bits % 8:
        return f"K={K}: a row of {bits}-bit codes does not fill whole bytes ({id})"
    return None


@dataclass(frozen=True)
class ScalarFormat(Format):
    """Schemes ``gptq-int{bits}-g{G}`` and ``rtn-int{bits}-g{G}``: stored alike, quantized apart.

    Tensors: qweight uint8 [N, K*bits/8]; scales float [N, K/G]; zeros uint8, the codes z of a row's
    groups packed like its weights, [N, ceil(K/G*bits/8)].
    """

    method: str
    bits: int
    group_size: int

    code_names = ("qweight", "zeros")

    def __post_init__(self):
        if self.bits not in (2, 3, 4, 8):
            raise FormatError(f"{self.id}: 2, 3, 4 or 8 bits, not {self.bits}")
        if self.group_size < 1:
            raise FormatError(f"{self.id}: group_size={self.group_size} is not positive")

    @classmethod
    def parse(cls, scheme: str) -> ScalarFormat | None:
        match = re.fullmatch(r"(gptq|rtn)-int(\d+)-g(\d+)", scheme)
        return cls(match[1], int(match[2]), int(match[3])) if match else None

    @property
    def id(self) -> str:
        return f"{self.method}-int{self.bits}-g{self.group_size}"

    def why_not_shape(self, N: int, K: int) -> str | None:
        if K % self.group_size:
            return f"K={K} is not a multiple of {self.group_size} (group_size of {self.id})"
        return _why_not_bytes(self.id, self.bits, N, K)

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        groups = K // self.group_size
        return {
            "qweight": TensorSpec((N, K * self.bits // 8), torch.uint8),
            "scales": TensorSpec((N, groups), None),
            "zeros": TensorSpec((N, -(-groups * self.bits // 8)), torch.uint8),
        }

    def out_features(self, tensors: Tensors, name: str = "layer") -> int:
        return size_of(tensors, "qweight", 0, name, self.id)

    def in_features(self, tensors: Tensors, name: str = "layer") -> int:
        return size_of(tensors, "scales", 1, name, self.id) * self.group_size

    def check_codes(self, codes: torch.Tensor, name: str) -> None:
        """Every byte of ``qweight`` and ``zeros`` is made of valid codes."""

    def pack_codes(self, codes: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
        """The code tensors of codes [N, K] and zeros [N, K/G] (integers in 0..2^bits-1)."""
        return {"qweight": pack_bits(codes, self.bits), "zeros": pack_bits(zeros, self.bits)}

    def zero_points(self, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        """The zeros as floats [N, K/G]."""
        groups = tensors["scales"].shape[1]
        return unpack_bits(tensors["zeros"], self.bits, groups).to(dtype)

    def dequantize(self, tensors: Tensors, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The [N, K] weight, differentiable in scales; float32 inside (float64 for float64)."""
        scales = tensors["scales"]
        dtype = dtype or scales.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        K = scales.shape[1] * self.group_size
        codes = unpack_bits(tensors["qweight"], self.bits, K).to(wide)
        groups = codes.unflatten(1, (-1, self.group_size))
        weight = (groups - self.zero_points(tensors, wide)[..., None]) * scales.to(wide)[..., None]
        return weight.flatten(1).to(dtype)

    def bits_per_weight(self, N: int, K: int) -> float:
        groups = K // self.group_size
        zeros = 8 * -(-groups * self.bits // 8)
        return self.bits + (16 * groups + zeros) / K


KINDS = {"": "hadamard", "-b128": "block", "-kron": "kronecker"}
"""Suffix of the scheme id -> kind of rotation."""

_KRONECKER = ("B0", "B1", "p_in", "p_out")


@dataclass(frozen=True)
class QuipFormat(Format):
    """Schemes ``quip-int{2,3,4}[-b128|-kron]``: QuIP's uniform grid on a rotated weight.

    Tensors: qweight uint8 [N, K*bits/8]; SU [K], SV [N] float; Wscale float32 []; with ``-kron``
    also U_* and V_*, the rotations of the output and the input: B0 [p, p], B1 [q, q] float32 and
    p_in, p_out int32.
    """

    bits: int
    rotation: str = "hadamard"

    def __post_init__(self):
        if self.bits not in (2, 3, 4):
            raise FormatError(f"QuIP's grid has 2, 3 or 4 bits here, not {self.bits}")
        if self.rotation not in KINDS.values():
            raise FormatError(f"rotation {self.rotation!r}; known: {', '.join(KINDS.values())}")

    @property
    def code_names(self) -> tuple[str, ...]:
        if self.rotation != "kronecker":
            return ("qweight",)
        return ("qweight", *(f"{side}_{n}" for side in "UV" for n in ("p_in", "p_out")))

    @classmethod
    def parse(cls, scheme: str) -> QuipFormat | None:
        match = re.fullmatch(r"quip-int(\d+)(-b128|-kron)?", scheme)
        return cls(int(match[1]), KINDS[match[2] or ""]) if match else None

    @property
    def id(self) -> str:
        suffix = next(s for s, kind in KINDS.items() if kind == self.rotation)
        return f"quip-int{self.bits}{suffix}"

    @property
    def step(self) -> float:
        """Distance of neighbouring grid values in units of Wscale, 2/(2^bits - 1)."""
        return 2 / ((1 << self.bits) - 1)

    def why_not_shape(self, N: int, K: int) -> str | None:
        reason = _why_not_bytes(self.id, self.bits, N, K)
        if reason or self.rotation == "kronecker":
            return reason
        return why_not_rotated(self.rotation, N, K)

    def tensor_specs(self, N: int, K: int) -> dict[str, TensorSpec]:
        specs = {
            "qweight": TensorSpec((N, K * self.bits // 8), torch.uint8),
            "SU": TensorSpec((K,), None),
            "SV": TensorSpec((N,), None),
            "Wscale": TensorSpec((), torch.float32),
        }
        if self.rotation == "kronecker":
            for side, size in (("U", N), ("V", K)):
                p, q = kronecker_sizes(size)
                specs[f"{side}_B0"] = TensorSpec((p, p), torch.float32)
                specs[f"{side}_B1"] = TensorSpec((q, q), torch.float32)
                specs[f"{side}_p_in"] = TensorSpec((size,), torch.int32)
                specs[f"{side}_p_out"] = TensorSpec((size,), torch.int32)
        return specs

    def out_features(self, tensors: Tensors, name: str = "layer") -> int:
        return size_of(tensors, "qweight", 0, name, self.id)

    def in_features(self, tensors: Tensors, name: str = "layer") -> int:
        return size_of(tensors, "SU", 0, name, self.id)

    def check_codes(self, codes: torch.Tensor, name: str) -> None:
        if name.endswith(("p_in", "p_out")):
            index = torch.arange(len(codes), dtype=codes.dtype, device=codes.device)
            wrong = (codes.sort().values != index).nonzero()
            if len(wrong):
                raise FormatError(f"{name} is no permutation: {int(wrong[0])} is missing or twice")

    def pack_codes(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """The code tensor of codes [N, K] in 0..2^bits-1."""
        return {"qweight": pack_bits(codes, self.bits)}

    def decode(self, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
        """Wq [N, K] in the rotated basis, Wscale included; ``dtype`` float32 or float64."""
        K = tensors["SU"].shape[0]
        codes = unpack_bits(tensors["qweight"], self.bits, K).to(dtype)
        return (codes * self.step - 1) * tensors["Wscale"].to(dtype)

    def dequantize(self, tensors: Tensors, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The [N, K] weight in the original basis, differentiable in SU, SV and Wscale.

        Everything is float32 (float64 with ``dtype`` float64), rounded once to ``dtype`` (default:
        SV's dtype).
        """
        dtype = dtype or tensors["SV"].dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return self.rotate_back(self.decode(tensors, wide), tensors).to(dtype)

    def rotate_back(self, weight: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """A weight [N, K] of the rotated basis in the original one, in its own dtype."""
        su, sv = tensors["SU"].to(weight.dtype), tensors["SV"].to(weight.dtype)
        if self.rotation != "kronecker":
            return rotate_back(weight, self.rotation, su, sv)
        weight = kronecker_transform(weight, _kronecker_parts(tensors, "V"), transpose=True)
        weight = kronecker_transform(weight.T, _kronecker_parts(tensors, "U"), transpose=True).T
        return sv[:, None] * weight * su

    def bits_per_weight(self, N: int, K: int) -> float:
        extra = 16 * (N + K) + 32
        if self.rotation == "kronecker":
            for size in (N, K):
                p, q = kronecker_sizes(size)
                extra += 32 * (p * p + q * q + 2 * size)
        return self.bits + extra / (N * K)


def _kronecker_parts(tensors: Tensors, side: str) -> dict[str, torch.Tensor]:
    """The tensors of one side's rotation ("U" output, "V" input), as ``kronecker_transform``."""
    return {name: tensors[f"{side}_{name}"] for name in _KRONECKER}
