"""Which representation tunes which family of formats: the one table."""

from __future__ import annotations

from ..formats import AdditiveFormat, E8PFormat, Format, QuipFormat, ScalarFormat
from .additive import AdditiveRepresentation
from .e8p import E8PRepresentation
from .representation import Representation
from .scalar import QuipRepresentation, ScalarRepresentation

REPRESENTATIONS: dict[type[Format], type[Representation]] = {
    AdditiveFormat: AdditiveRepresentation,
    E8PFormat: E8PRepresentation,
    QuipFormat: QuipRepresentation,
    ScalarFormat: ScalarRepresentation,
}
