"""Split K: partial sums [S, M, N] are added in order, so runs are bitwise equal; and sums of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

FINISH_ROWS = 256
SUM_ELEMENTS = 8192


@triton.jit(do_not_specialize=["M", "splits"])
def _finish(partial_ptr, unit_ptr, scales_ptr, bias_ptr, y_ptr, M, N, y_stride, splits,
            OG: tl.constexpr, UNIT: tl.constexpr, SCALES: tl.constexpr, BIAS: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """y[m, n] = scale[n] * unit[m] * (partial sums in order) + bias[n]."""
    rows, m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    ok = rows < N
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, splits, 4):
        for i in tl.static_range(4):  # loads of four at once
            s = first + i + 0 * rows
            at = partial_ptr + (s * M + m) * N + rows
            total += tl.load(at, mask=ok & (s < splits), other=0.0)
    if UNIT:
        total *= tl.load(unit_ptr + m)
    if SCALES:
        total *= tl.load(scales_ptr + rows // OG, mask=ok, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + rows, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * y_stride + rows, total.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _sums(x_ptr, sums_ptr, x_stride, groups, G, BLOCK: tl.constexpr):
    """sums[m, g] = sum of x[m] over group g of G."""
    m, g = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, G, BLOCK):
        k = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + m * x_stride + g * G + k, mask=k < G, other=0.0)
        total += x.to(tl.float32)
    tl.store(sums_ptr + m * groups + g, tl.sum(total, 0))


def split(steps: int, wanted: int) -> tuple[int, int]:
    """(steps a split, splits) for at most ``wanted`` splits, none of them empty."""
    each = triton.cdiv(steps, max(1, min(wanted, steps)))
    return each, triton.cdiv(steps, each)


def share(steps: int, tiles: int, config: dict) -> tuple[int, int]:
    """(steps a split, splits) of each of ``tiles``, for at most the config's PROGRAMS.

    FILL: as many steps a split as PROGRAMS programs, those that run at once, would share evenly.
    The last split has what is left: its programs are launched last and fill what the others leave
    idle. (Equal splits of 448 tiles leave 160 of 1056 places empty.)
    """
    if not config.get("FILL"):
        return split(steps, config["PROGRAMS"] // tiles)
    each = min(steps, triton.cdiv(tiles * steps, config["PROGRAMS"]))
    return each, triton.cdiv(steps, each)


def slots(tiles: int, steps: int, programs: int) -> int:
    """The most programs of a tile, when the steps of all tiles are dealt evenly to programs."""
    units = tiles * steps
    return max(
        ((tile + 1) * steps * programs - 1) // units - ((tile * steps + 1) * programs - 1) // units
        for tile in range(tiles)
    ) + 1  # fmt: skip


def partial_sums(splits: int, x: torch.Tensor, N: int, y: torch.Tensor | None) -> torch.Tensor:
    """Memory for partial sums [splits, M, N]: y [M, N] for one split if it is given, or float32."""
    if splits == 1 and y is not None:
        return y[None]
    return torch.empty((splits, x.shape[0], N), dtype=torch.float32, device=x.device)


def finish(
    partial: torch.Tensor,
    y: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    out_group: int = 1,
    unit: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Fill y [M, N] (any row stride) with scales * unit * (sum of partial [S, M, N]) + bias.

    scales [N / out_group], unit [M], bias [N].
    """
    splits, M, N = partial.shape
    wrap_triton(_finish)[(triton.cdiv(N, FINISH_ROWS), M)](
        partial, partial if unit is None else unit, partial if scales is None else scales,
        partial if bias is None else bias, y, M, N, y.stride(0), splits, OG=out_group,
        UNIT=unit is not None, SCALES=scales is not None, BIAS=bias is not None, BLOCK=FINISH_ROWS,
    )  # fmt: skip


def group_sums(x: torch.Tensor, group: int) -> torch.Tensor:
    """Sums of each row of x [M, K] over groups, float32 [M, K / group]."""
    M, K = x.shape
    sums = torch.empty((M, K // group), dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(group), SUM_ELEMENTS)
    wrap_triton(_sums)[(M, K // group)](
        x, sums, x.stride(0), K // group, group, BLOCK=block, num_warps=8 if block > 2048 else 1
    )
    return sums


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [M, K] with neighbouring elements in a row."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
