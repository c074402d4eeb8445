"""Sibling layers that read one input, as one launch: q, k and v; gate and up.

Their rows are stacked: one packed buffer, one matmul, and a slice of its result for each. Additive
layers keep a codebook set each (the operators' ``partitions``). The parts stay in the places of the
layers they stand for, write the same ``state_dict``, and :func:`unstack` brings the layers back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..backends import Problem, select
from ..formats import AdditiveFormat, ScalarFormat
from ..layers import FusedPart, QuantLinear
from ..layers.shared import SharedInBlock

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Names of children that their block calls with the same tensor (Llama and its like; Mixtral)."""


class StackedLinear(nn.Module):
    """``y = x W^T + bias`` where W [N, K] is the rows of several prepared layers, in order.

    For inference: nothing is trained, and its tensors are in no ``state_dict`` (the parts write
    them). Moving or casting it repacks.
    """

    def __init__(self, layers: Sequence[QuantLinear]):
        super().__init__()
        first = layers[0]
        self.format, self.precision = first.format, first.precision
        self.in_features = first.in_features
        self.sizes = tuple(layer.out_features for layer in layers)
        self.forced_kernel = first.forced_kernel
        found, biases = [layer.tensors() for layer in layers], [layer.bias for layer in layers]
        self._build(
            {name: torch.cat([tensors[name] for tensors in found]) for name in found[0]},
            None if biases[0] is None else torch.cat([bias.detach() for bias in biases]),
        )

    @property
    def partitions(self) -> tuple[int, ...]:
        """What the operators take: parts with codebooks of their own."""
        return self.sizes if isinstance(self.format, AdditiveFormat) else (sum(self.sizes),)

    @torch.no_grad()
    def _build(self, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None) -> None:
        values = {n: t for n, t in tensors.items() if n not in self.format.code_names}
        value = next(iter(values.values()))
        parts, precision = self.partitions, self.precision
        problem = Problem(
            self.format, sum(parts), self.in_features, value.dtype, value.device.type, precision,
            parts=len(parts),
        )  # fmt: skip
        self.kernel = select(problem, self.forced_kernel)
        packed = self.kernel.repack(self.format, tensors, parts, precision)
        if self.kernel.fold is not None:
            packed |= self.kernel.fold(self.format, values)
        self._value_names, self._packed_names = tuple(values), tuple(packed)
        for name, tensor in {**values, **packed, "bias": bias}.items():
            self.register_buffer(name, tensor, persistent=False)

    def _values(self) -> dict[str, torch.Tensor]:
        return {n: self._buffers[n] for n in self._value_names}

    def _packed(self) -> dict[str, torch.Tensor]:
        return {n: self._buffers[n] for n in self._packed_names}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The canonical tensors of all parts, stacked."""
        parts, packed = self.partitions, self._packed()
        codes = self.kernel.unpack(self.format, packed, sum(parts), self.in_features, parts)
        return {**codes, **self._values()}

    def part_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """The canonical tensors of one part, with its bias: what its layer had."""
        found = {}
        for name, tensor in self.tensors().items():
            # Rows, groups of rows, or codebooks: every part has its share of the first dimension.
            units = [size * tensor.shape[0] // sum(self.sizes) for size in self.sizes]
            if name == "codebooks":
                units = [tensor.shape[0] // len(self.sizes)] * len(self.sizes)
            found[name] = tensor.split(units)[index].contiguous()
        if self.bias is not None:
            found["bias"] = self.bias.split(self.sizes)[index].clone()
        return found

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized [N, K] weight (computed anew at every access)."""
        K, parts = self.in_features, self.partitions
        return self.kernel.dequantize(self.format, self._packed(), self._values(), K, parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel.matmul(
            self.format, x, self._packed(), self._values(), self.bias, self.partitions,
            self.precision,
        )  # fmt: skip

    def _apply(self, fn, recurse=True):
        tensors, bias = self.tensors(), self.bias
        self._build({n: fn(t) for n, t in tensors.items()}, None if bias is None else fn(bias))
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={'+'.join(map(str, self.sizes))},"
            f" bias={self.bias is not None}, scheme={self.format.id}, kernel={self.kernel.id}"
        )


class StackedPart(FusedPart):
    """One layer of a stack, in its place. It saves the layer's tensors, and loads none."""

    def __init__(self, stack: StackedLinear, index: int, shared: SharedInBlock):
        start = sum(stack.sizes[:index])
        super().__init__(stack, slice(start, start + stack.sizes[index]), shared)
        self.index = index

    def restored(self) -> QuantLinear:
        """The layer that this part stands for."""
        stack, tensors = self.fused, self.fused.part_tensors(self.index)
        bias = tensors.pop("bias", None)
        return QuantLinear.from_tensors(
            stack.format, tensors, stack.in_features, bias,
            precision=stack.precision, kernel=stack.forced_kernel,
        ).train(self.training)  # fmt: skip

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, tensor in self.fused.part_tensors(self.index).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict, prefix, *args):
        raise RuntimeError(
            f"{prefix.rstrip('.')} is stacked with its siblings for generation: call"
            " aqlm_infer.undo_prepare_for_generation(model) before loading tensors"
        )


def why_not_stacked(layers: Sequence[nn.Module]) -> str | None:
    """Reason why these siblings cannot run as one launch, or None."""
    if not all(isinstance(layer, QuantLinear) for layer in layers):
        return "not all are quantized layers"
    if any(layer.kernel is None or layer.trains_values for layer in layers):
        return "not all are prepared and frozen"
    format = layers[0].format
    if not isinstance(format, (AdditiveFormat, ScalarFormat)):
        return f"{format.id} rotates the outputs of each layer by themselves"
    kinds = dict.fromkeys(_kind(layer) for layer in layers)
    return None if len(kinds) == 1 else f"they differ: {', '.join(map(str, kinds))}"


def _kind(layer: QuantLinear) -> tuple:
    """What must be the same for layers to be stacked."""
    value = layer.scales
    return (
        layer.format.id, layer.in_features, value.dtype, str(value.device), layer.precision,
        layer.forced_kernel, layer.bias is None,
    )  # fmt: skip


def stack_siblings(model: nn.Module) -> list[tuple[str, ...]]:
    """Replace siblings by stacks wherever they can run as one launch; returns their paths."""
    stacked = []
    for path, block in list(model.named_modules()):
        for names in SIBLINGS:
            layers = [getattr(block, name, None) for name in names]
            if None in layers or why_not_stacked(layers) is not None:
                continue
            stack, shared = StackedLinear(layers), SharedInBlock(block)
            block.add_module(_stack_name(names), stack)
            for index, name in enumerate(names):
                setattr(block, name, StackedPart(stack, index, shared).train(block.training))
            stacked.append(tuple(f"{path}.{name}" if path else name for name in names))
    return stacked


def unstack(model: nn.Module) -> None:
    """Undo ``stack_siblings``: the layers come back, bit for bit."""
    for block in list(model.modules()):
        for names in SIBLINGS:
            parts = [getattr(block, name, None) for name in names]
            if not all(isinstance(part, StackedPart) for part in parts):
                continue
            layers = [part.restored() for part in parts]
            parts[0].shared.detach()
            delattr(block, _stack_name(names))
            for name, layer in zip(names, layers, strict=True):
                setattr(block, name, layer)


def stacks(model: nn.Module) -> Iterator[StackedLinear]:
    """The model's stacks."""
    return (module for module in model.modules() if isinstance(module, StackedLinear))


def _stack_name(names: Sequence[str]) -> str:
    return "stacked_" + "_".join(names)
