"""Quantizers: a dense weight in, the canonical tensors of a format out."""

from .base import Quantizer, QuantizerError

__all__ = ["Quantizer", "QuantizerError"]
