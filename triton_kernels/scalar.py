"""Scalar grids (2, 3, 4 and 8-bit codes) in Triton: the kernel bodies.

Runtime layout, ``scalar_pack``'s: 32-bit words [N, blocks, W, 16] of two 16-bit halves. A block is
P planes of 32 neighbouring inputs; a field of the halves of word i holds the codes of a plane's
inputs 2i and 2i + 1. 2, 4 and 8 bits: W = 1 word, P = 16/b planes; field s of each byte is a set
of two planes: 2s in the lower bytes of the halves, 2s + 1 in the upper ones. 3 bits: W = 3 words,
P = 16: four planes in the low 12 bits of each half, and four more in the top 4 bits of the three
together. Kernels take NB blocks at once: 2 where groups allow it, because 16 words are half a cache
line.

With scale s and zero z a group's sum is s (sum of q x - z sum of x); ``fields`` gives 1 + q 2^-s.
"""

import triton
import triton.language as tl

from .fields import (
    _code_pairs,
    _in_place,
    _pair_bits,
    _pairs,
    _total,
    _unplaced,
)
from .first import _inputs, _settled, _store, _sums_of
from .shared import _load_number, _load_once4

PW = tl.constexpr(16)  # words of a plane
SET = tl.constexpr(64)  # inputs of two planes
MINUS_ZERO = tl.constexpr(-0x7FFF8000)  # -0.0 in both halves


@triton.jit
def _words(words_ptr, rows, row_ok, block, blocks, i, BITS: tl.constexpr):
    """The four words (equal but at 3 bits) that hold the fields of blocks from ``block`` on.

    rows, row_ok [R, 1] and i [1, NB * PW], or with a dimension of 1 between: words have that shape.
    (For tiles of three dimensions they are loaded with three, or Triton changes their layout.)
    """
    if BITS == 3:
        at = words_ptr + (rows * blocks + block) * (3 * PW) + (i // PW * (3 * PW) + i % PW)
    else:
        at = words_ptr + (rows * blocks + block) * PW + i
    word0 = tl.load(at, mask=row_ok, other=0)
    if BITS == 3:
        word1 = tl.load(at + PW, mask=row_ok, other=0)
        word2 = tl.load(at + 2 * PW, mask=row_ok, other=0)
        rest = (word0 >> 12) & 0x000F000F
        rest |= (word1 >> 8) & 0x00F000F0
        rest |= (word2 >> 4) & 0x0F000F00
    else:
        word1 = word0
        word2 = word0
        rest = word0
    return word0, word1, word2, rest


@triton.jit
def _word_of(word0, word1, word2, rest, j: tl.constexpr, BITS: tl.constexpr):
    """The words that hold plane j."""
    if BITS != 3 or j < 4:
        return word0
    elif j < 8:
        return word1
    elif j < 12:
        return word2
    else:
        return rest


@triton.jit
def _scale_and_zero(scales_ptr, zeros_ptr, rows, row_ok, group, groups, BITS: tl.constexpr,
                    ZEROS: tl.constexpr):  # fmt: skip
    """Scale and zero of one group of each row, float32."""
    scale = tl.load(scales_ptr + rows * groups + group, mask=row_ok, other=0.0).to(tl.float32)
    if ZEROS:
        zero = tl.load(zeros_ptr + rows * groups + group, mask=row_ok, other=0.0).to(tl.float32)
    else:
        zero = tl.zeros_like(scale) + ((1 << BITS) - 1) / 2
    return scale, zero


@triton.jit
def _prepare(x_ptr, out_ptr, sums_ptr, K, BITS: tl.constexpr, C: tl.constexpr,
             TOGETHER: tl.constexpr):  # fmt: skip
    """One token's inputs as ``_gemv`` wants them, float32 [block, plane, half, PW], for C planes.

    They are multiplied by what their field's place divides by. sums[block, chunk] are the sums of x
    and of what was written.
    """
    P: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    FIELDS: tl.constexpr = 4 if BITS == 3 else P  # of a half
    chunk = tl.program_id(0)
    t = tl.arange(0, 2 * C * PW)
    k = chunk * (2 * C * PW) + t
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    plane = chunk * C + t // (2 * PW)
    plane_in = plane % P
    field = plane_in % FIELDS if BITS == 3 else plane_in // 2 + plane_in % 2 * (P // 2)
    scaled = x * _unplaced(field, BITS, TOGETHER)
    tl.store(out_ptr + (2 * plane + t % 2) * PW + t % (2 * PW) // 2, scaled)
    tl.store(sums_ptr + 2 * chunk, tl.sum(x, 0))
    tl.store(sums_ptr + 2 * chunk + 1, tl.sum(scaled, 0))


@triton.jit
def _gemv(x_ptr, sums_ptr, words_ptr, scales_ptr, zeros_ptr, partial_ptr, N, K, blocks, per_split,
          G, one, BITS: tl.constexpr, NB: tl.constexpr, C: tl.constexpr, TOGETHER: tl.constexpr,
          GROUPED: tl.constexpr, ZEROS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """partial[s, n] = one token's sum over the split's blocks, scales applied.

    x and sums are ``_prepare``'s for the same C: when GROUPED, C planes share a scale and NB is 1.
    """
    P: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    i = tl.arange(0, NB * PW)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, blocks)
    groups = K // G
    total = tl.zeros((BLOCK_N, NB * PW), tl.float32)
    offset = tl.zeros((BLOCK_N,), tl.float32)
    for block in range(begin, end, NB):
        word0, word1, word2, rest = _words(
            words_ptr, rows[:, None], row_ok[:, None], block, blocks, i[None, :], BITS
        )
        # x is [block, plane, half, PW].
        x_at = x_ptr + (block + i // PW) * (2 * P * PW) + i % PW
        for first in tl.static_range(0, P, C):
            part = tl.zeros((BLOCK_N, NB * PW), tl.float32)
            for j in tl.static_range(first, first + C):
                word = _word_of(word0, word1, word2, rest, j, BITS)
                for half in tl.static_range(2):
                    x = tl.load(x_at + (2 * j + half) * PW)
                    value = _in_place(
                        word, one, 16 * half, j % 4 if BITS == 3 else j // 2 + j % 2 * (P // 2),
                        BITS, TOGETHER,
                    )  # fmt: skip
                    part += value * x[None, :]
            if GROUPED:
                group = tl.minimum((block * P + first) * (2 * PW) // G, groups - 1)
                scale, zero = _scale_and_zero(
                    scales_ptr, zeros_ptr, rows, row_ok, group, groups, BITS, ZEROS
                )
                at = sums_ptr + 2 * (block * (P // C) + first // C)
                offset += scale * (tl.load(at + 1) + zero / (1 << BITS) * tl.load(at))
                total += scale[:, None] * part
            else:
                total += part
    y = tl.sum(total, 1)
    if not GROUPED:
        scale, zero = _scale_and_zero(scales_ptr, zeros_ptr, rows, row_ok, 0, 1, BITS, ZEROS)
        at = sums_ptr + 2 * begin * (P // C)
        total_x, total_scaled = _total(at, (end - begin) * (P // C), 128)
        y = scale * y
        offset = scale * (total_scaled + zero / (1 << BITS) * total_x)
    y = (y - offset) * (1 << BITS)
    tl.store(partial_ptr + tl.program_id(1) * N + rows, y, mask=row_ok)


@triton.jit
def _number(at, ASM: tl.constexpr):
    """The number at each pointer, float32."""
    if ASM:
        return _load_number(at)
    else:
        return tl.load(at).to(tl.float32)


@triton.jit
def _row_words(words_ptr, row, block, blocks, ASM: tl.constexpr):
    """The words of a block of ``row`` [R, 1, 1], four a lane: [R, t, w, 1]."""
    t = tl.arange(0, 4)[None, :, None]
    at = words_ptr + (row * blocks + block) * PW + 4 * t
    if ASM:
        w0, w1, w2, w3 = _load_once4(at)
    else:
        w0, w1, w2, w3 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, (row.shape[0], 4, 4, 1))


@triton.jit
def _twice(number):
    """A 16-bit number in both halves of an int32."""
    return (number.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001


@triton.jit
def _half(word, TYPE: tl.constexpr):
    """The lower half of a word, float32."""
    return word.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)


@triton.jit
def _fma2(a, b, c, TYPE: tl.constexpr, ASM: tl.constexpr):
    """a b + c in both halves of words, in their 16-bit type, rounded once."""
    if ASM and tl.float16 == TYPE:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1
        )
    else:
        low = _half(a, TYPE) * _half(b, TYPE) + _half(c, TYPE)
        high = _half(a >> 16, TYPE) * _half(b >> 16, TYPE) + _half(c >> 16, TYPE)
        low = low.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (high.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _first_tile(word, one, minus_center, scale, j, BITS: tl.constexpr, TYPE: tl.constexpr,
                GROUPED: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Fields j of words [R, t, w, 1] as 1 + q / 2^b, or GROUPED as scale (q - zero): a weight
    rounded once where zeros are integers. (Factors of rows hold them twice.) K is (w, plane, t,
    pair)."""
    bits = _pair_bits(word, one, j, BITS, TYPE)
    if GROUPED:
        bits = _fma2(bits, bits * 0 + one, minus_center, TYPE, ASM)
        bits = _fma2(bits, scale, bits * 0 + MINUS_ZERO, TYPE, ASM)
    tile = tl.join(bits.to(tl.int16), (bits >> 16).to(tl.int16)).to(TYPE, bitcast=True)
    return tl.reshape(tl.permute(tile, (0, 2, 3, 1, 4)), (word.shape[0], 32 * j.shape[3]))


@triton.jit(do_not_specialize=["M", "per_split"])
def _first_dot(x_ptr, sums_ptr, words_ptr, scales_ptr, zeros_ptr, partial_ptr, M, N, blocks,
               per_split, groups, one, BITS: tl.constexpr, C: tl.constexpr, SHARE: tl.constexpr,
               GROUPED: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """partial[s, m, n] with the weight as first operand (``first``), for 2 and 4 bits.

    C planes are multiplied at once. When GROUPED, SHARE times C planes share a scale, and weights
    are multiplied by it first: sums of each group would double the registers. x and sums are
    ``_spread``'s for chunks of C planes.
    """
    P: tl.constexpr = 16 // BITS
    TURNS: tl.constexpr = P // C  # of a block; one load of inputs in the loop, so stages are small
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(rows, N - 1)
    row = inside[:, None, None]
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, blocks)
    j = tl.reshape(tl.arange(0, C), (1, 1, 1, C))
    field = j // 2 + j % 2 * (P // 2)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Words are loaded one turn ahead.
    ahead = _row_words(words_ptr, row, begin, blocks, ASM)
    for turn in range(begin * TURNS, end * TURNS):
        x = _inputs(x_ptr, turn * (32 * C), 32 * C, BLOCK_M)
        word = ahead
        if TURNS > 1:
            # Plane j + C of a block is C / 2 fields above plane j.
            word = word >> (turn % TURNS * (C // 2 * BITS))
        next_block = tl.minimum((turn + 1) // TURNS, end - 1)
        ahead = _row_words(words_ptr, row, next_block, blocks, ASM)
        scale = one
        minus_center = one
        if GROUPED:
            # In the words' layout (a lane's factors are its rows'), so that nothing is moved.
            at = row * groups + tl.minimum(turn // SHARE, groups - 1)
            at += 0 * tl.arange(0, 4)[None, :, None]
            scale = _number(scales_ptr + at, ASM)
            zero = tl.zeros_like(scale) + ((1 << BITS) - 1) / 2
            if ZEROS:
                zero = _number(zeros_ptr + at, ASM)
            minus_center = _twice((-1 - zero / (1 << BITS)).to(TYPE))
            minus_center = tl.reshape(minus_center, (BLOCK_N, 4, 1, 1))
            scale = tl.reshape(_twice((scale * (1 << BITS)).to(TYPE)), (BLOCK_N, 4, 1, 1))
        tile = _first_tile(word, one, minus_center, scale, field, BITS, TYPE, GROUPED, ASM)
        total = _settled(tl.dot(tile, x, total), ASM)
    if not GROUPED:
        scale, zero = _scale_and_zero(scales_ptr, zeros_ptr, inside, inside >= 0, 0, 1, BITS, ZEROS)
        sums = _sums_of(sums_ptr, begin * TURNS, end * TURNS, BLOCK_M, 16)
        total = total - (1 + zero / (1 << BITS))[:, None] * sums[None, :]
        total *= (scale * (1 << BITS))[:, None]
    _store(partial_ptr, tl.program_id(1), total, rows, M, N, BLOCK_M)


@triton.jit
def _dot(x_ptr, words_ptr, scales_ptr, zeros_ptr, sums_ptr, partial_ptr, M, N, K, x_stride, blocks,
         per_split, G, one, BITS: tl.constexpr, NB: tl.constexpr, C: tl.constexpr,
         GROUPED: tl.constexpr, ZEROS: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
         FIRST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
         BLOCK_M: tl.constexpr):  # fmt: skip
    """partial[s, m, n] = sum over the split's blocks, scales applied, for up to BLOCK_M tokens.

    C planes of NB blocks are multiplied at once; when GROUPED they share a scale and NB is 1.
    sums[m, g] is the sum of x over group g (over K when not GROUPED). EXACT: codes are converted,
    for types whose mantissa does not hold a field (float32, bfloat16 at 8 bits). EVEN: no block
    reaches past K. FIRST: the weight is the first operand of the product.
    """
    P: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    factor: tl.constexpr = 1 if EXACT else 1 << BITS
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    i = tl.arange(0, NB * PW)
    tokens = tl.arange(0, BLOCK_M)
    token_ok = tokens < M
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, blocks)
    groups = K // G
    t = tl.arange(0, C * NB * 2 * PW)
    # In the order of a tile: plane, block, input of the plane.
    inside = t // (NB * 2 * PW) * (2 * PW) + t // (2 * PW) % NB * (P * 2 * PW) + t % (2 * PW)
    if FIRST:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Words are loaded one step ahead.
    row, row_in, i3 = rows[:, None, None], row_ok[:, None, None], i[None, None, :]
    next0, next1, next2, next3 = _words(words_ptr, row, row_in, begin, blocks, i3, BITS)
    for block in range(begin, end, NB):
        word0 = next0
        word1 = next1 if BITS == 3 else next0
        word2 = next2 if BITS == 3 else next0
        rest = next3 if BITS == 3 else next0
        ahead = row < tl.where(block + NB < end, N, 0)
        next0, next1, next2, next3 = _words(words_ptr, row, ahead, block + NB, blocks, i3, BITS)
        for first in tl.static_range(0, P, C):
            k0 = (block * P + first) * (2 * PW)
            k = k0 + inside
            ok = token_ok[:, None] if EVEN else token_ok[:, None] & (k < K)[None, :]
            x = tl.load(x_ptr + tokens[:, None] * x_stride + k[None, :], mask=ok, other=0.0)
            word = _word_of(word0, word1, word2, rest, first, BITS)
            j = first + tl.arange(0, C)
            j = (j % 4 if BITS == 3 else j // 2 + j % 2 * (P // 2))[None, :, None]
            if EXACT:
                tile = _code_pairs(word, j, BITS).to(TYPE)
            else:
                tile = _pairs(word, one, j, BITS, TYPE)
            tile = tl.reshape(tile, (BLOCK_N, C * NB * 2 * PW))
            if GROUPED:
                group = tl.minimum(k0 // G, groups - 1)
                scale, zero = _scale_and_zero(
                    scales_ptr, zeros_ptr, rows, row_ok, group, groups, BITS, ZEROS
                )
                center = zero if EXACT else 1 + zero / factor
                sums = tl.load(sums_ptr + tokens * groups + group, mask=token_ok, other=0.0)
                # A group that spans several dots takes its sum of x off once, with its first.
                center = tl.where((k0 % G == 0) & (k0 < K), center, 0.0)
                if FIRST:
                    part = tl.dot(tile, tl.trans(x), input_precision=PRECISION)
                    total += scale[:, None] * (part - center[:, None] * sums[None, :])
                else:
                    part = tl.dot(x, tl.trans(tile), input_precision=PRECISION)
                    total += scale[None, :] * (part - center[None, :] * sums[:, None])
            elif FIRST:
                total = tl.dot(tile, tl.trans(x), total, input_precision=PRECISION)
            else:
                total = tl.dot(x, tl.trans(tile), total, input_precision=PRECISION)
    if FIRST:
        total = tl.trans(total)
    if not GROUPED:
        scale, zero = _scale_and_zero(scales_ptr, zeros_ptr, rows, row_ok, 0, 1, BITS, ZEROS)
        center = zero if EXACT else 1 + zero / factor
        center = tl.where(tl.program_id(1) == 0, center, 0.0)
        sums = tl.load(sums_ptr + tokens, mask=token_ok, other=0.0)
        total = scale[None, :] * (total - center[None, :] * sums[:, None])
    at = (tl.program_id(1) * M + tokens[:, None]) * N + rows[None, :]
    tl.store(partial_ptr + at, total * factor, mask=row_ok[None, :] & token_ok[:, None])


@triton.jit
def _dequantize(words_ptr, scales_ptr, zeros_ptr, w_ptr, first_row, rows_end, K, blocks, G, factor,
                BITS: tl.constexpr, ZEROS: tl.constexpr, ALIGNED: tl.constexpr,
                BLOCK_N: tl.constexpr):  # fmt: skip
    """w[n - first_row, :] = factor * scale * (q - zero), rows first_row .. rows_end - 1.

    ALIGNED: planes are inside groups (a division for each weight cost most of the time).
    """
    P: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    rows = first_row + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < rows_end
    i = tl.arange(0, PW)
    block = tl.program_id(1)
    groups = K // G
    word0, word1, word2, rest = _words(
        words_ptr, rows[:, None], row_ok[:, None], block, blocks, i[None, :], BITS
    )
    for j in tl.static_range(P):
        word = _word_of(word0, word1, word2, rest, j, BITS)
        code = _code_pairs(word, j % 4 if BITS == 3 else j // 2 + j % 2 * (P // 2), BITS)
        code = code.to(tl.float32)
        code = tl.reshape(code, (BLOCK_N, 2 * PW))
        k = (block * P + j) * (2 * PW) + tl.arange(0, 2 * PW)
        ok = row_ok[:, None] & (k < K)[None, :]
        if ALIGNED:
            group = tl.minimum((block * P + j) * (2 * PW) // G, groups - 1)
            scale, zero = _scale_and_zero(
                scales_ptr, zeros_ptr, rows, row_ok, group, groups, BITS, ZEROS
            )
            scale, zero = scale[:, None], zero[:, None]
        else:
            at = rows[:, None] * groups + (k // G)[None, :]
            scale, zero = _scale_and_zero(scales_ptr, zeros_ptr, at, ok, 0, 1, BITS, ZEROS)
        w = scale * (code - zero) * factor
        at = (rows - first_row)[:, None] * K + k[None, :]
        tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=ok)
