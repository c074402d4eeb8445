"""Gradients through rounding and clamping on a scalar grid (arXiv 2410.10849, our definitions).

With x = w/s and integers a..b the forward is always ``s * clamp(round(x), a, b)``. The gradient
d(w^)/dw is a product of two slopes:

    rounding   identity   1
               sigmoid    T sigma (1 - sigma) at T (frac(x) - 1/2), of
                          round_T(x) = floor(x) + sigma(T (x - floor(x) - 1/2))
    clamp      none       1
               hard       1 in a..b, else 0
               soft       S'(r), of S(r) = r g(r-a) g(b-r) + a g(a-r) + b g(r-b), g = sigma

where r is the rounded x, by round_T for "sigmoid". S' turns negative beyond 1.28 outside the grid.
"""

from __future__ import annotations

import torch


def sigmoid_round(x: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(round_T(x), its slope)."""
    whole = x.floor()
    s = torch.sigmoid(temperature * (x - whole - 0.5))
    return whole + s, temperature * s * (1 - s)


def softclamp_slope(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """S'(x) for the bounds a <= b, elementwise."""
    low, high = torch.sigmoid(x - a), torch.sigmoid(b - x)
    dlow, dhigh = low * (1 - low), high * (1 - high)  # even in their argument: also of a-x, x-b
    return low * high + x * (dlow * high - low * dhigh) - a * dlow + b * dhigh


def slope(
    x: torch.Tensor,
    zero: torch.Tensor,
    top: int,
    rounding: str,
    clamp: str,
    temperature: float,
) -> torch.Tensor:
    """d(w^)/dw of weights at ``x`` = w/s on the grid ``q - zero``, q = 0..top.

    Rounding is to that grid, which need not be of integers (QuIP's 2-bit grid is -1.5 .. 1.5).
    """
    if rounding == "sigmoid":
        r, total = sigmoid_round(x + zero, temperature)
    else:
        r, total = (x + zero).round(), torch.ones_like(x)
    r = r - zero
    if clamp == "soft":
        return total * softclamp_slope(r, -zero, top - zero)
    if clamp == "hard":
        return total * ((r >= -zero) & (r <= top - zero))
    return total
