"""The V step: new codes for the groups that matter most, within a trust region.

    delta = |Buf - What| of each group, What decoded with the new values
    1  choose k = ceil(max_code_change * groups) groups by score, the largest first, ties by number
    2  search new codes for them towards Buf; a code changes only where |Buf - word| falls
    3  keep, in that order, the changes that together stay within trust_ratio * |What|, and one more

A step may therefore always change one group. Nothing here waits for the device: the numbers that a
step reports stay tensors. Sums over groups that decide something are sums of integers, so the same
groups are chosen in any order of summation.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from .representation import Representation
from .settings import Method

UNIT = 1 << 36
"""The trust region's budget in the fixed-point sums: one group of 2^25 can be off by 2^-37 each."""


@dataclass(frozen=True)
class Choice:
    """How the V step of one tensor chooses: see ``Method`` and ``TuneSettings``."""

    max_code_change: float = 1.0
    trust_ratio: float = 0.0
    temperature: float = 0.0
    ranking: str = "residual"
    beam: int = 1
    stochastic: bool = False
    rounding_temperature: float = 1.0

    @classmethod
    def of(cls, settings) -> Choice:
        """What ``TuneSettings`` ask for."""
        rule: Method = settings.rule
        return cls(
            rule.max_code_change,
            rule.trust_ratio,
            settings.temperature,
            settings.ranking,
            settings.beam,
            rule.stochastic,
            settings.rounding_temperature,
        )


@dataclass(frozen=True)
class Moved:
    """What a V step did, as tensors of no dimension: squares of norms in the code basis."""

    flips: torch.Tensor
    """Groups whose codes changed."""
    moved: torch.Tensor
    """|What after - What before|^2."""
    residual: torch.Tensor
    """|Buf - What before|^2."""
    size: torch.Tensor
    """|What before|^2."""


def seeded(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator of its own for (seed, step, tensor): a resumed run draws the same."""
    return torch.Generator(device).manual_seed(random.Random(repr(numbers)).getrandbits(62))


@torch.no_grad()
def v_step(
    rep: Representation,
    buffer: torch.Tensor,
    choice: Choice,
    seed: tuple[int, ...] = (0,),
    gradient: torch.Tensor | None = None,
) -> Moved:
    """Re-encode ``rep`` towards ``buffer`` [groups, width], in place.

    ``gradient`` [groups, width], in the code basis, is needed by the ranking "gain". ``seed``
    names the draw, where something is sampled.
    """
    before = rep.decode(rep.codes)
    order = list(range(rep.books))
    random.Random(repr(seed)).shuffle(order)
    if choice.stochastic:
        codes, better = _at_random(rep, buffer, before, choice, tuple(order), seed)
        index = None
    elif choice.ranking == "residual" and choice.max_code_change < 1:
        score = (buffer - before).square().sum(1)
        index = largest(score, _limit(rep, choice), choice.temperature, seed)
        codes = rep.search(buffer[index], index, choice.beam, tuple(order))
        better = _improves(rep, codes, index, buffer[index], before[index])
    else:
        codes = rep.search(buffer, None, choice.beam, tuple(order))
        better = _improves(rep, codes, None, buffer, before)
        index = None
        if choice.max_code_change < 1 or choice.trust_ratio:
            index = _ranked(rep, codes, better, buffer, before, gradient, choice, seed)
            codes, better = codes[index], better[index]
    old = before if index is None else before[index]
    moved = (rep.decode(codes, index) - old).double().square().sum(1) * better
    size = torch.linalg.vector_norm(before, dtype=torch.float64).square()
    if choice.trust_ratio:
        better = better & within(moved, choice.trust_ratio**2 * size)
        moved = moved * better
    held = rep.codes if index is None else rep.codes[index]
    codes = torch.where(better[:, None], codes, held)
    flips = (codes != held).any(1).sum()
    if index is None:
        rep.codes = codes
    else:
        rep.codes[index] = codes
    residual = torch.linalg.vector_norm(buffer - before, dtype=torch.float64).square()
    return Moved(flips, moved.sum(), residual, size)


def _limit(rep: Representation, choice: Choice) -> int:
    """Most groups that may change. The tolerance undoes the rounding of products like .07 * 100."""
    return max(1, math.ceil(choice.max_code_change * rep.groups * (1 - 1e-12)))


def _improves(
    rep: Representation,
    codes: torch.Tensor,
    index: torch.Tensor | None,
    targets: torch.Tensor,
    before: torch.Tensor,
) -> torch.Tensor:
    """Where new codes are strictly nearer to the targets than the old words."""
    error = (targets - rep.decode(codes, index)).square().sum(1)
    return error < (targets - before).square().sum(1)


def _ranked(
    rep: Representation,
    codes: torch.Tensor,
    better: torch.Tensor,
    buffer: torch.Tensor,
    before: torch.Tensor,
    gradient: torch.Tensor | None,
    choice: Choice,
    seed: tuple[int, ...],
) -> torch.Tensor:
    """The chosen groups of a search over all of them, int64, best first."""
    if choice.ranking == "residual":
        score = (buffer - before).square().sum(1)
    else:
        change = rep.decode(codes) - before
        along = -gradient if choice.ranking == "gain" else change
        score = torch.where(better, (along * change).sum(1), -torch.inf)
    return largest(score, _limit(rep, choice), choice.temperature, seed)


def _at_random(
    rep: Representation,
    buffer: torch.Tensor,
    before: torch.Tensor,
    choice: Choice,
    order: tuple[int, ...],
    seed: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One of the two nearest words each, the farther with probability 1/(1 + (e2/e1)^(1/T)).

    e1 <= e2 are their distances: a target on a word stays there, and on a scalar grid the
    expectation at T = 1 is the target. Returns (codes, where they are to be taken: everywhere).
    """
    pair = rep.two_nearest(buffer, choice.beam, order)
    first, second = ((buffer - rep.decode(codes)).square().sum(1).sqrt() for codes in pair)
    odds = (second / first) ** (1 / choice.rounding_temperature)  # inf where first is 0
    draw = torch.rand(len(buffer), device=buffer.device, generator=seeded(buffer.device, *seed))
    farther = draw < 1 / (1 + odds)
    codes = torch.where(farther[:, None], pair[1], pair[0])
    return codes, torch.ones_like(farther)


def largest(
    score: torch.Tensor, count: int, temperature: float = 0.0, seed: tuple[int, ...] = (0,)
) -> torch.Tensor:
    """Indices of the ``count`` largest of float32 ``score`` [n], largest first, ties by index.

    ``temperature`` T > 0 samples them without replacement instead, with probabilities proportional
    to score^(1/2T) (a score is a square), by adding Gumbel noise to the logarithms.
    """
    if temperature:
        noise = torch.rand(len(score), device=score.device, generator=seeded(score.device, *seed))
        gumbel = -torch.log(-torch.log(noise.clamp(1e-30, 1 - 2**-24)))
        score = score.clamp_min(0).log() / (2 * temperature) + gumbel
    bits = score.float().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the floats' order as that of integers
    number = torch.arange(len(score), device=score.device)
    key = (ordered.long() << 32) | (0xFFFFFFFF - number)
    return 0xFFFFFFFF - (key.topk(count).values & 0xFFFFFFFF)


def within(moved: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Mask of the leading ``moved`` [k] (squares) whose sum is within ``budget``, and one more."""
    share = (moved / budget.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=2.0)
    units = (share * UNIT).round().long()
    return units.cumsum(0) - units <= UNIT
