"""Additive codebooks in Triton: the operators, which choose a body and its launch configuration.

Wrapped as ``triton_op``, so that ``torch.compile`` sees the kernels. Tensors are those of
``aqlm_infer.ops``, but ``packed`` is :func:`pack`'s.
"""

from __future__ import annotations

import torch
import triton
from torch.library import triton_op, wrap_triton

from ..ops.additive import additive_gradient, check_matmul, check_operands
from ..ops.library import OperandError
from . import additive as bodies
from . import first, planes, tuning, words
from .fields import dot_precision, has_dp4a
from .partial import finish, share, slots, unit_rows
from .slices import sliced_dx, sliced_matmul

DEQUANTIZE_N, DEQUANTIZE_K = 32, 128  # rows and inputs of a tile
DEQUANTIZE_WARPS, DEQUANTIZE_STEPS = 8, 16  # of a program of ``words``
PLANES_TOKENS = 32  # the most of ``planes``


def _copies(books: int, entries: int) -> tuple[int, int]:
    """Copies of codebooks of vectors of 8 in shared memory, and its bytes; zeros: they do not fit.
    (With what Triton takes itself they stay within 48 KB, see ``shared``.)"""
    for copies in (8, 4, 2, 1):
        size = 16 * entries * books * copies
        if size <= 32768:
            return copies, 16384 if size <= 16384 else 32768
    return 0, 0


class _Part:
    """One fused part: views of its codes, codebooks and scales, and the sizes kernels need."""

    def __init__(self, codes, codebooks, scales, K: int):
        self.codes, self.codebooks, self.scales, self.K = codes, codebooks, scales, K
        self.B, self.entries, self.og, self.g = codebooks.shape
        self.gp = max(triton.next_power_of_2(self.g), 1)
        self.in_groups, self.out_groups = codes.shape[1], codes.shape[2]
        self.N = self.out_groups * self.og
        self.sizes = {"B": self.B, "ENTRIES": self.entries, "OG": self.og, "G": self.g}

    def config(self, x: torch.Tensor) -> tuning.Config:
        M = x.shape[0]
        scheme = f"{self.B}x{self.entries.bit_length() - 1}-g{self.g}"
        if self.og > 1:
            scheme += f"-o{self.og}"
        body = "dot"
        if M == 1 and self.og == 1:
            # A table entry is 2 bytes where a codebook vector is 16, but tables of more than 256
            # entries cost more than the products that they replace.
            body = "lookup" if self.entries <= 256 and self.B > 1 else "gemv"
        gathers = (self.g, self.og) == (8, 1) and x.dtype.itemsize == 2
        gathers = gathers and x.dtype == self.codebooks.dtype
        config = tuning.config("additive", scheme, self.N, self.K, tuning.token_block(M), body)
        whole = self.entries == planes.ENTRIES.value and M <= PLANES_TOKENS
        takes = {"words_dot": gathers, "planes_dot": gathers and whole}
        return config if takes.get(config["body"], True) else tuning.default(f"additive.{body}")

    def matmul(self, x, widest, bias, y) -> None:
        """Fill y [M, N] with the product of at most 64 tokens."""
        config, unit = self.config(x), None
        if config["body"] == "lookup":
            partial, unit = self.lookup(x, widest, config)
        elif config["body"] == "gemv":
            partial = self.gemv(x, config)
        elif config["body"] == "words_dot":
            partial = self.words_dot(x, config)
        elif config["body"] == "planes_dot":
            partial = self.planes_dot(x, config)
        else:
            partial = self.dot(x, config)
        finish(partial, y, scales=self.scales, out_group=self.og, unit=unit, bias=bias)

    def gemv(self, x: torch.Tensor, config: tuning.Config) -> torch.Tensor:
        """Partial sums [S, 1, N] of one token."""
        tiles = triton.cdiv(self.N, config["BLOCK_N"])
        block_g = config["BLOCK_G"]
        steps = triton.cdiv(self.in_groups, block_g)
        each, splits = share(steps, tiles, config)
        partial = torch.empty((splits, 1, self.N), dtype=torch.float32, device=x.device)
        wrap_triton(bodies._gemv)[(tiles, splits)](
            x, self.codes, self.codebooks, partial, self.N, self.in_groups, each * block_g,
            B=self.B, ENTRIES=self.entries, G=self.g, GP=self.gp, BLOCK_N=config["BLOCK_N"],
            BLOCK_G=block_g, **tuning.launch_options(config),
        )  # fmt: skip
        return partial

    def words_dot(self, x: torch.Tensor, config: tuning.Config) -> torch.Tensor:
        """Partial sums [S, M, N] of at most 64 tokens of the codebooks' type."""
        M, block_m, warps = x.shape[0], tuning.token_rows(config, x.shape[0]), config["num_warps"]
        rows = self.rows_of_a_word()
        # (More words than four take minutes to compile: a lane of odd rows has one code a word.)
        width, books = min(4, config["WIDTH"] * 4 // rows), config["BOOKS"] or self.B
        books = books if self.B % books == 0 else 1
        together = rows * width  # rows of a lane
        wide = rows > 1 and width in (2, 4) and self.N % together == 0
        wide = wide and self.codes.storage_offset() % together == 0
        tiles = triton.cdiv(self.N, 8 * warps * together)
        steps = triton.cdiv(self.in_groups, words.STEP.value)
        weight_first = bool(config["FIRST"]) and rows > 1
        if weight_first:
            inputs = torch.empty((256 * steps, block_m), dtype=x.dtype, device=x.device)
            sums = torch.empty((steps, block_m), dtype=torch.float32, device=x.device)
            wrap_triton(first._spread)[(steps, block_m // 16)](
                x, inputs, sums, M, self.K, x.stride(0), FIELDS=False, STEP=words.STEP.value,
                CHUNK=256, BLOCK_M=block_m,
            )  # fmt: skip
        else:
            inputs = torch.empty(128 * block_m * steps, dtype=torch.int32, device=x.device)
            wrap_triton(words._arrange)[(4 * steps, block_m // 16)](
                x, inputs, M, self.K, x.stride(0), TILES=block_m // 16
            )
        programs = max(1, min(config["PROGRAMS"] * books // self.B, tiles * steps))
        if config["DEALT"]:
            each = count = slots(tiles, steps, programs)
            grid = (programs, self.B // books)
        else:
            each, count = share(steps, tiles, {**config, "PROGRAMS": programs})
            grid = (tiles, count * self.B // books)
        partial = torch.empty(
            (count * self.B // books, M, self.N), dtype=torch.float32, device=x.device
        )
        copies = size = 0
        if has_dp4a(x) and config["COPIES"]:
            copies, size = _copies(books, self.entries)
        stage = 32 * config["Q"] * block_m * x.dtype.itemsize
        stages = first.stages(config["num_stages"], stage, size) if weight_first else 1
        wrap_triton(words._words_dot)[grid](
            inputs, self.codes, self.codebooks, partial, M, self.N, self.in_groups, each, B=self.B,
            BOOKS=books, ENTRIES=self.entries, COPIES=copies, BYTES=size, ROWS=rows, WIDTH=width,
            WIDE=wide, Q=config["Q"], FIRST=weight_first, DEALT=bool(config["DEALT"]),
            ASM=has_dp4a(x), WARPS=warps, FEW=bool(M <= 8), BLOCK_M=block_m, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
        return partial

    def planes_dot(self, x: torch.Tensor, config: tuning.Config) -> torch.Tensor:
        """Partial sums [S, M, N] of at most 32 tokens, with codebooks of 16 bits of their type."""
        M, warps, at_once = x.shape[0], config["num_warps"], config["Q"] // 4
        rows, width = self.rows_of_a_word(), config["WIDTH"]
        wide = rows > 1 and width in (2, 4) and self.N % (rows * width) == 0
        wide = wide and self.codes.storage_offset() % (rows * width) == 0
        parts = planes.PARTS.value * self.B
        tiles = triton.cdiv(self.N, 8 * warps * rows * width)
        turns = triton.cdiv(self.in_groups, planes.GROUPS.value * at_once)
        pairs, programs = turns * at_once, max(1, min(config["PROGRAMS"] // parts, tiles * turns))
        share, entries = slots(tiles, turns, programs), self.B * self.entries
        plane = torch.empty(4 * entries, dtype=torch.int32, device=x.device)
        tokens = 1 if M <= 16 else 2  # tiles of them
        inputs = torch.empty(1024 * pairs * tokens, dtype=torch.int32, device=x.device)
        wrap_triton(planes._planes)[(triton.cdiv(entries, 256),)](
            x, self.codebooks, plane, inputs, M, self.K, x.stride(0), entries, pairs, BLOCK=256,
        )  # fmt: skip
        partial = torch.empty((share * parts, M, self.N), dtype=torch.float32, device=x.device)
        wrap_triton(planes._planes_dot)[(parts, programs)](
            inputs, self.codes, self.codebooks, plane, partial, M, self.N, self.in_groups, pairs,
            share, 0, B=self.B, ROWS=rows, WIDTH=width, WIDE=wide, Q=config["Q"], TILES=tokens,
            ASM=has_dp4a(x), WARPS=warps, FEW=bool(M <= 8), num_warps=warps,
        )  # fmt: skip
        return partial

    def dot(self, x: torch.Tensor, config: tuning.Config) -> torch.Tensor:
        """Partial sums [S, M, N] of at most 64 tokens."""
        M = x.shape[0]
        # tl.dot needs 16 along K.
        block_g = max(config["BLOCK_K"] // self.gp, triton.cdiv(16, self.gp), 1)
        tiles = triton.cdiv(self.N, config["BLOCK_N"])
        steps = triton.cdiv(self.in_groups, block_g)
        each, splits = share(steps, tiles, config)
        partial = torch.empty((splits, M, self.N), dtype=torch.float32, device=x.device)
        wrap_triton(bodies._dot)[(tiles, splits)](
            x, self.codes, self.codebooks, partial, M, self.N, self.in_groups, self.out_groups,
            x.stride(0), each * block_g, **self.sizes, GP=self.gp, BLOCK_N=config["BLOCK_N"],
            BLOCK_G=block_g, BLOCK_M=tuning.token_rows(config, M),
            NATIVE=self.B == 2 and x.dtype == self.codebooks.dtype, PRECISION=dot_precision(x),
            **tuning.launch_options(config),
        )  # fmt: skip
        return partial

    def lookup(self, x: torch.Tensor, widest: torch.Tensor, config: tuning.Config):
        """Partial sums [S, M, N] in units [M] of one or two tokens."""
        M = x.shape[0]
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
        each, splits = share(self.in_groups, tiles, config)
        partial = torch.empty((splits, M, self.N), dtype=torch.float32, device=x.device)
        wrap_triton(bodies._lookup)[(tiles, splits, M)](
            tables, self.codes, partial, M, self.N, self.in_groups, each, B=self.B,
            ENTRIES=self.entries, BLOCK_N=config["BLOCK_N"], **tuning.launch_options(config),
        )  # fmt: skip
        return partial, unit

    def dequantize(self, first: int, out: torch.Tensor) -> None:
        """Fill ``out`` [rows, K] with the rows from ``first`` on."""
        rows = self.rows_of_a_word()
        here = torch.version.hip is None and out.device.type != "xpu"
        whole = (first % rows, out.shape[0] % rows) == (0, 0)
        if here and whole and (self.g, self.og, self.codebooks.dtype.itemsize) == (8, 1, 2):
            self._dequantize_words(first, out, rows)
            return
        block_g = max(DEQUANTIZE_K // self.gp, 1)
        grid = (triton.cdiv(out.shape[0], DEQUANTIZE_N), triton.cdiv(self.in_groups, block_g))
        wrap_triton(bodies._dequantize)[grid](
            self.codes, self.codebooks, self.scales, out, first, first + out.shape[0], self.K,
            self.in_groups, self.out_groups, **self.sizes, GP=self.gp, BLOCK_N=DEQUANTIZE_N,
            BLOCK_G=block_g, num_warps=4,
        )  # fmt: skip

    def rows_of_a_word(self) -> int:
        """Neighbouring rows whose codes are a 32-bit word; 1 where rows do not begin with one."""
        rows = 4 // self.codes.dtype.itemsize
        return 1 if self.N % rows or self.codes.storage_offset() % rows else rows

    def _dequantize_words(self, first: int, out: torch.Tensor, rows: int) -> None:
        copies, size = _copies(self.B, self.entries) if has_dp4a(out) else (0, 0)
        grid = (
            triton.cdiv(out.shape[0], 4 * DEQUANTIZE_WARPS * rows),
            triton.cdiv(self.in_groups, 8 * DEQUANTIZE_STEPS),
        )
        wrap_triton(words._dequantize)[grid](
            self.codes, self.codebooks, self.scales, out, first, first + out.shape[0], self.K,
            self.N, self.in_groups, DEQUANTIZE_STEPS, B=self.B, ENTRIES=self.entries,
            COPIES=copies, BYTES=size, ROWS=rows, ASM=has_dp4a(out), WARPS=DEQUANTIZE_WARPS,
            num_warps=DEQUANTIZE_WARPS,
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
    rows = unit_rows(x)
    M, N = rows.shape[0], sum(partitions)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0:
        return y.view(*x.shape[:-1], N)
    for p, (row, part) in enumerate(_parts(packed, codebooks, scales, x.shape[-1], partitions)):
        part_bias = None if bias is None else bias[row : row + part.N]
        out = y[:, row : row + part.N]
        if M > tuning.DOT_TOKENS:
            sliced_matmul(rows, out, part.dequantize, part_bias)
        else:
            part.matmul(rows, widest[p], part_bias, out)
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
        dx = dx + sliced_dx(rows[:, row : row + part.N], in_features, part.dequantize)
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


_backward, _context = additive_gradient(additive_matmul_dx)
additive_matmul.register_autograd(_backward, setup_context=_context)
