"""Quantizer of additive codebooks (AQLM), data-free or in the norm of a layer's input.

    rows over their rms -> residual k-means -> [ codebooks, scales, codes ]* -> a common gauge

Without a Hessian the refit minimises ``|W - What|^2`` and k-means weighs a vector by the square of
its row's scale; with one, H, it minimises ``tr((W - What) H (W - What)^T)`` and k-means goes on in
the metric of H's LDL blocks. A step is taken only when the objective falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..formats import AdditiveFormat
from .base import Quantizer, QuantizerError, check_weight
from .calibrated import CalibratedRefit
from .hessian import diagonal_blocks, regularise, row_losses
from .kmeans import residual_kmeans
from .metric import metric_kmeans
from .refit import Refit


@dataclass(frozen=True)
class Progress:
    """One accepted or refused step: ``error`` is the objective after it, relative to What = 0."""

    stage: str
    round: int
    error: float


@dataclass(frozen=True)
class AdditiveQuantizer(Quantizer):
    """Quantizer of one ``aqlm-*`` format.

    Args:
        format: the format record.
        seed: of the quantizer's own generator; the global one is neither read nor moved.
        kmeans_rounds: most Lloyd rounds of a codebook. The refit makes up for a short k-means: on
            iid Gaussian weights 100 rounds instead of 25 lower the error of 2x8-g8 by 0.7 %.
        kmeans_vectors: k-means sees a random sample of this many vectors where there are more; the
            refit always sees all. From 2 to 32 vectors an entry cost 1-2.5 % of error.
        kmeans_scores: most vector-centre scores of one codebook's k-means, which caps the rounds of
            wide codebooks (1x16 on a 1024x1024 layer: 4 rounds), at no fewer than three.
        refit_rounds: most rounds of the joint refit.
        tolerance: the refit ends when a round lowers the error by less than this fraction.
        beam: hypotheses of the code search, no effect with one codebook. Error of 4x4-g8 on
            Gaussian weights: .113 at beam 2, .103 at 4, .098 at 8, .095 at 16.
        damping: of a Hessian, as a fraction of its mean diagonal.
        metric_rounds: rounds of k-means in the metric of a Hessian.
        progress: called with a :class:`Progress` after every step of the refit.
    """

    format: AdditiveFormat
    seed: int = 0
    kmeans_rounds: int = 25
    kmeans_vectors: int = 1 << 18
    kmeans_scores: int = 4 * 10**10
    refit_rounds: int = 10
    tolerance: float = 2e-3
    beam: int = 8
    damping: float = 1e-3
    metric_rounds: int = 5
    progress: Callable[[Progress], None] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        for name, least in (
            ("kmeans_rounds", 0),
            ("kmeans_vectors", 1),
            ("kmeans_scores", 1),
            ("refit_rounds", 0),
            ("tolerance", 0),
            ("beam", 1),
            ("damping", 0),
            ("metric_rounds", 0),
        ):
            value = getattr(self, name)
            if not value >= least:
                raise QuantizerError(f"{name}={value} is below {least} ({self.format.id})")

    @torch.no_grad()
    def fit(
        self, weight: torch.Tensor, hessian: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Quantize ``weight`` [N, K]: packed codes, codebooks and scales (float32).

        Values survive a cast to float16 whenever float16 can hold the weight: the gauge between
        codebooks and scales is a power of two that keeps both away from the ends of its range.
        Bitwise the same for the same seed and input on one device. Raises QuantizerError for a
        weight that is not a finite floating [N, K] and for a Hessian that is not a finite [K, K];
        FormatError when N or K does not fit the format.
        """
        check_weight(weight, self.format)
        vectors, exponent = self._vectors(weight.float())
        scales = vectors.double().square().mean((1, 2)).sqrt().float()
        generator = torch.Generator().manual_seed(self.seed)
        if hessian is not None:
            refit = self._calibrate(vectors, scales, hessian, generator)
            return self._canonical(refit, exponent)
        codebooks = self._start(vectors, scales, generator)
        energy = float(vectors.double().square().sum((1, 2)).sum())
        refit = self._run(Refit(vectors, codebooks, scales, self.beam), energy)
        return self._canonical(refit, exponent)

    def _vectors(self, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        """A float32 weight as vectors [O, I, og*ig], times 2^-exponent so that values are <= 1."""
        exponent = math.frexp(weight.abs().amax().item())[1]
        (N, K), og, ig = weight.shape, self.format.out_group_size, self.format.in_group_size
        unit = torch.ldexp(weight.double(), weight.new_tensor(-exponent, dtype=torch.float64))
        groups = unit.float().view(N // og, og, K // ig, ig).permute(0, 2, 1, 3)
        return groups.reshape(N // og, K // ig, og * ig), exponent

    def _sample(
        self, vectors: torch.Tensor, live: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Indices into all vectors [O * I] of those of the ``live`` rows that k-means sees."""
        groups = vectors.shape[1]
        count = len(live) * groups
        sample = torch.arange(count)
        if count > self.kmeans_vectors:
            sample = torch.randperm(count, generator=generator)[: self.kmeans_vectors]
        sample = sample.to(vectors.device)
        return live[sample // groups] * groups + sample % groups

    def _start(
        self, vectors: torch.Tensor, scales: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Codebooks [B, C, d] by residual k-means on the row-normalised non-zero rows."""
        live = (scales > 0).nonzero()[:, 0]
        entries, width = self.format.entries, vectors.shape[2]
        if not len(live):
            return vectors.new_zeros(self.format.num_codebooks, entries, width)
        sample = self._sample(vectors, live, generator)
        row = sample // vectors.shape[1]
        return residual_kmeans(
            vectors.flatten(0, 1)[sample] / scales[row, None],
            scales[row].double().square(),
            self.format.num_codebooks,
            entries,
            self._rounds(len(sample)),
            generator,
        )

    def _rounds(self, count: int) -> int:
        """Rounds of plain k-means on ``count`` vectors."""
        most = max(3, self.kmeans_scores // (count * self.format.entries))
        return min(most, self.kmeans_rounds)

    def _calibrate(
        self,
        vectors: torch.Tensor,
        scales: torch.Tensor,
        hessian: torch.Tensor,
        generator: torch.Generator,
    ) -> CalibratedRefit:
        """Start and refine in the norm of ``hessian``, on the device of ``vectors``."""
        format, og, g = self.format, self.format.out_group_size, self.format.in_group_size
        K = vectors.shape[1] * g
        curvature = regularise(hessian.to(vectors.device), K, self.damping)
        weight = vectors.unflatten(2, (og, g)).transpose(1, 2).reshape(-1, K)
        live = (scales > 0).nonzero()[:, 0]
        if len(live):
            roots = diagonal_blocks(curvature.factor, g)  # of the LDL blocks D_j
            sample = self._sample(vectors, live, generator)
            codebooks, codes = metric_kmeans(
                vectors / torch.where(scales > 0, scales, 1.0)[:, None, None],
                scales,
                roots,
                og,
                format.num_codebooks,
                format.entries,
                plain_rounds=self._rounds(len(sample)),
                metric_rounds=self.metric_rounds,
                sample=sample,
                generator=generator,
            )
        else:
            shape = (format.num_codebooks, format.entries, og * g)
            codebooks = vectors.new_zeros(shape)
            codes = torch.zeros(*vectors.shape[:2], len(codebooks), dtype=torch.int64)
            codes = codes.to(vectors.device)
        matrix = curvature.matrix
        del curvature  # its factor takes 6.6 GB in a 70B model
        refit = CalibratedRefit(weight, matrix, og, codebooks, scales, codes, self.beam, generator)
        return self._run(refit, float(row_losses(weight, matrix).sum()))

    def _run(self, refit: Refit | CalibratedRefit, energy: float) -> Refit | CalibratedRefit:
        """Alternate codebooks, scales and codes until a round gains less than ``tolerance``."""
        energy = energy or 1.0
        self._report("start", 0, refit.error / energy)
        steps = {
            "codebooks": refit.step_codebooks,
            "scales": refit.step_scales,
            "codes": refit.step_codes,
        }
        for round in range(1, self.refit_rounds + 1):
            before = refit.error
            for stage, step in steps.items():
                step()
                self._report(stage, round, refit.error / energy)
            if refit.error >= before * (1 - self.tolerance):
                break
        return refit

    def _report(self, stage: str, round: int, error: float) -> None:
        if self.progress is not None:
            self.progress(Progress(stage, round, error))

    def _canonical(self, refit: Refit | CalibratedRefit, exponent: int) -> dict[str, torch.Tensor]:
        """Packed codes, and values in a gauge where scales are about 2^8 times the codebooks.

        With the largest scale at 2^4 * sqrt(p) and the largest word at 2^-4 * sqrt(p), p their
        product, a weight anywhere in float16's range leaves both in it, and rows far smaller than
        the largest keep their precision.
        """
        codebooks, scales = refit.codebooks.double(), refit.scales.double()
        scales = torch.ldexp(scales, scales.new_tensor(exponent))
        largest, widest = float(scales.abs().max()), float(codebooks.abs().max())
        shift = round(math.log2(largest / widest) / 2) - 4 if largest and widest else 0
        og, ig = self.format.out_group_size, self.format.in_group_size
        return {
            "codes": self.format.pack_codes(refit.codes),
            "codebooks": (codebooks * 2.0**shift).float().unflatten(2, (og, ig)),
            "scales": (scales * 2.0**-shift).float().view(-1, 1, 1, 1),
        }
