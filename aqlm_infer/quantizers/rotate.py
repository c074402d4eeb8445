"""Incoherence: a weight and its second moment in a rotated basis, where both look alike everywhere:

W = diag(SV) U_N Wr U_K^T diag(SU),   Hr = U_K^T diag(1/SU) H diag(1/SU) U_K
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]

ROWS = 4096
"""Rows of a second moment that are rotated at a time."""


def random_signs(size: int, generator: torch.Generator) -> torch.Tensor:
    """float64 [size] of -1 and +1."""
    return torch.randint(2, (size,), generator=generator).double() * 2 - 1


def balance(energy: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """QuIP's column scaling t [K]: ``W diag(t)`` and ``diag(1/t) H diag(1/t)`` are quantized.

    The fourth root of diag(H) over ``energy`` [K], diag(W^T W) or the sum of those of all layers
    that read the input; both clamped at 1e-8 of their largest, centred on 1.
    """
    ratio = []
    for values in (hessian.diagonal(), energy):
        ratio.append((values / values.max().clamp_min(1e-300)).clamp_min(1e-8))
    scale = (ratio[0] / ratio[1]).pow(0.25)
    return scale / scale.log().mean().exp()


def column_energy(weight: torch.Tensor) -> torch.Tensor:
    """diag(W^T W), float64 [K]."""
    return weight.double().square().sum(0)


@dataclass(frozen=True)
class Rotated:
    """A float64 weight [N, K] and second moment [K, K] in the rotated basis, and the vectors."""

    weight: torch.Tensor
    hessian: torch.Tensor
    su: torch.Tensor
    sv: torch.Tensor


def rotate(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    su: torch.Tensor,
    sv: torch.Tensor,
    inverse_out: Transform,
    inverse_in: Transform,
) -> Rotated:
    """Rotate by ``inverse_out`` (U_N^T) and ``inverse_in`` (U_K^T), which act on the last dim.

    ``su`` may be signs divided by a column scaling, ``sv`` must be signs.
    """
    turned = inverse_in(weight / su)
    turned = inverse_out((turned * sv[:, None]).T.contiguous()).T.contiguous()
    moment = (hessian * su).mul_(su[:, None])
    _rows_in_place(moment, inverse_in)
    moment = moment.T.contiguous()
    _rows_in_place(moment, inverse_in)
    return Rotated(turned, moment, su, sv)


def _rows_in_place(matrix: torch.Tensor, transform: Transform) -> None:
    """Apply ``transform`` to the rows of ``matrix``, some at a time: it makes copies of them."""
    for part in matrix.split(ROWS):
        part.copy_(transform(part))
