"""Quantizers: a dense weight in, the canonical tensors of a format out.

``QUANTIZERS`` is the one table: which quantizer makes the tensors of which family of formats.
"""

from __future__ import annotations

from dataclasses import fields

from ..formats import AdditiveFormat, Format, parse_scheme
from ..formats.e8p import E8PFormat
from ..formats.scalar import QuipFormat, ScalarFormat
from .additive import AdditiveQuantizer, Progress
from .base import Quantizer, QuantizerError
from .e8p import E8PQuantizer
from .hessian import HessianWarning
from .quip import QuipQuantizer
from .scalar import ScalarQuantizer

__all__ = [
    "QUANTIZERS",
    "AdditiveQuantizer",
    "E8PQuantizer",
    "HessianWarning",
    "Progress",
    "Quantizer",
    "QuantizerError",
    "QuipQuantizer",
    "ScalarQuantizer",
    "quantizer_for",
]

QUANTIZERS: dict[type[Format], type[Quantizer]] = {
    AdditiveFormat: AdditiveQuantizer,
    E8PFormat: E8PQuantizer,
    QuipFormat: QuipQuantizer,
    ScalarFormat: ScalarQuantizer,
}


def quantizer_for(scheme: str | Format, **options) -> Quantizer:
    """The default quantizer of a scheme id or format record, with ``options`` set.

    Raises FormatError for an unknown scheme, QuantizerError for a format without a quantizer and
    for an option that its quantizer does not have.
    """
    format = parse_scheme(scheme)
    quantizer = QUANTIZERS.get(type(format))
    if quantizer is None:
        known = ", ".join(sorted(family.__name__ for family in QUANTIZERS))
        raise QuantizerError(f"no quantizer for {format.id}; formats with one: {known}")
    known = [f.name for f in fields(quantizer) if f.name != "format"]
    for name in options:
        if name not in known:
            raise QuantizerError(f"{quantizer.__name__} has no option {name!r}; known: {known}")
    return quantizer(format, **options)
