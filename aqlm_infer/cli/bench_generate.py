"""``aqlm-infer bench generate``: time quantized models beside dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .bench import Out, collect
from .options import (
    Debug,
    Device,
    Json,
    OptionError,
    Precision,
    parse_device,
    parse_dtype,
    parse_ints,
)
from .output import emit, table, working


def generate(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or hub id.", metavar="[MODEL]")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Instead of MODEL, random weights of a published shape: llama-3-8b, llama-2-7b,"
            " llama-3-70b or llama-3.2-1b. Nothing is downloaded."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="With --shape, only this many blocks.")] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Scheme of a dense MODEL's or --shape's layers; may be repeated."),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(help="Dense model to compare a quantized MODEL with.", metavar="MODEL"),
    ] = None,
    skip_dense: Annotated[
        bool, typer.Option("--skip-dense", help="Do not time the dense model.")
    ] = False,
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,4.")] = "1",
    prompt_tokens: Annotated[str, typer.Option(help="Prompt lengths, such as 32,2048.")] = "32",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="eager, no-graph or prepared (the default); may be repeated.", metavar="MODE"
        ),
    ] = None,
    lm_head: Annotated[
        str | None, typer.Option(help="Quantize the output head, to rtn-int8-g128 for instance.")
    ] = None,
    threads: Annotated[str, typer.Option(help="Thread counts, such as 1,2.")] = "1",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    precision: Precision = "exact",
    device: Device = "cpu",
    out: Out = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the rows (needs matplotlib).", metavar="FILE.svg")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Decode rate and time to first token of a quantized model, beside the dense one."""
    from ..bench.generate import bench_generate, check_modes
    from ..evaluation import resolve_model
    from ..formats import parse_scheme

    if (model is None) == (shape is None):
        raise OptionError("give either MODEL or --shape")
    torch_dtype, device = parse_dtype(dtype), parse_device(device)
    sizes = {
        "batches": parse_ints(batch, "--batch"),
        "prompt_tokens": parse_ints(prompt_tokens, "--prompt-tokens"),
        "new_tokens": new_tokens,
    }
    options = {
        **sizes, "threads": parse_ints(threads, "--threads"), "modes": mode or ["prepared"],
        "lm_head": lm_head,
    }  # fmt: skip
    for name in scheme or []:
        parse_scheme(name)
    if shape is not None and not scheme:
        raise OptionError("--shape needs --scheme")
    if shape is not None and dense is not None:
        raise OptionError("--shape is compared with its own dense model, not --dense")
    check_modes(options["modes"], lm_head)
    for name in (model, dense):
        if name is not None:
            resolve_model(name)
    with working(json):
        if shape is not None:
            pairs = _shapes(shape, layers, scheme, torch_dtype, device, precision, skip_dense)
        else:
            pairs = _models(model, scheme, dense, torch_dtype, device, precision, sizes, skip_dense)
        measured = (
            row for ours, theirs in pairs
            for row in bench_generate(shape or model, ours, theirs, **options)
        )  # fmt: skip
        each = [options[n] for n in ("batches", "prompt_tokens", "threads", "modes")]
        total = len(scheme or [1])
        for values in each:
            total *= len(values)
        rows = collect(measured, total, out)
        if plot is not None:
            from ..bench.plot import plot_generate

            plot_generate(rows, plot)
    columns = ["scheme", "mode", "batch", "prompt", "threads", "tokens/s", "dense", "compiled",
               "first ms", "dense ms"]  # fmt: skip
    shown = [
        [
            r["scheme"], r["mode"], r["batch"], r["prompt_tokens"], r["threads"],
            r["tokens_per_s"], r["dense_tokens_per_s"], r["dense_compiled_tokens_per_s"],
            r["ttft_ms"], r["dense_ttft_ms"],
        ]
        for r in rows
    ]  # fmt: skip
    title = f"{shape or model}, {rows[0]['device_name']}, {rows[0]['device']}, {dtype}"
    emit({"rows": rows}, json, table(title, columns, shown))


def _shapes(
    shape, layers, scheme, dtype, device: str, precision: str, skip_dense: bool
) -> Iterator[tuple]:
    """(quantized, dense) random models of a shape, a scheme at a time."""
    from ..bench.generate import Dense
    from ..bench.shapes import random_model, shape_config

    config = shape_config(shape, layers)
    dense = None if skip_dense else Dense(random_model(config, None, dtype, device))
    for name in scheme:
        yield random_model(config, name, dtype, device, precision=precision), dense


def _models(
    model, scheme, dense, dtype, device: str, precision: str, sizes: dict, skip_dense: bool
) -> Iterator[tuple]:
    """(quantized, dense) of a checkpoint: quantized already, or to be quantized to each scheme."""
    from ..bench.generate import Dense, check_sizes, quantized_copy
    from ..evaluation import load_model, set_precision
    from ..layers import plan_layers, quantized_layers

    loaded = load_model(model, dtype, device)
    quantized = any(True for _ in quantized_layers(loaded))
    if quantized and scheme:
        raise OptionError(f"{model} is quantized already: --scheme needs a dense model")
    if not quantized and (not scheme or dense):
        raise OptionError(f"{model} is dense: give --scheme, and no --dense")
    check_sizes(loaded, sizes["batches"], sizes["new_tokens"], sizes["prompt_tokens"])
    for name in scheme or []:
        plan_layers(loaded, name)
    if quantized:
        if precision != "exact":
            set_precision(loaded, precision)
        yield loaded, Dense(load_model(dense, dtype, device)) if dense else None
        return
    other = None if skip_dense else Dense(loaded)
    for name in scheme:
        yield quantized_copy(loaded, name, precision, True), other
