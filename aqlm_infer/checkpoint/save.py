"""Write a checkpoint folder whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from ..layers import quantized_layers
from .config import attach_config
from .headers import CheckpointError
from .own import METHOD

_REPLACEABLE = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "quantize_report.*",
)
"""What an earlier save may have left in a folder; anything else belongs to somebody."""


def save_quantized(model: nn.Module, out_dir: str | Path, tokenizer=None) -> Path:
    """Save a quantized transformers model as a checkpoint folder; returns its path.

    AQLM codes are written [O, I, B]; values and all other tensors keep the model's dtype
    (published checkpoints are float16: load the model as float16 if that matters).
    Everything is written to a temporary sibling folder, which then takes the place of ``out_dir``:
    a failure leaves what was there. An earlier quantized checkpoint in ``out_dir`` is replaced.

    Raises CheckpointError when ``out_dir`` holds anything else or the model cannot be saved,
    FormatError when a layer's tensors are not valid (for instance after training).
    """
    out = Path(out_dir).resolve()
    refuse_foreign(out)
    if getattr(model, "aqlm_generation", None) is not None:
        raise CheckpointError(
            "the model is prepared for generation: aqlm_infer.undo_prepare_for_generation(model)"
            " first"
        )
    attach_config(model)
    for name, layer in quantized_layers(model):
        N, K = layer.out_features, layer.in_features
        layer.format.check_tensors(layer.tensors(), N, K, name)
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return out


def refuse_foreign(out: Path) -> None:
    """Raise CheckpointError unless ``out`` is free, empty, or an earlier quantized checkpoint."""
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} exists and is not a folder")
    names = sorted(entry.name for entry in out.iterdir())
    foreign = [n for n in names if not any(fnmatchcase(n, p) for p in _REPLACEABLE)]
    if foreign:
        raise CheckpointError(f"{out} exists and holds {foreign[0]}: choose another folder")
    if names and not _is_quantized(out / "config.json"):
        raise CheckpointError(f"{out} exists and is no quantized checkpoint: choose another folder")


def _is_quantized(config: Path) -> bool:
    try:
        block = json.loads(config.read_text())["quantization_config"]
        return block["quant_method"] in ("aqlm", METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of ``out`` to write into, renamed to ``out`` if the block succeeds."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        yield folder
        _take_place(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _take_place(folder: Path, out: Path) -> None:
    if not out.exists():
        os.rename(folder, out)
        return
    old = folder.with_name(folder.name + ".old")
    os.rename(out, old)
    try:
        os.rename(folder, out)
    except OSError:
        os.rename(old, out)
        raise
    shutil.rmtree(old)
