"""Tune a checkpoint folder: the function behind ``aqlm-infer tune``."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import save_quantized
from ..checkpoint.save import refuse_foreign
from ..evaluation import load_model, load_tokenizer, resolve_model
from ..evaluation.loading import ModelError
from ..layers import quantized_cost
from .curves import plot_log, plotting
from .data import read_windows
from .loss import score
from .parallel import Parallel
from .representation import TuningError
from .runs import RunFolder, check_disk
from .settings import TuneSettings
from .student import Student
from .trainer import Trainer, TuneResult, check_same


@dataclass(frozen=True)
class TuneReport:
    """What a run gave. ``final`` evaluates what was written, in its own dtype."""

    model: str
    teacher: str | None
    out: str
    method: str
    bits_per_weight: float
    run: TuneResult
    final: dict[str, float]
    file_bytes: int
    log: str
    seconds: float


def run_folder(out: Path) -> Path:
    """Where the run behind ``out`` keeps its checkpoints and log."""
    return out.with_name(out.name + ".tuning")


def check_models(student: nn.Module, teacher: nn.Module | None, seq_len: int) -> None:
    """Raise TuningError when the two do not predict the same tokens, or their context is short."""
    sizes = [m.get_output_embeddings() for m in (student, teacher) if m is not None]
    sizes = [head.out_features for head in sizes]
    if len(set(sizes)) > 1:
        raise TuningError(
            f"the teacher's vocabulary has {sizes[1]} tokens, the student's {sizes[0]}"
        )
    for model in (student, teacher):
        if model is None:
            continue
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and seq_len > limit:
            raise TuningError(f"seq_len={seq_len} is longer than a model's context of {limit}")


def check_tokenizers(model: str, teacher: str | Path) -> None:
    """Raise TuningError when a token has not the same number in both models; warn where one of them
    has no tokenizer, so that nobody can tell."""
    try:
        ours, theirs = (load_tokenizer(m).get_vocab() for m in (model, teacher))
    except ModelError as error:
        warnings.warn(f"the vocabularies were not compared: {error}", stacklevel=2)
        return
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            raise TuningError(
                f"the teacher's vocabulary is another: {token!r} is its token {theirs.get(token)},"
                f" the student's {ours.get(token)}"
            )


def stored_dtype(model: str) -> torch.dtype:
    """The dtype that a checkpoint says its values are stored in."""
    from transformers import AutoConfig

    source, local = resolve_model(model)
    dtype = AutoConfig.from_pretrained(source, local_files_only=local).dtype
    return dtype or torch.float32


def tune_checkpoint(
    model: str | Path,
    out: str | Path,
    data: str | Path,
    valid: str | Path,
    settings: TuneSettings,
    *,
    teacher: str | Path | None = None,
    dtype: torch.dtype | None = None,
    compute: torch.dtype | None = None,
    device: str = "cpu",
    resume: bool = False,
    plot: bool = False,
    progress: bool = False,
) -> TuneReport | None:
    """Tune the quantized checkpoint ``model`` and write it to ``out`` in the same format.

    Args:
        data, valid: token files ``.bin`` or text files, for training and for choosing the best.
        teacher: dense checkpoint with the same vocabulary (none for the loss "ce").
        dtype: of stored values (None: the checkpoint's).
        compute: of matrix products (None: float32 on the CPU, bfloat16 elsewhere).
        resume: go on with the run in ``OUT.tuning``.
        plot: draw its curves (needs matplotlib).

    Under ``torchrun`` every rank calls this alike, and all but rank 0 get None.
    Everything that can be checked is before work starts. A failure leaves ``out`` as it was, and
    the last checkpoint of the run in ``OUT.tuning``; a finished run leaves its log there.
    """
    start = time.perf_counter()
    model, out = str(model), Path(out).resolve()
    compute = compute or (torch.float32 if device == "cpu" else torch.bfloat16)
    source, local = resolve_model(model)
    if local and Path(source).resolve() == out:
        raise TuningError(f"{out} is the model itself: choose another folder")
    refuse_foreign(out)
    folder = RunFolder(run_folder(out))
    if resume:
        check_same(folder.peek()["settings"], settings, folder.folder)
    else:
        folder.require_new()
    if plot:
        plotting()
    if (teacher is None) != (settings.loss == "ce"):
        raise TuningError(f"loss={settings.loss!r}: {'needs a' if not teacher else 'no'} teacher")
    for path in (data, valid):
        if not Path(path).is_file():
            raise FileNotFoundError(2, "no such file", str(path))
    dtype = dtype or stored_dtype(model)
    parallel = Parallel(device) if Parallel.wanted() else None
    device = device if parallel is None else parallel.device
    folder = RunFolder(folder.folder, parallel)
    loaded = load_model(model, torch.float32, device)
    dense = None if teacher is None else load_model(teacher, compute, device)
    check_models(loaded, dense, settings.seq_len)
    if teacher is not None:
        check_tokenizers(model, teacher)
    vocabulary = loaded.get_input_embeddings().num_embeddings
    windows = [read_windows(Path(p), model, vocabulary, settings.seq_len) for p in (data, valid)]
    bits = quantized_cost(loaded).bits_per_weight
    student = Student(loaded, settings, compute, parallel)
    check_disk(folder.folder, student)
    trainer = Trainer(student, dense, *windows, settings, folder, progress)
    result, micro, chunk = trainer.run(resume), trainer.micro, trainer.chunk
    if parallel is not None:
        parallel.stop()
        if parallel.rank:
            return None
        # What computes is sharded and masters are spread: gather them in a student of one rank.
        del trainer, student, loaded, dense
        folder = RunFolder(folder.folder)
        student = Student(load_model(model, torch.float32, device), settings, compute)
        folder.load_best(student, result.best["step"])
        dense = None if teacher is None else load_model(teacher, compute, device)
    try:
        tokenizer = load_tokenizer(model)
    except ModelError:
        tokenizer = None
    save_quantized(student.export(dtype), out, tokenizer)
    found = score(
        load_model(out, None, device),
        dense,
        windows[1][: settings.valid_windows],
        micro,
        chunk,
    )
    if plot:
        plot_log(folder.rows(), f"{model}: {settings.method}", folder.folder / "curves.png")
    folder.finish()
    return TuneReport(
        model=model,
        teacher=None if teacher is None else str(teacher),
        out=str(out),
        method=settings.method,
        bits_per_weight=bits,
        run=result,
        final={**found, "ppl": math.exp(min(found["nll"], 700))},
        file_bytes=sum(f.stat().st_size for f in out.glob("*.safetensors")),
        log=str(folder.log),
        seconds=time.perf_counter() - start,
    )
