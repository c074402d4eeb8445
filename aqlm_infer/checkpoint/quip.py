"""QuIP# checkpoints as published (relaxml): ``quip_params`` in the config, fused E8P modules.

They have no ``quantization_config``, so transformers would load random weights without a word.
Converting keeps every code and value and adds our config block.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..formats import E8PFormat, FormatError
from .headers import CheckpointError, read_headers
from .own import FUSED, METHOD, describe_layers
from .save import refuse_foreign, whole_folder

_CODEBOOKS = {"E8P12": 2, "E8P12RVQ3B": 3, "E8P12RVQ4B": 4}
_COPIED = (".json", ".model", ".txt", ".jinja", ".md")
_SUPPORTED = {"lora_rank": 0, "outlier_channel_split": False, "rescale_WH": False}
_REFUSED = ("A", "B", "ocs_dupe_inds", "scaleWH")


def convert_quip(folder: str | Path, out_dir: str | Path) -> Path:
    """Copy a published QuIP# checkpoint folder into our layout; returns the new folder.

    Codes and values are copied bit for bit under their names; scalars get their canonical shape and
    dtype. Raises CheckpointError naming what is not supported: another codebook or version,
    low-rank or outlier parts, input scales, parts of a fused module that do not fit the config;
    FormatError naming a tensor that is missing or has the wrong shape.
    """
    source, out = Path(folder).resolve(), Path(out_dir).resolve()
    config_file = source / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_file} is not a readable config: {error}") from error
    params = config.pop("quip_params", None)
    if not isinstance(params, dict):
        raise CheckpointError(f'{config_file} has no "quip_params": not a QuIP# checkpoint')
    bits, residual = _check_params(params, config_file)
    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("*.bin"))
    if not files:
        raise CheckpointError(f"{source} holds no .safetensors or .bin file")
    headers = read_headers(files)
    layers = _layers(headers, bits, residual, config)
    config.pop("auto_map", None)
    config["quantization_config"] = {"quant_method": METHOD, **describe_layers(layers)}
    refuse_foreign(out)
    with whole_folder(out) as new:
        for entry in source.iterdir():
            if entry.is_file() and entry.suffix in _COPIED and ".index." not in entry.name:
                shutil.copy2(entry, new)
        unscaled = [name for name in layers if f"{name}.Wscale" not in headers]
        _write_tensors(files, layers, unscaled, new)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out


def _check_params(params: Mapping, file: Path) -> tuple[int, float]:
    """(bits, residual scale or 0) of the codebook that the config names."""
    codebook = params.get("codebook")
    if codebook not in _CODEBOOKS:
        known = ", ".join(_CODEBOOKS)
        raise CheckpointError(f"{file}: codebook {codebook!r} is not supported; known: {known}")
    if params.get("codebook_version", 1) != 1:
        version = params["codebook_version"]
        raise CheckpointError(f"{file}: codebook_version {version}, only 1 is supported")
    for key, supported in _SUPPORTED.items():
        if params.get(key, supported) != supported:
            raise CheckpointError(f"{file}: {key}={params[key]} is not supported")
    bits, override = _CODEBOOKS[codebook], params.get("resid_scale_override", -1)
    return bits, float(override) if override > 0 and bits > 2 else 0.0


def _layers(headers: Mapping[str, torch.Tensor], bits: int, residual: float, config: Mapping):
    """{name: (format, N, K)} of the quantized modules, every header checked."""
    names = [key.removesuffix(".Qidxs") for key in headers if key.endswith(".Qidxs")]
    if not names:
        raise CheckpointError("no quantized module: no tensor is named *.Qidxs")
    layers = {}
    for name in names:
        found = {k.removeprefix(f"{name}."): t for k, t in headers.items() if _owner(k) == name}
        for key in ("SU", "SV"):
            if key not in found or found[key].dim() != 1:
                raise FormatError(f"{name}.{key} is missing or no vector")
        N, K = len(found["SV"]), len(found["SU"])
        parts = _parts(name, N, config) if "fuse_scales" in found else ()
        format = E8PFormat(bits, residual=residual, parts=parts)
        format.check_shape(N, K)
        _check_module(name, found, format, N, K)
        layers[name] = format, N, K
    return layers


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def _check_module(name: str, found: Mapping[str, torch.Tensor], format: E8PFormat, N: int, K: int):
    specs = format.tensor_specs(N, K)
    for key in found:
        if key in _REFUSED:
            raise CheckpointError(
                f"{name}.{key}: low-rank and outlier parts and input scales are not supported"
            )
        if key not in (*specs, "bias"):
            raise CheckpointError(f"{name}.{key} is no tensor of {format.id}")
    for key, spec in specs.items():
        if key == "Wscale" and key not in found:
            continue
        if key not in found:
            raise FormatError(f"{name}.{key} is missing ({format.id}, N={N}, K={K})")
        shape = tuple(found[key].shape)
        if shape != spec.shape and not (spec.shape == () and shape == (1,)):
            raise FormatError(
                f"{name}.{key} has shape {list(shape)}, expected {list(spec.shape)} for {format.id}"
            )


def _parts(name: str, N: int, config: Mapping) -> tuple[int, ...]:
    """Outputs of each part of a fused module, from the model's config."""
    leaf = name.rpartition(".")[2]
    if leaf not in FUSED:
        raise CheckpointError(
            f"{name} has fuse_scales; fused modules are known as {', '.join(FUSED)}"
        )
    try:
        if leaf == "upgate_proj":
            parts = (config["intermediate_size"],) * 2
        else:
            heads = config["num_attention_heads"]
            size = config.get("head_dim") or config["hidden_size"] // heads
            kv_heads = config.get("num_key_value_heads") or heads
            parts = (heads * size, kv_heads * size, kv_heads * size)
    except KeyError as error:
        raise CheckpointError(f"config.json has no {error}: the parts of {name}") from error
    if sum(parts) != N:
        raise CheckpointError(f"{name} has N={N}, but the config's parts are {list(parts)}")
    return parts


def _write_tensors(files: list[Path], layers: Mapping, unscaled: list[str], out: Path) -> None:
    """Write the shards of ``files`` as safetensors, one at a time in memory, and their index.

    The layers of ``unscaled`` get the Wscale of 1 that their files leave out.
    """
    index: dict[str, str] = {}
    total = 0
    for file in files:
        state = load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
        state = {key: _canonical(key, tensor, layers) for key, tensor in state.items()}
        missing = [name for name in unscaled if f"{name}.SV" in state]
        state |= {f"{name}.Wscale": torch.tensor(1.0) for name in missing}
        stem = file.stem.replace("pytorch_model", "model") if len(files) > 1 else "model"
        save_file(state, out / f"{stem}.safetensors", {"format": "pt"})
        index.update(dict.fromkeys(state, f"{stem}.safetensors"))
        total += sum(t.nbytes for t in state.values())
    if len(files) > 1:
        body = {"metadata": {"total_size": total}, "weight_map": index}
        (out / "model.safetensors.index.json").write_text(json.dumps(body, indent=2) + "\n")


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)


def _canonical(key: str, tensor: torch.Tensor, layers: Mapping) -> torch.Tensor:
    name, _, leaf = key.rpartition(".")
    if name not in layers:
        return tensor.contiguous()
    format, N, K = layers[name]
    if leaf == "codebook_id":
        format.check_codes(tensor.reshape(()), key)
    spec = format.tensor_specs(N, K).get(leaf)
    if spec is None or spec.dtype is None:
        return tensor.contiguous()
    return tensor.reshape(spec.shape).to(spec.dtype).contiguous()
