"""One quantized layer under training: the module that computes, and the masters behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..layers import QuantLinear
from .representation import Representation, TuningError, represent
from .scalar import GridRepresentation
from .settings import Method
from .surrogates import slope
from .vstep import Choice, Moved, v_step


class TunedLinear(nn.Module):
    """``y = x Wd^T + bias`` with Wd [N, K], a copy of the dequantized weight in its own dtype."""

    compute_copy = True
    """Marks the module for sharding: its weight is refreshed from masters that are elsewhere."""

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class TunedLayer:
    """Codes, values and buffer of one layer.

    Attributes:
        module: what the model computes with.
        rep: codes and values; None on a rank that does not own the layer.
        buffer: Buf float32 [groups, width] in the code basis, or None where codes do not move.
        gradient: dL/dWd [N, K] of the microbatches so far.
        groups: of the code basis.
    """

    def __init__(self, layer: QuantLinear, name: str, rule: Method, dtype: torch.dtype):
        tensors = {n: t.detach() for n, t in layer.tensors().items()}
        self.name, self.format, self.rule = name, layer.format, rule
        self.rep: Representation | None = represent(layer.format, tensors, name)
        if rule.surrogate and not isinstance(self.rep, GridRepresentation):
            raise TuningError(
                f"{name}: {layer.format.id} is no scalar grid, which gradients through rounding"
                f" {rule.rounding!r} and clamping {rule.clamp!r} are for"
            )
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.groups = self.rep.groups
        weight = self.rep.weight().detach().to(dtype).contiguous()  # rotations leave a transpose
        self.module = TunedLinear(weight, layer.bias)
        self.buffer = None
        if rule.moves_codes:
            self.buffer = nn.Parameter(self.rep.decode(self.rep.codes).clone())
        self.gradient: torch.Tensor | None = None

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight

    def drop(self) -> None:
        """Forget the masters: another rank owns them."""
        self.rep = self.buffer = None

    def collect_gradient(self, several: bool) -> None:
        """Move each microbatch's gradient out of ``weight.grad``; sums of several are float32."""

        def collect(weight: nn.Parameter) -> None:
            if self.gradient is None:
                self.gradient = weight.grad.float() if several else weight.grad
            else:
                self.gradient += weight.grad
            weight.grad = None

        self.weight.register_post_accumulate_grad_hook(collect)

    def spread_gradient(self, temperature: float) -> None:
        """Chain rule from the collected G: ``.grad`` of the values and of the buffer.

        ``temperature`` is that of the sigmoid methods.
        """
        gradient = self.rep.gradients(self.gradient.float())
        self.gradient = None
        if self.buffer is None:
            return
        if self.rule.surrogate:
            gradient = self._surrogate(gradient, temperature)
        self.buffer.grad = gradient

    @torch.no_grad()
    def _surrogate(self, gradient: torch.Tensor, temperature: float) -> torch.Tensor:
        """dL/dBuf by the slopes of rounding and clamping, and the scales' gradient by them."""
        step, zero = self.rep.grid()
        x = torch.where(step == 0, 0.0, self.buffer / torch.where(step == 0, 1.0, step))
        rise = slope(x, zero, self.rep.top, self.rule.rounding, self.rule.clamp, temperature)
        scales = self.rep.values.get("scales")
        if scales is not None:  # dw^/ds = q - x * slope; LSQ's factor keeps it in proportion
            size = self.format.group_size
            through = (x * rise * gradient).view(*scales.shape, size).sum(2)
            scales.grad = (scales.grad - through) / (size * self.rep.top) ** 0.5
        return gradient * rise

    @torch.no_grad()
    def choose_codes(self, choice: Choice, seed: tuple[int, ...]) -> Moved:
        """The V step and the buffer's decay."""
        moved = v_step(self.rep, self.buffer, choice, seed, self.buffer.grad)
        if self.rule.delta_decay:
            self.buffer.lerp_(self.rep.decode(self.rep.codes), self.rule.delta_decay)
        return moved


def quantized(layer: TunedLayer, dtype: torch.dtype) -> QuantLinear:
    """The layer as a prepared ``QuantLinear`` with values in ``dtype``, where the format leaves
    the choice."""
    specs = layer.format.tensor_specs(layer.out_features, layer.in_features)
    tensors = {n: t.to(specs[n].dtype or dtype) for n, t in layer.rep.tensors().items()}
    bias = layer.module.bias
    bias = None if bias is None else bias.detach().to(dtype)
    return QuantLinear.from_tensors(layer.format, tensors, layer.in_features, bias, name=layer.name)
