"""LDLQ and greedy passes over one window of columns, every row of the weight on its own.

What ``quantizers.ldlq`` does column by column in some thirty launches is here one launch for a
window: a program holds the window of its rows in registers.
"""

import torch
import triton
import triton.language as tl

from .devices import on_its_device

ROWS = 8
"""Rows of a program of four warps: 128 float64 columns of each in registers."""


@triton.jit
def _window(pull_ptr, local_ptr, weight_ptr, rounded_ptr, codes_ptr, step_ptr, zero_ptr,
            inverse_ptr, N, K, first, count, top,
            WIDTH: tl.constexpr, ROWS: tl.constexpr, GREEDY: tl.constexpr):  # fmt: skip
    """Columns first + count - 1 .. first. ``pull`` [N, WIDTH] holds the targets, or with GREEDY
    the columns of (W - What) H; ``local`` [WIDTH, WIDTH] the window of L or H; ``step`` and
    ``zero`` [N, WIDTH] the grid ``step * (code - zero)``; ``inverse`` [WIDTH] that of H's diagonal.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = rows < N
    columns = tl.arange(0, WIDTH)
    tile = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    pull = tl.load(pull_ptr + tile, mask=ok[:, None], other=0.0)
    for back in range(count):
        j = count - 1 - back
        own = tl.sum(tl.where(columns[None, :] == j, pull, 0.0), 1)
        here = rows.to(tl.int64) * K + first + j
        step = tl.load(step_ptr + rows * WIDTH + j, mask=ok, other=1.0)
        zero = tl.load(zero_ptr + rows * WIDTH + j, mask=ok, other=0.0)
        line = tl.load(local_ptr + j * WIDTH + columns)
        target = own
        old = own
        if GREEDY:
            old = tl.load(rounded_ptr + here, mask=ok, other=0.0)
            target = old + own * tl.load(inverse_ptr + j)
        exact = target / step + zero
        code = tl.floor(exact + 0.5)
        odd = code - 2 * tl.floor(code * 0.5) == 1
        code = tl.where((code - exact == 0.5) & odd, code - 1, code)  # halves to even, as torch
        code = tl.minimum(tl.maximum(code, 0.0), top)
        value = step * (code - zero)
        if GREEDY:
            move = value - old
            better = move * (own - 0.5 * move * tl.load(local_ptr + j * WIDTH + j)) > 0
            pull -= tl.where(better, move, 0.0)[:, None] * line[None, :]
            tl.store(rounded_ptr + here, value, mask=ok & better)
            tl.store(codes_ptr + here, code.to(tl.uint8), mask=ok & better)
        else:
            wrong = tl.load(weight_ptr + here, mask=ok, other=0.0) - value
            pull += wrong[:, None] * line[None, :]
            tl.store(rounded_ptr + here, value, mask=ok)
            tl.store(codes_ptr + here, code.to(tl.uint8), mask=ok)


@on_its_device
def round_window(
    pull: torch.Tensor,
    local: torch.Tensor,
    weight: torch.Tensor,
    rounded: torch.Tensor,
    codes: torch.Tensor,
    grid: tuple[torch.Tensor, torch.Tensor],
    inverse: torch.Tensor | None,
    columns: slice,
    top: int,
) -> None:
    """Round ``columns`` of ``rounded`` float64 [N, K] and ``codes`` uint8 [N, K], in place.

    Args:
        pull: float64 [N, width]; targets, or (W - What) H where ``inverse`` is given.
        local: float64 [width, width], the window of L or of H.
        weight: float64 [N, K].
        grid: step and zero point of every row and column, float64 [N, width] each.
        inverse: float64 [width], of the diagonal of H, for a greedy pass; None for LDLQ.
        top: largest code.

    ``width`` is a power of two. All tensors are contiguous.
    """
    N, K = rounded.shape
    width = pull.shape[1]
    _window[(triton.cdiv(N, ROWS),)](
        pull, local, weight, rounded, codes, *grid, pull if inverse is None else inverse,
        N, K, columns.start, columns.stop - columns.start, float(top),
        WIDTH=width, ROWS=ROWS, GREEDY=inverse is not None, num_warps=4,
    )  # fmt: skip
