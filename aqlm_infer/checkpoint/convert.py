"""Checkpoints that transformers cannot load as they are, whatever their kind."""

from __future__ import annotations

import json
from pathlib import Path

from .headers import CheckpointError
from .legacy import convert_legacy
from .quip import convert_quip

KINDS = {"aqlm": ("legacy AQLM", convert_legacy), "quip_params": ("QuIP#", convert_quip)}
"""The config key that tells a kind of checkpoint, its name, and what converts it."""


def convert(folder: str | Path, out_dir: str | Path) -> tuple[str, Path]:
    """Convert a checkpoint folder into one that ``from_pretrained`` loads: (kind, new folder).

    Raises CheckpointError when the folder is of no known kind, or for the reasons of its kind
    (``convert_legacy``, ``convert_quip``).
    """
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not a readable config: {error}") from error
    for key, (kind, function) in KINDS.items():
        if isinstance(config, dict) and isinstance(config.get(key), dict):
            return kind, function(folder, out_dir)
    known = ", ".join(f'{kind} ("{key}")' for key, (kind, _) in KINDS.items())
    raise CheckpointError(f"{file} has no block of a checkpoint to convert: {known}")
