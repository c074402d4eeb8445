"""Checkpoint folders: what their headers say, what their config must say, writing them whole."""

from .config import attach_config, describe
from .convert import convert
from .headers import CheckpointError, read_headers
from .layout import LinearShape, StoredLayer, quantized_names, stored_layers
from .legacy import convert_legacy
from .own import FUSED, check_block, declared_layers, describe_layers
from .quip import convert_quip
from .save import save_quantized

__all__ = [
    "FUSED",
    "CheckpointError",
    "LinearShape",
    "StoredLayer",
    "attach_config",
    "check_block",
    "convert",
    "convert_legacy",
    "convert_quip",
    "declared_layers",
    "describe",
    "describe_layers",
    "quantized_names",
    "read_headers",
    "save_quantized",
    "stored_layers",
]
