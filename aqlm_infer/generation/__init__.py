"""Fast decoding in transformers' own ``generate``: stacked layers, captured steps, a small head.

Importing this package imports no transformers: the runner, which does, is loaded when used.
"""

from . import cpu_ops as _cpu_ops  # noqa: F401  registers operators
from .errors import GenerationSetupError
from .prepare import Preparation, prepare_for_generation, undo_prepare_for_generation

__all__ = [
    "GenerationSetupError",
    "Preparation",
    "prepare_for_generation",
    "undo_prepare_for_generation",
]
