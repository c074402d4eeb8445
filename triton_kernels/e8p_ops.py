"""E8P in Triton: the operators, with the signatures of ``aqlm_infer.ops``.

``packed`` is :func:`e8p_pack`'s. Wrapped as ``triton_op``, so that ``torch.compile`` sees the
kernels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch.library import triton_op, wrap_triton

from ..formats.e8p import E8PFormat, grid_x4, residual_x2
from ..ops.library import OperandError
from ..ops.rotated import check_e8p, check_e8p_matmul, check_e8p_matmul_dx, e8p_gradient
from . import e8p as bodies
from . import first, tuning
from .fields import dot_precision, exact_type, has_dp4a, one_of
from .partial import group_sums, partial_sums, share
from .products import rotated_dx, rotated_product

PREPARED = 1024  # inputs of a program
QUANTIZED = 128  # groups of a program
CHUNK = bodies.CHUNK  # groups of a row that lie together
TABLE_BYTES = {2: 2048, 3: 3072, 4: 2048}


@lru_cache(maxsize=1)
def _tables() -> torch.Tensor:
    """Magnitude, sign and residual words, int32 [768] (``e8p`` says what they are)."""
    nibbles = ((grid_x4().to(torch.int64) - 1) // 2 + 8) & 15
    element = torch.arange(8)
    places = 4 * (element // 2 + 4 * (element % 2))
    words = (nibbles << places).sum(1)
    magnitudes, signs = words[::256], words[:256] ^ words[0]
    residuals = ((residual_x2().to(torch.int64) + 8) << places).sum(1)
    table = torch.cat([magnitudes, signs, residuals])
    return torch.where(table >= 1 << 31, table - (1 << 32), table).to(torch.int32)


def _chunked(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N, K/8] -> [chunks, N, CHUNK]."""
    N, groups = codes.shape
    padded = torch.zeros((N, _groups(8 * groups)), dtype=dtype, device=codes.device)
    padded[:, :groups] = codes.to(dtype)
    return padded.view(N, -1, CHUNK).transpose(0, 1)


def e8p_pack(Qidxs: torch.Tensor, bits: int) -> torch.Tensor:
    """Canonical Qidxs -> uint8: the tables, then codes [chunks, N, 32], then residual codes."""
    codes, residual = E8PFormat(bits).unpack_codes(Qidxs)
    count = TABLE_BYTES[bits] // 4
    parts = [_tables()[:count].to(Qidxs.device), _chunked(codes, torch.int16)]
    if residual is not None:
        parts.append(_chunked(residual, torch.int16 if bits == 4 else torch.uint8))
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def e8p_unpack(packed: torch.Tensor, bits: int, N: int, K: int) -> torch.Tensor:
    """The canonical Qidxs, bit for bit what :func:`e8p_pack` was given."""
    _, codes, rest = _views(packed, bits, N, K)

    def canonical(chunks: torch.Tensor, mask: int) -> torch.Tensor:
        return (chunks.transpose(0, 1).reshape(N, -1)[:, : K // 8].int() & mask).contiguous()

    residual = None if bits == 2 else canonical(rest, 0xFFFF if bits == 4 else 255)
    return E8PFormat(bits).pack_codes(canonical(codes, 0xFFFF), residual)["Qidxs"]


def _groups(K: int) -> int:
    """Groups of 8 inputs, in whole chunks."""
    return CHUNK * triton.cdiv(K, 8 * CHUNK)


def _views(packed: torch.Tensor, bits: int, N: int, K: int):
    """Tables, codes [chunks, N, 32] and residual codes (at 2 bits the codes) inside ``packed``."""
    groups = _groups(K)
    table, size = TABLE_BYTES[bits], 2 * N * groups
    expected = table + N * groups * bits
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != expected:
        raise OperandError(
            f"packed is {packed.dtype} {list(packed.shape)}, expected uint8 [{expected}]"
            f" for N={N}, K={K} at {bits} bits"
        )
    codes = packed[table : table + size].view(torch.int16).view(-1, N, CHUNK)
    if bits == 2:
        return packed[:table].view(torch.int32), codes, codes
    rest = packed[table + size :]
    rest = rest.view(torch.int16) if bits == 4 else rest
    return packed[:table].view(torch.int32), codes, rest.view(-1, N, CHUNK)


class _Weight:
    """Views of one packed weight, and the sizes that kernels need."""

    def __init__(self, packed: torch.Tensor, bits: int, residual: float, N: int, K: int):
        self.tables, self.codes, self.rest = _views(packed, bits, N, K)
        self.bits, self.residual, self.N, self.K = bits, residual, N, K

    def config(self, x: torch.Tensor) -> tuning.Config:
        block = tuning.token_block(x.shape[0])
        # float32 keeps its own precision where MMAs have a type for it.
        integers = block == 1 or x.dtype != torch.float32
        body = "gemv" if block == 1 else "dot"
        if integers and has_dp4a(x):
            body = "integers" if block == 1 else "integer_dot"
        config = tuning.config("e8p", f"{self.bits}bit", self.N, self.K, block, body)
        return config if integers else tuning.default("e8p.dot")

    def partial(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """Partial sums [S, M, N] of at most 64 tokens, float32, or one split in y [M, N]."""
        M, groups, config = x.shape[0], _groups(self.K), self.config(x)
        block_g, block_n = config.get("BLOCK_G", CHUNK), config["BLOCK_N"]
        tiles = triton.cdiv(self.N, block_n)
        tokens, block_m = 1, 0
        if config["body"] == "integer_dot":
            block_m = tuning.token_part(config, M)
            tokens = triton.cdiv(M, block_m)
        each, splits = share(groups // block_g, tiles * tokens, config)
        partial = partial_sums(splits, x, self.N, y)
        options = {"BITS": self.bits, "BLOCK_N": block_n, "BLOCK_G": block_g}
        options |= tuning.launch_options(config)
        weight, grid = (self.tables, self.codes, self.rest), (tiles, splits)
        copies = 16 if has_dp4a(x) and config.get("COPIES") and self.bits != 3 else 0
        if config["body"] == "integers":
            inputs, sums, unit = self._quantized(x, 0)
            wrap_triton(bodies._integers)[grid](
                inputs, sums, unit, *weight, partial, self.N, groups, each, self.residual,
                sums.shape[1], SHARED=bool(config["SHARED"]), COPIES=copies, ASM=has_dp4a(x),
                **options,
            )  # fmt: skip
        elif config["body"] == "gemv":
            pieces = triton.cdiv(groups * 8, PREPARED)
            inputs = torch.empty((8, groups), dtype=torch.float32, device=x.device)
            sums = torch.empty((pieces, 2), dtype=torch.float32, device=x.device)
            wrap_triton(bodies._prepare)[(pieces,)](x, inputs, sums, self.K, groups, BLOCK=PREPARED)
            wrap_triton(bodies._gemv)[grid](
                inputs, sums, *weight, partial, self.N, groups, each, self.residual,
                one_of(torch.float32), pieces, SHARED=bool(config["SHARED"]), **options,
            )  # fmt: skip
        elif config["body"] == "first_dot":
            block_m = max(16, tuning.token_block(M))
            inputs = torch.empty((groups * 8, block_m), dtype=x.dtype, device=x.device)
            sums = torch.empty((groups // CHUNK, block_m), dtype=torch.float32, device=x.device)
            wrap_triton(first._spread)[(groups // CHUNK, block_m // 16)](
                x, inputs, sums, M, self.K, x.stride(0), FIELDS=False, STEP=CHUNK, CHUNK=8 * CHUNK,
                BLOCK_M=block_m,
            )  # fmt: skip
            stage = 8 * CHUNK * block_m * x.dtype.itemsize
            wrap_triton(bodies._first_dot)[grid](
                inputs, sums, *weight, partial, M, self.N, groups, each, self.residual,
                one_of(x.dtype), BITS=self.bits, COPIES=copies, ASM=has_dp4a(x), BLOCK_N=block_n,
                BLOCK_M=block_m, num_warps=config["num_warps"],
                num_stages=first.stages(config["num_stages"], stage, 2048 * copies),
            )  # fmt: skip
        elif config["body"] == "integer_dot":
            tiles = tokens * block_m // 16
            inputs, sums, unit = self._quantized(x, tiles)
            wrap_triton(bodies._integer_dot)[(*grid, tokens)](
                inputs, sums, unit, *weight, partial, M, self.N, groups, each, self.residual,
                sums.shape[1], COPIES=copies, ASM=has_dp4a(x), TILES=tiles, BLOCK_M=block_m,
                BITS=self.bits, BLOCK_N=block_n, **tuning.launch_options(config),
            )  # fmt: skip
        else:
            wrap_triton(bodies._dot)[grid](
                x, *weight, group_sums(x, self.K), partial, M, self.N, self.K, groups,
                x.stride(0), each, self.residual, one_of(x.dtype),
                EXACT=exact_type(x.dtype, 4), SHARED=bool(config["SHARED"]),
                FIRST=bool(config["FIRST"]), PRECISION=dot_precision(x),
                BLOCK_M=tuning.token_rows(config, M), **options,
            )  # fmt: skip
        return partial

    def _quantized(self, x: torch.Tensor, tiles: int):
        """What ``_quantize`` makes of x for ``tiles`` tiles of tokens, or one token: bytes, sums
        and units."""
        M, groups, tokens = x.shape[0], _groups(self.K), 16 * tiles or 1
        pieces = triton.cdiv(groups, QUANTIZED)
        inputs = torch.empty(4 * tokens * groups, dtype=torch.int32, device=x.device)
        sums = torch.empty((M, pieces), dtype=torch.float32, device=x.device)
        unit = torch.empty(M, dtype=torch.float32, device=x.device)
        wrap_triton(bodies._quantize)[(pieces, tokens)](
            x, inputs, sums, unit, M, self.K, x.stride(0), groups, TILES=tiles, BLOCK=QUANTIZED,
            CHUNK_K=4096, num_warps=8,
        )  # fmt: skip
        return inputs, sums, unit

    def dequantize(self, first: int, out: torch.Tensor, factor: float = 1.0) -> None:
        """Fill ``out`` [rows, K] with ``factor`` times the rows from ``first`` on."""
        grid = (triton.cdiv(out.shape[0], 64), triton.cdiv(self.K // 8, 8))
        wrap_triton(bodies._dequantize)[grid](
            self.tables, self.codes, self.rest, out, first, first + out.shape[0], self.N, self.K,
            self.residual, factor, BITS=self.bits, BLOCK_N=64, BLOCK_G=8, num_warps=4,
        )  # fmt: skip


@triton_op("aqlm_infer_triton::e8p_matmul", mutates_args={})
def e8p_matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    sv: torch.Tensor | None,
    bias: torch.Tensor | None,
    h: torch.Tensor,
    bits: int,
    residual: float,
    N: int,
    factor: int,
    block: int,
    precision: str,
) -> torch.Tensor:
    """y = sv * U_N (x Wq^T) + bias in x's dtype, as ``aqlm_infer.ops.e8p_matmul``."""
    check_e8p_matmul(x, sv, bias, h, bits, N, factor, block)
    weight = _Weight(packed, bits, residual, N, x.shape[-1])
    y = rotated_product(x, weight, sv, bias, h, factor, block)
    return y.view(*x.shape[:-1], N)


@triton_op("aqlm_infer_triton::e8p_matmul_dx", mutates_args={})
def e8p_matmul_dx(
    dy: torch.Tensor,
    packed: torch.Tensor,
    sv: torch.Tensor | None,
    h: torch.Tensor,
    bits: int,
    residual: float,
    in_features: int,
    factor: int,
    block: int,
) -> torch.Tensor:
    """dx = (U_N^T (sv * dy)) Wq in dy's dtype, as ``aqlm_infer.ops.e8p_matmul_dx``."""
    check_e8p_matmul_dx(dy, sv, h, bits, in_features, factor, block)
    weight = _Weight(packed, bits, residual, dy.shape[-1], in_features)
    return rotated_dx(dy, weight, sv, h, factor, block).view(*dy.shape[:-1], in_features)


@triton_op("aqlm_infer_triton::e8p_dequantize", mutates_args={})
def e8p_dequantize(
    packed: torch.Tensor, bits: int, residual: float, N: int, K: int
) -> torch.Tensor:
    """Wq [N, K] in float32, without rotations and scales."""
    check_e8p(bits, N, K)
    weight = torch.empty((N, K), dtype=torch.float32, device=packed.device)
    _Weight(packed, bits, residual, N, K).dequantize(0, weight)
    return weight


_backward, _context = e8p_gradient(e8p_matmul_dx)
e8p_matmul.register_autograd(_backward, setup_context=_context)
