"""``aqlm-infer tune``: a quantized checkpoint in, the same one tuned end to end out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Device, Json, Model, parse_device, parse_dtype
from .output import emit, megabytes, pairs, working


def tune(
    model: Model,
    data: Annotated[
        Path, typer.Option(help="Training tokens: raw uint16 .bin, or text.", metavar="FILE")
    ],
    valid: Annotated[
        Path, typer.Option(help="Tokens that choose the best model; no test set.", metavar="FILE")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", metavar="DIR")],
    teacher: Annotated[
        str | None, typer.Option(help="Dense model whose logits to match.", metavar="MODEL")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="pv, pv-ste, ste, continuous, stochastic, naive-pv; on scalar grids also"
            " clamp-ste, sigmoid-ste, softclamp, sigmoid-softclamp."
        ),
    ] = "pv-ste",
    loss: Annotated[str, typer.Option(help="kl (to the teacher) or ce (no teacher).")] = "kl",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 100,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 32,
    microbatch: Annotated[
        int | None, typer.Option(help="Windows run at once (default: the batch).")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    optimizer: Annotated[str, typer.Option(help="lamb or adam.")] = "lamb",
    lr: Annotated[
        float, typer.Option(help="Relative step of codebooks, scales, norms, embeddings.")
    ] = 3e-4,
    final_lr: Annotated[
        float,
        typer.Option(help="Fraction that learning rates fall to by a half cosine; 1: constant."),
    ] = 1.0,
    code_lr: Annotated[
        float | None,
        typer.Option(help="Relative step of the weights that codes follow (default: by method)."),
    ] = None,
    code_warmup: Annotated[
        bool | None,
        typer.Option(
            "--code-warmup/--no-code-warmup",
            help="LAMB's bias correction of the code step (default: by method).",
            show_default=False,
        ),
    ] = None,
    max_code_change: Annotated[
        float | None,
        typer.Option(help="Most codes to change in a step, a fraction (default: by method)."),
    ] = None,
    trust_ratio: Annotated[
        float | None,
        typer.Option(help="Most |dW|/|W| of a step's code changes, 0: any (default: by method)."),
    ] = None,
    delta_decay: Annotated[
        float | None,
        typer.Option(help="1 resets the weights that codes follow each step, 0 keeps them."),
    ] = None,
    ranking: Annotated[
        str, typer.Option(help="Which codes may change: residual, change or gain.")
    ] = "residual",
    temperature: Annotated[
        float, typer.Option(help="Of choosing them: 0 takes the first of the ranking.")
    ] = 0.0,
    beam: Annotated[int, typer.Option(help="Of the code search of several codebooks.")] = 4,
    sigmoid_temperature: Annotated[float, typer.Option(help="T of the sigmoid methods.")] = 20.0,
    train: Annotated[
        str,
        typer.Option(help="What else trains, of norms,biases,embeddings,head,linears; or none."),
    ] = "norms,biases,embeddings,head",
    seed: Annotated[int, typer.Option(help="Of the order of windows and all sampling.")] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 25,
    patience: Annotated[
        int, typer.Option(help="Stop after so many evaluations without a better one; 0: never.")
    ] = 0,
    valid_windows: Annotated[
        int | None, typer.Option(help="Score only the first so many windows.")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints of the run.")] = 50,
    chunk: Annotated[
        int | None,
        typer.Option(help="Tokens whose logits exist at once (default: by vocabulary, device)."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in DIR.tuning.")
    ] = False,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw loss and flips to DIR.tuning/curves.png.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of stored values (default: the checkpoint's).", show_default=False),
    ] = None,
    compute: Annotated[
        str | None,
        typer.Option(
            help="Of matrix products (default: float32 on the CPU, else bfloat16).",
            show_default=False,
        ),
    ] = None,
    device: Device = "cpu",
    poison: Annotated[bool, typer.Option("--poison", hidden=True)] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """PV-Tuning: train the quantized MODEL's values and choose its codes, against a teacher.

    The best model on the validation tokens is written; checkpoints and the log of the run are in
    DIR.tuning.
    """
    from ..training.settings import TuneSettings

    settings = TuneSettings(
        method=method,
        loss=loss,
        steps=steps,
        batch=batch,
        seq_len=seq_len,
        microbatch=microbatch,
        optimizer=optimizer,
        lr=lr,
        final_lr=final_lr,
        code_lr=code_lr,
        delta_decay=delta_decay,
        max_code_change=max_code_change,
        trust_ratio=trust_ratio,
        warm_up=code_warmup,
        temperature=temperature,
        ranking=ranking,
        beam=beam,
        sigmoid_temperature=sigmoid_temperature,
        train=[] if train == "none" else [kind.strip() for kind in train.split(",")],
        seed=seed,
        eval_every=eval_every,
        patience=patience,
        valid_windows=valid_windows,
        save_every=save_every,
        chunk=chunk,
        gradient_checkpointing=gradient_checkpointing,
        poison=poison,
    )
    stored, compute_dtype, device = parse_dtype(dtype), parse_dtype(compute), parse_device(device)
    with working(json):
        from ..training import tune_checkpoint

        report = tune_checkpoint(
            model,
            out,
            data,
            valid,
            settings,
            teacher=teacher,
            dtype=stored,
            compute=compute_dtype,
            device=device,
            resume=resume,
            plot=plot,
            progress=True,
        )
    if report is None:  # under torchrun, a rank that is not the first
        return
    run, final = report.run, report.final
    rows = [
        ("method", f"{report.method}, {run.steps} steps ({run.epochs:.2f} epochs)"),
        ("perplexity", f"{run.first['ppl']:.3f} -> {final['ppl']:.3f}, best at step"
                       f" {run.best['step']:.0f}"),
        ("codes changed", f"{100 * run.flips:.4f} % a step"),
        ("bits a weight", f"{report.bits_per_weight:.3f}"),
        ("files", f"{megabytes(report.file_bytes)} in {report.out}"),
        ("log", report.log),
        ("seconds", f"{report.seconds:.1f}"),
    ]  # fmt: skip
    if "kl" in final:
        shown = f"{run.first['kl']:.5f} -> {final['kl']:.5f} nats a token, top-1 agreement"
        rows.insert(2, ("KL to the teacher", f"{shown} {100 * final['top1']:.2f} %"))
    emit(asdict(report), json, pairs(rows))
