"""QuIP# (arXiv 2402.04396): randomized Hadamard rotation, then BlockLDLQ on the E8P codebook."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..formats.e8p import E8PFormat
from ..formats.rotation import Hadamard
from .base import Quantizer, QuantizerError, check_weight
from .hessian import DAMPING, regularise
from .lattice import E8PRounder
from .ldlq import feedback_round, greedy_passes
from .rotate import balance, column_energy, random_signs, rotate

SPREADS = {2: 0.9, 3: 0.98, 4: 1.03}
"""Root mean square of the rotated weight in units of the codebook, as published."""


@dataclass(frozen=True)
class E8PQuantizer(Quantizer):
    """Quantizer of ``quip-e8p-*``.

    Args:
        format: the format record.
        seed: of the random signs.
        damping: of the rotated Hessian, as a fraction of its mean diagonal.
        rescale: balance columns before rotating; the scaling lands in SU.
        energy: [K], the column energies to balance by (None: the weight's own). Layers that read
            one input and are given their sum get equal SU, so that they can share its rotation.
        passes: greedy passes after BlockLDLQ.
    """

    format: E8PFormat
    seed: int = 0
    damping: float = DAMPING
    rescale: bool = True
    energy: torch.Tensor | None = field(default=None, compare=False, repr=False)
    passes: int = 10

    def __post_init__(self):
        if not self.damping > 0 or self.passes < 0:
            raise QuantizerError(
                f"damping={self.damping}, passes={self.passes}: need > 0 and at least 0"
            )

    @torch.no_grad()
    def fit(
        self, weight: torch.Tensor, hessian: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Quantize ``weight`` [N, K]: packed codes, SU, SV (the scale in it) and Wscale 1.

        Without a Hessian it is the identity, as the seam says: the lattice rounds the rotated
        weight alone. Raises QuantizerError for values that are not finite.
        """
        check_weight(weight, self.format)
        if self.format.parts:
            raise QuantizerError(f"{self.format.id}: layers are quantized one by one, not fused")
        (N, K), device = weight.shape, weight.device
        if hessian is None:
            hessian = torch.eye(K, dtype=torch.float64, device=device)
        generator = torch.Generator().manual_seed(self.seed)
        wide = weight.double()
        plain = regularise(hessian.to(device), K, self.damping).matrix
        su = random_signs(K, generator).to(device)
        sv = random_signs(N, generator).to(device)
        if self.rescale:
            energy = column_energy(wide) if self.energy is None else self.energy
            su = su / balance(energy, plain)
        make = Hadamard.blocks if self.format.blocks else Hadamard.full
        out, into = make(N), make(K)
        turned = rotate(
            wide,
            plain,
            su,
            sv,
            lambda x: out.apply(x, transpose=True),
            lambda x: into.apply(x, transpose=True),
        )
        del plain  # each of these [K, K] matrices takes 6.6 GB in a 70B model
        scale = float(turned.weight.square().mean().sqrt()) / SPREADS[self.format.bits] or 1.0
        curvature, unit = regularise(turned.hessian, K, self.damping), turned.weight / scale
        del turned
        rounder = E8PRounder(N, K, self.format, device)
        rounded = feedback_round(unit, curvature, rounder)
        greedy_passes(unit, rounded, curvature, rounder, self.passes)
        codes = rounder.codes.unbind(2)
        return {
            **self.format.pack_codes(*codes),
            "SU": su.float(),
            "SV": (sv * scale).float(),
            "Wscale": torch.ones((), device=device),
        }
