"""Quantized ``nn.Linear`` replacements, and swapping them into a model."""

from .fused import FusedPart, place_fused
from .linear import QuantLinear
from .rotated import RotatedLinear, share_rotations
from .surgery import (
    Cost,
    PlanError,
    plan_layers,
    quantized_cost,
    quantized_layers,
    replace_linears,
)

__all__ = [
    "Cost",
    "FusedPart",
    "PlanError",
    "QuantLinear",
    "RotatedLinear",
    "place_fused",
    "plan_layers",
    "quantized_cost",
    "quantized_layers",
    "replace_linears",
    "share_rotations",
]
