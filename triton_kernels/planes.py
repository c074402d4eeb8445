"""Additive codebooks of 16 bits for a few tokens on NVIDIA: a fifth of them in shared memory.

A gather of a word of 16 bytes costs a sector of L2, whose rate bounds ``additive._gemv`` and
``_dot``. Here words lie as four planes of two neighbouring numbers each, one plane after the other,
and a program has a fifth of them, 205 KB, in shared memory: of one plane, or the end of one and the
beginning of the next, which never are of the same entries. So it looks each code of its rows up
once at most: 10 bytes of L2 a code instead of 32. Numbers go straight into the operand of MMAs, as
in ``words``: those of the first plane into one, those of the second into another.

Triton has no shared memory of the kernel's own, and asks for more than 48 KB for what it moves
itself alone. A loop of loads that are asked for ahead has buffers there, side by side. Here it
never takes a turn, and inline assembly fills and reads the buffers, which needs their address: 0 of
Triton's share, where they are in a kernel whose share is theirs (``test_triton_build`` looks). What
Triton moves through shared memory later it moves through the first words, so the fifth begins after
them.
"""

import triton
import triton.language as tl

from .operands import _operand, _place
from .shared import _load4, _store4
from .words import _by_lane, _codes, _halves

ENTRIES = tl.constexpr(65536)
PLANES = tl.constexpr(4)  # of a codebook
PARTS = tl.constexpr(5)  # of its planes
PART = tl.constexpr(52432)  # entries of a part; of the last one fewer
BUFFER = tl.constexpr(8192)  # words
BUFFERS = tl.constexpr(7)
MOVED = tl.constexpr(4096)  # words of the first buffer that Triton uses later
QUADS = tl.constexpr(4096)  # of entries that a program copies at once
GROUPS = tl.constexpr(16)  # of a pair of tiles of 16 inputs (``operands``), which are two a group


@triton.jit
def _planes(x_ptr, books_ptr, planes_ptr, out_ptr, M, K, x_stride, entries, pairs,
            BLOCK: tl.constexpr):  # fmt: skip
    """planes[b, n, e]: the numbers 2n and 2n + 1 of codebook b's word e, int32. out[tile, n]: the
    inputs that they meet as ``operands``' of each tile of 16 tokens, past M and K zeros.

    Group 4 q + t of a pair is lane t's, at low q // 2 and j q % 2.
    """
    p = tl.program_id(0)
    e = p * BLOCK + tl.arange(0, BLOCK)[:, None]
    n = tl.arange(0, 4)[None, :]
    word = tl.load(books_ptr.to(tl.pointer_type(tl.int32)) + e * 4 + n, mask=e < entries)
    to = (e // ENTRIES * PLANES + n) * ENTRIES + e % ENTRIES
    tl.store(planes_ptr + to, word, mask=e < entries)
    i = tl.arange(0, 16)[:, None, None, None]
    group = tl.arange(0, GROUPS)[None, :, None, None]
    n = tl.arange(0, 4)[None, None, :, None]
    half = tl.arange(0, 2)[None, None, None, :]
    for unit in range(p, (M + 15) // 16 * pairs, tl.num_programs(0)):
        tile, pair = unit // pairs, unit % pairs
        k = (pair * GROUPS + group) * 8 + 2 * n + half
        m = tile * 16 + i
        x = tl.load(x_ptr + m * x_stride + k, mask=(m < M) & (k < K), other=0.0)
        both = tl.sum((x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) << (16 * half), 3)
        q = group // 4
        place = _place(pair, q // 2, group % 4, q % 2, i, 0, 1, 1)
        place += (tile * 4 + n) * (pairs * 256)
        tl.store(out_ptr + tl.reshape(place, (16, GROUPS, 4)), both)


@triton.jit
def _address(after):
    """The shared address of words that Triton moves nothing through, once ``after`` is there."""
    share = tl.inline_asm_elementwise(
        "{ .reg .b32 a; mov.u32 a, global_smem; and.b32 $0, $1, 0; add.u32 $0, $0, a; }",
        "=&r,r", [after], tl.int32, True, 1,
    )  # fmt: skip
    return share + 4 * MOVED


@triton.jit
def _copied(part_ptr, count, never, ASM: tl.constexpr):
    """The shared address of a copy of ``count`` entries. ``never`` is 0."""
    if ASM:
        e = tl.arange(0, BUFFER)
        total = tl.zeros((BUFFER,), tl.int32)
        for i in tl.range(0, never, num_stages=BUFFERS + 1):
            total += tl.load(part_ptr + i * BUFFER + e)
        to = _address(tl.sum(total, 0))
        stored = tl.zeros((QUADS,), tl.int32)
        for first in tl.static_range(0, PART // 4, QUADS):
            quad = tl.minimum(first + tl.arange(0, QUADS), count // 4 - 1)
            w0, w1, w2, w3 = _load4(part_ptr + quad * 4, False)
            stored += _store4(to + quad * 16, w0, w1, w2, w3)
        return _address(tl.sum(stored, 0))  # waits for all warps
    else:
        return 0


@triton.jit
def _look_up(part_ptr, base, word, r, begins, first, count, ASM: tl.constexpr):
    """The numbers of the codes in halves r of words: of a part's first plane, or 0, and of its
    second one, or 0; int32. The part begins with entry ``begins`` of all planes; of its ``count``
    entries the ``first`` are of the first plane."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .pred p, q, s; .reg .b32 a, v; shf.l.wrap.b32 a, $3, $3, $4; add.u32 a, a, $5;
            and.b32 a, a, 262140; setp.lt.u32 p, a, $7; setp.lt.and.u32 q|s, a, $6, p;
            add.u32 a, a, $2; @p ld.shared.b32 v, [a]; selp.b32 $0, v, 0, q;
            selp.b32 $1, v, 0, s; }""",
            "=r,=r,r,r,r,r,r,r", [base, word, 2 + 16 * r, -4 * begins, 4 * first, 4 * count],
            (tl.int32, tl.int32), True, 1,
        )  # fmt: skip
    else:
        at = ((word >> (16 * r)) - begins) & (ENTRIES - 1)
        number = tl.load(part_ptr + at, mask=at < count, other=0)
        return tl.where(at < first, number, 0), tl.where(at < first, 0, number)


@triton.jit
def _inputs(first_ptr, second_ptr, pair, pairs, M, PAIRS: tl.constexpr, TILES: tl.constexpr,
            ASM: tl.constexpr):  # fmt: skip
    """The inputs of each tile of tokens for a part's first plane and for its second one."""
    inputs = ()
    for h in tl.static_range(TILES):
        skip = h * (PLANES * pairs * 256)
        inputs += (_operand(first_ptr + skip, pair, 0, 0, PAIRS, 1, 1, 1, ASM, M),)
        inputs += (_operand(second_ptr + skip, pair, 0, 0, PAIRS, 1, 1, 1, ASM, M),)
    return inputs


@triton.jit(do_not_specialize=["M", "share", "never"])
def _planes_dot(x_ptr, codes_ptr, books_ptr, planes_ptr, partial_ptr, M, N, IN, pairs, share,
                never, B: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                WIDE: tl.constexpr, Q: tl.constexpr, TILES: tl.constexpr, ASM: tl.constexpr,
                WARPS: tl.constexpr, FEW: tl.constexpr):  # fmt: skip
    """Partial sums [slot, b, part, m, n] of x[m] . words[n], at most 16 TILES tokens (FEW: 8).

    x and planes are ``_planes'``. A program has a part for as long as it runs: turns of all tiles
    of rows, one tile after the other, are dealt evenly to the programs of a part, and a tile's
    programs, at most ``share``, write to a slot each; the last one leaves zeros in the others.

    A lane has Q groups of ROWS WIDTH neighbouring rows at once, as in ``words._words_dot``.
    """
    TYPE: tl.constexpr = books_ptr.dtype.element_ty
    EACH: tl.constexpr = 2 if ROWS > 1 else 1  # rows of a lane in a dot
    LANES: tl.constexpr = 8 * WARPS
    TILE: tl.constexpr = LANES * ROWS * WIDTH
    AT_ONCE: tl.constexpr = Q // 4  # pairs
    tl.static_assert(16 * LANES * ROWS <= MOVED)
    few = M if FEW else None
    part = tl.program_id(0)
    p, programs = tl.program_id(1), tl.num_programs(1)
    book = part // PARTS
    begins = part % PARTS * PART
    plane = begins // ENTRIES
    firsts = (plane + 1) * ENTRIES - begins
    count = tl.minimum(PART, PLANES * ENTRIES - begins)
    part_ptr = planes_ptr + book * (PLANES * ENTRIES) + part % PARTS * PART
    first_x = x_ptr + plane * (pairs * 256)
    second_x = x_ptr + tl.minimum(plane + 1, PLANES - 1) * (pairs * 256)
    codes_ptr += book * IN * N
    t = tl.reshape(tl.arange(0, 4), (4, 1, 1, 1, 1))
    lane = tl.reshape(tl.arange(0, LANES), (1, WARPS, 8, 1, 1))
    q = tl.reshape(tl.arange(0, Q), (1, 1, 1, Q, 1))
    r = tl.reshape(tl.arange(0, EACH), (1, 1, 1, 1, EACH))
    c = tl.arange(0, LANES * ROWS)
    zero = tl.zeros((16, LANES * EACH), tl.float32)
    turns = pairs // AT_ONCE
    units = (N + TILE - 1) // TILE * turns
    begin, end = p * units // programs, (p + 1) * units // programs
    base = _copied(part_ptr, count, never, ASM)
    for block in range(begin // turns, (end + turns - 1) // turns):
        first = tl.maximum(begin - block * turns, 0)
        last = tl.minimum(end - block * turns, turns)
        row = block * TILE + lane * (ROWS * WIDTH)
        if WIDE:
            row = tl.minimum(row, N - ROWS * WIDTH)
        total = ()
        for _ in tl.static_range(WIDTH * TILES):
            total += (zero,)
        # Codes are loaded one turn ahead, and inputs where registers suffice.
        ahead = _codes(codes_ptr, first * (4 * Q) + q * 4 + t, row, 0, N, IN, WIDTH, 1, ENTRIES,
                       ROWS, WIDE, ASM)  # fmt: skip
        next_x = _inputs(first_x, second_x, first * AT_ONCE, pairs, few, AT_ONCE, TILES, ASM)
        for turn in range(first, last):
            words = ahead
            x = next_x
            then = tl.minimum(turn + 1, last - 1)
            ahead = _codes(codes_ptr, then * (4 * Q) + q * 4 + t, row, 0, N, IN, WIDTH, 1, ENTRIES,
                           ROWS, WIDE, ASM)  # fmt: skip
            if TILES == 1:
                next_x = _inputs(first_x, second_x, then * AT_ONCE, pairs, few, AT_ONCE, TILES, ASM)
            else:
                x = _inputs(first_x, second_x, turn * AT_ONCE, pairs, few, AT_ONCE, TILES, ASM)
            sums = ()
            for i in tl.static_range(WIDTH):
                numbers = _look_up(part_ptr, base, words[i], r, begins, firsts, count, ASM)
                for h in tl.static_range(TILES):
                    old = total[i * TILES + h]
                    for plane_of in tl.static_range(2):
                        tile = _halves(numbers[plane_of], TYPE)
                        # K is (pair, low, t, j, half), rows are (r, warp, lane).
                        tile = tl.reshape(tile, (4, WARPS, 8, 2 * AT_ONCE, 2, EACH, 2))
                        tile = tl.permute(tile, (3, 0, 4, 6, 5, 1, 2))
                        tile = tl.reshape(tile, (32 * AT_ONCE, LANES * EACH))
                        here = _halves(x[2 * h + plane_of], TYPE)
                        here = tl.reshape(here, (16, 32 * AT_ONCE))
                        old = tl.dot(here, tile, old, input_precision="ieee")
                    sums += (old,)
            total = sums
        slot = p - ((block * turns + 1) * programs - 1) // units
        end_slot = tl.where(last == turns, share, slot + 1)
        for i in tl.static_range(WIDTH):
            n = block * TILE + (c // ROWS * WIDTH + i) * ROWS + c % ROWS
            for h in tl.static_range(TILES):
                z = _by_lane(total[i * TILES + h], 16, WARPS, EACH, False)
                z = tl.reshape(z, (16, LANES * ROWS))
                m = h * 16 + tl.arange(0, 16)
                at = partial_ptr + m[:, None] * N + n[None, :]
                for s in range(slot, end_slot):
                    place = s * (PARTS * B) + part
                    tl.store(at + place * M * N, z, mask=(n < N)[None, :] & (m < M)[:, None])
                    z = tl.zeros_like(z)
