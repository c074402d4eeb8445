"""Quantized layers under training: the modules that compute, and the masters behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..layers import QuantLinear
from .representation import Representation, TuningError, represent
from .scalar import GridRepresentation
from .settings import Method
from .surrogates import slope
from .vstep import Choice, Moved, v_step

LARGEST = 1 << 24
"""Most weights of a stack of layers: temporaries of its update are of this size (64 MiB each)."""


class TunedLinear(nn.Module):
    """``y = x Wd^T + bias`` with Wd [N, K], a copy of the dequantized weight in its own dtype."""

    compute_copy = True
    """Marks the module for sharding: its weight is refreshed from masters that are elsewhere."""

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Gathered:
    """The gradient of a parameter that computes, moved out of ``.grad`` microbatch by microbatch.

    Sums of ``several`` are float32, whatever the parameter is.
    """

    def __init__(self, parameter: nn.Parameter, several: bool):
        self.parameter, self.several = parameter, several
        self.sum: torch.Tensor | None = None
        parameter.register_post_accumulate_grad_hook(self._collect)

    def _collect(self, parameter: nn.Parameter) -> None:
        if self.sum is None:
            self.sum = parameter.grad.float() if self.several else parameter.grad
        else:
            self.sum += parameter.grad
        parameter.grad = None

    def take(self) -> torch.Tensor | None:
        found, self.sum = self.sum, None
        return found


@dataclass
class TunedLayer:
    """One quantized layer of the model.

    Attributes:
        module: what the model computes with.
        owner: the rank that has its masters.
        groups: of the code basis.
        stack, place: where the masters are; None on another rank than the owner.
        gathered: the gradient of its weight.
    """

    name: str
    number: int
    layer: QuantLinear
    owner: int = 0
    module: TunedLinear | None = None
    groups: int = 0
    stack: TunedStack | None = None
    place: int = 0
    gathered: Gathered | None = None

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight

    @property
    def codes(self) -> torch.Tensor:
        """[groups, codes a group], of the stack's."""
        return self.stack.rep.codes[self.place]


@dataclass(frozen=True)
class Master:
    """A float32 parameter of the optimiser: of one name, or a stack of several."""

    names: tuple[str, ...]
    parameter: nn.Parameter
    buffer: bool = False
    stacked: bool = False

    def slices(self, state: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """By name the tensors of the parameter, or of optimiser state of its shape."""
        whole = self.parameter.detach() if state is None else state
        if not self.stacked:
            return {self.names[0]: whole}
        return dict(zip(self.names, whole, strict=True))


class TunedStack:
    """Codes, values and buffers of layers of one format and shape, which are updated together.

    Args:
        layers: of one owner; their modules are made here.
        rule: of the method.
        dtype: that they compute in.
        apart: whether each layer is a tensor of its own to the optimiser.

    Attributes:
        rep: codes and values; None once the masters are another rank's.
        buffer: Buf float32 [L, groups, width] in the code basis, or None where codes do not move.
        masters: what the optimiser trains.
        weights: [L, N, K] that the modules compute with, as long as they are not sharded.
    """

    def __init__(self, layers: Sequence[TunedLayer], rule: Method, dtype: torch.dtype, apart: bool):
        self.layers, self.rule = tuple(layers), rule
        first = layers[0]
        self.format, self.owner = first.layer.format, first.owner
        tensors = [{n: t.detach() for n, t in y.layer.tensors().items()} for y in layers]
        self.rep: Representation | None = represent(self.format, tensors, first.name)
        if rule.surrogate and not isinstance(self.rep, GridRepresentation):
            raise TuningError(
                f"{first.name}: {self.format.id} is no scalar grid, which gradients through"
                f" rounding {rule.rounding!r} and clamping {rule.clamp!r} are for"
            )
        with torch.no_grad():
            words = self.rep.decode(self.rep.codes)
            self.weights = self.rep.outer(words).to(dtype).contiguous()  # rotations transpose
        self.buffer = nn.Parameter(words.clone()) if rule.moves_codes else None
        for place, layer in enumerate(layers):
            layer.module = TunedLinear(self.weights[place], layer.layer.bias)
            layer.groups, layer.stack, layer.place = self.rep.groups, self, place
            layer.layer = None
        self._parts = self._make_parts(apart)
        self.masters = [m for parts in self._parts for m in parts[1]]

    def _make_parts(self, apart: bool) -> list[tuple[nn.Parameter, list[Master]]]:
        """Every parameter of the stack with its masters: itself, or views of it."""
        found = []
        held = [(n, p, False) for n, p in self.rep.values.items()]
        held += [] if self.buffer is None else [("buffer", self.buffer, True)]
        for kind, parameter, buffer in held:
            names = tuple(f"{y.name}.{kind}" for y in self.layers)
            masters = [Master(names, parameter, buffer, True)]
            if apart:
                views = zip(names, parameter.detach(), strict=True)
                masters = [Master((n,), nn.Parameter(v), buffer) for n, v in views]
            found.append((parameter, masters))
        return found

    def drop(self) -> None:
        """Forget the masters: another rank owns them."""
        self.rep = self.buffer = None
        self.masters, self._parts = [], []
        for layer in self.layers:
            layer.stack = None

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def spread_gradients(self, gradients: Sequence[torch.Tensor], temperature: float) -> None:
        """``.grad`` of the masters by the chain rule from G of each layer.

        ``temperature`` is that of the sigmoid methods.
        """
        gradient = self.rep.gradients(torch.stack(list(gradients)).float())
        if self.buffer is not None:
            if self.rule.surrogate:
                gradient = self._surrogate(gradient, temperature)
            self.buffer.grad = gradient
        for parameter, masters in self._parts:
            if masters[0].parameter is not parameter:
                for master, part in zip(masters, parameter.grad, strict=True):
                    master.parameter.grad = part

    def forget_gradients(self) -> None:
        for parameter, masters in self._parts:
            parameter.grad = None
            for master in masters:
                master.parameter.grad = None

    @torch.no_grad()
    def _surrogate(self, gradient: torch.Tensor, temperature: float) -> torch.Tensor:
        """dL/dBuf by the slopes of rounding and clamping, and the scales' gradient by them."""
        rep = self.rep
        step, zero = rep.grid()
        x = rep.tiled(self.buffer) / torch.where(step == 0, torch.inf, step)
        rise = slope(x, zero, rep.top, self.rule.rounding, self.rule.clamp, temperature)
        tiles = rep.tiled(gradient)
        scales = rep.values.get("scales")
        if scales is not None:  # dw^/ds = q - x * slope; LSQ's factor keeps it in proportion
            through = (x * rise * tiles).sum(2).view_as(scales)
            scales.grad = (scales.grad - through) / (rep.tile * rep.top) ** 0.5
        return (tiles * rise).view_as(gradient)

    @torch.no_grad()
    def choose_codes(self, choice: Choice, seeds: Sequence[tuple[int, ...]]) -> Moved:
        """The V step and the buffers' decay."""
        moved = v_step(self.rep, self.buffer, choice, seeds, self.buffer.grad)
        decay = self.rule.delta_decay
        if decay == 1:
            self.buffer.copy_(moved.words)
        elif decay:
            self.buffer.lerp_(moved.words, decay)
        return moved

    @torch.no_grad()
    def refresh(self, words: torch.Tensor | None = None) -> None:
        """What computes <- the masters, whose ``words`` these are if they are known."""
        words = self.rep.decode(self.rep.codes) if words is None else words
        self.weights.copy_(self.rep.outer(words))


def stacked(layers: Sequence[TunedLayer]) -> list[list[TunedLayer]]:
    """The layers in groups of one format, shape and owner, of at most ``LARGEST`` weights."""
    groups: dict[tuple, list[list[TunedLayer]]] = {}
    for one in layers:
        rows, columns = one.layer.out_features, one.layer.in_features
        found = groups.setdefault((one.owner, one.layer.format, rows, columns), [[]])
        if found[-1] and (len(found[-1]) + 1) * rows * columns > LARGEST:
            found.append([])
        found[-1].append(one)
    return [group for found in groups.values() for group in found]


def quantized(layer: TunedLayer, bias: torch.Tensor | None, dtype: torch.dtype) -> QuantLinear:
    """The layer as a prepared ``QuantLinear`` with values in ``dtype``, where the format leaves
    the choice."""
    format, (rows, columns) = layer.stack.format, layer.weight.shape
    specs = format.tensor_specs(rows, columns)
    tensors = layer.stack.rep.tensors(layer.place)
    tensors = {n: t.to(specs[n].dtype or dtype) for n, t in tensors.items()}
    bias = None if bias is None else bias.detach().to(dtype)
    return QuantLinear.from_tensors(format, tensors, columns, bias, name=layer.name)
