"""``aqlm-infer bench matmul | generate``: time quantized layers and models beside dense ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Debug,
    Device,
    Json,
    Model,
    OptionError,
    Precision,
    parse_device,
    parse_dtype,
    parse_ints,
    parse_shape,
)
from .output import emit, table, working

app = typer.Typer(help="Time quantized layers and models beside dense ones, in the same run.")

Out = Annotated[
    Path | None, typer.Option(help="Append the rows to this file.", metavar="FILE.jsonl")
]


def _collect(rows, total: int, out: Path | None) -> list[dict]:
    """Gather rows under a progress bar; each is appended to ``out`` as soon as it is measured."""
    from tqdm import tqdm

    from ..bench import append_rows

    collected = []
    with tqdm(rows, total=total, desc="bench", unit="case") as bar:
        for row in bar:
            collected.append(row)
            if out is not None:
                append_rows(out, [row])
    return collected


def _ratio(slow: float | None, fast: float | None) -> str | None:
    return None if slow is None or fast is None else f"{slow / fast:.2f}x"


@app.command("matmul")
def matmul(
    scheme: Annotated[list[str] | None, typer.Option(help="Scheme id; may be repeated.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="NxK, out_features x in_features; may be repeated.", metavar="NxK"),
    ] = None,
    m: Annotated[str, typer.Option("--m", help="Tokens, such as 1,2,16.")] = "1",
    threads: Annotated[str, typer.Option(help="Thread counts, such as 1,2.")] = "1",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    precision: Precision = "exact",
    isa: Annotated[
        str | None,
        typer.Option(help="Instruction set of the CPU kernels (`aqlm-infer info` lists them)."),
    ] = None,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold/--warm",
            help="Rotate through 256 MB of distinct weights, or stay in the caches.",
        ),
    ] = False,
    kernel: Annotated[str | None, typer.Option(help="Kernel id to force.")] = None,
    device: Device = "cpu",
    out: Out = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time y = x W^T in quantized formats against F.linear. Every result is verified first."""
    from ..bench import bench_matmul, matmul_cases

    parse_dtype(dtype)
    cases = matmul_cases(
        scheme or ["aqlm-2x8-g8"],
        [parse_shape(text) for text in shape or ["4096x4096"]],
        parse_ints(m, "--m"),
        parse_ints(threads, "--threads"),
        ["dram" if cold else "warm"],
        dtype=dtype,
        precision=precision,
        device=parse_device(device),
        kernel=kernel,
    )
    with working(json):
        rows = _collect(bench_matmul(cases, isa), len(cases), out)
    columns = ["scheme", "N x K", "M", "threads", "cache", "us", "min us", "GB/s", "dense us",
               "bf16 us", "speed-up"]  # fmt: skip
    shown = [
        [
            r["scheme"], f"{r['N']}x{r['K']}", r["M"], r["threads"], r["cache"], r["median_us"],
            r["min_us"], r["gb_per_s"], r["dense_us"], r["dense_bf16_us"],
            _ratio(r["dense_us"], r["median_us"]),
        ]
        for r in rows
    ]  # fmt: skip
    title = f"{rows[0]['device_name']}, {rows[0]['device']}, {dtype}, {precision}"
    emit({"rows": rows}, json, table(title, columns, shown))


@app.command("generate")
def generate(
    model: Model,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Quantize the dense MODEL to this scheme first; may be repeated."),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(help="Dense model to compare a quantized MODEL with.", metavar="MODEL"),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,4.")] = "1",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    threads: Annotated[str, typer.Option(help="Thread counts, such as 1,2.")] = "1",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    precision: Precision = "exact",
    device: Device = "cpu",
    out: Out = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Decode rate and time to first token of a quantized model, beside the dense one."""
    from ..evaluation import load_model, resolve_model, set_precision
    from ..formats import parse_scheme
    from ..layers import plan_layers, quantized_layers

    torch_dtype, device = parse_dtype(dtype), parse_device(device)
    counts, batches = parse_ints(threads, "--threads"), parse_ints(batch, "--batch")
    for name in scheme or []:
        parse_scheme(name)
    for name in (model, dense):
        if name is not None:
            resolve_model(name)
    with working(json):
        from ..bench.generate import bench_generate, check_sizes, quantized_copy

        loaded = load_model(model, torch_dtype, device)
        quantized = any(True for _ in quantized_layers(loaded))
        if quantized and scheme:
            raise OptionError(f"{model} is quantized already: --scheme needs a dense model")
        if not quantized and (not scheme or dense):
            raise OptionError(f"{model} is dense: give --scheme, and no --dense")
        check_sizes(loaded, batches, new_tokens)
        for name in scheme or []:
            plan_layers(loaded, name)
        if quantized:
            if precision != "exact":
                set_precision(loaded, precision)
            other = load_model(dense, torch_dtype, device) if dense else None
            pairs = iter([(loaded, other)])
        else:
            pairs = ((quantized_copy(loaded, s, precision, True), loaded) for s in scheme)
        measured = (
            row
            for ours, theirs in pairs
            for row in bench_generate(
                model, ours, theirs, batches=batches, new_tokens=new_tokens, threads=counts
            )
        )
        rows = _collect(measured, len(counts) * len(batches) * len(scheme or [1]), out)
    columns = ["scheme", "batch", "threads", "tokens/s", "dense", "first token ms", "dense ms"]
    shown = [
        [
            r["scheme"], r["batch"], r["threads"], r["tokens_per_s"], r["dense_tokens_per_s"],
            r["ttft_ms"], r["dense_ttft_ms"],
        ]
        for r in rows
    ]  # fmt: skip
    title = f"{model}, {rows[0]['device_name']}, {rows[0]['device']}, {dtype}"
    emit({"rows": rows}, json, table(title, columns, shown))
