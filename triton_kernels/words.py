"""Additive codebooks for a few tokens on NVIDIA: words gathered into the operands of MMAs.

Less than 64 tokens as the first operand of ``tl.dot`` make MMAs of one warp, whose operands are in
registers: a thread loads the codes and gathers the words that the MMA takes from it (a quarter of a
step's groups of its rows), and its inputs lie in memory in its order (``operands``). Neither is
moved. Vectors of 8, inputs and codebooks of one 16-bit type.

What bounds it are accesses to shared memory, or to L1: four cycles of an SM for the words of a warp
at least, when the lanes that read at once (8 of 16 bytes) have a copy of a codebook each: eight
copies of one, or four of two, of which four lanes read one while the others read the other.
"""

import triton
import triton.language as tl

from .first import _inputs, _settled
from .operands import _operand, _place
from .shared import (
    _declare,
    _gather4,
    _load4,
    _load_byte,
    _load_half,
    _load_once,
    _load_once2,
    _load_once4,
    _ready,
    _share4,
)

STEP = tl.constexpr(32)  # groups
PAIRS = tl.constexpr(8)  # of tiles of 16 inputs in a step


@triton.jit
def _arrange(x_ptr, out_ptr, M, K, x_stride, TILES: tl.constexpr):
    """64 inputs of 16 tokens a program as ``operands``' of TILES tiles; past M and K zeros.

    Pair q of a step has group 8 t + q of lane t; its word i = 2 j + low is numbers 2i and 2i + 1.
    """
    token = tl.program_id(1) * 16 + tl.arange(0, 16)[:, None]
    w = tl.program_id(0) * 32 + tl.arange(0, 32)[None, :]
    half = tl.arange(0, 2)[None, None, :]
    k = 2 * w[:, :, None] + half
    at = x_ptr + token[:, :, None] * x_stride + k
    x = tl.load(at, mask=(token < M)[:, :, None] & (k < K), other=0.0)
    word = tl.sum((x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) << (16 * half), 2)
    group, i = w // 4, w % 4
    pair = group // STEP * PAIRS + group % 8
    place = _place(pair, i % 2, group // 8 % 4, i // 2, token, 0, TILES, 1)
    tl.store(out_ptr + place, word)


@triton.jit
def _halves(word, TYPE: tl.constexpr):
    """The two numbers in each word, last dimension 2 (they stay one register)."""
    return tl.join(word.to(tl.int16), (word >> 16).to(tl.int16)).to(TYPE, bitcast=True)


@triton.jit
def _codes(codes_ptr, group, row, side, N, IN, WIDTH: tl.constexpr, BOOKS: tl.constexpr,
           ENTRIES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
           ASM: tl.constexpr):  # fmt: skip
    """WIDTH words of the codes of ROWS neighbouring rows each, from ``row`` [.., lane, ..] on, of
    BOOKS codebooks, from codebook ``side`` on. Groups past K repeat the last one, and meet inputs
    of 0."""
    group = tl.minimum(group, IN - 1)
    words = ()
    for b in tl.static_range(BOOKS):
        at = codes_ptr + ((b + side) % BOOKS * IN + group) * N
        if ASM and WIDE and WIDTH == 4:
            words += _load_once4(at + row)
        elif ASM and WIDE and WIDTH == 2:
            words += _load_once2(at + row)
        else:
            for i in tl.static_range(WIDTH):
                here = at + tl.minimum(row + i * ROWS, N - ROWS)
                if ASM and ROWS > 1:
                    word = _load_once(here)
                elif ASM:
                    word = _load_half(here) if ENTRIES > 256 else _load_byte(here)
                else:
                    word = (group + row) * 0
                    for r in tl.static_range(ROWS):
                        code = tl.load(here + r).to(tl.int32) & (255 if ROWS == 4 else 65535)
                        word |= code << (32 // ROWS * r)
                words += (word,)
    return words


@triton.jit
def _code_of(word, r, ROWS: tl.constexpr, ENTRIES: tl.constexpr, ASM: tl.constexpr):
    """The codes of rows r of words that hold ROWS of them, int32."""
    if ROWS > 1 and ASM:
        bytes = (0x4440 + r) if ROWS == 4 else (0x4410 + 0x22 * r)
        word = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [word, bytes], tl.int32, True, 1
        )
    elif ROWS > 1:
        word = (word >> (32 // ROWS * r)) & (255 if ROWS == 4 else 65535)
    WHOLE: tl.constexpr = 65536 if ROWS == 2 else 256
    return word if ENTRIES == WHOLE and ROWS > 1 else word & (ENTRIES - 1)


@triton.jit
def _word(books_ptr, own, code, book, ENTRIES: tl.constexpr, STRIDE: tl.constexpr,
          ASM: tl.constexpr):  # fmt: skip
    """A codebook's words [.., j, low, half] of codes, from shared copies at ``own``, STRIDE bytes
    an entry, where there are."""
    if ASM:
        if STRIDE > 0:
            w0, w1, w2, w3 = _load4(own + code * STRIDE, True)
        else:
            w0, w1, w2, w3 = _gather4(books_ptr + (book * ENTRIES + code) * 8)
        return _halves(tl.join(tl.join(w0, w2), tl.join(w1, w3)), books_ptr.dtype.element_ty)
    else:
        at = tl.reshape((book * ENTRIES + code) * 8, (*code.shape, 1))
        word = tl.load(books_ptr + at + tl.reshape(tl.arange(0, 8), (*([1] * len(code.shape)), 8)))
        return tl.reshape(word, (*code.shape, 2, 2, 2))


@triton.jit
def _by_lane(y, TOKENS: tl.constexpr, WARPS: tl.constexpr, PART: tl.constexpr,
             FIRST: tl.constexpr):  # fmt: skip
    """Sums of a dot as [tokens, lanes, r]."""
    if FIRST:
        y = tl.permute(tl.reshape(y, (WARPS, PART, 8, TOKENS)), (3, 0, 2, 1))
        return tl.reshape(y, (TOKENS, 8 * WARPS, PART))
    else:
        return tl.permute(tl.reshape(y, (TOKENS, PART, 8 * WARPS)), (0, 2, 1))


@triton.jit(do_not_specialize=["M", "share"])
def _words_dot(x_ptr, codes_ptr, books_ptr, partial_ptr, M, N, IN, share, B: tl.constexpr,
               BOOKS: tl.constexpr, ENTRIES: tl.constexpr, COPIES: tl.constexpr,
               BYTES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
               Q: tl.constexpr, FIRST: tl.constexpr, DEALT: tl.constexpr, ASM: tl.constexpr,
               WARPS: tl.constexpr, FEW: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Partial sums [slot, B / BOOKS, m, n] of x[m] . words[n], over BOOKS codebooks.

    A program takes a tile of rows and ``share`` steps of groups, and its slot is its split. DEALT:
    the steps of all tiles, one tile after the other, are dealt evenly to the programs of a
    codebook, so that all end at the same time. A tile's programs, at most ``share``, write to a
    slot each; the last one leaves zeros in the others.

    x is ``_arrange``'s; or the weight is the FIRST operand, and x ``_spread``'s (``first``). COPIES
    of the program's codebooks are in shared memory (BYTES; 0: none). A lane has WIDTH words of the
    codes of ROWS neighbouring rows, which lie together too (WIDE: and are loaded at once), in 8
    WARPS lanes of a program, and Q of a step's groups at once. Dots are of at most 16 rows a warp:
    of 32 as second operand Triton (3.6) moves the tile through shared memory. More than 32 tokens
    before it are dots of 32. FEW: at most 8 tokens.
    """
    TYPE: tl.constexpr = books_ptr.dtype.element_ty
    TOKENS: tl.constexpr = 32 if BLOCK_M > 32 and not FIRST else BLOCK_M
    HALVES: tl.constexpr = BLOCK_M // TOKENS
    TILES: tl.constexpr = BLOCK_M // 16
    PART: tl.constexpr = 2 if ROWS > 1 else 1  # rows of a lane in a dot
    DOTS: tl.constexpr = ROWS // PART  # of a word
    STRIDE: tl.constexpr = 16 * COPIES * BOOKS
    LANES: tl.constexpr = 8 * WARPS
    TILE: tl.constexpr = LANES * ROWS * WIDTH
    TURNS: tl.constexpr = PAIRS // Q  # of a step
    p, programs = tl.program_id(0), tl.num_programs(0)
    part = tl.program_id(1) % (B // BOOKS)
    split = tl.program_id(1) // (B // BOOKS)
    book = part * BOOKS
    base = 0
    if COPIES > 0:
        base = _declare(BYTES)
        stored = _share4(books_ptr + book * (8 * ENTRIES), base, ENTRIES, COPIES, STRIDE)
        for b in tl.static_range(1, BOOKS):
            to = base + 16 * COPIES * b
            stored += _share4(books_ptr + (book + b) * (8 * ENTRIES), to, ENTRIES, COPIES, STRIDE)
        base = _ready(base, stored)
    # Codes are [t, warp, lane / 4, q, r].
    t = tl.reshape(tl.arange(0, 4), (4, 1, 1, 1, 1))
    lane = tl.reshape(tl.arange(0, LANES), (1, WARPS, 8, 1, 1))
    q = tl.reshape(tl.arange(0, Q), (1, 1, 1, Q, 1))
    r = tl.reshape(tl.arange(0, PART), (1, 1, 1, 1, PART))
    # The 8 lanes that read at once: each has a copy of its own, of a codebook of its own.
    side = 0
    own = base
    if COPIES > 0:
        eighth = t + lane % 2 * 4
        own = base + eighth % COPIES * 16
        if BOOKS > 1:
            side = eighth // COPIES % BOOKS
    codes_ptr += book * IN * N
    if FIRST:
        zero = tl.zeros((LANES * PART, TOKENS), tl.float32)
    else:
        zero = tl.zeros((TOKENS, LANES * PART), tl.float32)
    c = tl.arange(0, LANES * ROWS)
    steps = (IN + STEP - 1) // STEP
    units = (N + TILE - 1) // TILE * steps
    first_unit, end_unit = p * units // programs, (p + 1) * units // programs
    first_block, end_block = p, p + 1
    if DEALT:
        first_block, end_block = first_unit // steps, (end_unit + steps - 1) // steps
    for block in range(first_block, end_block):
        begin = split * share
        end = tl.minimum(begin + share, steps)
        slot = split
        end_slot = slot + 1
        if DEALT:
            begin = tl.maximum(first_unit - block * steps, 0)
            end = tl.minimum(end_unit - block * steps, steps)
            slot = p - ((block * steps + 1) * programs - 1) // units
            end_slot = tl.where(end == steps, share, slot + 1)
        row = block * TILE + lane * (ROWS * WIDTH)
        if WIDE:
            row = tl.minimum(row, N - ROWS * WIDTH)
        total = ()
        for _ in tl.static_range(WIDTH * DOTS * HALVES):
            total += (zero,)
        # Codes are loaded one turn ahead.
        last = end * TURNS - 1
        ahead = _codes(codes_ptr, begin * STEP + t * 8 + q, row, side, N, IN, WIDTH, BOOKS,
                       ENTRIES, ROWS, WIDE, ASM)  # fmt: skip
        for turn in range(begin * TURNS, end * TURNS):
            x = ()
            for h in tl.static_range(HALVES):
                if FIRST:
                    x += (_inputs(x_ptr, turn * (32 * Q), 32 * Q, BLOCK_M),)
                else:
                    here = _operand(x_ptr, turn * Q, h * 2, 0, Q, TOKENS // 16, TILES, 1, ASM,
                                    M if FEW else None)  # fmt: skip
                    x += (tl.reshape(_halves(here, TYPE), (TOKENS, 32 * Q)),)
            words = ahead
            next_turn = tl.minimum(turn + 1, last)
            group = next_turn // TURNS * STEP + next_turn % TURNS * Q + t * 8 + q
            ahead = _codes(codes_ptr, group, row, side, N, IN, WIDTH, BOOKS, ENTRIES, ROWS, WIDE,
                           ASM)  # fmt: skip
            sums = ()
            for i in tl.static_range(WIDTH):
                for d in tl.static_range(DOTS):
                    for b in tl.static_range(BOOKS):
                        code = _code_of(words[b * WIDTH + i], d * PART + r, ROWS, ENTRIES, ASM)
                        here = (b + side) % BOOKS
                        word = _word(books_ptr, own + 16 * COPIES * here, code, book + here,
                                     ENTRIES, STRIDE, ASM)  # fmt: skip
                        if b == 0:
                            tile = word
                        else:
                            tile += word
                    if FIRST:
                        # Rows are (warp, r, lane), K is (q, j, low, t, half of a word).
                        tile = tl.permute(tile, (1, 4, 2, 3, 5, 6, 0, 7))
                        tile = tl.reshape(tile, (LANES * PART, 32 * Q))
                        sums += (_settled(tl.dot(tile, x[0], total[i * DOTS + d]), ASM),)
                    else:
                        # K is (q, low, t, j, half of a word), rows are (r, warp, lane).
                        tile = tl.permute(tile, (3, 6, 0, 5, 7, 4, 1, 2))
                        tile = tl.reshape(tile, (32 * Q, LANES * PART))
                        for h in tl.static_range(HALVES):
                            old = total[(i * DOTS + d) * HALVES + h]
                            sums += (tl.dot(x[h], tile, old, input_precision="ieee"),)
            total = sums
        for i in tl.static_range(WIDTH):
            n = block * TILE + (c // ROWS * WIDTH + i) * ROWS + c % ROWS
            for h in tl.static_range(HALVES):
                y = _by_lane(total[i * DOTS * HALVES + h], TOKENS, WARPS, PART, FIRST)
                if DOTS == 2:
                    z = _by_lane(total[(i * 2 + 1) * HALVES + h], TOKENS, WARPS, PART, FIRST)
                    y = tl.permute(tl.join(y, z), (0, 1, 3, 2))
                y = tl.reshape(y, (TOKENS, LANES * ROWS))
                tokens = h * 32 + tl.arange(0, TOKENS)
                ok = (n < N)[None, :] & (tokens < M)[:, None]
                at = partial_ptr + tokens[:, None] * N + n[None, :]
                for s in range(slot, end_slot):
                    place = s * (B // BOOKS) + part
                    tl.store(at + place * M * N, y, mask=ok)
                    y = tl.zeros_like(y)


@triton.jit
def _dequantize(codes_ptr, books_ptr, scales_ptr, w_ptr, first_row, rows_end, K, N, IN, per_program,
                B: tl.constexpr, ENTRIES: tl.constexpr, COPIES: tl.constexpr, BYTES: tl.constexpr,
                ROWS: tl.constexpr, ASM: tl.constexpr, WARPS: tl.constexpr):  # fmt: skip
    """w[n - first_row, :] = scale[n] * word sums[n], rows first_row .. rows_end - 1, both multiples
    of ROWS.

    A lane loads ROWS codes at once. Steps of 8 groups are what makes Triton store 128 bytes of four
    rows a warp, so that codes are read from 8 places.
    """
    LANES: tl.constexpr = 4 * WARPS  # of a step's group
    base = 0
    if COPIES > 0:
        base = _declare(BYTES)
        base = _ready(base, _share4(books_ptr, base, B * ENTRIES, COPIES, 16 * COPIES))
    lane = tl.arange(0, LANES)[None, :, None]
    g = tl.arange(0, 8)[None, None, :]
    r = tl.arange(0, ROWS)[:, None, None]
    own = base
    if COPIES > 0:
        own = base + g % COPIES * 16
    quad = first_row + (tl.program_id(0) * LANES + lane) * ROWS
    inside = tl.minimum(quad, N - ROWS)
    i = tl.arange(0, LANES * ROWS)
    row = first_row + (tl.program_id(0) * LANES + i % LANES) * ROWS + i // LANES
    ok = row < rows_end
    scale = tl.load(scales_ptr + row, mask=ok, other=0.0).to(tl.float32)
    begin = tl.program_id(1) * per_program
    for step in range(begin, tl.minimum(begin + per_program, (IN + 7) // 8)):
        group = tl.minimum(step * 8 + g, IN - 1)
        at = codes_ptr + group * N + inside
        for b in tl.static_range(B):
            if ASM and ROWS > 1:
                code = _code_of(_load_once(at + b * IN * N), r, ROWS, ENTRIES, ASM)
            else:
                code = tl.load(at + b * IN * N + r).to(tl.int32) & (ENTRIES - 1)
            mine = own + 16 * ENTRIES * COPIES * b
            word = _word(books_ptr, mine, code, b, ENTRIES, 16 * COPIES, ASM).to(tl.float32)
            if b == 0:
                tile = word
            else:
                tile += word
        tile = tl.reshape(tl.permute(tile, (0, 1, 2, 3, 4, 5)), (LANES * ROWS, 64))
        tile = (tile * scale[:, None]).to(w_ptr.dtype.element_ty)
        k = step * 64 + tl.arange(0, 64)
        to = w_ptr + (row - first_row).to(tl.int64)[:, None] * K + k[None, :]
        tl.store(to, tile, mask=ok[:, None] & (k < K)[None, :])
