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
from . import tuning
from .fields import exact_type, has_dp4a, one_of
from .partial import group_sums, split
from .products import rotated_dx, rotated_product

PREPARED = 1024  # inputs of a program
QUANTIZED = 128  # groups of a program
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


def e8p_pack(Qidxs: torch.Tensor, bits: int) -> torch.Tensor:
    """Canonical Qidxs -> uint8: the tables, then codes [K/8, N], then residual codes alike."""
    codes, residual = E8PFormat(bits).unpack_codes(Qidxs)
    count = TABLE_BYTES[bits] // 4
    parts = [_tables()[:count].to(Qidxs.device), codes.t().to(torch.int16)]
    if residual is not None:
        parts.append(residual.t().to(torch.int16 if bits == 4 else torch.uint8))
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def e8p_unpack(packed: torch.Tensor, bits: int, N: int, K: int) -> torch.Tensor:
    """The canonical Qidxs, bit for bit what :func:`e8p_pack` was given."""
    _, codes, rest = _views(packed, bits, N, K)
    codes = (codes.t().int() & 0xFFFF).contiguous()
    residual = None if bits == 2 else rest.t().int().contiguous() & (0xFFFF if bits == 4 else 255)
    return E8PFormat(bits).pack_codes(codes, residual)["Qidxs"]


def _views(packed: torch.Tensor, bits: int, N: int, K: int):
    """Tables, codes [K/8, N] and residual codes (at 2 bits the codes) inside ``packed``."""
    table, size = TABLE_BYTES[bits], N * K // 4
    expected = table + N * K * bits // 8
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != expected:
        raise OperandError(
            f"packed is {packed.dtype} {list(packed.shape)}, expected uint8 [{expected}]"
            f" for N={N}, K={K} at {bits} bits"
        )
    codes = packed[table : table + size].view(torch.int16).view(K // 8, N)
    if bits == 2:
        return packed[:table].view(torch.int32), codes, codes
    rest = packed[table + size :]
    rest = rest.view(torch.int16) if bits == 4 else rest
    return packed[:table].view(torch.int32), codes, rest.view(K // 8, N)


class _Weight:
    """Views of one packed weight, and the sizes that kernels need."""

    def __init__(self, packed: torch.Tensor, bits: int, residual: float, N: int, K: int):
        self.tables, self.codes, self.rest = _views(packed, bits, N, K)
        self.bits, self.residual, self.N, self.K = bits, residual, N, K

    def config(self, x: torch.Tensor) -> tuning.Config:
        block, body = tuning.token_block(x.shape[0]), "dot"
        if block == 1:
            body = "integers" if has_dp4a(x) else "gemv"
        return tuning.config("e8p", f"{self.bits}bit", self.N, self.K, block, body)

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """Partial sums [S, M, N] of at most 64 tokens, float32."""
        M, groups, config = x.shape[0], self.K // 8, self.config(x)
        block_g, block_n = config["BLOCK_G"], config["BLOCK_N"]
        tiles = triton.cdiv(self.N, block_n)
        each, splits = split(triton.cdiv(groups, block_g), config["PROGRAMS"] // tiles)
        partial = torch.empty((splits, M, self.N), dtype=torch.float32, device=x.device)
        options = {"BITS": self.bits, "BLOCK_N": block_n, "BLOCK_G": block_g}
        options["SHARED"] = bool(config["SHARED"])
        options |= tuning.launch_options(config)
        if config["body"] == "integers":
            pieces = triton.cdiv(groups, QUANTIZED)
            inputs = torch.empty((4, groups), dtype=torch.int32, device=x.device)
            sums = torch.empty((pieces, 2), dtype=torch.float32, device=x.device)
            unit = torch.empty(1, dtype=torch.float32, device=x.device)
            wrap_triton(bodies._quantize)[(pieces,)](
                x, inputs, sums, unit, self.K, BLOCK=QUANTIZED, CHUNK=4096, num_warps=8
            )
            wrap_triton(bodies._integers)[(tiles, splits)](
                inputs, sums, unit, self.tables, self.codes, self.rest, partial, self.N, groups,
                each * block_g, self.residual, pieces, ASM=has_dp4a(x), **options,
            )  # fmt: skip
        elif config["body"] == "gemv":
            pieces = triton.cdiv(self.K, PREPARED)
            inputs = torch.empty((8, groups), dtype=torch.float32, device=x.device)
            sums = torch.empty((pieces, 2), dtype=torch.float32, device=x.device)
            wrap_triton(bodies._prepare)[(pieces,)](x, inputs, sums, self.K, BLOCK=PREPARED)
            wrap_triton(bodies._gemv)[(tiles, splits)](
                inputs, sums, self.tables, self.codes, self.rest, partial, self.N, groups,
                each * block_g, self.residual, one_of(torch.float32), pieces, **options,
            )  # fmt: skip
        else:
            exact = exact_type(x.dtype, 4)
            wrap_triton(bodies._dot)[(tiles, splits)](
                x, self.tables, self.codes, self.rest, group_sums(x, self.K), partial, M, self.N,
                groups, x.stride(0), each * block_g, self.residual, one_of(x.dtype), EXACT=exact,
                FIRST=bool(config["FIRST"]), BLOCK_M=tuning.token_rows(config, M), **options,
            )  # fmt: skip
        return partial

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
