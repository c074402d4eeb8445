"""Block fine-tuning: a quantized block's values trained towards the dense block's outputs.

Codes stay; codebooks, scales, sign vectors, norms and biases move, in float32, by Adam on the mean
squared error. Held-out windows decide when to stop and which values to keep; the values before the
first step are one of the candidates, so tuning never makes a block worse on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..formats import Format
from ..training.modes import reproducible
from .stream import BlockStream

TRAINED = {"codebooks": "codebooks", "scales": "others", "SU": "others", "SV": "others"}
"""Canonical tensors that train, and whose learning rate they take."""


@dataclass(frozen=True)
class TuneOptions:
    """Settings of block fine-tuning.

    Args:
        epochs: most passes over the training windows.
        batch: windows an optimizer step.
        codebook_rate: learning rate of codebooks, as a fraction of their root mean square.
        rate: the same, of scales, sign vectors, norms and biases.
        held_out: fraction of the windows that validate.
        patience: epochs without improvement before it ends.
    """

    epochs: int = 5
    batch: int = 8
    codebook_rate: float = 3e-2
    rate: float = 3e-3
    held_out: float = 0.125
    patience: int = 2


@dataclass(frozen=True)
class TuneReport:
    """Mean squared error on the held-out windows, over that of their mean square."""

    before: float
    after: float
    epochs: int


class TunedBlock:
    """The trainable values of a block, each divided by its root mean square.

    Args:
        block: its linear layers dense; norms and biases are taken from it.
        layers: {layer name: (format, canonical tensors)}.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: Mapping[str, tuple[Format, Mapping[str, torch.Tensor]]],
        options: TuneOptions,
    ):
        self.block, self.layers = block, layers
        self.parameters: dict[str, nn.Parameter] = {}
        self._units: dict[str, float] = {}
        rates: dict[str, list] = {"codebooks": [], "others": []}
        inputs: list[str] = []  # SU vectors seen: layers with equal ones keep sharing a rotation
        for name, (_, tensors) in layers.items():
            for key, kind in TRAINED.items():
                if key not in tensors:
                    continue
                twin = self._twin(inputs, tensors[key]) if key == "SU" else None
                own = f"{name}.{key}"
                if twin is not None:
                    self.parameters[own] = self.parameters[twin]
                    self._units[own] = self._units[twin]
                    continue
                rates[kind].append(self._add(own, tensors[key]))
                if key == "SU":
                    inputs.append(own)
        for name, parameter in block.named_parameters():
            layer, _, leaf = name.rpartition(".")
            if (layer not in layers or leaf == "bias") and parameter.dim() == 1:
                rates["others"].append(self._add(name, parameter))
        self.optimizer = torch.optim.Adam(
            [
                {"params": rates["codebooks"], "lr": options.codebook_rate},
                {"params": rates["others"], "lr": options.rate},
            ],
            betas=(0.9, 0.95),
        )

    def _twin(self, names: list[str], value: torch.Tensor) -> str | None:
        """The name among ``names`` whose tensor equals ``value``."""
        for name in names:
            layer, _, key = name.rpartition(".")
            if torch.equal(self.layers[layer][1][key], value):
                return name
        return None

    def _add(self, name: str, value: torch.Tensor) -> nn.Parameter:
        value = value.detach().float()
        unit = float(value.square().mean().sqrt()) or 1.0
        self._units[name] = unit
        self.parameters[name] = nn.Parameter(value / unit)
        return self.parameters[name]

    def value(self, name: str) -> torch.Tensor:
        """A trained tensor in its own units, float32."""
        return self.parameters[name] * self._units[name]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Canonical tensors of a layer with the trained values in them."""
        _, tensors = self.layers[name]
        return {
            key: self.value(f"{name}.{key}") if f"{name}.{key}" in self.parameters else tensor
            for key, tensor in tensors.items()
        }

    def plain(self) -> dict[str, torch.Tensor]:
        """The trained norms and biases by their names in the block."""
        own = dict(self.block.named_parameters())
        return {name: self.value(name) for name in self.parameters if name in own}

    def weights(self) -> dict[str, torch.Tensor]:
        """Every tensor that the block computes with, as a function of the parameters."""
        decoded = {
            f"{name}.weight": format.dequantize(self.tensors(name), torch.float32)
            for name, (format, _) in self.layers.items()
        }
        return {**decoded, **self.plain()}


def tune_block(
    stream: BlockStream,
    index: int,
    tuned: TunedBlock,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    options: TuneOptions,
    *,
    batch: int,
    seed: int,
) -> TuneReport:
    """Train ``tuned`` so that block ``index`` maps ``inputs`` to ``targets`` [windows, tokens, D].

    ``batch`` windows run at once, gradients add up over ``options.batch``. The learning rate falls
    linearly to a tenth. A loss that is not finite ends the training. ``tuned`` holds the best
    values afterwards.
    """
    held = max(1, round(options.held_out * len(inputs)))
    train = torch.arange(len(inputs) - held)
    check = torch.arange(len(inputs) - held, len(inputs))
    batch = math.gcd(batch, options.batch)
    generator = torch.Generator().manual_seed(seed)
    energy = float(targets[check].float().square().mean()) or 1.0
    best = first = _validate(stream, index, tuned, inputs, targets, check, batch) / energy
    kept, stale, epochs = _copy(tuned), 0, 0
    steps = max(1, options.epochs * -(-len(train) // options.batch))
    schedule = torch.optim.lr_scheduler.LinearLR(tuned.optimizer, 1.0, 0.1, steps)
    for _ in range(options.epochs):
        epochs += 1
        order = train[torch.randperm(len(train), generator=generator)]
        finite = True
        for group in order.split(options.batch):
            finite = finite and _step(stream, index, tuned, inputs, targets, group, batch)
            schedule.step()
        error = _validate(stream, index, tuned, inputs, targets, check, batch) / energy
        if not (finite and math.isfinite(error)):
            break
        if error < best:
            best, kept, stale = error, _copy(tuned), 0
        else:
            stale += 1
            if stale >= options.patience:
                break
    with torch.no_grad():
        for name, value in kept.items():
            tuned.parameters[name].copy_(value)
    return TuneReport(first, best, epochs)


def _copy(tuned: TunedBlock) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in tuned.parameters.items()}


def _call(stream: BlockStream, index: int, tuned: TunedBlock, weights, hidden) -> torch.Tensor:
    def block(*args, **kwargs):
        return torch.func.functional_call(tuned.block, weights, args, kwargs)

    return stream.run(index, block, hidden).float()


def _step(stream, index, tuned, inputs, targets, group, batch: int) -> bool:
    """One optimizer step on the windows ``group``; False when its loss was not finite.

    Weights are decoded once; their gradients add up over the batches and then flow back at once.
    """
    weights = tuned.weights()
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    finite = True
    for part in group.split(batch):
        hidden = inputs[part].to(stream.device).float()
        target = targets[part].to(stream.device).float()
        with reproducible(stream.device):
            loss = F.mse_loss(_call(stream, index, tuned, leaves, hidden), target)
            (loss * (len(part) / len(group) / target.square().mean().clamp_min(1e-30))).backward()
        finite = finite and bool(torch.isfinite(loss))
    if not finite:
        return False
    tuned.optimizer.zero_grad()
    used = [name for name, leaf in leaves.items() if leaf.grad is not None]
    with reproducible(stream.device):
        torch.autograd.backward([weights[n] for n in used], [leaves[n].grad for n in used])
    tuned.optimizer.step()
    return True


@torch.no_grad()
def _validate(stream, index, tuned, inputs, targets, check, batch: int) -> float:
    """Mean squared error over the windows ``check``."""
    weights, total = tuned.weights(), 0.0
    for part in check.split(batch):
        out = _call(stream, index, tuned, weights, inputs[part].to(stream.device).float())
        wrong = out - targets[part].to(stream.device).float()
        total += float(wrong.double().square().mean()) * len(part)
    return total / len(check)
