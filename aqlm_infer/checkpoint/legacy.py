"""Checkpoints older than AQLM in transformers: an ``"aqlm"`` block in the config, remote code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .config import describe
from .headers import CheckpointError, read_headers
from .save import refuse_foreign, whole_folder

LEGACY_SUFFIX = "_aqlm"
_FIELDS = ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")


def convert_legacy(folder: str | Path, out_dir: str | Path) -> Path:
    """Copy a legacy checkpoint folder into the published layout; returns the new folder.

    Tensors are copied as they are. The config gets its ordinary ``model_type``, loses its remote
    code and gets a ``quantization_config`` read from the tensors, which must agree with the numbers
    of the legacy block. Raises CheckpointError when they do not, when there is no such block, or
    when ``out_dir`` holds something else.
    """
    source, out = Path(folder).resolve(), Path(out_dir).resolve()
    config_file = source / "config.json"
    try:
        config = json.loads(config_file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_file} is not a readable config: {error}") from error
    block = config.pop("aqlm", None)
    if not isinstance(block, dict):
        raise CheckpointError(f'{config_file} has no "aqlm" block: not a legacy AQLM checkpoint')
    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("*.bin"))
    if not files:
        raise CheckpointError(f"{source} holds no .safetensors or .bin file")
    fields = describe(read_headers(files))
    for field in _FIELDS:
        if block.get(field) != fields[field]:
            raise CheckpointError(
                f'{config_file}: the "aqlm" block says {field}={block.get(field)},'
                f" the tensors say {fields[field]}"
            )
    config.pop("auto_map", None)
    config["model_type"] = config.get("model_type", "").removesuffix(LEGACY_SUFFIX)
    config["quantization_config"] = {"quant_method": "aqlm", **fields}
    refuse_foreign(out)
    with whole_folder(out) as new:
        for entry in source.iterdir():
            if entry.is_file() and entry.suffix != ".py" and entry != config_file:
                shutil.copy2(entry, new)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out
