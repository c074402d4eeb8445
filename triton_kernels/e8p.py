"""E8P (QuIP#, arXiv 2402.04396) in Triton: the kernel bodies.

Runtime layout, ``e8p_pack``'s: tables of 256 words, then the codes as [chunks, N, 32]: K/8 groups
of 8 inputs in chunks of 32 (64 bytes a row, four threads' loads), then the residual codes alike.
Groups past K have code 0 and meet inputs of 0.

A 16-bit code becomes a word of eight nibbles u, one a weight, as
MAGNITUDES[code >> 8] ^ SIGNS[code & 255]: nibble j of the lower half for element 2j, of the upper
half for 2j + 1; the weight is (u - 7.5)/2. A residual code makes a second word alike, or is
RESIDUALS[code] with nibbles n for the values (n - 8)/2. From there on ``fields`` makes numbers.
"""

import triton
import triton.language as tl

from .fields import (
    _byte_fields,
    _bytes,
    _code_pairs,
    _dot4,
    _in_place,
    _pairs,
    _row_sums,
    _sixteen_bits,
    _total,
    _unit,
    _unplaced,
)
from .first import _inputs, _settled, _store, _sums_of
from .operands import _operand, _place
from .shared import _declare, _load, _load_once2, _load_once4, _ready, _share

ZERO = tl.constexpr(7.5)
ZERO_OF_8_BIT_CODES = tl.constexpr(8.0)
CHUNK = 32  # groups


@triton.jit
def _codes(codes_ptr, step, g, rows, N, BLOCK_G: tl.constexpr):
    """The codes of groups step * BLOCK_G + g, int32, for rows below N; g and rows are broadcast."""
    A_CHUNK: tl.constexpr = 32 // BLOCK_G
    at = codes_ptr + (step // A_CHUNK * N + rows) * 32 + step % A_CHUNK * BLOCK_G + g
    return tl.load(at, mask=rows < N, other=0, eviction_policy="evict_first").to(tl.int32)


@triton.jit
def _words(tables_ptr, code, KIND: tl.constexpr, SHARED: tl.constexpr, SHAPE: tl.constexpr):
    """Eight nibbles of each code of this shape: 16-bit codes (KIND 2), 8-bit residuals (KIND 1).

    SHARED: the tables are copied to shared memory (``tl.gather``), where an address takes half the
    instructions of one in global memory; every call copies them and waits for all warps.
    """
    if SHARED:
        i = tl.arange(0, 256)
        flat = tl.reshape(code, (code.numel,))
        if KIND == 1:
            word = tl.gather(tl.load(tables_ptr + 512 + i), flat & 255, 0)
        else:
            word = tl.gather(tl.load(tables_ptr + i), (flat >> 8) & 255, 0)
            word = word ^ tl.gather(tl.load(tables_ptr + 256 + i), flat & 255, 0)
        return tl.reshape(word, SHAPE)
    elif KIND == 1:
        return tl.load(tables_ptr + 512 + (code & 255), eviction_policy="evict_last")
    else:
        word = tl.load(tables_ptr + ((code >> 8) & 255), eviction_policy="evict_last")
        return word ^ tl.load(tables_ptr + 256 + (code & 255), eviction_policy="evict_last")


@triton.jit
def _tables(tables_ptr, COPIES: tl.constexpr):
    """The address of the two tables of 16-bit codes in shared memory, COPIES of each."""
    base = _declare(2048 * COPIES)
    stored = _share(tables_ptr, base, COPIES, 8 * COPIES)
    stored += _share(tables_ptr + 256, base + 4 * COPIES, COPIES, 8 * COPIES)
    return _ready(base, stored)


@triton.jit
def _shared_word(base, lane, word, byte, COPIES: tl.constexpr):
    """Nibbles of the 16-bit codes at bytes ``byte`` of words, from ``_tables``' copies. Half of a
    warp's lanes (``lane`` counts them) look the sign up first."""
    side = lane // COPIES % 2
    own = base + lane % COPIES * 4
    first, second = _byte(word, byte + 1 - side, True), _byte(word, byte + side, True)
    found = _load(own + side * (4 * COPIES) + first * (8 * COPIES), True)
    return found ^ _load(own + (1 - side) * (4 * COPIES) + second * (8 * COPIES), True)


@triton.jit
def _shared_words(base, code, COPIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):
    """``_words`` of 16-bit codes [BLOCK_N, BLOCK_G] from ``_tables``' copies."""
    lane = tl.arange(0, BLOCK_G)[None, :] // (BLOCK_G // 4)
    lane += tl.arange(0, BLOCK_N)[:, None] % 8 * 4
    return _shared_word(base, lane, code, 0, COPIES)


@triton.jit
def _prepare(x_ptr, out_ptr, sums_ptr, K, groups, BLOCK: tl.constexpr):
    """One token's inputs as ``_gemv`` wants them, float32 [8, groups]: by element of their group.

    They are multiplied by what their nibble's place divides by (two share a shift). sums[p] are
    the sums of x and of what was written.
    """
    p = tl.program_id(0)
    k = p * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    scaled = x * _unplaced(k % 8 // 2, 4, 2)
    tl.store(out_ptr + k % 8 * groups + k // 8, scaled, mask=k // 8 < groups)
    tl.store(sums_ptr + 2 * p, tl.sum(x, 0))
    tl.store(sums_ptr + 2 * p + 1, tl.sum(scaled, 0))


@triton.jit
def _gemv(x_ptr, sums_ptr, tables_ptr, codes_ptr, rest_ptr, partial_ptr, N, groups, per_split,
          residual, one, sums, BITS: tl.constexpr, SHARED: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_G: tl.constexpr):  # fmt: skip
    """partial[s, n] = one token's sum over the split's groups of 8, in the rotated basis.

    x and the ``sums`` pairs at sums_ptr are ``_prepare``'s.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, groups // BLOCK_G)
    total = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    g = tl.arange(0, BLOCK_G)
    for step in range(begin, end):
        code = _codes(codes_ptr, step, g[None, :], rows[:, None], N, BLOCK_G)
        word = _words(tables_ptr, code, 2, SHARED, (BLOCK_N, BLOCK_G))
        second = word
        if BITS > 2:
            code = _codes(rest_ptr, step, g[None, :], rows[:, None], N, BLOCK_G)
            second = _words(tables_ptr, code, BITS - 2, SHARED, (BLOCK_N, BLOCK_G))
        for j in tl.static_range(8):
            # Nibble j of the lower half holds element 2j, of the upper half 2j + 1.
            x = tl.load(x_ptr + (2 * (j % 4) + j // 4) * groups + step * BLOCK_G + g)
            value = _in_place(word, one, 16 * (j // 4), j % 4, 4, 2)
            if BITS > 2:
                value += residual * _in_place(second, one, 16 * (j // 4), j % 4, 4, 2)
            total += value * x[None, :]
    y = 8 * tl.sum(total, 1)
    if tl.program_id(1) == 0:
        total_x, total_scaled = _total(sums_ptr, sums, 128)
        if BITS > 2:
            center = ZERO + residual * (ZERO if BITS == 4 else ZERO_OF_8_BIT_CODES)
            y -= 8 * (1 + residual) * total_scaled + center / 2 * total_x
        else:
            y -= 8 * total_scaled + ZERO / 2 * total_x
    tl.store(partial_ptr + tl.program_id(1) * N + rows, y, mask=rows < N)


@triton.jit
def _quantize(x_ptr, out_ptr, sums_ptr, unit_ptr, M, K, x_stride, groups, TILES: tl.constexpr,
              BLOCK: tl.constexpr, CHUNK_K: tl.constexpr):  # fmt: skip
    """Inputs as ``_integers`` and ``_integer_dot`` want them: 16 bits in units, as signed bytes.

    A program takes BLOCK groups of one token. out is int32: the inputs of the nibbles at even
    places of a word (or odd), high bytes (or low), of each group, in the order of its nibbles:
    [even or odd, high or low, groups] for one token, or ``operands``' of TILES tiles of tokens,
    past M zeros: chunks of 32 groups, eight neighbours a lane. sums[m, p] is the sum of a program's
    16-bit inputs.
    """
    p, m = tl.program_id(0), tl.program_id(1)
    x_ptr += m * x_stride
    end = tl.where(m < M, K, 0)
    unit = _unit(x_ptr, end, CHUNK_K)
    group = p * BLOCK + tl.arange(0, BLOCK)[:, None]
    odd = tl.arange(0, 2)[None, :]
    b = tl.arange(0, 4)[None, None, :]
    # Nibble 2b + odd: of the lower half (b < 2) it holds element 2 (2b + odd).
    k = (group * 8 + 2 * odd)[:, :, None] + 4 * (b % 2) + b // 2
    x = tl.load(x_ptr + k, mask=k < end, other=0.0)
    high, low = _sixteen_bits(x.to(tl.float32), unit)
    total = tl.sum(tl.reshape(256 * high + low, (8 * BLOCK,)), 0).to(tl.float32)
    high = tl.sum((high & 255) << (8 * b), 2)
    low = tl.sum((low & 255) << (8 * b), 2)
    ok = (group < groups) & (odd >= 0)
    if TILES > 0:
        q = group % 8  # of the lane
        pair = group // 32 * 4 + q // 2
        at = _place(pair, q % 2, group // 8 % 4, odd, m, 0, TILES, 2)
        tl.store(out_ptr + at, high, mask=ok)
        tl.store(out_ptr + at + 256, low, mask=ok)
    else:
        at = out_ptr + 2 * odd * groups + group
        tl.store(at, high, mask=ok)
        tl.store(at + groups, low, mask=ok)
    tl.store(sums_ptr + m * tl.num_programs(0) + p, total, mask=m < M)
    tl.store(unit_ptr + m, unit, mask=(m < M) & (p == 0))


@triton.jit(do_not_specialize=["per_split"])
def _integers(x_ptr, sums_ptr, unit_ptr, tables_ptr, codes_ptr, rest_ptr, partial_ptr, N, groups,
              per_split, residual, sums, BITS: tl.constexpr, SHARED: tl.constexpr,
              COPIES: tl.constexpr, ASM: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_G: tl.constexpr):  # fmt: skip
    """partial[s, n] as ``_gemv``'s, of inputs rounded to 16 bits (``_quantize``).

    Sums of those are exact; four products take one instruction and four nibbles one mask. COPIES
    of the tables are in shared memory (0: none; always at 3 bits), or SHARED: they come there in
    each step.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, groups // BLOCK_G)
    high = tl.zeros((BLOCK_N, BLOCK_G), tl.int32)
    low = tl.zeros((BLOCK_N, BLOCK_G), tl.int32)
    high2 = tl.zeros((BLOCK_N, BLOCK_G), tl.int32)
    low2 = tl.zeros((BLOCK_N, BLOCK_G), tl.int32)
    base = 0
    if COPIES > 0:
        base = _tables(tables_ptr, COPIES)
    # Codes are loaded one step ahead.
    g = tl.arange(0, BLOCK_G)
    code = _codes(codes_ptr, begin, g[None, :], rows[:, None], N, BLOCK_G)
    code2 = code
    if BITS > 2:
        code2 = _codes(rest_ptr, begin, g[None, :], rows[:, None], N, BLOCK_G)
    for step in range(begin, end):
        ahead = tl.minimum(step + 1, end - 1)
        next_code = _codes(codes_ptr, ahead, g[None, :], rows[:, None], N, BLOCK_G)
        next_code2 = next_code
        if BITS > 2:
            next_code2 = _codes(rest_ptr, ahead, g[None, :], rows[:, None], N, BLOCK_G)
        if COPIES > 0:
            word = _shared_words(base, code, COPIES, BLOCK_N, BLOCK_G)
        else:
            word = _words(tables_ptr, code, 2, SHARED, (BLOCK_N, BLOCK_G))
        second = word
        if BITS > 2 and COPIES > 0:
            second = _shared_words(base, code2, COPIES, BLOCK_N, BLOCK_G)
        elif BITS > 2:
            second = _words(tables_ptr, code2, BITS - 2, SHARED, (BLOCK_N, BLOCK_G))
        code = next_code
        code2 = next_code2
        for odd in tl.static_range(2):
            x_at = x_ptr + 2 * odd * groups + step * BLOCK_G + g
            x_high = tl.load(x_at)[None, :] + tl.zeros_like(word)
            x_low = tl.load(x_at + groups)[None, :] + tl.zeros_like(word)
            nibbles = (word >> (4 * odd)) & 0x0F0F0F0F
            high = _dot4(nibbles, x_high, high, ASM)
            low = _dot4(nibbles, x_low, low, ASM)
            if BITS > 2:
                nibbles = (second >> (4 * odd)) & 0x0F0F0F0F
                high2 = _dot4(nibbles, x_high, high2, ASM)
                low2 = _dot4(nibbles, x_low, low2, ASM)
    y = tl.sum(high, 1).to(tl.float32) * 256 + tl.sum(low, 1).to(tl.float32)
    center = ZERO * 1.0
    if BITS > 2:
        y += residual * (tl.sum(high2, 1).to(tl.float32) * 256 + tl.sum(low2, 1).to(tl.float32))
        center += residual * (ZERO if BITS == 4 else ZERO_OF_8_BIT_CODES)
    if tl.program_id(1) == 0:
        y -= center * tl.sum(_row_sums(sums_ptr, tl.zeros((1,), tl.int32), 0, 0, sums, 128), 0)
    y *= 0.5 * tl.load(unit_ptr)
    tl.store(partial_ptr + tl.program_id(1) * N + rows, y, mask=rows < N)


@triton.jit
def _code_words(codes_ptr, step, rows, N, KIND: tl.constexpr):
    """The codes of a chunk of 32 groups as 32-bit words [rows, 16 KIND / 2], for rows below N."""
    WORDS: tl.constexpr = 8 * KIND
    at = codes_ptr.to(tl.pointer_type(tl.int32)) + (step * N + rows)[:, None] * WORDS
    at += tl.arange(0, WORDS)[None, :]
    return tl.load(at, mask=(rows < N)[:, None], other=0, eviction_policy="evict_first")


@triton.jit
def _byte(word, b, ASM: tl.constexpr):
    """Byte b of each word, int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [word, 0x4440 + b], tl.int32, True, 1
        )
    else:
        return (word >> (8 * b)) & 255


@triton.jit
def _integer_tile(tables_ptr, base, word, KIND: tl.constexpr, COPIES: tl.constexpr,
                  ASM: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The nibbles of a chunk of codes, int8 [256, BLOCK_N] in ``_quantize``'s order: the thread
    that loaded a word (``_code_words``) has its nibbles where an MMA wants them."""
    HELD: tl.constexpr = 4 // KIND  # codes of a word
    word = tl.reshape(word, (BLOCK_N, 4, 8 // HELD, 1))
    i = tl.reshape(tl.arange(0, HELD), (1, 1, 1, HELD))
    if KIND == 1:
        at = 512 + _byte(word, i, ASM)
        word = _load(tables_ptr + at, False) if ASM else tl.load(tables_ptr + at)
    else:
        magnitude, sign = _byte(word, 2 * i + 1, ASM), _byte(word, 2 * i, ASM)
        if COPIES > 0:
            lane = tl.reshape(tl.arange(0, 4), (1, 4, 1, 1))
            lane += tl.reshape(tl.arange(0, BLOCK_N) % 8 * 4, (BLOCK_N, 1, 1, 1))
            word = _shared_word(base, lane, word, 2 * i, COPIES)
        elif ASM:
            word = _load(tables_ptr + magnitude, False) ^ _load(tables_ptr + 256 + sign, False)
        else:
            word = tl.load(tables_ptr + magnitude) ^ tl.load(tables_ptr + 256 + sign)
    word = tl.reshape(word, (BLOCK_N, 4, 1, 8))
    odd = tl.arange(0, 2)[None, None, :, None]
    nibbles = _bytes(_byte_fields(word, 4 * odd, 4, ASM))
    return tl.reshape(tl.permute(nibbles, (3, 1, 2, 4, 5, 0)), (256, BLOCK_N))


@triton.jit(do_not_specialize=["M", "per_split"])
def _integer_dot(x_ptr, sums_ptr, unit_ptr, tables_ptr, codes_ptr, rest_ptr, partial_ptr, M, N,
                 groups, per_split, residual, sums, BITS: tl.constexpr, COPIES: tl.constexpr,
                 ASM: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_M: tl.constexpr):  # fmt: skip
    """partial[s, m, n] of BLOCK_M tokens a program, of inputs rounded to 16 bits.

    Less than 64 tokens as the first operand make MMAs of one warp, whose operands are in registers:
    inputs (``operands``, TILES tiles of 16 tokens) and nibbles go into them without shared memory.
    """
    COUNT: tl.constexpr = BLOCK_M // 16
    PAIRS: tl.constexpr = 4  # of a chunk
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    token_ok = tokens < M
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, groups // 32)
    high = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    low = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    high2 = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    low2 = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    base = 0
    if COPIES > 0:
        base = _tables(tables_ptr, COPIES)
    # Codes are loaded one step ahead.
    code = _code_words(codes_ptr, begin, rows, N, 2)
    code2 = code
    if BITS > 2:
        code2 = _code_words(rest_ptr, begin, rows, N, BITS - 2)
    first = tl.program_id(2) * COUNT
    for step in range(begin, end):
        x_high = _bytes(_operand(x_ptr, step * PAIRS, first, 0, PAIRS, COUNT, TILES, 2, ASM))
        x_low = _bytes(_operand(x_ptr, step * PAIRS, first, 1, PAIRS, COUNT, TILES, 2, ASM))
        x_high = tl.reshape(x_high, (BLOCK_M, 256))
        x_low = tl.reshape(x_low, (BLOCK_M, 256))
        ahead = tl.minimum(step + 1, end - 1)
        next_code = _code_words(codes_ptr, ahead, rows, N, 2)
        next_code2 = next_code
        if BITS > 2:
            next_code2 = _code_words(rest_ptr, ahead, rows, N, BITS - 2)
        tile = _integer_tile(tables_ptr, base, code, 2, COPIES, ASM, BLOCK_N)
        high = tl.dot(x_high, tile, high, out_dtype=tl.int32)
        low = tl.dot(x_low, tile, low, out_dtype=tl.int32)
        if BITS > 2:
            tile = _integer_tile(tables_ptr, base, code2, BITS - 2, COPIES, ASM, BLOCK_N)
            high2 = tl.dot(x_high, tile, high2, out_dtype=tl.int32)
            low2 = tl.dot(x_low, tile, low2, out_dtype=tl.int32)
        code = next_code
        code2 = next_code2
    y = high.to(tl.float32) * 256 + low.to(tl.float32)
    center = ZERO * 1.0
    if BITS > 2:
        y += residual * (high2.to(tl.float32) * 256 + low2.to(tl.float32))
        center += residual * (ZERO if BITS == 4 else ZERO_OF_8_BIT_CODES)
    inside = tl.minimum(tokens, M - 1)
    total_x = _row_sums(sums_ptr, inside, sums, 0, tl.where(tl.program_id(1) == 0, sums, 0), 32)
    y = (y - center * total_x[:, None]) * (0.5 * tl.load(unit_ptr + inside))[:, None]
    at = (tl.program_id(1) * M + tokens[:, None]) * N + rows[None, :]
    tl.store(partial_ptr + at, y, mask=(rows < N)[None, :] & token_ok[:, None])


@triton.jit
def _row_codes(codes_ptr, step, row, N, KIND: tl.constexpr, ASM: tl.constexpr):
    """Codes of a chunk of 32 groups of ``row`` [R, 1, 1], eight neighbours a lane: [R, t, q, 1]."""
    t = tl.arange(0, 4)[None, :, None]
    if ASM:
        at = codes_ptr.to(tl.pointer_type(tl.int32)) + (step * N + row) * (8 * KIND) + t * 2 * KIND
        if KIND == 1:
            w0, w1 = _load_once2(at)
            words = tl.join(w0, w1)
        else:
            w0, w1, w2, w3 = _load_once4(at)
            words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        words = tl.reshape(words, (row.shape[0], 4, 2 * KIND, 1))
        i = tl.reshape(tl.arange(0, 4 // KIND), (1, 1, 1, 4 // KIND))
        MASK: tl.constexpr = 255 if KIND == 1 else 65535
        code = (words >> (8 * KIND * i)) & MASK
        return tl.reshape(code, (row.shape[0], 4, 8, 1))
    else:
        q = tl.reshape(tl.arange(0, 8), (1, 1, 8, 1))
        at = codes_ptr + (step * N + tl.reshape(row, (row.shape[0], 1, 1, 1))) * 32 + q
        return tl.load(at + 8 * tl.reshape(t, (1, 4, 1, 1))).to(tl.int32)


@triton.jit
def _first_tile(tables_ptr, base, code, one, KIND: tl.constexpr, COPIES: tl.constexpr,
                ASM: tl.constexpr, TYPE: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """1 + u/16 of nibbles of codes [BLOCK_N, t, q, 1], [BLOCK_N, 256] in ``_spread``'s order."""
    if KIND == 1:
        at = tables_ptr + 512 + (code & 255)
        word = _load(at, False) if ASM else tl.load(at)
    elif COPIES > 0:
        lane = tl.reshape(tl.arange(0, 4), (1, 4, 1, 1))
        lane += tl.reshape(tl.arange(0, BLOCK_N) % 8 * 4, (BLOCK_N, 1, 1, 1))
        word = _shared_word(base, lane, code, 0, COPIES)
    else:
        magnitude, sign = tables_ptr + ((code >> 8) & 255), tables_ptr + 256 + (code & 255)
        if ASM:
            word = _load(magnitude, False) ^ _load(sign, False)
        else:
            word = tl.load(magnitude) ^ tl.load(sign)
    j = tl.reshape(tl.arange(0, 4), (1, 1, 1, 4))
    tile = _pairs(word, one, j, 4, TYPE)
    return tl.reshape(tl.permute(tile, (0, 2, 3, 1, 4)), (BLOCK_N, 256))


@triton.jit(do_not_specialize=["M", "per_split"])
def _first_dot(x_ptr, sums_ptr, tables_ptr, codes_ptr, rest_ptr, partial_ptr, M, N, groups,
               per_split, residual, one, BITS: tl.constexpr, COPIES: tl.constexpr,
               ASM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """partial[s, m, n] with the weight as first operand (``first``), in the rotated basis.

    x and sums are ``_spread``'s for chunks of 32 groups.
    """
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(rows, N - 1)[:, None, None]
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, groups // 32)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total2 = total
    base = 0
    if COPIES > 0:
        base = _tables(tables_ptr, COPIES)
    # Codes are loaded one step ahead.
    code = _row_codes(codes_ptr, begin, row, N, 2, ASM)
    code2 = code
    if BITS > 2:
        code2 = _row_codes(rest_ptr, begin, row, N, BITS - 2, ASM)
    for step in range(begin, end):
        x = _inputs(x_ptr, step * 256, 256, BLOCK_M)
        ahead = tl.minimum(step + 1, end - 1)
        next_code = _row_codes(codes_ptr, ahead, row, N, 2, ASM)
        next_code2 = next_code
        if BITS > 2:
            next_code2 = _row_codes(rest_ptr, ahead, row, N, BITS - 2, ASM)
        tile = _first_tile(tables_ptr, base, code, one, 2, COPIES, ASM, TYPE, BLOCK_N)
        total = _settled(tl.dot(tile, x, total), ASM)
        if BITS > 2:
            tile = _first_tile(tables_ptr, base, code2, one, BITS - 2, COPIES, ASM, TYPE, BLOCK_N)
            total2 = _settled(tl.dot(tile, x, total2), ASM)
        code = next_code
        code2 = next_code2
    center = 1 + ZERO / 16
    if BITS > 2:
        total += residual * total2
        center += residual * (1 + (ZERO if BITS == 4 else ZERO_OF_8_BIT_CODES) / 16)
    sums = _sums_of(sums_ptr, begin, end, BLOCK_M, 16)
    total = 8 * (total - center * sums[None, :])
    _store(partial_ptr, tl.program_id(1), total, rows, M, N, BLOCK_M)


@triton.jit
def _tile(word, one, EXACT: tl.constexpr, TYPE: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """The nibbles of [R, P, 1] words as u (EXACT) or 1 + u/16, [R, 8 P]."""
    j = tl.arange(0, 4)[None, None, :]
    tile = _code_pairs(word, j, 4).to(TYPE) if EXACT else _pairs(word, one, j, 4, TYPE)
    return tl.reshape(tile, (R, P * 8))


@triton.jit
def _dot(x_ptr, tables_ptr, codes_ptr, rest_ptr, sums_ptr, partial_ptr, M, N, K, groups, x_stride,
         per_split, residual, one, BITS: tl.constexpr, EXACT: tl.constexpr, SHARED: tl.constexpr,
         FIRST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
         BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """partial[s, m, n] = sum over the split's groups, in the rotated basis, up to BLOCK_M tokens.

    sums[m] is the sum of x over K. EXACT: nibbles are converted, for float32. FIRST: the weight is
    the first operand of the product.
    """
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = rows[:, None, None]
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, groups // BLOCK_G)
    tokens = tl.arange(0, BLOCK_M)
    token_ok = tokens < M
    if FIRST:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total2 = tl.zeros_like(total)
    # Codes are loaded one step ahead.
    g = tl.arange(0, BLOCK_G)[None, :, None]
    code = _codes(codes_ptr, begin, g, row, N, BLOCK_G)
    code2 = code
    if BITS > 2:
        code2 = _codes(rest_ptr, begin, g, row, N, BLOCK_G)
    for step in range(begin, end):
        k = step * (8 * BLOCK_G) + tl.arange(0, 8 * BLOCK_G)
        x_ok = token_ok[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + tokens[:, None] * x_stride + k[None, :], mask=x_ok, other=0.0)
        ahead = tl.minimum(step + 1, end - 1)
        next_code = _codes(codes_ptr, ahead, g, row, N, BLOCK_G)
        word = _words(tables_ptr, code, 2, SHARED, (BLOCK_N, BLOCK_G, 1))
        tile = _tile(word, one, EXACT, TYPE, BLOCK_N, BLOCK_G)
        if FIRST:
            total = tl.dot(tile, tl.trans(x), total, input_precision=PRECISION)
        else:
            total = tl.dot(x, tl.trans(tile), total, input_precision=PRECISION)
        code = next_code
        if BITS > 2:
            next_code = _codes(rest_ptr, ahead, g, row, N, BLOCK_G)
            word = _words(tables_ptr, code2, BITS - 2, SHARED, (BLOCK_N, BLOCK_G, 1))
            tile = _tile(word, one, EXACT, TYPE, BLOCK_N, BLOCK_G)
            if FIRST:
                total2 = tl.dot(tile, tl.trans(x), total2, input_precision=PRECISION)
            else:
                total2 = tl.dot(x, tl.trans(tile), total2, input_precision=PRECISION)
            code2 = next_code
    if EXACT:
        center = ZERO * 1.0
        center2 = ZERO if BITS == 4 else ZERO_OF_8_BIT_CODES
    else:
        center = 1 + ZERO / 16
        center2 = 1 + (ZERO if BITS == 4 else ZERO_OF_8_BIT_CODES) / 16
    if BITS > 2:
        total += residual * total2
        center += residual * center2
    if FIRST:
        total = tl.trans(total)
    sums = tl.load(sums_ptr + tokens, mask=token_ok, other=0.0)
    sums = tl.where(tl.program_id(1) == 0, sums, 0.0)  # they come off once
    total = (total - center * sums[:, None]) * (0.5 if EXACT else 8.0)
    at = (tl.program_id(1) * M + tokens[:, None]) * N + rows[None, :]
    tl.store(partial_ptr + at, total, mask=(rows < N)[None, :] & token_ok[:, None])


@triton.jit
def _dequantize(tables_ptr, codes_ptr, rest_ptr, w_ptr, first_row, rows_end, N, K, residual, factor,
                BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):  # fmt: skip
    """w[n - first_row, :] = factor * Wq[n], rows first_row .. rows_end - 1."""
    row = (first_row + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
    step, g = tl.program_id(1), tl.arange(0, BLOCK_G)[None, :, None]
    code = _codes(codes_ptr, step, g, row, N, BLOCK_G)
    word = _words(tables_ptr, code, 2, False, (BLOCK_N, BLOCK_G, 1))
    w = (_tile(word, 0, True, tl.float32, BLOCK_N, BLOCK_G) - ZERO) * 0.5
    if BITS > 2:
        code = _codes(rest_ptr, step, g, row, N, BLOCK_G)
        word = _words(tables_ptr, code, BITS - 2, False, (BLOCK_N, BLOCK_G, 1))
        rest = _tile(word, 0, True, tl.float32, BLOCK_N, BLOCK_G)
        w += residual * (rest - (ZERO if BITS == 4 else ZERO_OF_8_BIT_CODES)) * 0.5
    rows = first_row + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * (BLOCK_G * 8) + tl.arange(0, BLOCK_G * 8)
    at = (rows - first_row)[:, None] * K + k[None, :]
    ok = (rows < rows_end)[:, None] & (k < K)[None, :]
    tl.store(w_ptr + at, (w * factor).to(w_ptr.dtype.element_ty), mask=ok)
