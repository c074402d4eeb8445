"""Additive codebooks of 16 bits for a few tokens on NVIDIA: planes of them in shared memory.

A gather of a word of 16 bytes costs a sector of L2, whose rate bounds ``additive._gemv`` and
``_dot``. Here a program has a plane in shared memory, 128 KB: a quarter of all words' numbers (two
neighbours) of one half of the entries. It looks up all codes of its rows, whose sums of eight
planes are added: 16 bytes of L2 a code instead of 32. Look-ups of the other half are not made, so
32 codes take about 2.5 accesses (some meet in a bank), and numbers go straight into the operand of
MMAs, as in ``words``.

Triton has no shared memory that lasts. ``tl.gather`` copies its table there, and what it has left
is read afterwards by inline assembly, which needs its address: 0 of Triton's own share, where a
table of 128 KB is in a kernel without another one (``test_triton_build`` looks).
"""

import triton
import triton.language as tl

from .operands import _operand, _place
from .words import _by_lane, _code_of, _codes, _halves

ENTRIES = tl.constexpr(65536)
HALF = tl.constexpr(32768)
PLANES = tl.constexpr(8)  # of a codebook: four pairs of numbers, two halves
OVERWRITTEN = tl.constexpr(8192)  # entries of a plane that storing sums may overwrite
GROUPS = tl.constexpr(16)  # of a pair of tiles of 16 inputs (``operands``), which are two a group


@triton.jit
def _planes(x_ptr, books_ptr, planes_ptr, out_ptr, M, K, x_stride, entries, pairs,
            BLOCK: tl.constexpr):  # fmt: skip
    """planes[b, n, e]: the numbers 2n and 2n + 1 of codebook b's word e, int32. out[n]: the inputs
    that they meet as ``operands``' of a tile of 16 tokens, past M and K zeros.

    Group 4 q + t of a pair is lane t's, at low q // 2 and j q % 2.
    """
    p = tl.program_id(0)
    e = p * BLOCK + tl.arange(0, BLOCK)[:, None]
    n = tl.arange(0, 4)[None, :]
    word = tl.load(books_ptr.to(tl.pointer_type(tl.int32)) + e * 4 + n, mask=e < entries)
    tl.store(planes_ptr + (e // ENTRIES * 4 + n) * ENTRIES + e % ENTRIES, word, mask=e < entries)
    i = tl.arange(0, 16)[:, None, None, None]
    group = tl.arange(0, GROUPS)[None, :, None, None]
    n = tl.arange(0, 4)[None, None, :, None]
    half = tl.arange(0, 2)[None, None, None, :]
    for pair in range(p, pairs, tl.num_programs(0)):
        k = (pair * GROUPS + group) * 8 + 2 * n + half
        ok = (i < M) & (k < K)
        x = tl.load(x_ptr + i * x_stride + k, mask=ok, other=0.0)
        both = tl.sum((x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) << (16 * half), 3)
        q = group // 4
        place = _place(pair, q // 2, group % 4, q % 2, i, 0, 1, 1)
        place += n * (pairs * 256)
        tl.store(out_ptr + tl.reshape(place, (16, GROUPS, 4)), both)


@triton.jit
def _left(table, ASM: tl.constexpr):
    """The shared address where ``tl.gather`` has left its table."""
    if ASM:
        found = tl.sum(tl.gather(table, tl.arange(0, 32), 0), 0)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a; mov.u32 a, global_smem; and.b32 $0, $1, 0; add.u32 $0, $0, a; }",
            "=&r,r", [found], tl.int32, True, 1,
        )  # fmt: skip
    else:
        return 0


@triton.jit
def _look_up(plane_ptr, base, code, ASM: tl.constexpr):
    """The plane's numbers of codes below HALF, of others 0; int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .b32 a; setp.lt.u32 p, $2, 32768; shl.b32 a, $2, 2;
            add.u32 a, a, $1; mov.b32 $0, 0; @p ld.shared.b32 $0, [a]; }""",
            "=&r,r,r", [base, code], tl.int32, True, 1,
        )  # fmt: skip
    else:
        return tl.load(plane_ptr + (code & (HALF - 1)), mask=code < HALF, other=0)


@triton.jit(do_not_specialize=["M", "share"])
def _planes_dot(x_ptr, codes_ptr, books_ptr, planes_ptr, partial_ptr, M, N, IN, pairs, share,
                B: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
                Q: tl.constexpr, ASM: tl.constexpr, WARPS: tl.constexpr):  # fmt: skip
    """Partial sums [slot, b, plane, m, n] of x[m] . words[n], at most 16 tokens.

    x and planes are ``_planes'``. A program has a plane for as long as it runs: turns of all tiles
    of rows, one tile after the other, are dealt evenly to the programs of a plane, and a tile's
    programs, at most ``share``, write to a slot each; the last one leaves zeros in the others.

    A lane has Q groups of ROWS WIDTH neighbouring rows at once, as in ``words._words_dot``. Sums go
    through shared memory to be stored, so what they overwrite of the plane is put back.
    """
    TYPE: tl.constexpr = books_ptr.dtype.element_ty
    PART: tl.constexpr = 2 if ROWS > 1 else 1  # rows of a lane in a dot
    LANES: tl.constexpr = 8 * WARPS
    TILE: tl.constexpr = LANES * ROWS * WIDTH
    AT_ONCE: tl.constexpr = Q // 4  # pairs
    part = tl.program_id(0)
    p, programs = tl.program_id(1), tl.num_programs(1)
    plane_ptr = planes_ptr + part * HALF
    # Codes of this half get a top bit of 0, in both halves of a word.
    flip = tl.where(part % 2 == 1, -0x7FFF8000 if ROWS > 1 else 0x8000, 0)
    x_ptr += part // 2 % 4 * (pairs * 256)
    codes_ptr += part // PLANES * IN * N
    t = tl.reshape(tl.arange(0, 4), (4, 1, 1, 1, 1))
    lane = tl.reshape(tl.arange(0, LANES), (1, WARPS, 8, 1, 1))
    q = tl.reshape(tl.arange(0, Q), (1, 1, 1, Q, 1))
    r = tl.reshape(tl.arange(0, PART), (1, 1, 1, 1, PART))
    c = tl.arange(0, LANES * ROWS)
    tokens = tl.arange(0, 16)
    zero = tl.zeros((16, LANES * PART), tl.float32)
    turns = pairs // AT_ONCE
    units = (N + TILE - 1) // TILE * turns
    begin, end = p * units // programs, (p + 1) * units // programs
    base = _left(tl.load(plane_ptr + tl.arange(0, HALF)), ASM)
    for block in range(begin // turns, (end + turns - 1) // turns):
        first = tl.maximum(begin - block * turns, 0)
        last = tl.minimum(end - block * turns, turns)
        row = block * TILE + lane * (ROWS * WIDTH)
        if WIDE:
            row = tl.minimum(row, N - ROWS * WIDTH)
        total = ()
        for _ in tl.static_range(WIDTH):
            total += (zero,)
        # Codes and inputs are loaded one turn ahead.
        ahead = _codes(codes_ptr, first * (4 * Q) + q * 4 + t, row, 0, N, IN, WIDTH, 1, ENTRIES,
                       ROWS, WIDE, ASM)  # fmt: skip
        next_x = _operand(x_ptr, first * AT_ONCE, 0, 0, AT_ONCE, 1, 1, 1, ASM)
        for turn in range(first, last):
            words = ahead
            x = tl.reshape(_halves(next_x, TYPE), (16, 32 * AT_ONCE))
            then = tl.minimum(turn + 1, last - 1)
            ahead = _codes(codes_ptr, then * (4 * Q) + q * 4 + t, row, 0, N, IN, WIDTH, 1, ENTRIES,
                           ROWS, WIDE, ASM)  # fmt: skip
            next_x = _operand(x_ptr, then * AT_ONCE, 0, 0, AT_ONCE, 1, 1, 1, ASM)
            sums = ()
            for i in tl.static_range(WIDTH):
                code = _code_of(words[i] ^ flip, r, ROWS, ENTRIES, ASM)
                tile = _halves(_look_up(plane_ptr, base, code, ASM), TYPE)
                # K is (pair, low, t, j, half), rows are (r, warp, lane).
                tile = tl.reshape(tile, (4, WARPS, 8, 2 * AT_ONCE, 2, PART, 2))
                tile = tl.permute(tile, (3, 0, 4, 6, 5, 1, 2))
                tile = tl.reshape(tile, (32 * AT_ONCE, LANES * PART))
                sums += (tl.dot(x, tile, total[i], input_precision="ieee"),)
            total = sums
        slot = p - ((block * turns + 1) * programs - 1) // units
        end_slot = tl.where(last == turns, share, slot + 1)
        for i in tl.static_range(WIDTH):
            y = tl.reshape(_by_lane(total[i], 16, WARPS, PART, False), (16, LANES * ROWS))
            n = block * TILE + (c // ROWS * WIDTH + i) * ROWS + c % ROWS
            at = partial_ptr + tokens[:, None] * N + n[None, :]
            for s in range(slot, end_slot):
                place = s * (PLANES * B) + part
                tl.store(at + place * M * N, y, mask=(n < N)[None, :] & (tokens < M)[:, None])
                y = tl.zeros_like(y)
        if (block + 1) * turns < end:
            base = _left(tl.load(plane_ptr + tl.arange(0, OVERWRITTEN)), ASM)
