"""Round to nearest and OPTQ: ``rtn-int*`` and ``gptq-int*``, grids of contiguous groups of columns.

OPTQ (GPTQ, arXiv 2210.17323) is run as LDLQ on reordered columns (see ldlq.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats.scalar import ScalarFormat
from .base import Quantizer, QuantizerError, check_weight
from .grid import GroupRounder, group_grid
from .hessian import DAMPING, regularise
from .ldlq import feedback_round, greedy_passes

ORDERS = ("natural", "activation")


@dataclass(frozen=True)
class ScalarQuantizer(Quantizer):
    """Quantizer of ``rtn-int*`` (ignores the Hessian) and ``gptq-int*`` (needs one).

    Args:
        format: the format record.
        seed: unused; every quantizer has one.
        clip: search the range of every grid instead of taking the smallest and largest weight.
        damping: of the Hessian, as a fraction of its mean diagonal.
        order: of the columns: "natural" (left to right, grids from the updated weights) or
            "activation" (largest second moment first, grids from the original weights).
        passes: greedy passes after rounding with feedback.
    """

    format: ScalarFormat
    seed: int = 0
    clip: bool = True
    damping: float = DAMPING
    order: str = "natural"
    passes: int = 5

    def __post_init__(self):
        if self.order not in ORDERS:
            raise QuantizerError(f"order={self.order!r}; known: {', '.join(ORDERS)}")
        if not self.damping > 0 or self.passes < 0:
            raise QuantizerError(
                f"damping={self.damping}, passes={self.passes}: need > 0 and at least 0"
            )

    @property
    def needs_hessian(self) -> bool:
        return self.format.method == "gptq"

    @torch.no_grad()
    def fit(
        self, weight: torch.Tensor, hessian: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Quantize ``weight`` [N, K]: packed codes, packed zeros and scales (float32).

        Raises QuantizerError for a weight or Hessian that is not finite, and when a ``gptq-*``
        format gets no Hessian.
        """
        check_weight(weight, self.format)
        if not self.needs_hessian:
            return self._nearest(weight.float())
        if hessian is None:
            raise QuantizerError(f"{self.format.id} needs calibration: it got no Hessian")
        return self._feedback(weight.double(), hessian.to(weight.device))

    def _nearest(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.unflatten(1, (-1, self.format.group_size))
        scales, zeros = group_grid(groups, self.format.bits, self.clip)
        top = (1 << self.format.bits) - 1
        codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, top)
        return self._canonical(codes.flatten(1), scales, zeros)

    def _feedback(self, weight: torch.Tensor, hessian: torch.Tensor) -> dict[str, torch.Tensor]:
        (N, K), G, bits = weight.shape, self.format.group_size, self.format.bits
        dense = regularise(hessian, K, self.damping).matrix
        diagonal = dense.diagonal().clone()
        by_group = weight.unflatten(1, (-1, G)).float()
        scales, zeros = group_grid(by_group, bits, self.clip, diagonal.view(-1, G).float())
        if self.order == "natural":
            order = torch.arange(K - 1, -1, -1, device=weight.device)
        else:
            order = diagonal.argsort(stable=True)  # rounding starts with the last column
        dense = dense[order[:, None], order]
        curvature = regularise(dense, K, self.damping * 1e-6)
        del dense  # each of these [K, K] matrices takes 6.6 GB in a 70B model
        ordered = weight[:, order]

        def fit(columns: slice, targets: torch.Tensor):
            weights = curvature.matrix.diagonal()[columns][None].float()
            scale, zero = group_grid(targets[:, None].float(), bits, self.clip, weights)
            return scale[:, 0].double(), zero[:, 0].double()

        rounder = GroupRounder(
            N, K, bits, order // G, scales.double(), zeros.double(),
            fit if self.order == "natural" else None,
        )  # fmt: skip
        buffer = G if self.order == "natural" else 128
        rounded = feedback_round(ordered, curvature, rounder, buffer)
        rounder.fit = None
        greedy_passes(ordered, rounded, curvature, rounder, self.passes)
        codes = torch.empty_like(rounder.codes)
        codes[:, order] = rounder.codes
        return self._canonical(codes, rounder.scales, rounder.zeros)

    def _canonical(self, codes, scales, zeros) -> dict[str, torch.Tensor]:
        packed = self.format.pack_codes(codes.to(torch.uint8), zeros.to(torch.uint8))
        return {**packed, "scales": scales.float()}
