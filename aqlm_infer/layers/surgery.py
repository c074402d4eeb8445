"""Swap a model's linear layers for quantized ones, and account for what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from tqdm import tqdm

from ..formats import Format, parse_scheme
from .linear import QuantLinear
from .rotated import share_rotations

DENSE = "dense"
"""The scheme name of a plan entry that keeps its layers as they are."""


class PlanError(ValueError):
    """A plan or skip list that does not fit the model's layers."""


def default_skip(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that stay dense unless asked for: the output head, tied or not."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return tuple(name for name, module in model.named_modules() if head and module is head)


def plan_layers(
    model: nn.Module,
    plan: str | Format | Mapping[str, str | Format],
    skip: Sequence[str] | None = None,
) -> dict[str, Format]:
    """Resolve a plan: the ``nn.Linear`` modules to replace, by name, with their formats.

    Args:
        model: searched for ``nn.Linear`` modules.
        plan: one scheme for all, or ``{glob: scheme}`` over module names (first match wins, layers
            that match no glob stay dense, scheme "dense" keeps a layer).
        skip: globs of layers to leave alone; None means the output head, unless the plan has its
            very name.

    Raises PlanError when a glob matches no layer or nothing is left to replace, FormatError when a
    layer's shape does not fit its scheme: all before any work is done.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    rules = dict(plan) if isinstance(plan, Mapping) else {"*": plan}
    skips = tuple(n for n in default_skip(model) if n not in rules) if skip is None else tuple(skip)
    for pattern in (*rules, *(skips if skip is not None else ())):
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise PlanError(f"{pattern!r} matches none of the model's {len(linears)} linear layers")
    formats = {p: None if s == DENSE else parse_scheme(s) for p, s in rules.items()}
    chosen: dict[str, Format] = {}
    for name, linear in linears.items():
        if any(fnmatchcase(name, pattern) for pattern in skips):
            continue
        format = next((f for p, f in formats.items() if fnmatchcase(name, p)), None)
        if format is None:
            continue
        reason = format.why_not_shape(linear.out_features, linear.in_features)
        if reason:
            raise PlanError(f"{name}: {reason}")
        chosen[name] = format
    if not chosen:
        raise PlanError(f"no layer to replace: {len(linears)} linear layers, skip={list(skips)}")
    return chosen


def replace_linears(
    model: nn.Module,
    plan: str | Format | Mapping[str, str | Format],
    *,
    skip: Sequence[str] | None = None,
    quantizer=None,
    hessians: Mapping | None = None,
    precision: str = "exact",
    progress: bool = True,
    on_layer=None,
) -> dict[str, QuantLinear]:
    """Quantize a model's linear layers in place and return the new ones by name.

    ``plan`` and ``skip`` are those of :func:`plan_layers`; ``quantizer`` None uses each scheme's
    default; ``hessians`` maps layer names to input second moments [K, K]. ``on_layer(name, linear,
    layer)`` is called after each layer, before the dense one is dropped. Rotated siblings with
    equal sign vectors then share one rotation of their input.
    """
    chosen = plan_layers(model, plan, skip)
    replaced: dict[str, QuantLinear] = {}
    bar = tqdm(chosen.items(), desc="quantize", unit="layer", disable=not progress)
    for name, format in bar:
        linear = model.get_submodule(name)
        bar.set_postfix_str(name)
        hessian = None if hessians is None else hessians[name]
        layer = QuantLinear.from_linear(
            linear, format, quantizer=quantizer, hessian=hessian, precision=precision
        )
        if on_layer is not None:
            on_layer(name, linear, layer)
        model.set_submodule(name, layer)
        replaced[name] = layer
    share_rotations(model)
    return replaced


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """The model's quantized layers, by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


@dataclass(frozen=True)
class Cost:
    """What a model's quantized layers cost, codes, codebooks and scales counted."""

    layers: int
    weights: int
    bits_per_weight: float
    quantized_bytes: int
    dense_bytes: int


def quantized_cost(model: nn.Module) -> Cost:
    """Average bits a weight over the quantized layers, and their bytes beside 16-bit dense ones.

    Raises PlanError when the model has no quantized layer.
    """
    layers = weights = 0
    bits = 0.0
    for _, layer in quantized_layers(model):
        count = layer.in_features * layer.out_features
        bits += count * layer.format.bits_per_weight(layer.out_features, layer.in_features)
        layers, weights = layers + 1, weights + count
    if not layers:
        raise PlanError("the model has no quantized layer")
    return Cost(layers, weights, bits / weights, round(bits / 8), 2 * weights)
