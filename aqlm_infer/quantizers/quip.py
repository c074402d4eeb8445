"""QuIP (arXiv 2307.13304): incoherence by rotation, then LDLQ on one uniform grid a matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..formats.rotation import Hadamard, kronecker_sizes, kronecker_transform
from ..formats.scalar import QuipFormat
from .base import Quantizer, QuantizerError, check_weight
from .hessian import DAMPING, regularise
from .ldlq import GridRounder, feedback_round, greedy_passes
from .rotate import balance, column_energy, random_signs, rotate

SPREADS = {2: 1.6, 3: 2.1, 4: 2.6}
"""Half the grid's range over the weight's root mean square, by bits.

Published: 2.4 at every width, which at 2 bits doubles the error (docs/notes/quantizers.md)."""


class UniformRounder(GridRounder):
    """One column at a time onto codes 0..2^b-1 of [-scale, scale]."""

    def __init__(self, N: int, K: int, bits: int, scale: float, device):
        self.top, self.scale = (1 << bits) - 1, scale
        self.codes = torch.zeros(N, K, dtype=torch.uint8, device=device)

    def round(
        self, block: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes = ((targets / self.scale + 1) * (self.top / 2)).round().clamp(0, self.top)
        return (codes * (2 / self.top) - 1) * self.scale, codes

    def grid(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.full((), 2 * self.scale / self.top, dtype=torch.float64)
        whole = whole.to(self.codes.device).expand(len(self.codes), 1)
        return whole, torch.full_like(whole, self.top / 2)


def random_kronecker(size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A random rotation of QuIP's form: two orthogonal factors and two permutations."""
    p, q = kronecker_sizes(size)
    factors = []
    for side in (p, q):
        gaussian = torch.randn(side, side, generator=generator, dtype=torch.float64)
        factors.append(torch.linalg.qr(gaussian).Q.float())
    orders = [torch.randperm(size, generator=generator).int() for _ in range(2)]
    return {"B0": factors[0], "B1": factors[1], "p_in": orders[0], "p_out": orders[1]}


@dataclass(frozen=True)
class QuipQuantizer(Quantizer):
    """Quantizer of ``quip-int*``.

    Args:
        format: the format record.
        seed: of signs, orthogonal factors and permutations.
        damping: of the rotated Hessian, as a fraction of its mean diagonal.
        rescale: balance columns before rotating; the scaling lands in SU.
        energy: [K], the column energies to balance by (None: the weight's own). Layers that read
            one input and are given their sum get equal SU, so that they can share its rotation.
        passes: greedy passes after LDLQ.
        spread: half the grid's range over the rotated weight's root mean square (None: SPREADS).
    """

    format: QuipFormat
    seed: int = 0
    damping: float = DAMPING
    rescale: bool = True
    energy: torch.Tensor | None = field(default=None, compare=False, repr=False)
    passes: int = 5
    spread: float | None = None

    def __post_init__(self):
        if not self.damping > 0 or self.passes < 0 or not (self.spread is None or self.spread > 0):
            raise QuantizerError(
                f"damping={self.damping}, passes={self.passes}, spread={self.spread}: need > 0, at"
                " least 0 and > 0"
            )

    @torch.no_grad()
    def fit(
        self, weight: torch.Tensor, hessian: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Quantize ``weight`` [N, K]: packed codes, SU, SV, Wscale and, with ``-kron``, the
        rotations. Without a Hessian it is the identity, as the seam says. Raises QuantizerError
        for values that are not finite."""
        check_weight(weight, self.format)
        (N, K), device = weight.shape, weight.device
        if hessian is None:
            hessian = torch.eye(K, dtype=torch.float64, device=device)
        generator = torch.Generator().manual_seed(self.seed)
        plain = regularise(hessian.to(device), K, self.damping).matrix
        wide = weight.double()
        energy = column_energy(wide) if self.energy is None else self.energy
        scaling = balance(energy, plain) if self.rescale else torch.ones_like(wide[0])
        extra: dict[str, torch.Tensor] = {}
        if self.format.rotation == "kronecker":
            sides = {"U": random_kronecker(N, generator), "V": random_kronecker(K, generator)}
            sides = {s: {k: t.to(device) for k, t in p.items()} for s, p in sides.items()}
            extra = {f"{side}_{k}": t for side, parts in sides.items() for k, t in parts.items()}
            su, sv = 1 / scaling, torch.ones(N, dtype=torch.float64, device=device)

            def inverse_out(x):
                return kronecker_transform(x, sides["U"])

            def inverse_in(x):
                return kronecker_transform(x, sides["V"])
        else:
            make = Hadamard.blocks if self.format.rotation == "block" else Hadamard.full
            out, into = make(N), make(K)
            su = random_signs(K, generator).to(device) / scaling
            sv = random_signs(N, generator).to(device)

            def inverse_out(x):
                return out.apply(x, transpose=True)

            def inverse_in(x):
                return into.apply(x, transpose=True)

        turned = rotate(wide, plain, su, sv, inverse_out, inverse_in)
        del plain  # each of these [K, K] matrices takes 6.6 GB in a 70B model
        curvature, wide = regularise(turned.hessian, K, self.damping), turned.weight
        del turned
        spread = self.spread or SPREADS[self.format.bits]
        scale = float((spread * wide.square().mean().sqrt()).float()) or 1.0
        rounder = UniformRounder(N, K, self.format.bits, scale, device)
        rounded = feedback_round(wide, curvature, rounder)
        greedy_passes(wide, rounded, curvature, rounder, self.passes)
        values = {"SU": su.float(), "SV": sv.float(), "Wscale": torch.tensor(scale).to(device)}
        return {**self.format.pack_codes(rounder.codes), **values, **extra}
