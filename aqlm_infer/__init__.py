"""aqlm_infer: large language models at about 2 bits a weight, fast on the GPU or CPU you have.

Importing this package loads torch and the compiled modules, and nothing else: no CUDA
initialisation, no Triton, no transformers (its loader is registered as soon as transformers is
imported, before or after).
"""

from . import integrations as _integrations
from .backends import KernelError, explain, select
from .checkpoint import CheckpointError, save_quantized
from .formats import FormatError, parse_scheme
from .generation import (
    GenerationSetupError,
    prepare_for_generation,
    undo_prepare_for_generation,
)
from .layers import (
    PlanError,
    QuantLinear,
    RotatedLinear,
    plan_layers,
    quantized_cost,
    quantized_layers,
    replace_linears,
    share_rotations,
)
from .version import __version__

__all__ = [
    "CheckpointError",
    "FormatError",
    "GenerationSetupError",
    "KernelError",
    "PlanError",
    "QuantLinear",
    "RotatedLinear",
    "__version__",
    "explain",
    "parse_scheme",
    "plan_layers",
    "prepare_for_generation",
    "quantized_cost",
    "quantized_layers",
    "replace_linears",
    "save_quantized",
    "select",
    "share_rotations",
    "undo_prepare_for_generation",
]

_integrations.register_lazily()
