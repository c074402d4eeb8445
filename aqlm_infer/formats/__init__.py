"""Weight formats as records. ``FAMILIES`` is the one table: a new format is one line in it."""

from __future__ import annotations

from .additive import AdditiveFormat
from .base import FLOAT_DTYPES, Format, FormatError, Tensors, TensorSpec
from .e8p import E8PFormat
from .scalar import QuipFormat, ScalarFormat

__all__ = [
    "FAMILIES",
    "FLOAT_DTYPES",
    "AdditiveFormat",
    "E8PFormat",
    "Format",
    "FormatError",
    "QuipFormat",
    "ScalarFormat",
    "TensorSpec",
    "Tensors",
    "parse_scheme",
]

FAMILIES: dict[str, type[Format]] = {
    "aqlm-{B}x{bits}-g{G}": AdditiveFormat,
    "quip-e8p-{bits}bit": E8PFormat,
    "quip-int{bits}": QuipFormat,
    "gptq-int{bits}-g{G}": ScalarFormat,
    "rtn-int{bits}-g{G}": ScalarFormat,
}


def parse_scheme(scheme: str | Format) -> Format:
    """The format record of a scheme id such as ``aqlm-2x8-g8`` (a record passes through).

    Raises FormatError for an id of no known family or with values out of range.
    """
    if isinstance(scheme, Format):
        return scheme
    for family in FAMILIES.values():
        found = family.parse(scheme)
        if found is not None:
            return found
    raise FormatError(f"unknown scheme {scheme!r}; known: {', '.join(FAMILIES)}")
