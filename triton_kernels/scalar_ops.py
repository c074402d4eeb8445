"""Scalar grids in Triton: the operators, with the signatures of ``aqlm_infer.ops``.

``packed`` is :func:`scalar_pack`'s. Wrapped as ``triton_op``, so that ``torch.compile`` sees the
kernels.
"""

from __future__ import annotations

import torch
import triton
from torch.library import triton_op, wrap_triton

from ..formats.scalar import pack_bits, unpack_bits
from ..ops.library import OperandError
from ..ops.scalar import check_scalar, check_scalar_matmul, check_scalar_matmul_dx, scalar_gradient
from . import first, tuning
from . import scalar as bodies
from . import scalar_integers as integers
from .fields import dot_precision, exact_type, has_dp4a, one_of
from .partial import group_sums, partial_sums, share
from .products import rotated_dx, rotated_product

PLANES = {2: 8, 3: 16, 4: 4, 8: 2}  # of a block
WORDS = {2: 1, 3: 3, 4: 1, 8: 1}
FIELDS = {2: 8, 3: 4, 4: 4, 8: 2}  # of a 16-bit half of a word
TOGETHER = {2: 4, 3: 2, 4: 2, 8: 1}  # fields that share a shift in _gemv
PW = bodies.PW.value
PLANE = 2 * PW  # inputs
SET = bodies.SET.value
DEQUANTIZE_N = 32  # rows of a tile
AT_ONCE = 2  # blocks of a step where weights are not grouped; rows are padded to it


def _blocks(bits: int, K: int) -> int:
    return AT_ONCE * triton.cdiv(K, PLANES[bits] * PLANE * AT_ONCE)


def scalar_pack(qweight: torch.Tensor, bits: int, K: int) -> torch.Tensor:
    """Canonical qweight [N, K*bits/8] -> the words of ``scalar`` as uint8."""
    N, blocks, planes, fields = qweight.shape[0], _blocks(bits, K), PLANES[bits], FIELDS[bits]
    codes = torch.zeros((N, blocks * planes * PLANE), dtype=torch.int64, device=qweight.device)
    codes[:, :K] = unpack_bits(qweight, bits, K)
    pairs = codes.view(N, blocks, planes // fields, fields, PW, 2)
    words = (pairs << _places(bits, codes.device)).sum((3, 5))  # [N, blocks, words, PW]
    if bits == 3:
        tops = torch.stack([(words[:, :, 3] >> 4 * w) & 0x000F000F for w in range(3)], 2)
        words = words[:, :, :3] | (tops << 12)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return words.contiguous().view(-1).view(torch.uint8)


def scalar_unpack(packed: torch.Tensor, bits: int, N: int, K: int) -> torch.Tensor:
    """The canonical qweight, bit for bit what :func:`scalar_pack` was given."""
    words = _words(packed, bits, N, K).to(torch.int64) & 0xFFFFFFFF
    if bits == 3:
        tops = (words >> 12) & 0x000F000F
        rest = tops[:, :, 0] | (tops[:, :, 1] << 4) | (tops[:, :, 2] << 8)
        words = torch.cat([words, rest[:, :, None]], 2)
    codes = (words[:, :, :, None, :, None] >> _places(bits, packed.device)) & ((1 << bits) - 1)
    return pack_bits(codes.reshape(N, -1)[:, :K], bits)


def _places(bits: int, device: torch.device) -> torch.Tensor:
    """Bit of each plane of a word, in each half: [planes, 1, 2]."""
    plane = torch.arange(FIELDS[bits], device=device)
    field = plane if bits == 3 else plane // 2 + plane % 2 * (8 // bits)
    return (bits * field)[:, None, None] + torch.tensor([0, 16], device=device)


def _words(packed: torch.Tensor, bits: int, N: int, K: int) -> torch.Tensor:
    shape = (N, _blocks(bits, K), WORDS[bits], PW)
    expected = 4 * shape[0] * shape[1] * shape[2] * shape[3]
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != expected:
        raise OperandError(
            f"packed is {packed.dtype} {list(packed.shape)}, expected uint8 [{expected}]"
            f" for N={N}, K={K} at {bits} bits"
        )
    return packed.view(torch.int32).view(shape)


class _Weight:
    """Views of one packed weight, and the sizes that kernels need."""

    def __init__(self, packed, scales, zeros, bits: int, G: int, K: int):
        self.N, self.K, self.bits, self.G = scales.shape[0], K, bits, G
        self.words = _words(packed, bits, self.N, K)
        self.scales = scales.contiguous()
        self.zeros = self.scales if zeros is None else zeros.contiguous()
        self.has_zeros, self.grouped, self.blocks = zeros is not None, K != G, self.words.shape[1]

    def planes(self, most: int) -> int:
        """Planes that share a scale: a power of two, at most ``most``."""
        if not self.grouped:
            return most
        shared = self.G // PLANE
        return min(most, shared & -shared)

    def sets(self) -> int:
        """Sets of a block that share a scale, for the bodies with integers; 0: they cannot run.

        Fields must fill bytes, groups be whole sets, and sums of bytes by bytes fit 32 bits.
        """
        count = 8 // self.bits
        if self.bits == 3 or self.K > 65536 or (self.grouped and self.G % SET):
            return 0
        return self.planes(2 * count) // 2

    def paired(self, sets: int) -> bool:
        """Whether a block is two groups with 16-bit scales in one word each."""
        two = self.grouped and sets * SET == self.G and 2 * sets * self.bits == 8
        words = self.K // self.G % 2 == 0 and self.scales.element_size() == 2
        offsets = self.scales.storage_offset() | self.zeros.storage_offset()
        return two and words and offsets % 2 == 0

    def partial(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """Partial sums [S, M, N] of at most 64 tokens, float32, or one split in y [M, N]."""
        if self.grouped and self.G % PLANE:
            return self._dequantized(x, y)
        M, config = x.shape[0], self.config(x)
        body, tokens, block_m = config["body"], 1, 0
        if body == "integer_dot":
            block_m = tuning.token_part(config, M)
            tokens = triton.cdiv(M, block_m)
        at_once = 1 if self.grouped or body in ("integer_dot", "first_dot") else AT_ONCE
        tiles = triton.cdiv(self.N, config["BLOCK_N"])
        each, splits = share(self.blocks // at_once, tiles * tokens, config)
        partial = partial_sums(splits, x, self.N, y)
        options = {
            "BITS": self.bits, "GROUPED": self.grouped, "ZEROS": self.has_zeros,
            "BLOCK_N": config["BLOCK_N"], **tuning.launch_options(config),
        }  # fmt: skip
        grid, per_split = (tiles, splits), each * at_once
        if body == "integer_dot":
            options["BLOCK_M"] = block_m
            self._integer_dot(x, partial, (*grid, tokens), per_split, options)
        elif body == "first_dot":
            options["BLOCK_M"] = max(16, tuning.token_block(M))
            self._first_dot(x, partial, grid, each, options)
        elif body == "integers":
            self._integers(x, partial, grid, per_split, {"NB": at_once, **options})
        elif M == 1:
            self._gemv(x, partial, grid, per_split, {"NB": at_once, **options})
        else:
            options["BLOCK_M"] = tuning.token_rows(config, M)
            options |= {"NB": at_once, "FIRST": bool(config["FIRST"])}
            self._dot(x, partial, grid, per_split, config["BLOCK_K"], options)
        return partial

    def config(self, x: torch.Tensor) -> tuning.Config:
        M, sets = x.shape[0], self.sets()
        # float32 keeps its own precision where MMAs have a type for it.
        integers = sets > 0 and (M == 1 or (self.bits < 8 and x.dtype != torch.float32))
        body = "gemv" if M == 1 else "dot"
        # (Sums of a part of a block are scaled so often that floats are faster for one token.)
        whole = not self.grouped or sets * self.bits == 8
        if integers and has_dp4a(x) and (whole or M > 1):
            body = "integers" if M == 1 else "integer_dot"
        scheme = f"int{self.bits}" + (f"-g{self.G}" if self.grouped else "")
        config = tuning.config("scalar", scheme, self.N, self.K, tuning.token_block(M), body)
        whole = integers and M > 1  # fields fill bytes, and x has a 16-bit type
        if config["body"] == "first_dot" and not whole:
            return tuning.default("scalar.dot")
        if config["body"].startswith("integer") and not integers:
            return tuning.default("scalar.gemv" if M == 1 else "scalar.dot")
        return config

    def _quantized(self, x: torch.Tensor, tiles: int):
        """What ``_quantize`` makes of x: bytes in words (for ``tiles`` tiles of tokens, or one
        token), sums and units, and its C."""
        M, count, sets = x.shape[0], 8 // self.bits, self.sets()
        chunks, tokens = self.blocks * (count // sets), 16 * tiles or 1
        words = 2 * tokens * self.blocks * count * PW
        inputs = torch.empty(words, dtype=torch.int32, device=x.device)
        sums = torch.empty((M, chunks), dtype=torch.float32, device=x.device)
        unit = torch.empty((M, chunks if self.grouped else 1), dtype=torch.float32, device=x.device)
        wrap_triton(integers._quantize)[(self.blocks // AT_ONCE, tokens)](
            x, inputs, sums, unit, M, self.K, x.stride(0), self.blocks, BITS=self.bits, C=sets,
            GROUPED=self.grouped, TILES=tiles, NB=AT_ONCE, CHUNK=4096,
            num_warps=2 if self.grouped else 8,
        )  # fmt: skip
        return inputs, sums, unit, sets

    def _integers(self, x, partial, grid, per_split: int, options: dict) -> None:
        inputs, sums, unit, sets = self._quantized(x, 0)
        wrap_triton(integers._integers)[grid](
            inputs, sums, unit, self.words, self.scales, self.zeros, partial, self.N, self.K,
            self.blocks, per_split, self.G, C=sets, ASM=has_dp4a(x), **options,
        )  # fmt: skip

    def _integer_dot(self, x, partial, grid, per_split: int, options: dict) -> None:
        tiles = grid[2] * options["BLOCK_M"] // 16
        inputs, sums, unit, sets = self._quantized(x, tiles)
        wrap_triton(integers._integer_dot)[grid](
            inputs, sums, unit, self.words, self.scales, self.zeros, partial, x.shape[0], self.N,
            self.K, self.blocks, per_split, self.G, C=sets, PAIRED=self.paired(sets),
            ASM=has_dp4a(x), TILES=tiles, **options,
        )  # fmt: skip

    def _first_dot(self, x, partial, grid, per_split: int, options: dict) -> None:
        M, block_m, planes = x.shape[0], options["BLOCK_M"], PLANES[self.bits]
        C, count = self.planes(min(4, planes)), self.blocks * planes * PLANE
        inputs = torch.empty((count, block_m), dtype=x.dtype, device=x.device)
        sums = torch.empty((count // (PLANE * C), block_m), dtype=torch.float32, device=x.device)
        wrap_triton(first._spread)[(count // (PLANE * C), block_m // 16)](
            x, inputs, sums, M, self.K, x.stride(0), FIELDS=True, STEP=C, CHUNK=PLANE * C,
            BLOCK_M=block_m,
        )  # fmt: skip
        wrap_triton(bodies._first_dot)[grid](
            inputs, sums, self.words, self.scales, self.zeros, partial, M, self.N, self.blocks,
            per_split, self.K // self.G, one_of(x.dtype), C=C, SHARE=self.G // (PLANE * C),
            ASM=has_dp4a(x), **options,
        )  # fmt: skip

    def _gemv(self, x, partial, grid, per_split: int, options: dict) -> None:
        C, together = self.planes(PLANES[self.bits]), TOGETHER[self.bits]
        chunks = self.blocks * PLANES[self.bits] // C
        inputs = torch.empty(chunks * C * PLANE, dtype=torch.float32, device=x.device)
        sums = torch.empty((chunks, 2), dtype=torch.float32, device=x.device)
        wrap_triton(bodies._prepare)[(chunks,)](
            x, inputs, sums, self.K, BITS=self.bits, C=C, TOGETHER=together
        )
        wrap_triton(bodies._gemv)[grid](
            inputs, sums, self.words, self.scales, self.zeros, partial, self.N, self.K,
            self.blocks, per_split, self.G, one_of(torch.float32), C=C, TOGETHER=together,
            **options,
        )  # fmt: skip

    def _dot(self, x, partial, grid, per_split: int, block_k: int, options: dict) -> None:
        M, bits = x.shape[0], self.bits
        C = self.planes(min(FIELDS[bits], max(1, block_k // (PLANE * options["NB"]))))
        wrap_triton(bodies._dot)[grid](
            x, self.words, self.scales, self.zeros, group_sums(x, self.G), partial, M, self.N,
            self.K, x.stride(0), self.blocks, per_split, self.G, one_of(x.dtype), C=C,
            EVEN=self.blocks * PLANES[bits] * PLANE == self.K,
            EXACT=exact_type(x.dtype, bits), PRECISION=dot_precision(x), **options,
        )  # fmt: skip

    def _dequantized(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """Groups that no plane fits in: the product with the decoded weight, as one split."""
        weight = torch.empty((self.N, self.K), dtype=x.dtype, device=x.device)
        self.dequantize(0, weight)
        partial = partial_sums(1, x, self.N, y)
        partial[0] = torch.mm(x, weight.t())
        return partial

    def dequantize(self, first: int, out: torch.Tensor, factor: float = 1.0) -> None:
        """Fill ``out`` [rows, K] with ``factor`` times the rows from ``first`` on."""
        wrap_triton(bodies._dequantize)[(triton.cdiv(out.shape[0], DEQUANTIZE_N), self.blocks)](
            self.words, self.scales, self.zeros, out, first, first + out.shape[0], self.K,
            self.blocks, self.G, factor, BITS=self.bits, ZEROS=self.has_zeros,
            ALIGNED=not self.grouped or self.G % PLANE == 0, BLOCK_N=DEQUANTIZE_N, num_warps=4,
        )  # fmt: skip


@triton_op("aqlm_infer_triton::scalar_matmul", mutates_args={})
def scalar_matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    sv: torch.Tensor | None,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    bits: int,
    group_size: int,
    N: int,
    factor: int,
    block: int,
    precision: str,
) -> torch.Tensor:
    """y = sv * U_N (x w^T) + bias in x's dtype, as ``aqlm_infer.ops.scalar_matmul``."""
    check_scalar_matmul(x, scales, zeros, sv, bias, h, bits, group_size, N, factor, block)
    weight = _Weight(packed, scales, zeros, bits, group_size, x.shape[-1])
    return rotated_product(x, weight, sv, bias, h, factor, block).view(*x.shape[:-1], N)


@triton_op("aqlm_infer_triton::scalar_matmul_dx", mutates_args={})
def scalar_matmul_dx(
    dy: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    sv: torch.Tensor | None,
    h: torch.Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    factor: int,
    block: int,
) -> torch.Tensor:
    """dx = (U_N^T (sv * dy)) w in dy's dtype, as ``aqlm_infer.ops.scalar_matmul_dx``."""
    check_scalar_matmul_dx(dy, scales, zeros, sv, h, bits, group_size, in_features, factor, block)
    weight = _Weight(packed, scales, zeros, bits, group_size, in_features)
    return rotated_dx(dy, weight, sv, h, factor, block).view(*dy.shape[:-1], in_features)


@triton_op("aqlm_infer_triton::scalar_dequantize", mutates_args={})
def scalar_dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    K: int,
) -> torch.Tensor:
    """The [N, K] weight in float32."""
    check_scalar(scales, zeros, bits, group_size, scales.shape[0], K)
    weight = torch.empty((scales.shape[0], K), dtype=torch.float32, device=packed.device)
    _Weight(packed, scales, zeros, bits, group_size, K).dequantize(0, weight)
    return weight


_backward, _context = scalar_gradient(scalar_matmul_dx)
scalar_matmul.register_autograd(_backward, setup_context=_context)
