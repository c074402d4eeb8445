"""Block fine-tuning: a quantized block's values trained towards the dense block's outputs.

Codes stay; codebooks, scales, sign vectors, norms and biases move, in float32, by Adam on the mean
squared error. Held-out windows decide when to stop and which values to keep; the values before the
first step are one of the candidates, so tuning never makes a block worse on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..formats import Format
from ..training.modes import reproducible
from .stream import BlockStream

TOKENS = 4096
"""Most tokens that run through a block at once: in float32, with all that their gradients need,
4096 take 3.5 GB in a block of Llama-3-70B."""

RESIDENT = 1 << 31
"""Most bytes of inputs and targets that stay on the device; else every step fetches its windows."""

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
        ahead: dense blocks after the tuned one that its outputs pass through before they are
            compared; fewer at the end of the model.
        per_token: errors count relative to the energy of each token rather than of all: what the
            next block's norm makes of them.
    """

    epochs: int = 5
    batch: int = 8
    codebook_rate: float = 3e-2
    rate: float = 3e-3
    held_out: float = 0.125
    patience: int = 2
    ahead: int = 0
    per_token: bool = False


@dataclass(frozen=True)
class TuneReport:
    """Error of the outputs on the held-out windows, as the loss counts it."""

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

    def decode(self, name: str) -> torch.Tensor:
        """The weight of a layer, as a function of the parameters."""
        format, _ = self.layers[name]
        return format.dequantize(self.tensors(name), torch.float32)

    @torch.no_grad()
    def weights(self) -> dict[str, torch.Tensor]:
        """Every tensor that the block computes with."""
        return {**{f"{name}.weight": self.decode(name) for name in self.layers}, **self.plain()}

    def backward(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Carry the gradients of ``weights`` to the parameters, one layer's graph at a time."""
        for name in self.layers:
            if f"{name}.weight" in gradients:
                self.decode(name).backward(gradients[f"{name}.weight"])
        for name, value in self.plain().items():
            if name in gradients:
                value.backward(gradients[name])


class BlockTuner:
    """Trains a :class:`TunedBlock` so that block ``index``, and the dense blocks ``following`` it,
    map ``inputs`` to ``targets`` [windows, tokens, D].

    ``batch`` windows at most run at once; gradients add up over ``options.batch``.
    """

    def __init__(
        self,
        stream: BlockStream,
        index: int,
        tuned: TunedBlock,
        following: Sequence[nn.Module],
        inputs: torch.Tensor,
        targets: torch.Tensor,
        options: TuneOptions,
        batch: int,
    ):
        self.stream, self.index, self.tuned, self.following = stream, index, tuned, following
        small = inputs.nbytes + targets.nbytes <= RESIDENT
        self.inputs, self.targets = (t.to(stream.device) if small else t for t in (inputs, targets))
        self.options = options
        most = min(batch, max(1, TOKENS // inputs.shape[1]))
        self.batch = max(n for n in range(1, most + 1) if options.batch % n == 0)

    def train(self, seed: int, progress: Callable[[int, float], None] | None = None) -> TuneReport:
        """Train with a learning rate that falls to zero as a cosine; ``progress`` gets the epoch
        and the held-out error. A loss that is not finite ends the training. The best values are
        kept."""
        options, count = self.options, len(self.inputs)
        held = max(1, round(options.held_out * count))
        train, check = torch.arange(count - held), torch.arange(count - held, count)
        generator = torch.Generator().manual_seed(seed)
        best = first = self.error(check)
        kept, stale, epochs = _copy(self.tuned), 0, 0
        steps = max(1, options.epochs * -(-len(train) // options.batch))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.tuned.optimizer, steps)
        for _ in range(options.epochs):
            epochs += 1
            finite = True
            for group in train[torch.randperm(len(train), generator=generator)].split(
                options.batch
            ):
                finite = finite and self.step(group)
                schedule.step()
            error = self.error(check)
            if not (finite and math.isfinite(error)):
                break
            if progress is not None:
                progress(epochs, error)
            if error < best:
                best, kept, stale = error, _copy(self.tuned), 0
            else:
                stale += 1
                if stale >= options.patience:
                    break
        with torch.no_grad():
            for name, value in kept.items():
                self.tuned.parameters[name].copy_(value)
        return TuneReport(first, best, epochs)

    def step(self, group: torch.Tensor) -> bool:
        """One optimizer step on the windows ``group``; False when its loss was not finite.

        The gradients of the decoded weights add up over the batches and then flow back at once.
        """
        leaves = {name: w.requires_grad_() for name, w in self.tuned.weights().items()}
        total = torch.zeros((), device=self.stream.device)
        for part in group.split(self.batch):
            with reproducible(self.stream.device):
                loss = self._loss(leaves, part) * (len(part) / len(group))
                loss.backward()
            total += loss.detach()
        if not bool(torch.isfinite(total)):
            return False
        self.tuned.optimizer.zero_grad()
        with reproducible(self.stream.device):
            self.tuned.backward({n: w.grad for n, w in leaves.items() if w.grad is not None})
        self.tuned.optimizer.step()
        return True

    @torch.no_grad()
    def error(self, windows: torch.Tensor) -> float:
        """Mean loss over ``windows``."""
        weights = self.tuned.weights()
        parts = windows.split(self.batch)
        losses = [self._loss(weights, part).double() * len(part) for part in parts]
        return float(torch.stack(losses).sum()) / len(windows)

    def _loss(self, weights: Mapping[str, torch.Tensor], windows: torch.Tensor) -> torch.Tensor:
        """Squared error of the outputs over their energy, of each token or of all ``windows``."""

        def block(*args, **kwargs):
            return torch.func.functional_call(self.tuned.block, weights, args, kwargs)

        device = self.stream.device
        hidden, target = (t[windows].to(device).float() for t in (self.inputs, self.targets))
        for step, module in enumerate((block, *self.following)):
            hidden = self.stream.run(self.index + step, module, hidden)
        wrong = (hidden.float() - target).square().mean(2)
        energy = target.square().mean(2)
        if not self.options.per_token:
            energy = energy.mean()
        return (wrong / energy.clamp_min(1e-30)).mean()


def _copy(tuned: TunedBlock) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in tuned.parameters.items()}
