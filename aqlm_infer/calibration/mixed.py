"""Mixed plans: which of several schemes each layer gets, for an average of so many bits a weight.

Sensitivity of a layer: how much the model's output distribution moves (KL divergence to the dense
one, over a few calibration windows) when Gaussian noise of a known relative size is added to its
weight alone. For small errors that is proportional to the squared error (the linearity argument of
HIGGS, arXiv 2411.17525), so a scheme costs a layer ``sensitivity * error(scheme)``, and the errors
of schemes are measured once, on a Gaussian weight. The plan that minimises the sum under the budget
is found greedily: the upgrade with the largest gain a bit, as long as it fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..formats import Format, parse_scheme
from ..layers import PlanError
from ..quantizers import quantizer_for

NOISE = 0.1
"""Relative size |dW|^2 / |W|^2 of the noise: that of 2 bits a weight."""

SAMPLE = (512, 512)
"""Shape of the Gaussian weight that a scheme's error is measured on."""


@dataclass(frozen=True)
class Choice:
    """A scheme for a layer: its bits in all, and the divergence that it is expected to cost."""

    scheme: str
    bits: float
    cost: float


def scheme_errors(schemes: Sequence[str], seed: int) -> dict[str, float]:
    """Relative squared error of each scheme on one Gaussian weight, in the plain norm."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SAMPLE, generator=generator)
    errors = {}
    for scheme in schemes:
        format = parse_scheme(scheme)
        tensors = quantizer_for(format, seed=seed).fit(weight, torch.eye(SAMPLE[1]))
        wrong = format.dequantize(tensors, torch.float32) - weight
        errors[scheme] = float(wrong.square().sum() / weight.square().sum())
    return errors


@torch.no_grad()
def sensitivities(
    model: nn.Module,
    names: Sequence[str],
    windows: torch.Tensor,
    seed: int,
    progress: bool = False,
) -> dict[str, float]:
    """KL divergence, nats a token, that one unit of relative squared error in each layer costs.

    ``model`` is dense, on its device, and is left as it was; ``windows`` [n, tokens] run at once.
    Raises PlanError when the model's logits are not finite.
    """
    windows = windows.to(next(model.parameters()).device)
    generator = torch.Generator().manual_seed(seed)
    dense = F.log_softmax(model(input_ids=windows, use_cache=False).logits.float(), -1)
    if not bool(torch.isfinite(dense).all()):
        raise PlanError("the dense model's logits are not finite: no sensitivity can be measured")
    found = {}
    for name in tqdm(names, desc="sensitivity", unit="layer", disable=not progress):
        weight = model.get_submodule(name).weight
        kept = weight.clone()
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        noise *= (NOISE**0.5) * float(kept.float().norm()) / float(noise.norm())
        weight.copy_((kept.float() + noise).to(kept.dtype))
        moved = F.log_softmax(model(input_ids=windows, use_cache=False).logits.float(), -1)
        weight.copy_(kept)
        divergence = F.kl_div(moved, dense, reduction="none", log_target=True).sum(-1).mean()
        found[name] = max(0.0, float(divergence)) / NOISE
    return found


def choices(
    shapes: Mapping[str, tuple[int, int]],
    schemes: Sequence[str],
    sensitivity: Mapping[str, float],
    errors: Mapping[str, float],
) -> dict[str, list[Choice]]:
    """What each layer may become, cheapest in bits first; PlanError when a layer fits no scheme."""
    formats: dict[str, Format] = {scheme: parse_scheme(scheme) for scheme in schemes}
    table = {}
    for name, (N, K) in shapes.items():
        found = [
            Choice(s, N * K * f.bits_per_weight(N, K), sensitivity[name] * errors[s])
            for s, f in formats.items()
            if f.why_not_shape(N, K) is None
        ]
        if not found:
            raise PlanError(f"{name}: none of {', '.join(schemes)} fits N={N}, K={K}")
        table[name] = sorted(found, key=lambda c: c.bits)
    return table


def best_plan(table: Mapping[str, list[Choice]], weights: int, target: float) -> dict[str, str]:
    """The scheme of each layer, at most ``target`` bits a weight on average over ``weights``.

    Raises PlanError when even the smallest choices exceed the target.
    """
    chosen = {name: options[0] for name, options in table.items()}
    spent = sum(choice.bits for choice in chosen.values())
    if spent > target * weights:
        raise PlanError(
            f"target of {target:g} bits: the smallest choices already take {spent / weights:.3f}"
        )
    while True:
        best, gain = None, 0.0
        for name, options in table.items():
            now = chosen[name]
            for option in options:
                extra = option.bits - now.bits
                saved = now.cost - option.cost
                fits = spent + extra <= target * weights
                if extra > 0 and fits and saved / extra > gain:
                    best, gain = (name, option), saved / extra
        if best is None:
            return {name: choice.scheme for name, choice in chosen.items()}
        name, option = best
        spent += option.bits - chosen[name].bits
        chosen[name] = option
