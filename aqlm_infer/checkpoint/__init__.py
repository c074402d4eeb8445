"""Checkpoint folders: what their headers say, what their config must say, writing them whole."""

from .config import attach_config, describe
from .headers import CheckpointError, read_headers
from .layout import LinearShape, StoredLayer, quantized_names, stored_layers
from .legacy import convert_legacy
from .save import save_quantized

__all__ = [
    "CheckpointError",
    "LinearShape",
    "StoredLayer",
    "attach_config",
    "convert_legacy",
    "describe",
    "quantized_names",
    "read_headers",
    "save_quantized",
    "stored_layers",
]
