"""Additive codebooks in Triton: the operators, which choose a body and its launch configuration.

Wrapped as ``triton_op``, so that ``torch.compile`` sees the kernels. Tensors are those of
``aqlm_infer.ops``, but ``packed`` is :func:`pack`'s.
"""

from __future__ import annotations

import torch
import triton
from torch.library import triton_op, wrap_triton

from ..ops.additive import check_matmul, check_operands, refuse_value_gradients
from ..ops.library import OperandError, bias_gradient
from . import additive as bodies
from . import tuning

LOOKUP_TOKENS = 2  # the table costs twice for two tokens
DOT_TOKENS = 64
SLICE_BYTES = 24 << 20  # a slice of the weight that stays in L2


class _Part:
    """One fused part: views of its codes, codebooks and scales, and the sizes kernels need."""

    def __init__(self, codes, codebooks, scales, K: int):
        self.codes, self.codebooks, self.scales, self.K = codes, codebooks, scales, K
        self.B, self.entries, self.og, self.g = codebooks.shape
        self.gp = max(triton.next_power_of_2(self.g), 1)
        self.in_groups, self.out_groups = codes.shape[1], codes.shape[2]
        self.N = self.out_groups * self.og
        self.sizes = {"B": self.B, "ENTRIES": self.entries, "OG": self.og, "G": self.g}

    def config(self, body: str, M: int) -> dict[str, int]:
        scheme = f"{self.B}x{self.entries.bit_length() - 1}-g{self.g}"
        return tuning.config(f"additive.{body}", scheme, self.N, self.K, M)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.stride(1) == 1 else x.contiguous()

    def block_groups(self, block_k: int) -> int:
        # tl.dot needs 16 along K.
        return max(block_k // self.gp, triton.cdiv(16, self.gp), 1)

    def dot(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Partial sums [S, M, N] of at most 64 tokens."""
        M, config = x.shape[0], self.config("dot", x.shape[0])
        block_g = self.block_groups(config["BLOCK_K"])
        tiles = triton.cdiv(self.N, config["BLOCK_N"])
        steps = triton.cdiv(self.in_groups, block_g)
        per_split = triton.cdiv(steps, max(1, min(config["PROGRAMS"] // tiles, steps))) * block_g
        splits = triton.cdiv(self.in_groups, per_split)
        partial = torch.empty((splits, M, self.N), dtype=torch.float32, device=x.device)
        wrap_triton(bodies._dot)[(tiles, splits)](
            x, self.codes, self.codebooks, partial, M, self.N, self.in_groups, self.out_groups,
            x.stride(0), per_split, **self.sizes, GP=self.gp, BLOCK_N=config["BLOCK_N"],
            BLOCK_G=block_g,
            BLOCK_M=max(16, triton.next_power_of_2(M)),
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
        return partial, splits

    def lookup(self, x: torch.Tensor, widest: torch.Tensor):
        """Partial sums [S, M, N] in units [M] of one or two tokens."""
        M, config = x.shape[0], self.config("lookup", x.shape[0])
        # float16 tables are half the bytes; float32 input keeps float32 sums.
        dtype = torch.float32 if x.dtype == torch.float32 else torch.float16
        tables = torch.empty(
            (M, self.in_groups, self.B, self.entries), dtype=dtype, device=x.device
        )
        unit = torch.empty(M, dtype=torch.float32, device=x.device)
        groups = config["GROUPS"]
        wrap_triton(bodies._tables)[(triton.cdiv(self.in_groups, groups), self.B, M)](
            x, self.codebooks, widest, tables, unit, self.K, self.in_groups, x.stride(0), B=self.B,
            ENTRIES=self.entries, G=self.g, GP=self.gp, GROUPS=groups, CHUNK=1024,
        )  # fmt: skip
        tiles = triton.cdiv(self.N, config["BLOCK_N"])
        splits = max(1, min(config["PROGRAMS"] // tiles, self.in_groups))
        per_split = triton.cdiv(self.in_groups, splits)
        splits = triton.cdiv(self.in_groups, per_split)
        partial = torch.empty((splits, M, self.N), dtype=torch.float32, device=x.device)
        wrap_triton(bodies._lookup)[(tiles, splits, M)](
            tables, self.codes, partial, M, self.N, self.in_groups, per_split, B=self.B,
            ENTRIES=self.entries, BLOCK_N=config["BLOCK_N"], num_warps=config["num_warps"],
        )  # fmt: skip
        return partial, splits, unit

    def finish(self, partial, splits: int, unit, bias, y: torch.Tensor) -> None:
        wrap_triton(bodies._finish)[(triton.cdiv(self.N, 1024), y.shape[0])](
            partial, partial if unit is None else unit, self.scales,
            self.scales if bias is None else bias, y, y.shape[0], self.N, y.stride(0),
            SPLITS=splits, OG=self.og, UNIT=unit is not None, BIAS=bias is not None, BLOCK=1024,
        )  # fmt: skip

    def slices(self, dtype: torch.dtype):
        """Yields (first row, weight slice [rows, K]); the scratch is reused."""
        rows = max(1, SLICE_BYTES // (self.K * dtype.itemsize))
        scratch = torch.empty((min(rows, self.N), self.K), dtype=dtype, device=self.codes.device)
        for first in range(0, self.N, rows):
            count = min(rows, self.N - first)
            self.dequantize(first, scratch[:count])
            yield first, scratch[:count]

    def dequantize(self, first: int, out: torch.Tensor) -> None:
        """Fill ``out`` [rows, K] with the rows from ``first`` on."""
        config = self.config("dequantize", 0)
        block_g = max(config["BLOCK_K"] // self.gp, 1)
        grid = (triton.cdiv(out.shape[0], config["BLOCK_N"]), triton.cdiv(self.in_groups, block_g))
        wrap_triton(bodies._dequantize)[grid](
            self.codes, self.codebooks, self.scales, out, first, first + out.shape[0], self.K,
            self.in_groups, self.out_groups, **self.sizes, GP=self.gp, BLOCK_N=config["BLOCK_N"],
            BLOCK_G=block_g, num_warps=config["num_warps"],
        )  # fmt: skip


def _parts(codes, codebooks, scales, K: int, partitions: list[int]):
    """The fused parts with their first rows. ``codes`` is the flat runtime tensor."""
    books, og, ig = codebooks.shape[0] // len(partitions), codebooks.shape[2], codebooks.shape[3]
    expected = books * (K // ig) * (sum(partitions) // og)
    if codes.dim() != 1 or codes.numel() != expected:
        raise OperandError(
            f"packed has shape {list(codes.shape)}, expected [{expected}] codes"
            f" for partitions {list(partitions)}, K={K}"
        )
    offset = row = 0
    for p, rows in enumerate(partitions):
        groups = rows // og
        size = books * (K // ig) * groups
        part = codes[offset : offset + size].view(books, K // ig, groups)
        first = row // og
        yield row, _Part(part, codebooks[p * books : (p + 1) * books],
                         scales[first : first + groups], K)  # fmt: skip
        offset, row = offset + size, row + rows


def pack(codes: torch.Tensor, out_group_size: int, partitions: list[int]) -> torch.Tensor:
    """Canonical codes [O, I, B] -> the flat runtime tensor: [B, I, O] part after part."""
    parts = codes.split([rows // out_group_size for rows in partitions])
    return torch.cat([part.permute(2, 1, 0).reshape(-1) for part in parts])


def unpack(packed, in_groups: int, books: int, out_group_size: int, partitions: list[int]):
    """The canonical codes [O, I, B], bit for bit what ``pack`` was given."""
    groups = [rows // out_group_size for rows in partitions]
    parts = packed.split([books * in_groups * g for g in groups])
    shaped = [p.view(books, in_groups, g) for p, g in zip(parts, groups, strict=True)]
    return torch.cat([p.permute(2, 1, 0) for p in shaped]).contiguous()


@triton_op("aqlm_infer_triton::additive_matmul", mutates_args={})
def additive_matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    widest: torch.Tensor,
    partitions: list[int],
) -> torch.Tensor:
    """y [..., N] = x W^T + bias in x's dtype, float32 accumulation.

    ``packed`` is :func:`pack`'s, ``widest`` [P] the largest |value| of each part's codebooks when
    it was packed (it only scales the look-up tables); other shapes as in ``aqlm_infer.ops``.
    """
    check_matmul(x, codebooks, scales, bias, partitions)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    M, N = rows.shape[0], sum(partitions)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0:
        return y.view(*x.shape[:-1], N)
    for p, (row, part) in enumerate(_parts(packed, codebooks, scales, x.shape[-1], partitions)):
        part_bias = None if bias is None else bias[row : row + part.N]
        out = y[:, row : row + part.N]
        if M > DOT_TOKENS:
            for first, weight in part.slices(x.dtype):
                product = torch.mm(rows, weight.t())
                if part_bias is not None:
                    product = product + part_bias[first : first + weight.shape[0]].to(x.dtype)
                out[:, first : first + weight.shape[0]] = product
        elif M <= LOOKUP_TOKENS and part.entries <= 256 and part.og == 1:
            partial, splits, unit = part.lookup(rows, widest[p])
            part.finish(partial, splits, unit, part_bias, out)
        else:
            partial, splits = part.dot(rows)
            part.finish(partial, splits, None, part_bias, out)
    return y.view(*x.shape[:-1], N)


@triton_op("aqlm_infer_triton::additive_matmul_dx", mutates_args={})
def additive_matmul_dx(
    dy: torch.Tensor,
    packed: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    in_features: int,
    partitions: list[int],
) -> torch.Tensor:
    """dx [..., K] = dy W, summed over slices of rows in float32."""
    check_operands(codebooks, scales, dy.shape[-1], in_features, partitions)
    rows = dy.reshape(-1, dy.shape[-1])
    dx = torch.zeros((rows.shape[0], in_features), dtype=torch.float32, device=dy.device)
    for row, part in _parts(packed, codebooks, scales, in_features, partitions):
        for first, weight in part.slices(dy.dtype):
            block = rows[:, row + first : row + first + weight.shape[0]]
            dx = dx + torch.mm(block, weight)
    return dx.to(dy.dtype).view(*dy.shape[:-1], in_features)


@triton_op("aqlm_infer_triton::additive_dequantize", mutates_args={})
def additive_dequantize(
    packed: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    in_features: int,
    partitions: list[int],
) -> torch.Tensor:
    """The [N, K] weight in the codebooks' dtype."""
    check_operands(codebooks, scales, sum(partitions), in_features, partitions)
    weight = torch.empty(
        (sum(partitions), in_features), dtype=codebooks.dtype, device=packed.device
    )
    for row, part in _parts(packed, codebooks, scales, in_features, partitions):
        part.dequantize(0, weight[row : row + part.N])
    return weight


def _context(ctx, inputs, output):
    x, packed, codebooks, scales, bias, _, partitions = inputs
    refuse_value_gradients(ctx.needs_input_grad)
    ctx.save_for_backward(packed, codebooks, scales)
    ctx.in_features, ctx.partitions = x.shape[-1], partitions
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    packed, codebooks, scales = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = additive_matmul_dx(dy, packed, codebooks, scales, ctx.in_features, ctx.partitions)
    if ctx.needs_input_grad[4]:
        dbias = bias_gradient(dy, ctx.bias_dtype)
    return dx, None, None, None, dbias, None, None


additive_matmul.register_autograd(_backward, setup_context=_context)
