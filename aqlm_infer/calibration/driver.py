"""Calibrated quantization of a checkpoint, block by block and resumably.

    h <- embeddings of the windows
    for each block:  target <- dense block(h), second moments of its layers' inputs on the way
                     quantize its layers; optionally tune their values towards target
                     save the block; h <- quantized block(h)

So every layer sees the inputs that the quantized layers before it produce. A finished block is one
file in ``OUT.partial/``, written whole under a key of everything it depends on; after a kill the
same call runs the finished blocks forward and goes on with the next.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.save import refuse_foreign
from ..evaluation import resolve_model
from ..formats import Format
from ..layers import PlanError, plan_layers
from ..quantizers import quantizer_for
from .assemble import write_checkpoint
from .datafree import JobError, check_disk, work_folder
from .job import Job, Settings, options_for
from .report import BlockResult, CalibratedReport, mean_error, text
from .stream import BlockStream
from .tune import TuneOptions
from .windows import calibration_windows


def quantize_calibrated(
    model: str | Path,
    out: str | Path,
    plan: str | Mapping[str, str],
    calibration: str | Path,
    *,
    samples: int = 128,
    seq_len: int = 2048,
    skip: Sequence[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    tune: TuneOptions | None = None,
    options: Mapping[str, object] | None = None,
    progress: bool = False,
) -> CalibratedReport:
    """Quantize the checkpoint ``model`` by ``plan`` on calibration text, into the folder ``out``.

    Args:
        plan, skip: those of ``plan_layers``; every layer must be in a decoder block or be the
            output head (which fine-tuning leaves alone).
        calibration, samples, seq_len: those of ``calibration_windows``.
        seed: of the choice of windows, the quantizers and the order of fine-tuning.
        dtype: of every stored value. The computation is float32 on the CPU, and in the
            checkpoint's own dtype on CUDA, with second moments and factorisations in float64.
        tune: fine-tune each block.
        options: for the quantizers, as ``quantizer_for`` takes them.

    Everything is checked before work starts. A failure or an interrupt leaves ``out`` as it was and
    the finished blocks in ``OUT.partial``.
    """
    start = time.perf_counter()
    out = Path(out).resolve()
    source, local = resolve_model(model)
    if local and Path(source).resolve() == out:
        raise JobError(f"{out} is the model itself: choose another folder")
    refuse_foreign(out)
    if tune is not None and samples < 2:
        raise JobError(f"fine-tuning holds windows out: samples={samples}, at least 2 are needed")
    stream = open_stream(model, device)
    windows = calibration_windows(
        calibration, model, stream.vocab_size, samples=samples, seq_len=seq_len, seed=seed
    )
    check_window(stream.model, seq_len)
    chosen = plan_layers(stream.model, plan, skip)
    check_inside(chosen, stream)
    for format in {f.id: f for f in chosen.values()}.values():
        quantizer_for(format, **options_for(format, options, seed))
    check_disk(stream.model, chosen, out, dtype)
    settings = Settings(
        {name: format.id for name, format in chosen.items()},
        seed,
        str(dtype),
        dict(options or {}),
        tune,
    )
    work = work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    job = Job(stream, chosen, settings, dtype, work, windows, progress)
    blocks = job.run()
    return _finish(job, blocks, out, start, samples, seq_len)


def _finish(
    job: Job, blocks: list[BlockResult], out: Path, start: float, samples: int, seq_len: int
) -> CalibratedReport:
    """Write the checkpoint and the report, and drop the work folder."""
    stream, chosen = job.stream, job.chosen
    files = [job.file(index) for index in range(len(blocks))]
    write_checkpoint(stream, chosen, files, out, job.dtype)
    layers = [layer for block in blocks for layer in block.layers]
    weights = sum(layer.N * layer.K for layer in layers)
    bits = sum(layer.N * layer.K * layer.bits_per_weight for layer in layers)
    report = CalibratedReport(
        model=str(stream.source),
        out=str(out),
        blocks=blocks,
        weights=weights,
        bits_per_weight=bits / weights,
        relative_error=mean_error(layers),
        quantized_bytes=round(bits / 8),
        dense_bytes=2 * weights,
        file_bytes=sum(f.stat().st_size for f in out.glob("*.safetensors")),
        samples=samples,
        seq_len=seq_len,
        seed=job.settings.seed,
        reused=job.reused,
        seconds=time.perf_counter() - start,
        tune=None if job.settings.tune is None else asdict(job.settings.tune),
    )
    (out / "quantize_report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    (out / "quantize_report.txt").write_text(text(report))
    shutil.rmtree(job.work)
    return report


def open_stream(model: str | Path, device: str) -> BlockStream:
    """The model's skeleton, computing in float32 on the CPU and in its own dtype elsewhere."""
    if torch.device(device).type == "cpu":
        return BlockStream(model, torch.float32, device)
    from transformers import AutoConfig

    source, local = resolve_model(model)
    own = AutoConfig.from_pretrained(source, local_files_only=local).dtype
    half = own if own in (torch.float16, torch.bfloat16) else torch.bfloat16
    return BlockStream(model, half, device)


def check_window(model: nn.Module, seq_len: int) -> None:
    """Raise JobError when a window is longer than the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise JobError(f"seq_len={seq_len} is longer than the model's context of {limit}")


def check_inside(chosen: Mapping[str, Format], stream: BlockStream) -> None:
    """Raise PlanError for a layer outside the decoder blocks that is not the output head."""
    head, _ = stream.head()
    for name in chosen:
        if name != head and not name.startswith(stream.prefix + "."):
            raise PlanError(
                f"{name} is neither in a decoder block ({stream.prefix}.*) nor the output head:"
                " calibrated quantization keeps it dense"
            )
