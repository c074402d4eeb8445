"""BlockLDLQ and greedy passes onto the E8P codebook over one window of columns.

As ``rounding.py`` does for scalar grids: one launch for a window, where ``quantizers.ldlq`` and
``quantizers.lattice`` take some seventy a block of eight columns. A row of the weight is a program
of one warp, which holds the row's window in registers. A point is searched among all 256 rows of S
and both shifts, 12 thousand operations a vector: less than the launches cost.
"""

import torch
import triton
import triton.language as tl

from .devices import on_its_device


@triton.jit
def _element(values, e, i: tl.constexpr):
    """Element ``i`` of [8]."""
    return tl.sum(tl.where(e == i, values, 0.0), 0)


@triton.jit
def _of_shift(x, shift: tl.constexpr, rows_ptr, odd_ptr, bits_ptr, e, s):
    """Best point, float32 [8], and its 16-bit code for one shift."""
    y = x - shift
    size = tl.abs(y)
    negative = (y < 0).to(tl.int32)
    parity = tl.sum(negative, 0) & 1
    row = tl.load(rows_ptr + s * 8)
    scores = _element(size, e, 0) * row
    cheapest = scores
    norm = row * row
    for i in tl.static_range(1, 8):
        row = tl.load(rows_ptr + s * 8 + i)
        product = _element(size, e, i) * row
        norm += row * row
        scores += product
        cheapest = tl.minimum(cheapest, product)
    wrong = parity != tl.load(odd_ptr + s)
    scores -= norm * 0.5 + tl.where(wrong, 2 * cheapest, 0.0)
    best = tl.argmax(scores, 0)
    magnitude = tl.load(rows_ptr + best * 8 + e)
    odd = tl.load(odd_ptr + best)
    flip = tl.argmin(size * magnitude, 0)
    negative = negative ^ tl.where((e == flip) & (parity != odd), 1, 0)
    value = tl.where(negative == 1, -magnitude, magnitude) + shift
    # An odd coordinate sum negates element 7 before the sign bits do.
    negative = negative ^ tl.where(e == 7, odd, 0)
    byte = tl.sum(negative * tl.load(bits_ptr + e), 0)
    if shift < 0:  # bit 0 is toggled where the parity is odd, and then the shift is -1/4
        byte = byte ^ 1
    return value, (best << 8) | byte


@triton.jit
def _nearest(x, rows_ptr, odd_ptr, bits_ptr, e, s):
    """The E8P point nearest to ``x`` float32 [8], and its code."""
    plus, plus_code = _of_shift(x, 0.25, rows_ptr, odd_ptr, bits_ptr, e, s)
    minus, minus_code = _of_shift(x, -0.25, rows_ptr, odd_ptr, bits_ptr, e, s)
    wrong = plus - x
    other = minus - x
    first = tl.sum(wrong * wrong, 0) <= tl.sum(other * other, 0)
    return tl.where(first, plus, minus), tl.where(first, plus_code, minus_code)


@triton.jit
def _nearest_word(x, words_ptr, e, s):
    """The word of a table [256, 8] nearest to ``x`` [8], and its index."""
    word = tl.load(words_ptr + s * 8)
    scores = (_element(x, e, 0) - word * 0.5) * word
    for i in tl.static_range(1, 8):
        word = tl.load(words_ptr + s * 8 + i)
        scores += (_element(x, e, i) - word * 0.5) * word
    best = tl.argmax(scores, 0)
    return tl.load(words_ptr + best * 8 + e), best


@triton.jit
def _block(row, j, WIDTH: tl.constexpr):
    """Elements 8 j .. 8 j + 7 of [WIDTH]."""
    parts = tl.reshape(row, (WIDTH // 8, 8))
    which = tl.arange(0, WIDTH // 8)[:, None]
    return tl.sum(tl.where(which == j, parts, 0.0), 0)


@triton.jit
def _window(pull_ptr, local_ptr, weight_ptr, rounded_ptr, codes_ptr, inverse_ptr,
            rows_ptr, odd_ptr, bits_ptr, words_ptr, K, first, blocks, residual,
            WIDTH: tl.constexpr, GREEDY: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Blocks ``blocks`` - 1 .. 0 of the window that begins at column ``first``, of one row.
    ``pull`` [N, WIDTH] holds the targets, or with GREEDY the columns of (W - What) H; ``local``
    [WIDTH, WIDTH] the window of L or H; ``inverse`` [blocks, 8, 8] that of H's blocks.
    """
    line = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    e = tl.arange(0, 8)
    s = tl.arange(0, 256)
    pull = tl.load(pull_ptr + line * WIDTH + columns)
    for back in range(blocks):
        j = blocks - 1 - back
        own = _block(pull, j, WIDTH)
        here = line * K + first + j * 8 + e
        target = own
        old = own
        if GREEDY:
            old = tl.load(rounded_ptr + here)
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
        exact = old if GREEDY else tl.load(weight_ptr + here)
        move = (value - exact) * (1 if GREEDY else -1)
        change = _element(move, e, 0) * tl.load(local_ptr + j * 8 * WIDTH + columns)
        for i in tl.static_range(1, 8):
            row = tl.load(local_ptr + (j * 8 + i) * WIDTH + columns)
            change += _element(move, e, i) * row
        take = True
        if GREEDY:
            take = tl.sum(move * (own - 0.5 * _block(change, j, WIDTH)), 0) > 0
            pull -= tl.where(take, change, 0.0)
        else:
            pull += change
        place = codes_ptr + (line * (K // 8) + first // 8 + j) * (1 if BITS == 2 else 2)
        if take:
            tl.store(rounded_ptr + here, value)
            tl.store(place, code.to(tl.int64))
            if BITS != 2:
                tl.store(place + 1, second.to(tl.int64))


@on_its_device
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
    _window[(N,)](
        pull, local, weight, rounded, codes, inverse if greedy else pull,
        tables["points"], tables["odd_sum"], tables["places"], tables["residual"],
        K, columns.start, (columns.stop - columns.start) // 8, float(residual),
        WIDTH=pull.shape[1], GREEDY=greedy, BITS=bits, num_warps=1,
    )  # fmt: skip
