"""BlockLDLQ and greedy passes onto the E8P codebook over one window of columns.

As ``rounding.py`` does for scalar grids: a program holds the window of its rows in registers, and
what ``quantizers.ldlq`` and ``quantizers.lattice`` do in some seventy launches a block of eight
columns is one launch for sixteen blocks. A point is searched among all 256 rows of S and both
shifts, 12 thousand operations a vector: less than the launches cost.
"""

import torch
import triton
import triton.language as tl

ROWS = 8
"""Rows of a program of four warps: their 256 scores and 128 float64 columns are in registers."""


@triton.jit
def _element(values, e, i: tl.constexpr):
    """Column ``i`` of [ROWS, 8] as [ROWS, 1]."""
    return tl.sum(tl.where(e == i, values, 0.0), 1)[:, None]


@triton.jit
def _of_shift(x, shift: tl.constexpr, rows_ptr, odd_ptr, bits_ptr, e, s):
    """Best point and 16-bit code for one shift: values float32 [ROWS, 8], code int32 [ROWS, 1]."""
    y = x - shift
    size = tl.abs(y)
    negative = (y < 0).to(tl.int32)
    parity = tl.sum(negative, 1)[:, None] & 1
    product = _element(size, e, 0) * tl.load(rows_ptr + s * 8)
    norm = tl.load(rows_ptr + s * 8) * tl.load(rows_ptr + s * 8)
    scores = product
    cheapest = product
    for i in tl.static_range(1, 8):
        row = tl.load(rows_ptr + s * 8 + i)
        product = _element(size, e, i) * row
        norm += row * row
        scores += product
        cheapest = tl.minimum(cheapest, product)
    odd = tl.load(odd_ptr + s)
    scores -= norm * 0.5 + tl.where(parity != odd, 2 * cheapest, 0.0)
    best = tl.argmax(scores, 1)[:, None]
    magnitude = tl.load(rows_ptr + best * 8 + e)
    odd_best = tl.load(odd_ptr + best)
    flip = tl.argmin(size * magnitude, 1)[:, None]
    negative = negative ^ tl.where((e == flip) & (parity != odd_best), 1, 0)
    value = tl.where(negative == 1, -magnitude, magnitude) + shift
    # An odd coordinate sum negates element 7 before the sign bits do.
    negative = negative ^ tl.where(e == 7, odd_best, 0)
    byte = tl.sum(negative * tl.load(bits_ptr + e), 1)[:, None]
    if shift < 0:  # bit 0 is toggled where the parity is odd, and then the shift is -1/4
        byte = byte ^ 1
    return value, (best << 8) | byte


@triton.jit
def _nearest(x, rows_ptr, odd_ptr, bits_ptr, e, s):
    """The E8P point nearest to ``x`` float32 [ROWS, 8], and its code int32 [ROWS, 1]."""
    plus, plus_code = _of_shift(x, 0.25, rows_ptr, odd_ptr, bits_ptr, e, s)
    minus, minus_code = _of_shift(x, -0.25, rows_ptr, odd_ptr, bits_ptr, e, s)
    wrong = plus - x
    other = minus - x
    first = (tl.sum(wrong * wrong, 1) <= tl.sum(other * other, 1))[:, None]
    return tl.where(first, plus, minus), tl.where(first, plus_code, minus_code)


@triton.jit
def _nearest_word(x, words_ptr, e, s):
    """The word of a table [256, 8] nearest to ``x`` [ROWS, 8], and its index."""
    scores = tl.zeros_like(_element(x, e, 0) * tl.load(words_ptr + s * 8))
    for i in tl.static_range(8):
        word = tl.load(words_ptr + s * 8 + i)
        scores += (_element(x, e, i) - word * 0.5) * word
    best = tl.argmax(scores, 1)[:, None]
    return tl.load(words_ptr + best * 8 + e), best


@triton.jit
def _block(tile, j, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Columns 8 j .. 8 j + 7 of [ROWS, WIDTH]."""
    parts = tl.reshape(tile, (ROWS, WIDTH // 8, 8))
    which = tl.arange(0, WIDTH // 8)[None, :, None]
    return tl.sum(tl.where(which == j, parts, 0.0), 1)


@triton.jit
def _window(pull_ptr, local_ptr, weight_ptr, rounded_ptr, codes_ptr, inverse_ptr,
            rows_ptr, odd_ptr, bits_ptr, words_ptr, N, K, first, blocks, residual,
            WIDTH: tl.constexpr, ROWS: tl.constexpr, GREEDY: tl.constexpr,
            BITS: tl.constexpr):  # fmt: skip
    """Blocks ``blocks`` - 1 .. 0 of the window that begins at column ``first``. ``pull``
    [N, WIDTH] holds the targets, or with GREEDY the columns of (W - What) H; ``local``
    [WIDTH, WIDTH] the window of L or H; ``inverse`` [blocks, 8, 8] that of H's blocks.
    """
    lines = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = (lines < N)[:, None]
    line = lines.to(tl.int64)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    e = tl.arange(0, 8)[None, :]
    s = tl.arange(0, 256)[None, :]
    pull = tl.load(pull_ptr + line * WIDTH + columns, mask=ok, other=0.0)
    for back in range(blocks):
        j = blocks - 1 - back
        own = _block(pull, j, WIDTH, ROWS)
        here = line * K + first + j * 8 + e
        target = own
        old = own
        if GREEDY:
            old = tl.load(rounded_ptr + here, mask=ok, other=0.0)
            target = old
            for i in tl.static_range(8):
                target += _element(own, e, i) * tl.load(inverse_ptr + j * 64 + i * 8 + e)
        x = target.to(tl.float32)
        point, code = _nearest(x, rows_ptr, odd_ptr, bits_ptr, e, s)
        value = point.to(tl.float64)
        second = code
        if BITS == 4:
            fine, second = _nearest((x - point) * residual, rows_ptr, odd_ptr, bits_ptr, e, s)
            value += fine.to(tl.float64) / residual
        if BITS == 3:
            fine, second = _nearest_word((x - point) * residual, words_ptr, e, s)
            value += fine.to(tl.float64) / residual
        exact = old if GREEDY else tl.load(weight_ptr + here, mask=ok, other=0.0)
        move = (value - exact) * (1 if GREEDY else -1)
        change = _element(move, e, 0) * tl.load(local_ptr + j * 8 * WIDTH + columns)
        for i in tl.static_range(1, 8):
            row = tl.load(local_ptr + (j * 8 + i) * WIDTH + columns)
            change += _element(move, e, i) * row
        take = ok
        if GREEDY:
            gain = move * (own - 0.5 * _block(change, j, WIDTH, ROWS))
            better = (tl.sum(gain, 1) > 0)[:, None]
            take = ok & better
            pull -= tl.where(better, change, 0.0)
        else:
            pull += change
        tl.store(rounded_ptr + here, value, mask=take)
        place = codes_ptr + (line * (K // 8) + first // 8 + j) * (1 if BITS == 2 else 2)
        tl.store(place, code.to(tl.int64), mask=take)
        if BITS != 2:
            tl.store(place + 1, second.to(tl.int64), mask=take)


def round_window(
    pull: torch.Tensor,
    local: torch.Tensor,
    weight: torch.Tensor,
    rounded: torch.Tensor,
    codes: torch.Tensor,
    inverse: torch.Tensor | None,
    columns: slice,
    tables: dict[str, torch.Tensor],
    bits: int,
    residual: float,
) -> None:
    """Round ``columns`` of ``rounded`` float64 [N, K] and ``codes`` int64 [N, K / 8, 1 or 2], in
    place.

    Args:
        pull: float64 [N, width]; targets, or (W - What) H where ``inverse`` is given.
        local: float64 [width, width], the window of L or of H.
        weight: float64 [N, K].
        inverse: float64 [blocks, 8, 8], of the diagonal blocks of H, for a greedy pass; None for
            LDLQ.
        tables: ``points`` float32 [256, 8], the magnitudes S; ``odd_sum`` int32 [256], the parity
            of their sums; ``places`` int32 [8], an element's bit in the sign byte; ``residual``
            float32 [256, 8], the second words of 3 bits.
        bits, residual: of the format; what a first rounding leaves is multiplied by ``residual``.

    ``width`` is a power of two. All tensors are contiguous.
    """
    N, K = rounded.shape
    greedy = inverse is not None
    _window[(triton.cdiv(N, ROWS),)](
        pull, local, weight, rounded, codes, inverse if greedy else pull,
        tables["points"], tables["odd_sum"], tables["places"], tables["residual"],
        N, K, columns.start, (columns.stop - columns.start) // 8, float(residual),
        WIDTH=pull.shape[1], ROWS=ROWS, GREEDY=greedy, BITS=bits, num_warps=4,
    )  # fmt: skip
