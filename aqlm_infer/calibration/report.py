"""What a calibrated quantization did: one record, as JSON and as a table to read."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerResult:
    """One quantized layer.

    ``relative_error`` is tr(dW X2 dW^T) / tr(W X2 W^T) on the quantized path's inputs, after
    rounding values to their stored dtype and before block fine-tuning. ``notes`` are warnings of
    the factorisation.
    """

    name: str
    scheme: str
    N: int
    K: int
    bits_per_weight: float
    relative_error: float
    seconds: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BlockResult:
    """One block: ``error`` is the relative squared error of its outputs on held-out windows,
    before and after fine-tuning (None without)."""

    name: str
    layers: list[LayerResult]
    seconds: float
    error_before: float | None = None
    error_after: float | None = None
    epochs: int = 0

    @property
    def weights(self) -> int:
        """Of the quantized layers."""
        return sum(layer.N * layer.K for layer in self.layers)


@dataclass(frozen=True)
class CalibratedReport:
    """The whole run; ``relative_error`` is the layers' mean, weighted by their weights. ``tune``
    are the settings of fine-tuning, by name."""

    model: str
    out: str
    blocks: list[BlockResult]
    weights: int
    bits_per_weight: float
    relative_error: float
    quantized_bytes: int
    dense_bytes: int
    file_bytes: int
    samples: int
    seq_len: int
    seed: int
    reused: int
    seconds: float
    tune: dict | None = None


def mean_error(layers: list[LayerResult]) -> float:
    """Mean relative error, weighted by the number of weights."""
    total = sum(layer.N * layer.K for layer in layers)
    return sum(layer.N * layer.K * layer.relative_error for layer in layers) / total


def settings(values: dict) -> str:
    """``name value`` of each, on one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def text(report: CalibratedReport) -> str:
    """The report as plain lines, one a layer."""
    lines = [
        f"model            {report.model}",
        f"bits a weight    {report.bits_per_weight:.3f} over {report.weights:,} weights",
        f"bytes            {report.quantized_bytes:,} (16-bit dense {report.dense_bytes:,})",
        f"relative error   {report.relative_error:.4f} (tr dW X2 dW^T / tr W X2 W^T)",
        f"calibration      {report.samples} windows of {report.seq_len}, seed {report.seed}",
        "fine-tuning      " + ("none" if report.tune is None else settings(report.tune)),
        f"seconds          {report.seconds:.1f}",
        "",
        f"{'layer':48} {'scheme':18} {'NxK':>12} {'bits':>6} {'error':>8} {'s':>6}",
    ]
    for block in report.blocks:
        for layer in block.layers:
            shape = f"{layer.N}x{layer.K}"
            lines.append(
                f"{layer.name:48} {layer.scheme:18} {shape:>12} {layer.bits_per_weight:6.3f}"
                f" {layer.relative_error:8.4f} {layer.seconds:6.1f}"
            )
            lines += [f"    note: {note}" for note in layer.notes]
        if block.error_before is not None:
            lines.append(
                f"  {block.name} outputs: {block.error_before:.5f} -> {block.error_after:.5f}"
                f" in {block.epochs} epochs of fine-tuning"
            )
    return "\n".join(lines) + "\n"
