"""Quantize a checkpoint folder data-free, resumably: ``aqlm-infer quantize`` without calibration.

Finished layers are kept beside the output, in ``OUT.partial/``: one safetensors file a layer,
written whole, with a key of its weights, scheme and seed. The same command after a kill reuses
those whose key still fits. The folder is removed when the checkpoint is written.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from ..checkpoint import save_quantized
from ..checkpoint.save import refuse_foreign
from ..evaluation import load_model, load_tokenizer, resolve_model
from ..evaluation.loading import ModelError
from ..formats import Format
from ..layers import QuantLinear, plan_layers, quantized_cost
from ..quantizers import Quantizer, quantizer_for
from ..version import __version__
from .sharing import shared_by_name


class JobError(RuntimeError):
    """A quantization that cannot start."""


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer; ``relative_error`` is |W - Wq| / |W| (Frobenius)."""

    name: str
    scheme: str
    N: int
    K: int
    bits_per_weight: float
    relative_error: float
    reused: bool


@dataclass(frozen=True)
class QuantizeReport:
    """What was written, with everything counted (codes, codebooks, scales)."""

    model: str
    out: str
    layers: list[LayerReport]
    weights: int
    bits_per_weight: float
    relative_error: float
    quantized_bytes: int
    dense_bytes: int
    file_bytes: int
    reused: int
    seconds: float


class KeptLayer(Quantizer):
    """Another quantizer whose result is kept in a file, and taken from it when the key fits."""

    def __init__(
        self,
        inner: Quantizer,
        file: Path,
        format: Format,
        seed: int,
        shared: Mapping[str, torch.Tensor],
    ):
        self.inner, self.file, self.format, self.seed = inner, file, format, seed
        self.shared, self.reused = shared, False

    def key(self, weight: torch.Tensor) -> str:
        """Hash of everything that the result depends on."""
        parts = [__version__, self.format.id, self.seed, weight.dtype, tuple(weight.shape)]
        digest = hashlib.sha256(repr(parts).encode())
        for tensor in (weight, *self.shared.values()):
            digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy())
        return digest.hexdigest()

    def fit(
        self, weight: torch.Tensor, hessian: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        key = self.key(weight)
        kept = self._read(key)
        self.reused = kept is not None
        if kept is not None:
            return {name: tensor.to(weight.device) for name, tensor in kept.items()}
        tensors = self.inner.fit(weight, hessian)
        part = self.file.with_suffix(".part")
        save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, part, {"key": key})
        os.replace(part, self.file)
        return tensors

    def _read(self, key: str) -> dict[str, torch.Tensor] | None:
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, "pt") as file:
                if (file.metadata() or {}).get("key") != key:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None  # cut short by a crash of the machine: quantize the layer again


def work_folder(out: Path) -> Path:
    """Where finished layers wait for the rest."""
    return out.with_name(out.name + ".partial")


def check_disk(
    model: nn.Module, chosen: Mapping[str, Format], out: Path, dtype: torch.dtype
) -> None:
    """Raise JobError when the work folder and the checkpoint, with values in ``dtype``, do not fit
    on the disk. What an interrupted run has left in the work folder is there already."""
    rest = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    work = final = 0
    for name, format in chosen.items():
        linear = model.get_submodule(name)
        N, K = linear.out_features, linear.in_features
        for spec in format.tensor_specs(N, K).values():
            count = torch.Size(spec.shape).numel()
            work += count * (spec.dtype or torch.float32).itemsize
            final += count * (spec.dtype or dtype).itemsize
        if linear.weight is not embedding:
            rest -= linear.weight.numel()
    kept = sum(file.stat().st_size for file in work_folder(out).glob("*.safetensors"))
    needed = rest * dtype.itemsize + final + max(0, work - kept)
    folder = next(p for p in (out.parent, *out.parent.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise JobError(f"{folder} has {free:,} bytes free, about {needed:,} are needed for {out}")


def check_weights(model: nn.Module, chosen: Mapping[str, Format]) -> None:
    """Raise JobError naming the first weight that is not finite."""
    for name in chosen:
        weight = model.get_submodule(name).weight
        finite = torch.isfinite(weight)
        if not bool(finite.all()):
            where = (~finite).nonzero()[0].tolist()
            value = weight[tuple(where)].item()
            raise JobError(f"{name}.weight is not finite: {value} at {where}")


def quantize_layers(
    model: nn.Module, chosen: Mapping[str, Format], work: Path, seed: int, progress: bool
) -> list[LayerReport]:
    """Quantize the chosen layers in place, keeping each in ``work`` as it is done."""
    reports = []
    shared = shared_by_name(model, chosen)
    with tqdm(chosen.items(), desc="quantize", unit="layer", disable=not progress) as bar:
        for name, format in bar:
            bar.set_postfix_str(name)
            file = work / f"{name}.safetensors"
            options = shared.get(name, {})
            quantizer = quantizer_for(format, seed=seed, **options)
            kept = KeptLayer(quantizer, file, format, seed, options)
            linear = model.get_submodule(name)
            layer = QuantLinear.from_linear(linear, format, quantizer=kept)
            reports.append(_report(name, linear, layer, kept.reused))
            model.set_submodule(name, layer)
    return reports


def _report(name: str, linear: nn.Linear, layer: QuantLinear, reused: bool) -> LayerReport:
    weight = linear.weight.detach().float()
    size = weight.norm().item()
    error = (weight - layer.weight.float()).norm().item() / size if size else 0.0
    N, K = layer.out_features, layer.in_features
    bits = layer.format.bits_per_weight(N, K)
    return LayerReport(name, layer.format.id, N, K, bits, error, reused)


def mean_error(reports: Sequence[LayerReport]) -> float:
    """Root mean square of the layers' relative errors, weighted by their sizes."""
    sizes = [r.N * r.K for r in reports]
    squares = sum(s * r.relative_error**2 for s, r in zip(sizes, reports, strict=True))
    return (squares / sum(sizes)) ** 0.5


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    plan: str | Mapping[str, str],
    *,
    skip: Sequence[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    progress: bool = False,
) -> QuantizeReport:
    """Quantize the checkpoint ``model`` by ``plan`` and write it to the folder ``out``.

    ``plan`` and ``skip`` are those of ``plan_layers``; ``dtype`` is that of every stored value.
    Everything is checked before work starts; a failure or an interrupt leaves ``out`` as it was,
    and the layers done so far in ``OUT.partial`` for the same call to go on from.
    """
    start = time.perf_counter()
    out = Path(out).resolve()
    source, local = resolve_model(model)
    if local and Path(source).resolve() == out:
        raise JobError(f"{out} is the model itself: choose another folder")
    refuse_foreign(out)
    try:
        tokenizer = load_tokenizer(model)
    except ModelError:
        tokenizer = None
    dense = load_model(model, dtype, device)
    chosen = plan_layers(dense, plan, skip)
    for format in chosen.values():
        if quantizer_for(format).needs_hessian:
            raise JobError(f"{format.id} needs calibration (--calibration FILE)")
    check_weights(dense, chosen)
    check_disk(dense, chosen, out, dtype)
    work = work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    reports = quantize_layers(dense, chosen, work, seed, progress)
    save_quantized(dense, out, tokenizer)
    shutil.rmtree(work)
    cost = quantized_cost(dense)
    return QuantizeReport(
        model=str(model),
        out=str(out),
        layers=reports,
        weights=cost.weights,
        bits_per_weight=cost.bits_per_weight,
        relative_error=mean_error(reports),
        quantized_bytes=cost.quantized_bytes,
        dense_bytes=cost.dense_bytes,
        file_bytes=sum(f.stat().st_size for f in out.glob("*.safetensors")),
        reused=sum(r.reused for r in reports),
        seconds=time.perf_counter() - start,
    )
