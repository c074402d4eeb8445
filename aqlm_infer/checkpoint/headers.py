"""Names, shapes and dtypes of a checkpoint's tensors, read without reading the tensors."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class CheckpointError(ValueError):
    """A checkpoint or an output folder that cannot be used; the message names it and says why."""


def read_headers(files: Iterable[str | Path]) -> dict[str, torch.Tensor]:
    """Every tensor of the ``.safetensors`` or ``.bin`` files, by name, on the meta device.

    ``.bin`` files are unpickled with ``weights_only=True``. Raises CheckpointError naming the file
    when it is truncated, corrupt or holds anything but tensors.
    """
    headers: dict[str, torch.Tensor] = {}
    for file in map(Path, files):
        read = _safetensors if file.suffix == ".safetensors" else _pickled
        headers.update(read(file))
    return headers


def _safetensors(file: Path) -> dict[str, torch.Tensor]:
    headers = {}
    try:
        # Opening checks that the header is whole and that the tensors fill the file exactly.
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                entry = tensors.get_slice(name)
                dtype = _DTYPES.get(entry.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{name} has dtype {entry.get_dtype()} in {file}")
                headers[name] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    return headers


def _pickled(file: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(file, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(f"{file} is not a readable PyTorch file: {reason[0]}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, expected a state dict")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
