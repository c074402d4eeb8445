"""Find and load a model, dense or quantized, and refuse what does not load completely.

``from_pretrained`` fills weights that a checkpoint lacks with random values and goes on; here a
missing or mismatched weight is an error. Nothing touches the network unless the model's name is not
a local path and has the form of a hub id.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import read_headers
from ..layers import quantized_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that a model may be loaded in, by name."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelError(ValueError):
    """A model that is not there, or whose files do not make a whole model."""


def resolve_model(model: str | Path) -> tuple[str, bool]:
    """Where ``model`` is: (source, local?).

    A path that exists must be a checkpoint folder. Anything else must look like the hub id
    ``organisation/name``, and its first part must not be a local folder (then it is a mistyped
    path). Raises ModelError otherwise.
    """
    path = Path(model)
    if path.exists():
        if not (path / "config.json").is_file():
            what = "has no config.json" if path.is_dir() else "is a file, not a checkpoint folder"
            raise ModelError(f"{model} {what}")
        return str(path), True
    if _HUB_ID.fullmatch(str(model)) and not path.parent.is_dir():
        return str(model), False
    raise ModelError(f"model {str(model)!r} is no local folder, and no hub id ORGANISATION/NAME")


def load_model(
    model: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> nn.Module:
    """Load a causal language model for inference.

    ``dtype`` None is float32 on the CPU, elsewhere the checkpoint's own. Raises ModelError when the
    files are not a whole model, CheckpointError when one is truncated or corrupt.
    """
    from transformers import AutoModelForCausalLM

    source, local = resolve_model(model)
    if local:
        read_headers(sorted(Path(source).glob("*.safetensors")))
    if dtype is None and device == "cpu":
        dtype = torch.float32
    loaded, report = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype or "auto", local_files_only=local, output_loading_info=True
    )
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(str(key) for key in report.get(kind) or ())
        if names:
            raise ModelError(
                f"{source}: {len(names)} {kind.replace('_', ' ')}, {names[0]} for example"
            )
    return loaded.to(device).eval()


def load_tokenizer(model: str | Path):
    """The tokenizer stored with a model. Raises ModelError when a local folder has none."""
    from transformers import AutoTokenizer

    source, local = resolve_model(model)
    if local and not any(
        (Path(source) / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    ):
        raise ModelError(f"{source} has no tokenizer files")
    return AutoTokenizer.from_pretrained(source, local_files_only=local)


def set_precision(model: nn.Module, precision: str) -> None:
    """Prepare a model's quantized layers anew for "exact" or "fast" kernels.

    Raises KernelError when no kernel has that precision, ModelError when no layer is quantized.
    """
    layers = list(quantized_layers(model))
    if not layers:
        raise ModelError(f"precision={precision!r}: the model has no quantized layer")
    for name, layer in layers:
        if layer.precision != precision:
            layer.restore()
            layer.precision = precision
            layer.prepare(name)
