"""Rows of ``results/``: read, brought to one form, and picked from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from aqlm_infer import FormatError, parse_scheme

Row = dict


def read_rows(folder: Path) -> list[Row]:
    """All rows under ``folder``, oldest first: of .jsonl files by line, of .json files whole.

    A record with ``rows`` of its own gives one row for each, with the record's fields in it.
    Raises SystemExit for a line that is not JSON, or says not what, when or where it is.
    """
    found = []
    for file in sorted(folder.rglob("*.json*")):
        text = file.read_text(encoding="utf-8")
        records = text.splitlines() if file.suffix == ".jsonl" else [text]
        for number, record in enumerate(records, 1):
            try:
                row = json.loads(record)
            except ValueError as error:
                raise SystemExit(f"error: {file}:{number} is not a JSON row: {error}") from error
            missing = [key for key in ("bench", "date", "device") if key not in row]
            if missing:
                raise SystemExit(f"error: {file}:{number} has no {', '.join(missing)}")
            shared = {k: v for k, v in row.items() if k != "rows"}
            found += [{**shared, **inner} for inner in row.get("rows", [{}])]
    for row in found:
        row["device_name"] = row.get("device_name") or row["device"]
        if row["bench"] == "matmul" and is_rotated(row) and not is_cpu(row) and "kernel" in row:
            row["bench"] = "layer"  # bench_matmul times rotations too; the ladder has both
    return sorted(found, key=lambda row: row["date"])


def is_cpu(row: Row) -> bool:
    return row["device"].startswith("cpu-")


def is_rotated(row: Row) -> bool:
    """Whether inputs and outputs of the row's scheme are rotated, which takes time of its own."""
    return row["scheme"].startswith("quip-")


def one_cpu(rows: list[Row], name: str | None = None) -> list[Row]:
    """The rows without those of other CPUs: one table shows one machine.

    ``name``: a part of the CPU's product name; None: the CPU measured most.
    """
    names = Counter(row["device_name"] for row in rows if is_cpu(row))
    if name is None:
        kept = {most for most, _ in names.most_common(1)}
    else:
        kept = {one for one in names if name in one}
    return [r for r in rows if not is_cpu(r) or r["device_name"] in kept]


def best_isa(rows: list[Row]) -> list[Row]:
    """The rows of the instruction set that most rows ran: the machine's own choice."""
    devices = [row["device"] for row in rows]
    return [row for row in rows if row["device"] == max(devices, key=devices.count)]


def latest(rows: Iterable[Row], *keys: str) -> dict[tuple, Row]:
    """The newest row of each combination of ``keys``."""
    return {tuple(row.get(key) for key in keys): row for row in rows}


def of(rows: Iterable[Row], bench: str, **fields) -> list[Row]:
    """The rows of one bench with these values of these fields."""
    return [
        row
        for row in rows
        if row["bench"] == bench and all(row.get(k) == v for k, v in fields.items())
    ]


def matmuls(rows: Iterable[Row], cpu: bool, **fields) -> list[Row]:
    """This package's matmul rows, without the reference kernel's, on CPUs or else on GPUs."""
    found = [r for r in of(rows, "matmul", **fields) if is_cpu(r) == cpu]
    return [r for r in found if r["backend"] in ("cpu", "cuda", "triton")]


def layers(rows: Iterable[Row], cpu: bool, **fields) -> list[Row]:
    """The same, whole layers only: on GPUs a row of "matmul" in a rotated scheme is a part of one.

    On CPUs every row has the rotations in it.
    """
    found = matmuls(rows, cpu, **fields)
    if not cpu:
        plain = [r for r in found if not is_rotated(r)]
        found = plain + [r for r in of(rows, "layer", **fields) if not is_cpu(r)]
    return sorted(found, key=lambda row: row["date"])


@cache
def weight_bits(scheme: str, N: int, K: int) -> float | None:
    """Bits a weight of an N x K layer, codebooks and scales counted; None for what is no scheme."""
    try:
        return parse_scheme(scheme).bits_per_weight(N, K)
    except FormatError:
        return None


def caption(rows: Iterable[Row], *notes: str) -> str:
    """Where, when and at which commits the rows were measured: one sentence."""
    rows = list(rows)
    devices = {f"{r['device_name']} ({place(r)})": None for r in rows}
    commits = {(r.get("commit") or "no commit")[:9]: None for r in rows}
    date = max(r["date"] for r in rows)[:10]
    return "; ".join([", ".join(devices), *notes]) + f". {date}, {', '.join(commits)}.\n\n"


def place(row: Row) -> str:
    """The cores and instruction set of a CPU row, the software of a GPU row."""
    if is_cpu(row):
        return f"{row['cores']} cores, {row['device'].removeprefix('cpu-')}"
    torch = row.get("torch")
    return f"torch {torch}" if torch else "CUDA graph"
