"""Random rotated and scalar weights on the GPU, called through the ladder's own build.

``override`` sets what only that build has: launch shapes other than those of rotated_tune.h.
"""

import ctypes
import math
import os

import torch

from aqlm_infer import ops
from aqlm_infer.formats import E8PFormat
from aqlm_infer.formats.rotation import Hadamard
from aqlm_infer.formats.scalar import pack_bits, unpack_bits

LIB = os.environ.get("AQLM_LIB", "build/rotated/_rotated.so")
torch.ops.load_library(LIB)
DEV = "cuda"
NONE, FULL, BLOCK = "none", "full", "block"
BIG, MEDIUM, SMALL = (28672, 8192), (14336, 4096), (4096, 4096)


def override(cluster=0, ctas=0, body=0, dependent=1):
    ctypes.CDLL(os.path.abspath(LIB)).aqlm_rotated_override(cluster, ctas, body, dependent)


def many(least=-1):
    """Tokens from which on the kernel for many tokens rotates (-1: as tuned)."""
    ctypes.CDLL(os.path.abspath(LIB)).aqlm_rotated_many(least)


def share(how=-1):
    """How blocks get their work: 0 no owned rows and x of more than four tokens always staged by a
    kernel, 1 x staged by the blocks wherever it fits (-1: as tuned)."""
    ctypes.CDLL(os.path.abspath(LIB)).aqlm_rotated_share(how)


def rotation(kind, size):
    if kind == NONE:
        return Hadamard(size, 0)
    return Hadamard.full(size) if kind == FULL else Hadamard.blocks(size)


class Weight:
    """A random [N, K] weight in the rotated basis, with an output rotation; the oracle is
    ``weight64``."""

    def __init__(self, name, N, K, kind, sv):
        self.name, self.N, self.K = name, N, K
        self.rotation = rotation(kind, N)
        self.h = self.rotation.matrix(DEV)
        self.sv = torch.rand(N, device=DEV) + 0.5 if sv else None

    @property
    def bytes(self):
        return self.packed.numel()

    @property
    def turn(self):
        return self.rotation.factor, self.rotation.block


class E8P(Weight):
    def __init__(self, bits, N, K, kind=NONE, sv=False):
        super().__init__(f"quip-e8p-{bits}bit", N, K, kind, sv)
        self.format, self.bits = E8PFormat(bits), bits
        self.residual = 1 / self.format.residual
        shape = (N, K * bits // 64)
        high, low = (torch.randint(-(2**31), 2**31, shape, device=DEV) for _ in range(2))
        self.codes = high << 32 | low & 0xFFFFFFFF
        self.packed = ops.e8p_pack(self.codes, bits)

    def unpacked(self):
        return ops.e8p_unpack(self.packed, self.bits, self.N, self.K)

    def call(self, x, bias=None):
        numbers = (self.bits, self.residual, self.N, *self.turn, "exact")
        return ops.e8p_matmul(x, self.packed, self.sv, bias, self.h, *numbers)

    def dx(self, dy):
        numbers = (self.bits, self.residual, self.K, *self.turn)
        return ops.e8p_matmul_dx(dy, self.packed, self.sv, self.h, *numbers)

    def dequantized(self):
        return ops.e8p_dequantize(self.packed, self.bits, self.residual, self.N, self.K)

    def weight64(self):
        return self.format.decode(self.codes, torch.float64)


class Scalar(Weight):
    """A scalar grid; G = K and no zeros: the grid of quip-int."""

    def __init__(self, bits, N, K, G, kind=NONE, sv=False, zeros=True, dtype=torch.float16):
        name = f"gptq-int{bits}-g{G}" if zeros else f"quip-int{bits}"
        super().__init__(name, N, K, kind, sv)
        self.bits, self.G = bits, G
        self.codes = pack_bits(torch.randint(0, 2**bits, (N, K), device=DEV), bits)
        self.scales = (torch.rand(N, K // G, device=DEV) * 0.02 + 0.01).to(dtype)
        z = torch.randint(0, 2**bits, (N, K // G), device=DEV)
        self.zeros = z.to(dtype) if zeros else None
        self.packed = ops.scalar_pack(self.codes, bits, K)

    @property
    def grid(self):
        return self.packed, self.scales, self.zeros

    def unpacked(self):
        return ops.scalar_unpack(self.packed, self.bits, self.N, self.K)

    def call(self, x, bias=None):
        numbers = (self.bits, self.G, self.N, *self.turn, "exact")
        return ops.scalar_matmul(x, *self.grid, self.sv, bias, self.h, *numbers)

    def dx(self, dy):
        numbers = (self.bits, self.G, self.K, *self.turn)
        return ops.scalar_matmul_dx(dy, *self.grid, self.sv, self.h, *numbers)

    def dequantized(self):
        return ops.scalar_dequantize(*self.grid, self.bits, self.G, self.K)

    def weight64(self):
        q = unpack_bits(self.codes, self.bits, self.K).double().unflatten(1, (-1, self.G))
        zeros = (2**self.bits - 1) / 2 if self.zeros is None else self.zeros.double()[..., None]
        return (self.scales.double()[..., None] * (q - zeros)).flatten(1)


def copies(make, at_least=256e6):
    """Distinct weights, more of them than the L2 holds."""
    first = make()
    return [first] + [make() for _ in range(max(1, math.ceil(at_least / first.bytes) - 1))]
