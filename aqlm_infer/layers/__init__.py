"""Quantized ``nn.Linear`` replacements, and swapping them into a model."""

from .linear import QuantLinear
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
    "PlanError",
    "QuantLinear",
    "plan_layers",
    "quantized_cost",
    "quantized_layers",
    "replace_linears",
]
