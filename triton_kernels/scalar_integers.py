"""Scalar grids in Triton, inputs rounded to 16 bits: kernel bodies of one token and of few.

dp4a or int8 MMAs multiply bytes of inputs with codes. ``scalar.py`` has the layout and the rest.
"""

import triton
import triton.language as tl

from .fields import (
    _byte_fields,
    _bytes,
    _dot4,
    _row_sums,
    _sixteen_bits,
    _unit,
)
from .operands import _operand, _place
from .scalar import PW, SET, _number, _scale_and_zero, _words
from .shared import _load


@triton.jit
def _quantize(x_ptr, out_ptr, sums_ptr, unit_ptr, M, K, x_stride, blocks, BITS: tl.constexpr,
              C: tl.constexpr, GROUPED: tl.constexpr, TILES: tl.constexpr, NB: tl.constexpr,
              CHUNK: tl.constexpr):  # fmt: skip
    """Inputs as ``_integers`` and ``_integer_dot`` want them: 16 bits in units, as signed bytes.

    A program takes NB blocks of one token. A chunk is C sets of a block. The unit is one for all
    inputs of a token, or when GROUPED one a chunk: an outlier then costs the others no precision.
    sums[m, chunk] are sums of 16-bit inputs.

    out holds, for each set and word, the inputs of the word's four bytes: int32 [blocks, sets, high
    or low, PW] for one token, or ``operands``' of TILES tiles of tokens; past M they are zeros.
    """
    SETS: tl.constexpr = 8 // BITS
    COUNT: tl.constexpr = NB * SETS // C
    m = tl.program_id(1)
    x_ptr += m * x_stride
    end = tl.where(m < M, K, 0)
    chunk = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    s = tl.arange(0, C)[None, :, None]
    i = tl.arange(0, PW)[None, None, :]
    b = tl.arange(0, 4)[None, None, None, :]
    set = chunk[:, None, None] * C + s
    k = set[:, :, :, None] * SET + b % 2 * (2 * PW) + 2 * i[:, :, :, None] + b // 2
    x = tl.load(x_ptr + k, mask=k < end, other=0.0).to(tl.float32)
    if GROUPED:
        unit = tl.max(tl.reshape(tl.abs(x), (COUNT, C * SET)), 1) / 32512
        unit = tl.where(unit > 0, unit, 1.0)
        tl.store(unit_ptr + m * blocks * (SETS // C) + chunk, unit, mask=chunk * 0 + m < M)
        high, low = _sixteen_bits(x, unit[:, None, None, None])
    else:
        unit = _unit(x_ptr, end, CHUNK)
        tl.store(unit_ptr + m, unit, mask=(m < M) & (tl.program_id(0) == 0))
        high, low = _sixteen_bits(x, unit)
    total = tl.sum(tl.reshape(256 * high + low, (COUNT, C * SET)), 1).to(tl.float32)
    tl.store(sums_ptr + m * blocks * (SETS // C) + chunk, total, mask=chunk * 0 + m < M)
    high = tl.sum((high & 255) << (8 * b), 3)
    low = tl.sum((low & 255) << (8 * b), 3)
    if TILES > 0:
        # Word i is the (i % 4)-th of the four that thread i // 4 reads at once.
        u = i % 4 * C + s
        pair = chunk[:, None, None] * C + u // 4
        at = _place(pair, u // 2 % 2, i // 4, u % 2, m, 0, TILES, 2)
        tl.store(out_ptr + at, high)
        tl.store(out_ptr + at + 256, low)
    else:
        at = out_ptr + 2 * PW * set + i
        tl.store(at, high)
        tl.store(at + PW, low)


@triton.jit(do_not_specialize=["per_split"])
def _integers(x_ptr, sums_ptr, unit_ptr, words_ptr, scales_ptr, zeros_ptr, partial_ptr, N, K,
              blocks, per_split, G, BITS: tl.constexpr, NB: tl.constexpr, C: tl.constexpr,
              GROUPED: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """partial[s, n] as ``_gemv``'s, of inputs rounded to 16 bits (``_quantize``).

    Sums of those are exact; four products take one instruction and four fields one mask. 2, 4 and 8
    bits. When GROUPED, C sets share a scale and NB is 1.
    """
    SETS: tl.constexpr = 8 // BITS
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    i = tl.arange(0, NB * PW)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, blocks)
    groups = K // G
    high = tl.zeros((BLOCK_N, NB * PW), tl.int32)
    low = tl.zeros((BLOCK_N, NB * PW), tl.int32)
    total = tl.zeros((BLOCK_N, NB * PW), tl.float32)
    offset = tl.zeros((BLOCK_N,), tl.float32)
    for block in range(begin, end, NB):
        word, _, _, _ = _words(
            words_ptr, rows[:, None], row_ok[:, None], block, blocks, i[None, :], BITS
        )
        x_at = x_ptr + (block + i // PW) * (2 * SETS * PW) + i % PW
        for s in tl.static_range(SETS):
            fields = _byte_fields(word, BITS * s, BITS, False)
            x_high = tl.load(x_at + 2 * s * PW)[None, :] + tl.zeros_like(word)
            x_low = tl.load(x_at + (2 * s + 1) * PW)[None, :] + tl.zeros_like(word)
            high = _dot4(fields, x_high, high, ASM)
            low = _dot4(fields, x_low, low, ASM)
            if GROUPED and s % C == C - 1:
                group = tl.minimum((block * SETS + s) * SET // G, groups - 1)
                scale, zero = _scale_and_zero(
                    scales_ptr, zeros_ptr, rows, row_ok, group, groups, BITS, ZEROS
                )
                chunk = block * (SETS // C) + s // C
                scale *= tl.load(unit_ptr + chunk)
                total += scale[:, None] * (high * 256 + low).to(tl.float32)
                offset += scale * zero * tl.load(sums_ptr + chunk)
                high = tl.zeros_like(high)
                low = tl.zeros_like(low)
    if GROUPED:
        y = tl.sum(total, 1) - offset
    else:
        scale, zero = _scale_and_zero(scales_ptr, zeros_ptr, rows, row_ok, 0, 1, BITS, ZEROS)
        total_x = tl.sum(_row_sums(sums_ptr, tl.zeros((1,), tl.int32), 0, begin, end, 128), 0)
        y = tl.sum(high, 1).to(tl.float32) * 256 + tl.sum(low, 1).to(tl.float32)
        y = scale * (y - zero * total_x) * tl.load(unit_ptr)
    tl.store(partial_ptr + tl.program_id(1) * N + rows, y, mask=row_ok)


@triton.jit
def _integer_tile(word, first: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr,
                  ASM: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The codes of sets first .. first + C - 1 of words [BLOCK_N, PW], int8 [C * SET, BLOCK_N].

    In ``_quantize``'s order: the thread that loaded a word has its codes where an MMA wants them.
    """
    if C == 1:
        word = tl.reshape(word, (BLOCK_N, 4, 2, 2))
        codes = _bytes(_byte_fields(word, BITS * first, BITS, ASM))
        codes = tl.permute(codes, (2, 1, 3, 4, 5, 0))
    else:
        word = tl.reshape(word, (BLOCK_N, 4, 1, 1, 4))
        s = tl.reshape(first + tl.arange(0, C), (1, 1, C // 2, 2, 1))
        codes = _bytes(_byte_fields(word, BITS * s, BITS, ASM))
        codes = tl.permute(codes, (4, 2, 1, 3, 5, 6, 0))
    return tl.reshape(codes, (C * SET, BLOCK_N))


@triton.jit
def _pair(at, ASM: tl.constexpr):
    """The bits of two neighbouring 16-bit numbers at each pointer, which is a multiple of 4."""
    if ASM:
        return _load(at, False)
    else:
        first = tl.load(at).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return first | (tl.load(at + 1).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit(do_not_specialize=["M", "per_split"])
def _integer_dot(x_ptr, sums_ptr, unit_ptr, words_ptr, scales_ptr, zeros_ptr, partial_ptr, M, N, K,
                 blocks, per_split, G, BITS: tl.constexpr, C: tl.constexpr, GROUPED: tl.constexpr,
                 ZEROS: tl.constexpr, PAIRED: tl.constexpr, ASM: tl.constexpr,
                 TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """partial[s, m, n] of BLOCK_M tokens a program, of inputs rounded to 16 bits, for 2 and 4 bits.

    Less than 64 tokens as the first operand make MMAs of one warp, whose operands are in registers:
    inputs (``operands``, TILES tiles of 16 tokens) and codes go from the load into them without
    shared memory. Codes are decoded once, also for 64 tokens, which are two dots of 32. When
    GROUPED, C sets share a scale; PAIRED: a block is two groups, whose 16-bit scales are one word.
    """
    SETS: tl.constexpr = 8 // BITS
    TOKENS: tl.constexpr = 32 if BLOCK_M > 32 else BLOCK_M
    PARTS: tl.constexpr = BLOCK_M // TOKENS
    COUNT: tl.constexpr = TOKENS // 16
    TYPE: tl.constexpr = scales_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, TOKENS)  # of the first dot
    tile = tl.program_id(2) * (PARTS * COUNT)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, blocks)
    groups = K // G
    i = tl.arange(0, PW)
    none = tl.zeros((TOKENS, BLOCK_N), tl.int32)
    high = ()
    low = ()
    total = ()
    for _ in tl.static_range(PARTS):
        high += (none,)
        low += (none,)
        total += (none.to(tl.float32),)
    # Words are loaded one step ahead, and leave the L1 cache first: inputs shall stay there.
    at = words_ptr + rows[:, None] * (blocks * PW) + i[None, :]
    next_word = tl.load(
        at + begin * PW, mask=row_ok[:, None], other=0, eviction_policy="evict_first"
    )
    for block in range(begin, end):
        word = next_word
        ahead = rows[:, None] < tl.where(block + 1 < end, N, 0)
        next_word = tl.load(
            at + (block + 1) * PW, mask=ahead, other=0, eviction_policy="evict_first"
        )
        scales2 = tl.zeros((BLOCK_N,), tl.int32)
        zeros2 = scales2
        if PAIRED:
            at_pair = tl.minimum(rows, N - 1) * groups + tl.minimum(2 * block, groups - 2)
            scales2 = _pair(scales_ptr + at_pair, ASM)
            if ZEROS:
                zeros2 = _pair(zeros_ptr + at_pair, ASM)
        for first in tl.static_range(0, SETS, C):
            pair = block * SETS + first
            if GROUPED:
                # By inline assembly these are loaded as the product wants them (no barriers).
                if PAIRED:
                    scale = (scales2 >> (16 * (first // C))).to(tl.int16).to(TYPE, bitcast=True)
                    zero = (zeros2 >> (16 * (first // C))).to(tl.int16).to(TYPE, bitcast=True)
                    scale, zero = scale.to(tl.float32), zero.to(tl.float32)
                else:
                    group = tl.minimum(pair * SET // G, groups - 1)
                    at_group = tl.minimum(rows, N - 1) * groups + group
                    scale = _number(scales_ptr + at_group, ASM)
                    zero = scale
                    if ZEROS:
                        zero = _number(zeros_ptr + at_group, ASM)
                if not ZEROS:
                    zero = tl.zeros_like(scale) + ((1 << BITS) - 1) / 2
            codes = _integer_tile(word, first, BITS, C, ASM, BLOCK_N)
            highs = ()
            lows = ()
            totals = ()
            for h in tl.static_range(PARTS):
                here = tile + h * COUNT
                x_high = _bytes(_operand(x_ptr, pair, here, 0, C, COUNT, TILES, 2, ASM))
                x_low = _bytes(_operand(x_ptr, pair, here, 1, C, COUNT, TILES, 2, ASM))
                x_high = tl.reshape(x_high, (TOKENS, C * SET))
                x_low = tl.reshape(x_low, (TOKENS, C * SET))
                if GROUPED:
                    m = tl.minimum(tokens + h * TOKENS, M - 1)
                    chunk = (m * blocks + block) * (SETS // C) + first // C
                    unit, sums = _number(unit_ptr + chunk, ASM), _number(sums_ptr + chunk, ASM)
                    part = tl.dot(x_high, codes, none, out_dtype=tl.int32) * 256
                    part += tl.dot(x_low, codes, none, out_dtype=tl.int32)
                    part = part.to(tl.float32) - zero[None, :] * sums[:, None]
                    totals += (total[h] + scale[None, :] * (unit[:, None] * part),)
                else:
                    highs += (tl.dot(x_high, codes, high[h], out_dtype=tl.int32),)
                    lows += (tl.dot(x_low, codes, low[h], out_dtype=tl.int32),)
            if GROUPED:
                total = totals
            else:
                high = highs
                low = lows
    for h in tl.static_range(PARTS):
        m = tokens + h * TOKENS
        y = total[h]
        if not GROUPED:
            scale, zero = _scale_and_zero(scales_ptr, zeros_ptr, rows, row_ok, 0, 1, BITS, ZEROS)
            inside = tl.minimum(m, M - 1)
            sums = _row_sums(sums_ptr, inside, blocks, begin, end, 32)
            unit = tl.load(unit_ptr + inside)
            y = high[h].to(tl.float32) * 256 + low[h].to(tl.float32) - zero[None, :] * sums[:, None]
            y *= scale[None, :] * unit[:, None]
        at = (tl.program_id(1) * M + m[:, None]) * N + rows[None, :]
        tl.store(partial_ptr + at, y, mask=row_ok[None, :] & (m < M)[:, None])
