"""The V step: new codes for the groups that matter most, within a trust region.

    delta = |Buf - What| of each group, What decoded with the new values
    1  choose k = ceil(max_code_change * groups) groups by score, the largest first, ties by number
    2  search new codes for them towards Buf; a code changes only where |Buf - word| falls
    3  keep, in that order, the changes that together stay within trust_ratio * |What|, and one more

A step may therefore always change one group. Nothing here waits for the device: the numbers that a
step reports stay tensors. Sums over groups that decide something are sums of integers, so the same
groups are chosen in any order of summation. A representation is of several tensors: each has its
own limits, and every number of it is in a row of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .representation import Representation, taken
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
    """What a V step did, tensors [L] but for the words: squares of norms in the code basis."""

    flips: torch.Tensor
    """Groups whose codes changed."""
    moved: torch.Tensor
    """|What after - What before|^2."""
    residual: torch.Tensor
    """|Buf - What before|^2."""
    size: torch.Tensor
    """|What before|^2."""
    words: torch.Tensor | None
    """What after, [L, groups, width]; None once it is used."""


def seeded(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator of its own for (seed, step, tensor): a resumed run draws the same."""
    return torch.Generator(device).manual_seed(random.Random(repr(numbers)).getrandbits(62))


def uniform(device: torch.device, count: int, seeds: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Random numbers in 0..1 [L, count], a row from each seed."""
    rows = [torch.rand(count, device=device, generator=seeded(device, *seed)) for seed in seeds]
    return torch.stack(rows)


def orders(
    books: int, seeds: Sequence[tuple[int, ...]], device: torch.device
) -> torch.Tensor | None:
    """A shuffle of the codebooks from each seed, [L, books]; None where there is one."""
    if books == 1:
        return None
    rows = [list(range(books)) for _ in seeds]
    for row, seed in zip(rows, seeds, strict=True):
        random.Random(repr(seed)).shuffle(row)
    found = torch.tensor(rows)
    if device.type == "cuda":  # a copy from other memory would wait for all that was launched
        found = found.pin_memory()
    return found.to(device, non_blocking=True)


@torch.no_grad()
def v_step(
    rep: Representation,
    buffer: torch.Tensor,
    choice: Choice,
    seeds: Sequence[tuple[int, ...]],
    gradient: torch.Tensor | None = None,
) -> Moved:
    """Re-encode ``rep`` towards ``buffer`` [L, groups, width], in place.

    ``gradient`` [L, groups, width], in the code basis, is needed by the ranking "gain". ``seeds``
    name the draws of each tensor, where something is sampled.
    """
    before = rep.decode(rep.codes)
    pending = (buffer - before).square().sum(2)  # [L, groups]
    order = orders(rep.books, seeds, buffer.device)
    index = None
    if choice.stochastic:
        codes, better = _at_random(rep, buffer, choice, order, seeds)
    elif choice.ranking == "residual" and choice.max_code_change < 1:
        index = largest(pending, _limit(rep, choice), choice.temperature, seeds)
        targets = taken(buffer, index)
        codes = rep.search(targets, index, choice.beam, order)
        better = _improves(rep, codes, index, targets, pending)
    else:
        codes = rep.search(buffer, None, choice.beam, order)
        better = _improves(rep, codes, None, buffer, pending)
        if choice.max_code_change < 1 or choice.trust_ratio:
            score = pending
            if choice.ranking != "residual":
                change = rep.decode(codes) - before
                along = -gradient if choice.ranking == "gain" else change
                score = torch.where(better, (along * change).sum(2), -torch.inf)
            index = largest(score, _limit(rep, choice), choice.temperature, seeds)
            codes, better = taken(codes, index), better.gather(1, index)
    words = rep.decode(codes, index)
    moved = (words - taken(before, index)).double().square().sum(2) * better
    size = torch.linalg.vector_norm(before, dim=(1, 2), dtype=torch.float64).square()
    if choice.trust_ratio:
        better = better & within(moved, choice.trust_ratio**2 * size)
        moved = moved * better
    held = taken(rep.codes, index)
    codes = torch.where(better[..., None], codes, held)
    words = torch.where(better[..., None], words, taken(before, index))
    flips = (codes != held).any(2).sum(1)
    if index is None:
        rep.codes.copy_(codes)
    else:
        rep.codes.scatter_(1, index[..., None].expand_as(codes), codes)
        words = before.scatter_(1, index[..., None].expand_as(words), words)
    return Moved(flips, moved.sum(1), pending.sum(1, dtype=torch.float64), size, words)


def _limit(rep: Representation, choice: Choice) -> int:
    """Most groups that may change. The tolerance undoes the rounding of products like .07 * 100."""
    return max(1, math.ceil(choice.max_code_change * rep.groups * (1 - 1e-12)))


def _improves(
    rep: Representation,
    codes: torch.Tensor,
    index: torch.Tensor | None,
    targets: torch.Tensor,
    pending: torch.Tensor,
) -> torch.Tensor:
    """Where new codes are strictly nearer to the targets than the old words, ``pending`` off."""
    error = (targets - rep.decode(codes, index)).square().sum(2)
    return error < (pending if index is None else pending.gather(1, index))


def _at_random(
    rep: Representation,
    buffer: torch.Tensor,
    choice: Choice,
    order: torch.Tensor | None,
    seeds: Sequence[tuple[int, ...]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One of the two nearest words each, the farther with probability 1/(1 + (e2/e1)^(1/T)).

    e1 <= e2 are their distances: a target on a word stays there, and on a scalar grid the
    expectation at T = 1 is the target. Returns (codes, where they are to be taken: everywhere).
    """
    pair = rep.two_nearest(buffer, choice.beam, order)
    first, second = ((buffer - rep.decode(codes)).square().sum(2).sqrt() for codes in pair)
    odds = (second / first) ** (1 / choice.rounding_temperature)  # inf where first is 0
    farther = uniform(buffer.device, rep.groups, seeds) < 1 / (1 + odds)
    codes = torch.where(farther[..., None], pair[1], pair[0])
    return codes, torch.ones_like(farther)


def largest(
    score: torch.Tensor,
    count: int,
    temperature: float = 0.0,
    seeds: Sequence[tuple[int, ...]] = (),
) -> torch.Tensor:
    """Indices [L, count] of the largest of float32 ``score`` [L, n], in order, ties by index.

    ``temperature`` T > 0 samples them without replacement instead, with probabilities proportional
    to score^(1/2T) (a score is a square), by adding Gumbel noise to the logarithms.
    """
    if temperature:
        noise = uniform(score.device, score.shape[1], seeds).clamp(1e-30, 1 - 2**-24)
        score = score.clamp_min(0).log() / (2 * temperature) - torch.log(-torch.log(noise))
    bits = score.float().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the floats' order as that of integers
    number = torch.arange(score.shape[1], device=score.device)
    key = (ordered.long() << 32) | (0xFFFFFFFF - number)
    return 0xFFFFFFFF - (key.topk(count).values & 0xFFFFFFFF)


def within(moved: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Mask of the leading ``moved`` [L, k] (squares) whose sum is within ``budget`` [L], and one
    more of each row."""
    share = (moved / budget.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).clamp(max=2.0)
    units = (share * UNIT).round().long()
    return units.cumsum(1) - units <= UNIT
