"""Additive codebooks (AQLM, arXiv 2401.06118) in Triton: the kernel bodies.

Runtime layout: the canonical codes transposed to [B, K/g, N/og], so that neighbouring rows are
neighbouring bytes. ``additive_ops`` chooses the body by the number of tokens M:

    _tables, _lookup   one token: the 2^b partial dot products of every input vector and codebook,
                       then one table entry a code (2 bytes from L1 instead of a 16-byte word)
    _gemv              one token: words gathered and multiplied
    _dot               words gathered into a tile of the weight, one ``tl.dot`` for all tokens
                       (``words`` has a faster one for vectors of 8 on NVIDIA)
    _dequantize        a slice of the weight, for the device's GEMM

Split K writes partial sums [S, M, N] (``partial``).
"""

import triton
import triton.language as tl


@triton.jit
def _codes(codes_ptr, group, row, ok, b, IN, OUT, ENTRIES: tl.constexpr, OG: tl.constexpr):
    """Codebook b's codes, int32; 0 where not ok. IN and OUT count in groups and out groups."""
    at = codes_ptr + (b * IN + group) * OUT + row // OG
    code = tl.load(at, mask=ok, other=0, eviction_policy="evict_first").to(tl.int32)
    return code & (ENTRIES - 1)


@triton.jit
def _word(books_ptr, code, row, j, b, ENTRIES: tl.constexpr, OG: tl.constexpr, G: tl.constexpr,
          GP: tl.constexpr):  # fmt: skip
    """Codebook b's words of the codes in the codebooks' type, 0 past G.

    code, row and j are broadcast together, j over 0 .. GP-1: G padded to a power of two. (All have
    three dimensions, so that one thread reads a whole word at once.)
    """
    at = books_ptr + ((b * ENTRIES + code) * OG + row % OG) * G + j
    if G == GP:
        return tl.load(at, eviction_policy="evict_last")
    else:
        return tl.load(at, mask=(code >= 0) & (j < G), other=0.0, eviction_policy="evict_last")


@triton.jit
def _tile(codes_ptr, books_ptr, code0, code1, group, row, ok, IN, OUT, j, B: tl.constexpr,
          ENTRIES: tl.constexpr, OG: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
          NATIVE: tl.constexpr):  # fmt: skip
    """The sums of B words: float32, or with one codebook or NATIVE the codebooks' type.

    code0 and code1 are the first two codebooks' codes. NATIVE, for two codebooks: a sum in their
    type is rounded like a float32 sum that is put into a tile of that type, and takes no
    conversions.
    """
    total = _word(books_ptr, code0, row, j, 0, ENTRIES, OG, G, GP)
    if B > 1 and not NATIVE:
        total = total.to(tl.float32)
    if B > 1:
        total += _word(books_ptr, code1, row, j, 1, ENTRIES, OG, G, GP).to(total.dtype)
    for b in tl.static_range(2, B):
        code = _codes(codes_ptr, group, row, ok, b, IN, OUT, ENTRIES, OG)
        total += _word(books_ptr, code, row, j, b, ENTRIES, OG, G, GP).to(total.dtype)
    return total


@triton.jit
def _first_codes(codes_ptr, group, row, ok, IN, OUT, B: tl.constexpr, ENTRIES: tl.constexpr,
                 OG: tl.constexpr):  # fmt: skip
    """The codes of the first two codebooks (twice the first of one)."""
    code0 = _codes(codes_ptr, group, row, ok, 0, IN, OUT, ENTRIES, OG)
    code1 = code0
    if B > 1:
        code1 = _codes(codes_ptr, group, row, ok, 1, IN, OUT, ENTRIES, OG)
    return code0, code1


@triton.jit(do_not_specialize=["M", "per_split"])
def _dot(x_ptr, codes_ptr, books_ptr, partial_ptr, M, N, IN, OUT, x_stride, per_split,
         B: tl.constexpr, ENTRIES: tl.constexpr, OG: tl.constexpr, G: tl.constexpr,
         GP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
         NATIVE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """partial[s, m, n] = sum over the split's groups of x[m] . word sums[n].

    The weight is the second operand, [K, N], which Hopper's MMAs read from shared memory. As the
    first operand it was moved to registers in many small steps.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, row_ok = rows[None, None, :], (rows < N)[None, None, :]
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, IN)
    tokens = tl.arange(0, BLOCK_M)
    token_ok = tokens < M
    i = tl.arange(0, BLOCK_G * GP)
    j = tl.arange(0, GP)[None, :, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Codes (of two codebooks) are loaded one step ahead.
    group = begin + tl.arange(0, BLOCK_G)[:, None, None]
    ok = (group < end) & row_ok
    next0, next1 = _first_codes(codes_ptr, group, row, ok, IN, OUT, B, ENTRIES, OG)
    for first in range(begin, end, BLOCK_G):
        code0 = next0
        code1 = next1 if B > 1 else next0
        k = (first + i // GP) * G + i % GP
        x_ok = token_ok[:, None] & ((first + i // GP < end) & (i % GP < G))[None, :]
        x = tl.load(x_ptr + tokens[:, None] * x_stride + k[None, :], mask=x_ok, other=0.0)
        group = first + BLOCK_G + tl.arange(0, BLOCK_G)[:, None, None]
        ok = (group < end) & row_ok
        next0, next1 = _first_codes(codes_ptr, group, row, ok, IN, OUT, B, ENTRIES, OG)
        ok = (group - BLOCK_G < end) & row_ok
        tile = _tile(codes_ptr, books_ptr, code0, code1, group - BLOCK_G, row, ok, IN, OUT, j, B,
                     ENTRIES, OG, G, GP, NATIVE)  # fmt: skip
        tile = tl.reshape(tile, (BLOCK_G * GP, BLOCK_N)).to(x_ptr.dtype.element_ty)
        total = tl.dot(x, tile, total, input_precision=PRECISION)
    at = (tl.program_id(1) * M + tokens[:, None]) * N + rows[None, :]
    tl.store(partial_ptr + at, total, mask=(rows < N)[None, :] & token_ok[:, None])


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


@triton.jit(do_not_specialize=["M", "per_split"])
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


@triton.jit(do_not_specialize=["per_split"])
def _gemv(x_ptr, codes_ptr, books_ptr, partial_ptr, N, IN, per_split,
          B: tl.constexpr, ENTRIES: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):  # fmt: skip
    """partial[s, n] = one token's sum over the split's groups of x . codebook words (OG = 1)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, IN)
    j = tl.arange(0, GP)
    total = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    for first in range(begin, end, BLOCK_G):
        group = first + tl.arange(0, BLOCK_G)
        ok = (rows < N)[:, None] & (group < end)[None, :]
        x_ok = (group < end)[:, None] & (j < G)[None, :]
        x = tl.load(x_ptr + group[:, None] * G + j[None, :], mask=x_ok, other=0.0).to(tl.float32)
        for b in tl.static_range(B):
            at = (b * IN + group[None, :]) * N + rows[:, None]
            code = tl.load(codes_ptr + at, mask=ok, other=0, eviction_policy="evict_first")
            entry = (b * ENTRIES + (code.to(tl.int32) & (ENTRIES - 1))) * G
            entry = entry[:, :, None] + j[None, None, :]
            if G == GP:
                word = tl.load(books_ptr + entry, eviction_policy="evict_last")
            else:
                inside = (j < G)[None, None, :]
                word = tl.load(books_ptr + entry, mask=inside, other=0.0,
                               eviction_policy="evict_last")  # fmt: skip
            total += tl.sum(word.to(tl.float32) * x[None, :, :], 2)
    tl.store(partial_ptr + tl.program_id(1) * N + rows, tl.sum(total, 1), mask=rows < N)


@triton.jit
def _dequantize(codes_ptr, books_ptr, scales_ptr, w_ptr, first_row, rows_end, K, IN, OUT,
                B: tl.constexpr, ENTRIES: tl.constexpr, OG: tl.constexpr, G: tl.constexpr,
                GP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):  # fmt: skip
    """w[n - first_row, :] = scale[n] * word sums[n], rows first_row .. rows_end - 1."""
    row = (first_row + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
    group = (tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G))[None, :, None]
    ok = (row < rows_end) & (group < IN)
    j = tl.arange(0, GP)[None, None, :]
    code0, code1 = _first_codes(codes_ptr, group, row, ok, IN, OUT, B, ENTRIES, OG)
    w = _tile(codes_ptr, books_ptr, code0, code1, group, row, ok, IN, OUT, j, B, ENTRIES, OG, G,
              GP, False)  # fmt: skip
    w = w.to(tl.float32) * tl.load(scales_ptr + row // OG, mask=row < rows_end, other=0.0).to(
        tl.float32
    )
    at = (row - first_row) * K + group * G + j
    tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=ok & (j < G))
