"""``aqlm-infer bench matmul``: time quantized layers beside dense ones (models: bench_generate)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Debug,
    Device,
    Json,
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


def collect(rows, total: int, out: Path | None) -> list[dict]:
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


def ratio(slow: float | None, fast: float | None) -> str | None:
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
        rows = collect(bench_matmul(cases, isa), len(cases), out)
    columns = ["scheme", "N x K", "M", "threads", "cache", "us", "min us", "GB/s", "dense us",
               "bf16 us", "speed-up"]  # fmt: skip
    shown = [
        [
            r["scheme"], f"{r['N']}x{r['K']}", r["M"], r["threads"], r["cache"], r["median_us"],
            r["min_us"], r["gb_per_s"], r["dense_us"], r["dense_bf16_us"],
            ratio(r["dense_us"], r["median_us"]),
        ]
        for r in rows
    ]  # fmt: skip
    title = f"{rows[0]['device_name']}, {rows[0]['device']}, {dtype}, {precision}"
    emit({"rows": rows}, json, table(title, columns, shown))
