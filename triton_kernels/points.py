"""The nearest E8P points of many vectors in one launch, a vector a lane.

What ``quantizers.lattice.nearest_e8p`` does with some forty tensor operations a chunk: tuning asks
for three million vectors a step, and there they are most of it. A lane keeps its vector in eight
registers and scores all 256 rows of S for both shifts, about 12 thousand operations; the rows are
the same for all lanes.
"""

import torch
import triton
import triton.language as tl

from .devices import on_its_device

BLOCK = 128
"""Vectors of a program."""


@triton.jit
def _of_shift(y, rows_ptr, norms_ptr, odd_ptr, places_ptr):
    """Squared distance and code [BLOCK] of the best point for ``y`` = x - shift, eight tensors."""
    parity = (y[0] < 0).to(tl.int32)
    for i in tl.static_range(1, 8):
        parity ^= (y[i] < 0).to(tl.int32)
    best = tl.full(parity.shape, float("-inf"), tl.float32)
    row = tl.zeros_like(parity)
    for r in range(256):
        cheapest = tl.abs(y[0]) * tl.load(rows_ptr + r * 8)
        score = cheapest
        for i in tl.static_range(1, 8):
            product = tl.abs(y[i]) * tl.load(rows_ptr + r * 8 + i)
            cheapest = tl.minimum(cheapest, product)
            score += product
        score += tl.load(norms_ptr + r)
        score -= tl.where(parity != tl.load(odd_ptr + r), 2 * cheapest, 0.0)
        better = score > best
        best = tl.where(better, score, best)
        row = tl.where(better, r, row)

    odd = tl.load(odd_ptr + row)
    flip = tl.zeros_like(row)
    cheapest = tl.abs(y[0]) * tl.load(rows_ptr + row * 8)
    for i in tl.static_range(1, 8):
        product = tl.abs(y[i]) * tl.load(rows_ptr + row * 8 + i)
        flip = tl.where(product < cheapest, i, flip)
        cheapest = tl.minimum(cheapest, product)
    error = tl.zeros_like(best)
    byte = tl.zeros_like(row)
    for i in tl.static_range(8):
        negative = (y[i] < 0).to(tl.int32) ^ ((flip == i) & (parity != odd)).to(tl.int32)
        magnitude = tl.load(rows_ptr + row * 8 + i)
        wrong = y[i] - tl.where(negative == 1, -magnitude, magnitude)
        error += wrong * wrong
        if i == 7:  # an odd coordinate sum negates element 7 before the sign bits do
            negative ^= odd
        byte += negative * tl.load(places_ptr + i)
    return error, (row << 8) | byte


@triton.jit
def _nearest(x_ptr, codes_ptr, rows_ptr, norms_ptr, odd_ptr, places_ptr, count,
             BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = n < count
    at = x_ptr + n * 8
    x0 = tl.load(at, here, 0.0)
    x1 = tl.load(at + 1, here, 0.0)
    x2 = tl.load(at + 2, here, 0.0)
    x3 = tl.load(at + 3, here, 0.0)
    x4 = tl.load(at + 4, here, 0.0)
    x5 = tl.load(at + 5, here, 0.0)
    x6 = tl.load(at + 6, here, 0.0)
    x7 = tl.load(at + 7, here, 0.0)
    plus = (x0 - 0.25, x1 - 0.25, x2 - 0.25, x3 - 0.25, x4 - 0.25, x5 - 0.25, x6 - 0.25, x7 - 0.25)
    minus = (x0 + 0.25, x1 + 0.25, x2 + 0.25, x3 + 0.25, x4 + 0.25, x5 + 0.25, x6 + 0.25, x7 + 0.25)
    error, code = _of_shift(plus, rows_ptr, norms_ptr, odd_ptr, places_ptr)
    other, second = _of_shift(minus, rows_ptr, norms_ptr, odd_ptr, places_ptr)
    # Bit 0 of the sign byte is toggled where its parity is odd, and then the shift is -1/4.
    code = tl.where(error <= other, code, second ^ 1)
    tl.store(codes_ptr + n, code, here)


@on_its_device
def nearest_points(x: torch.Tensor, tables: dict[str, torch.Tensor]) -> torch.Tensor:
    """16-bit codes int32 [n] of the E8P points nearest to contiguous float32 ``x`` [n, 8].

    ``tables`` are those of ``quantizers.lattice``: ``points`` float32 [256, 8], the magnitudes S;
    ``minus_half_norm`` float32 [256] of them; ``odd_sum`` int32 [256], the parity of their sums;
    ``places`` int32 [8], an element's bit in the sign byte.
    """
    codes = torch.empty(len(x), dtype=torch.int32, device=x.device)
    _nearest[(triton.cdiv(len(x), BLOCK),)](
        x, codes, tables["points"], tables["minus_half_norm"], tables["odd_sum"],
        tables["places"], len(x), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return codes
