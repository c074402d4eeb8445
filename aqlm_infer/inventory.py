"""What this installation can run, and what a checkpoint holds: the functions behind ``info``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .backends import KERNELS, Problem, explain, native
from .bench.record import device_name
from .checkpoint import CheckpointError, check_block, quantized_names, read_headers
from .checkpoint.own import METHOD
from .formats import FAMILIES, AdditiveFormat, Format, FormatError, parse_scheme
from .version import __version__

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "triton", "numpy")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _module(module, problem: str | None) -> dict[str, Any]:
    return {"loaded": module is not None, "problem": problem}


def system_info() -> dict[str, Any]:
    """Versions, processors, compiled modules (and why one is missing), kernels and schemes."""
    cpu = native.cpu
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {
            "name": device_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": None if cpu is None else cpu.isa(),
            "isas": [] if cpu is None else list(cpu.supported_isas()),
            "features": {} if cpu is None else dict(cpu.features()),
        },
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "modules": {
            "_cpu": _module(native.cpu, native.cpu_problem),
            "_cuda": _module(native.cuda, native.cuda_problem),
        },
        "kernels": sorted(KERNELS),
        "native_kernels": [] if cpu is None else [dict(row) for row in cpu.kernel_table()],
        "schemes": list(FAMILIES),
    }


def _layers(config: dict, headers: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Every quantized layer: those that our own config block lists, or else AQLM's by headers."""
    block = config.get("quantization_config") or {}
    if block.get("quant_method") == METHOD:
        return [_listed_layer(n, format, headers) for n, format in check_block(block).items()]
    return [_additive_layer(name, headers) for name in quantized_names(headers)]


def _listed_layer(name: str, format: Format, headers: dict[str, torch.Tensor]) -> dict[str, Any]:
    prefix = f"{name}."
    found = {k.removeprefix(prefix): t for k, t in headers.items() if k.startswith(prefix)}
    N, K = format.out_features(found, name), format.in_features(found, name)
    specs = format.tensor_specs(N, K)
    for key in specs:
        if key not in found:
            raise FormatError(f"{name}.{key} is missing ({format.id})")
    return _row(name, format, N, K, [found[key] for key in specs])


def _row(name: str, format: Format, N: int, K: int, tensors) -> dict[str, Any]:
    return {
        "name": name,
        "scheme": format.id,
        "N": N,
        "K": K,
        "bits_per_weight": format.bits_per_weight(N, K),
        "bytes": sum(t.nbytes for t in tensors),
    }


def _additive_layer(name: str, headers: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One AQLM layer from its headers; codes may be stored [O, I, B] or [I, O, B]."""
    tensors = {}
    for key in ("codes", "codebooks", "scales"):
        if f"{name}.{key}" not in headers:
            raise FormatError(f"{name}.{key} is missing")
        tensors[key] = headers[f"{name}.{key}"]
    format = AdditiveFormat.of_codebooks(tensors["codebooks"])
    if tensors["codes"].dim() != 3:
        raise FormatError(f"{name}.codes has shape {list(tensors['codes'].shape)}, expected 3-D")
    groups = tensors["scales"].shape[0]
    rows, columns, _ = tensors["codes"].shape
    K = (columns if rows == groups else rows) * format.in_group_size
    N = groups * format.out_group_size
    return _row(name, format, N, K, tensors.values())


def checkpoint_info(folder: str | Path) -> dict[str, Any]:
    """Layers by scheme, bits and bytes of a checkpoint folder, from its safetensors headers."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no checkpoint folder: it has no config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not JSON: {error}") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no .safetensors file")
    headers = read_headers(files)
    layers = _layers(config, headers)
    total = sum(t.nbytes for t in headers.values())
    schemes = defaultdict(list)
    for layer in layers:
        schemes[layer["scheme"]].append(layer)
    return {
        "model": str(folder),
        "architectures": config.get("architectures"),
        "quant_method": (config.get("quantization_config") or {}).get("quant_method"),
        "files": len(files),
        "bytes": total,
        "dense_bytes": total - sum(layer["bytes"] for layer in layers),
        **_totals(layers),
        "schemes": [{"scheme": scheme, **_totals(group)} for scheme, group in schemes.items()],
        "layers": layers,
    }


def _totals(layers: list[dict[str, Any]]) -> dict[str, Any]:
    weights = sum(layer["N"] * layer["K"] for layer in layers)
    bits = sum(layer["N"] * layer["K"] * layer["bits_per_weight"] for layer in layers)
    return {
        "quantized_layers": len(layers),
        "quantized_weights": weights,
        "quantized_bytes": sum(layer["bytes"] for layer in layers),
        "bits_per_weight": bits / weights if weights else None,
    }


def explain_scheme(
    scheme: str, N: int, K: int, dtype: torch.dtype, precision: str, device: str
) -> list[dict[str, Any]]:
    """The registry's verdicts on one layer: kernel, reason why not, predicted us, chosen."""
    format = parse_scheme(scheme)
    format.check_shape(N, K)
    problem = Problem(format, N, K, dtype, torch.device(device).type, precision, M=1)
    return [asdict(verdict) for verdict in explain(problem)]
