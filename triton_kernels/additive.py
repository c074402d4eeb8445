"""Additive codebooks (AQLM, arXiv 2401.06118) in Triton: the kernel bodies.

Runtime layout: the canonical codes transposed to [B, K/g, N/og], so that neighbouring rows are
neighbouring bytes. ``additive_ops`` chooses the body by the number of tokens M:

    _tables, _lookup   the 2^b partial dot products of every input vector and codebook, then one
                       table entry a code (2 bytes from L1 instead of a 16-byte word)
    _dot               words gathered into a tile of the weight, one ``tl.dot`` for all tokens
    _dequantize        a slice of the weight, for the device's GEMM

Split K writes partial sums [S, M, N] that ``_finish`` adds in order: no atomics, so runs are
bitwise equal.
"""

import triton
import triton.language as tl


@triton.jit
def _word(codes_ptr, books_ptr, groups, rows, row_ok, group_ok, b, IN, OUT,
          ENTRIES: tl.constexpr, OG: tl.constexpr, G: tl.constexpr, GP: tl.constexpr):  # fmt: skip
    """Codebook b's words of a tile [rows, groups], float32 [rows, groups, GP] (zero past G).

    IN and OUT are the numbers of in groups and out groups; GP is G padded to a power of two.
    """
    ok = row_ok[:, None] & group_ok[None, :]
    at = (b * IN + groups[None, :]) * OUT + (rows // OG)[:, None]
    code = tl.load(codes_ptr + at, mask=ok, other=0).to(tl.int32) & (ENTRIES - 1)
    entry = ((b * ENTRIES + code) * OG + (rows % OG)[:, None]) * G
    j = tl.arange(0, GP)
    inside = ok[:, :, None] & (j < G)[None, None, :]
    return tl.load(books_ptr + entry[:, :, None] + j[None, None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _dot(x_ptr, codes_ptr, books_ptr, partial_ptr, M, N, IN, OUT, x_stride, per_split,
         B: tl.constexpr, ENTRIES: tl.constexpr, OG: tl.constexpr, G: tl.constexpr,
         GP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
         BLOCK_M: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """partial[s, m, n] = sum over the split's groups of x[m] . word sums[n]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, IN)
    tokens = tl.arange(0, BLOCK_M)
    j = tl.arange(0, GP)
    row_ok, token_ok = rows < N, tokens < M
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(begin, end, BLOCK_G):
        groups = first + tl.arange(0, BLOCK_G)
        group_ok = groups < end
        words = _word(codes_ptr, books_ptr, groups, rows, row_ok, group_ok, 0, IN, OUT,
                      ENTRIES, OG, G, GP)  # fmt: skip
        for b in tl.static_range(1, B):
            words += _word(codes_ptr, books_ptr, groups, rows, row_ok, group_ok, b, IN, OUT,
                           ENTRIES, OG, G, GP)  # fmt: skip
        tile = tl.reshape(words, (BLOCK_N, BLOCK_G * GP)).to(x_ptr.dtype.element_ty)
        k = tl.reshape(groups[:, None] * G + j[None, :], (BLOCK_G * GP,))
        k_ok = tl.reshape(group_ok[:, None] & (j < G)[None, :], (BLOCK_G * GP,))
        x = tl.load(
            x_ptr + tokens[None, :] * x_stride + k[:, None],
            mask=k_ok[:, None] & token_ok[None, :],
            other=0.0,
        )
        total = tl.dot(tile, x, total, input_precision=PRECISION)
    at = (tl.program_id(1) * M + tokens[None, :]) * N + rows[:, None]
    tl.store(partial_ptr + at, total, mask=row_ok[:, None] & token_ok[None, :])


@triton.jit
def _tables(x_ptr, books_ptr, widest_ptr, tables_ptr, unit_ptr, K, IN, x_stride,
            B: tl.constexpr, ENTRIES: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
            GROUPS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """tables[m, i, b, c] = x[m, i] . codebook[b, c] / unit[m], unit[m] = |x[m]| * widest.

    The unit (largest |x| times largest codebook value) keeps every entry within +-G; without it,
    activation outliers would leave float16's range.
    """
    b, m = tl.program_id(1), tl.program_id(2)
    largest = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, K, CHUNK):
        k = first + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    unit = tl.max(largest, 0) * tl.load(widest_ptr)
    unit = tl.where(unit > 0, unit, 1.0)
    if (tl.program_id(0) == 0) & (b == 0):
        tl.store(unit_ptr + m, unit)
    j, entries = tl.arange(0, GP), tl.arange(0, ENTRIES)
    book = tl.load(
        books_ptr + (b * ENTRIES + entries[:, None]) * G + j[None, :],
        mask=(j < G)[None, :] & (entries < ENTRIES)[:, None],
        other=0.0,
    ).to(tl.float32)
    begin = tl.program_id(0) * GROUPS
    for i in range(begin, tl.minimum(begin + GROUPS, IN)):
        x = tl.load(x_ptr + m * x_stride + i * G + j, mask=j < G, other=0.0)
        products = tl.sum(book * x.to(tl.float32)[None, :], 1) / unit
        at = ((m * IN + i) * B + b) * ENTRIES + entries
        tl.store(tables_ptr + at, products.to(tables_ptr.dtype.element_ty))


@triton.jit
def _lookup(tables_ptr, codes_ptr, partial_ptr, M, N, IN, per_split,
            B: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """partial[s, m, n] = sum over the split's groups and the codebooks of tables[m, i, b, code]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split, m = tl.program_id(1), tl.program_id(2)
    begin = split * per_split
    end = tl.minimum(begin + per_split, IN)
    ok = rows < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(begin, end):
        for b in tl.static_range(B):
            code = tl.load(codes_ptr + (b * IN + i) * N + rows, mask=ok, other=0)
            entry = ((m * IN + i) * B + b) * ENTRIES + (code.to(tl.int32) & (ENTRIES - 1))
            total += tl.load(tables_ptr + entry, mask=ok, other=0.0).to(tl.float32)
    tl.store(partial_ptr + (split * M + m) * N + rows, total, mask=ok)


@triton.jit
def _finish(partial_ptr, unit_ptr, scales_ptr, bias_ptr, y_ptr, M, N, y_stride,
            SPLITS: tl.constexpr, OG: tl.constexpr, UNIT: tl.constexpr,
            BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """y[m, n] = scale[n] * unit[m] * (partial sums in order) + bias[n]."""
    rows, m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    ok = rows < N
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + (s * M + m) * N + rows, mask=ok, other=0.0)
    if UNIT:
        total *= tl.load(unit_ptr + m)
    total *= tl.load(scales_ptr + rows // OG, mask=ok, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + rows, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * y_stride + rows, total.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _dequantize(codes_ptr, books_ptr, scales_ptr, w_ptr, first_row, rows_end, K, IN, OUT,
                B: tl.constexpr, ENTRIES: tl.constexpr, OG: tl.constexpr, G: tl.constexpr,
                GP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):  # fmt: skip
    """w[n - first_row, :] = scale[n] * word sums[n], rows first_row .. rows_end - 1."""
    rows = first_row + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    row_ok, group_ok = rows < rows_end, groups < IN
    words = _word(codes_ptr, books_ptr, groups, rows, row_ok, group_ok, 0, IN, OUT,
                  ENTRIES, OG, G, GP)  # fmt: skip
    for b in tl.static_range(1, B):
        words += _word(codes_ptr, books_ptr, groups, rows, row_ok, group_ok, b, IN, OUT,
                       ENTRIES, OG, G, GP)  # fmt: skip
    words *= tl.load(scales_ptr + rows // OG, mask=row_ok, other=0.0).to(tl.float32)[:, None, None]
    j = tl.arange(0, GP)
    at = (rows - first_row)[:, None, None] * K + groups[None, :, None] * G + j[None, None, :]
    ok = row_ok[:, None, None] & group_ok[None, :, None] & (j < G)[None, None, :]
    tl.store(w_ptr + at, words.to(w_ptr.dtype.element_ty), mask=ok)
