"""The blocks of one calibrated quantization: which are done, and doing the next.

A finished block is one safetensors file, written whole, with the key of everything that it depends
on and its report in the metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..formats import Format
from ..quantizers import quantizer_for
from ..quantizers.hessian import HessianWarning, relative_loss
from ..version import __version__
from .moments import Moments
from .progress import ProgressBar
from .report import BlockResult, LayerResult
from .sharing import shared_options
from .stream import BlockStream, set_parameter
from .tune import BlockTuner, TunedBlock, TuneOptions
from .windows import digest

BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens that run through a block at once, by device type."""


@dataclass(frozen=True)
class Settings:
    """What the bits of the result depend on, besides the model and the windows."""

    schemes: dict[str, str]
    seed: int
    dtype: str
    options: dict
    tune: TuneOptions | None

    def key(self, windows: torch.Tensor, source: str) -> str:
        """Hash that a saved block must carry to be reused."""
        parts = [__version__, digest(windows), source, json.dumps(asdict(self), sort_keys=True)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


def options_for(format: Format, options: Mapping | None, seed: int) -> dict:
    """Options for one format's quantizer: ``seed``, and those given for all."""
    return {"seed": seed, **(options or {})}


class Job:
    """The blocks of one run: which are done, and doing the next."""

    def __init__(
        self,
        stream: BlockStream,
        chosen: Mapping[str, Format],
        settings: Settings,
        dtype: torch.dtype,
        work: Path,
        windows: torch.Tensor,
        progress: bool,
    ):
        self.stream, self.chosen, self.settings, self.dtype = stream, chosen, settings, dtype
        self.work, self.windows, self.progress = work, windows, progress
        kind = torch.device(stream.device).type
        self.batch = max(1, min(len(windows), BATCH_TOKENS[kind] // windows.shape[1]))
        self.key = settings.key(windows, self._fingerprint())
        self.reused = 0

    def _fingerprint(self) -> str:
        """Of the source's tensors: the names, shapes and the bytes of each block's first norm."""
        parts = [f"{n}{list(t.shape)}{t.dtype}" for n, t in self.stream.weights.headers.items()]
        for index in range(len(self.stream.blocks)):
            name = next(iter(dict(self.stream.blocks[index].named_parameters())))
            tensor = self.stream.weights.get(f"{self.stream.block_name(index)}.{name}")
            data = tensor.contiguous().view(torch.uint8).numpy()
            parts.append(hashlib.sha256(data).hexdigest())
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def file(self, index: int) -> Path:
        return self.work / f"block-{index:04d}.safetensors"

    def layers_of(self, index: int) -> dict[str, Format]:
        """The chosen layers of a block by their names inside it."""
        prefix = self.stream.block_name(index) + "."
        return {n.removeprefix(prefix): f for n, f in self.chosen.items() if n.startswith(prefix)}

    def weights(self) -> int:
        """Weights of all layers to quantize."""
        layers = [self.stream.model.get_submodule(name) for name in self.chosen]
        return sum(layer.out_features * layer.in_features for layer in layers)

    @torch.no_grad()
    def run(self) -> list[BlockResult]:
        """Quantize all blocks; the inputs of the next one stay on the CPU."""
        results = []
        hidden = self.stream.embed(self.windows, self.batch)
        count = len(self.stream.blocks)
        head, _ = self.stream.head()
        total = count + (head in self.chosen)
        with ProgressBar(total, self.weights(), self.progress) as bar:
            for index in range(count):
                bar.block(index)
                kept = self.read(index)
                self.reused += kept is not None
                with self.stream.block(index) as block:
                    if kept is None:
                        result, tensors = self.quantize(index, block, hidden, bar)
                        self.write(index, tensors, result)
                    else:
                        tensors, result = kept
                        bar.reused(result.weights)
                    if index + 1 < total:
                        self.place(block, index, tensors)
                        hidden = self.forward(index, block, hidden)
                results.append(result)
            if head in self.chosen:
                bar.block(count)
                bar.begin(head)
                results.append(self.head(count, head, hidden))
                layer = results[-1].layers[0]
                bar.layer(head, results[-1].weights, layer.relative_error)
        return results

    def head(self, index: int, name: str, hidden: torch.Tensor) -> BlockResult:
        """Quantize the output head, kept like a block under the next ``index``."""
        kept = self.read(index)
        if kept is not None:
            self.reused += 1
            return kept[1]
        start = time.perf_counter()
        weight = self.stream.head_weight().to(self.stream.device).float()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        set_parameter(linear, "weight", weight)
        block = nn.ModuleDict({"head": linear})
        moments = Moments(block, ["head"])
        groups = zip(self.windows.split(self.batch), hidden.split(self.batch), strict=True)
        for windows, outputs in groups:
            outputs = outputs.to(self.stream.device)
            moments.add("head", self.stream.last_hidden(windows, outputs))
        format = self.chosen[name]
        tensors, report = self.layer(name, "head", format, block, moments, last=True)
        result = BlockResult(name, [report], time.perf_counter() - start)
        self.write(index, {f"{name}.{k}": t.cpu() for k, t in tensors.items()}, result)
        return result

    def forward(
        self, index: int, block: nn.Module, hidden: torch.Tensor, moments: Moments | None = None
    ) -> torch.Tensor:
        """The block's outputs for all windows, on the CPU."""
        outputs = []
        for group in hidden.split(self.batch):
            if moments is not None:
                moments.next_batch()
            outputs.append(self.stream.run(index, block, group.to(self.stream.device)).cpu())
        return torch.cat(outputs)

    def quantize(
        self, index: int, block: nn.Module, hidden: torch.Tensor, bar: ProgressBar
    ) -> tuple[BlockResult, dict[str, torch.Tensor]]:
        """Quantize one block: its report, and its stored tensors by their names inside it."""
        start, layers = time.perf_counter(), self.layers_of(index)
        moments = Moments(block, list(layers))
        with moments.watching():
            targets = self.forward(index, block, hidden, moments)
        done: dict[str, tuple[Format, dict[str, torch.Tensor]]] = {}
        reports = []
        for position, (name, format) in enumerate(layers.items()):
            bar.begin(name)
            rest = list(layers)[position + 1 :]
            last = all(moments.leader(n) != moments.leader(name) for n in rest)
            full = f"{self.stream.block_name(index)}.{name}"
            siblings = [n for n in layers if moments.leader(n) == moments.leader(name)]
            shared = shared_options(block, {n: layers[n] for n in siblings}, format)
            tensors, report = self.layer(full, name, format, block, moments, last, shared)
            done[name] = (format, tensors)
            reports.append(report)
            bar.layer(name, report.N * report.K, report.relative_error)
        tuned = None
        plain = {n: p for n, p in block.named_parameters() if n.rpartition(".")[0] not in layers}
        plain |= {n: p for n, p in block.named_parameters() if n.endswith(".bias")}
        if self.settings.tune is not None and layers:
            done, plain, tuned = self.tune(index, block, done, plain, hidden, targets, bar)
        tensors = {f"{n}.{k}": t for n, (_, values) in done.items() for k, t in values.items()}
        tensors |= {n: p.detach().to(self.dtype) for n, p in plain.items()}
        tensors = {n: t.cpu().contiguous() for n, t in tensors.items()}
        result = BlockResult(
            self.stream.block_name(index),
            reports,
            time.perf_counter() - start,
            *((tuned.before, tuned.after, tuned.epochs) if tuned else ()),
        )
        return result, tensors

    def layer(
        self,
        full: str,
        name: str,
        format: Format,
        block: nn.Module,
        moments: Moments,
        last: bool,
        shared: Mapping[str, object] | None = None,
    ) -> tuple[dict[str, torch.Tensor], LayerResult]:
        """Quantize the layer ``name`` of a block, called ``full`` in the model; its values come
        back in their stored dtype. ``shared``: options that its siblings get as well."""
        start = time.perf_counter()
        weight = block.get_submodule(name).weight.detach().float()
        N, K = weight.shape
        quantizer = quantizer_for(
            format,
            **options_for(format, self.settings.options, self.settings.seed),
            **(shared or {}),
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", HessianWarning)
            moment = moments.take(name, last)
            tensors = quantizer.fit(weight, moment)
        notes = [str(w.message) for w in caught if issubclass(w.category, HessianWarning)]
        tensors = stored(format, tensors, N, K, self.dtype)
        format.check_tensors(tensors, N, K, full)
        error = relative_loss(weight, format.dequantize(tensors, torch.float32), moment)
        bits = format.bits_per_weight(N, K)
        seconds = time.perf_counter() - start
        return tensors, LayerResult(full, format.id, N, K, bits, error, seconds, notes)

    def tune(self, index, block, done, plain, hidden, targets, bar):
        """Fine-tune the block's values; returns layers, plain tensors and the report."""
        options = self.settings.tune

        def progress(epoch: int, error: float) -> None:
            bar.tuning(epoch, options.epochs, error)

        with ExitStack() as stack:
            following = []
            for after in range(index + 1, min(index + 1 + options.ahead, len(self.stream.blocks))):
                with self.stream.block(after) as module:
                    targets = self.forward(after, module, targets)
                following.append(stack.enter_context(self.stream.block(after, torch.float32)))
            tuned = TunedBlock(block, done, options)
            tuner = BlockTuner(
                self.stream, index, tuned, following, hidden, targets, options, self.batch
            )
            with torch.enable_grad():
                report = tuner.train(self.settings.seed, progress)
        better = {}
        for name, (format, _) in done.items():
            N, K = block.get_submodule(name).weight.shape
            better[name] = (format, stored(format, tuned.tensors(name), N, K, self.dtype))
        return better, {**plain, **tuned.plain()}, report

    def place(self, block: nn.Module, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the block the weights that its stored tensors stand for."""
        device, dtype = self.stream.device, self.stream.dtype
        layers = self.layers_of(index)
        for name, format in layers.items():
            own = {k: tensors[f"{name}.{k}"].to(device) for k in _keys(format, block, name)}
            set_parameter(block, f"{name}.weight", format.dequantize(own, torch.float32).to(dtype))
        for name, _ in list(block.named_parameters()):
            if name in tensors:
                set_parameter(block, name, tensors[name].to(device=device, dtype=dtype))

    def write(self, index: int, tensors: dict[str, torch.Tensor], result: BlockResult) -> None:
        """Save a finished block whole."""
        part = self.file(index).with_suffix(".part")
        save_file(tensors, part, {"key": self.key, "result": json.dumps(asdict(result))})
        os.replace(part, self.file(index))

    def read(self, index: int) -> tuple[dict[str, torch.Tensor], BlockResult] | None:
        """A finished block of this very job, or None."""
        file = self.file(index)
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as saved:
                metadata = saved.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                tensors = {n: saved.get_tensor(n) for n in saved.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None  # cut short by a crash of the machine: quantize the block again
        body = json.loads(metadata["result"])
        body["layers"] = [LayerResult(**layer) for layer in body["layers"]]
        return tensors, BlockResult(**body)


def _keys(format: Format, block: nn.Module, name: str) -> list[str]:
    return list(format.tensor_specs(*block.get_submodule(name).weight.shape))


def stored(
    format: Format, tensors: Mapping[str, torch.Tensor], N: int, K: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Canonical tensors with values in the dtype that the checkpoint stores them in."""
    specs = format.tensor_specs(N, K)
    return {k: t.detach().to(specs[k].dtype or dtype).contiguous() for k, t in tensors.items()}
