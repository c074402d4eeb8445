"""Markdown tables from the rows in ``results/``, written between markers in the documents:

    <!-- table:cpu-matmul -->
    ...
    <!-- /table -->

``--check`` writes nothing and fails when a document is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
Row = dict

_MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def read_rows(folder: Path) -> list[Row]:
    """All rows under ``folder``, oldest first."""
    rows = []
    for file in sorted(folder.rglob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise SystemExit(f"error: {file}:{number} is not a JSON row: {error}") from error
    return sorted(rows, key=lambda row: row["date"])


def one_cpu(rows: list[Row]) -> list[Row]:
    """The rows without those of CPUs but the one measured most: a table shows one machine."""
    names = Counter(row["device_name"] for row in rows if row["device"].startswith("cpu-"))
    most = names.most_common(1)
    return [r for r in rows if not r["device"].startswith("cpu-") or r["device_name"] == most[0][0]]


def latest(rows: Iterable[Row], *keys: str) -> dict[tuple, Row]:
    """The newest row of each combination of ``keys``."""
    return {tuple(row.get(key) for key in keys): row for row in rows}


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """One Markdown table; the first column is left-aligned."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def milliseconds(us: float | None) -> str:
    """Microseconds as milliseconds with three digits."""
    return "" if us is None else f"{us / 1e3:#.3g}".rstrip(".")


def number(value: float | None) -> str:
    return "" if value is None else f"{value:#.3g}".rstrip(".")


def caption(rows: Iterable[Row]) -> str:
    """Where and when the rows were measured."""
    seen = {f"{r['device_name']} ({r['cores']} cores, {r['device']})": None for r in rows}
    dates = sorted(r["date"][:10] for r in rows)
    commits = {(r["commit"] or "no commit")[:9]: None for r in rows}
    return f"{'; '.join(seen)}, {dates[-1]}, {', '.join(commits)}.\n\n"


def best_isa(rows: list[Row]) -> list[Row]:
    """The rows of the instruction set that most rows ran: the machine's own choice."""
    devices = [row["device"] for row in rows]
    return [row for row in rows if row["device"] == max(devices, key=devices.count)]


def cpu_matmul(rows: list[Row]) -> str:
    """M = 1 at 4096 x 4096 in float32: ours, aqlm and dense, in milliseconds."""
    rows = [
        r for r in rows
        if r["bench"] == "matmul" and r["device"].startswith("cpu")
        and (r["N"], r["K"], r["M"], r["dtype"]) == (4096, 4096, 1, "float32")
    ]  # fmt: skip
    if not rows:
        return "No rows yet.\n"
    rows = best_isa(rows)
    found = latest(rows, "backend", "scheme", "cache", "threads", "precision")
    lines, used = [], []
    for (backend, scheme, cache, threads, precision), row in sorted(found.items()):
        if backend in ("aqlm", "torch") or precision != "exact":
            continue
        fast = found.get((backend, scheme, cache, threads, "fast"))
        peer = found.get(("aqlm", scheme, cache, threads, "exact"))
        share = None
        if row["read_gb_per_s"]:
            share = max(r["gb_per_s"] for r in (row, fast) if r) / row["read_gb_per_s"]
        used.append(row)
        lines.append([
            scheme, str(threads), cache, milliseconds(row["median_us"]),
            milliseconds(fast and fast["median_us"]), milliseconds(peer and peer["median_us"]),
            milliseconds(row["dense_us"]), milliseconds(row["dense_bf16_us"]),
            number(row["gb_per_s"]),
            f"{100 * share:.0f} %" if share and cache == "dram" else "",
        ])  # fmt: skip
    columns = ["scheme", "threads", "weights in", "ms", "`fast` ms", "aqlm 1.1.7 ms",
               "dense fp32 ms", "dense bf16 ms", "GB/s of codes",
               "best share of read bandwidth"]  # fmt: skip
    return caption(used) + markdown(columns, lines)


def cpu_isa(rows: list[Row]) -> str:
    """The same layer by instruction set: M = 1, 4096 x 4096, float32, one thread, in the caches."""
    rows = [
        r
        for r in rows
        if r["bench"] == "matmul"
        and r["device"].startswith("cpu")
        and r["precision"] == "exact"
        and r["backend"] == "cpu"
        and (r["N"], r["K"], r["M"], r["threads"]) == (4096, 4096, 1, 1)
        and (r["dtype"], r["cache"]) == ("float32", "warm")
    ]
    found = latest(rows, "scheme", "device")
    compared = {scheme for scheme, device in found if device == "cpu-portable"}
    shown = {key: row for key, row in sorted(found.items()) if key[0] in compared}
    if not shown:
        return "No rows yet.\n"
    ranked = sorted(shown.items(), key=lambda item: (item[0][0], item[1]["median_us"]))
    lines = [
        [scheme, device.removeprefix("cpu-"), milliseconds(row["median_us"])]
        for (scheme, device), row in ranked
    ]
    return caption(shown.values()) + markdown(["scheme", "instruction set", "ms"], lines)


def cpu_batch(rows: list[Row]) -> str:
    """Times by number of tokens at 4096 x 4096 on one thread, beside dense layers, in ms."""
    rows = [
        r for r in rows
        if r["bench"] == "matmul" and r["device"].startswith("cpu") and r["precision"] == "exact"
        and r["backend"] not in ("aqlm", "torch") and r["cache"] == "warm"
        and (r["N"], r["K"]) == (4096, 4096)
    ]  # fmt: skip
    if not rows:
        return "No rows yet.\n"
    rows = best_isa(rows)
    rows = [r for r in rows if r["threads"] == 1 and r["M"] in (1, 2, 4, 8, 16, 64, 512)]
    found = latest(rows, "scheme", "dtype", "threads", "M")
    batched = {key[:3] for key in found if key[3] > 1}
    shown = {key: row for key, row in sorted(found.items()) if key[:3] in batched}
    if not shown:
        return "No rows yet.\n"
    lines = [
        [
            scheme, dtype, str(threads), str(M), milliseconds(row["median_us"]),
            milliseconds(row["dense_us"]), milliseconds(row["dense_bf16_us"]),
        ]
        for (scheme, dtype, threads, M), row in shown.items()
    ]  # fmt: skip
    columns = ["scheme", "dtype", "threads", "M", "ms", "dense ms", "dense bf16 ms"]
    return caption(shown.values()) + markdown(columns, lines)


def cpu_generate(rows: list[Row]) -> str:
    """Decode rate and time to first token beside the dense model."""
    rows = [
        r
        for r in rows
        if r["bench"] == "generate" and r["device"].startswith("cpu") and r["batch"] in (1, 16)
    ]
    if not rows:
        return "No rows yet.\n"
    found = latest(best_isa(rows), "model", "scheme", "dtype", "threads", "batch")
    lines = [
        [
            model, scheme, dtype, str(threads), str(batch), number(row["tokens_per_s"]),
            number(row["dense_tokens_per_s"]), number(row["ttft_ms"]),
            number(row["dense_ttft_ms"]),
        ]
        for (model, scheme, dtype, threads, batch), row in sorted(found.items())
    ]  # fmt: skip
    columns = ["model", "scheme", "dtype", "threads", "batch", "tokens/s", "dense tokens/s",
               "first token ms", "dense ms"]  # fmt: skip
    return caption(found.values()) + markdown(columns, lines)


def cuda_matmul(rows: list[Row]) -> str:
    """Microseconds by shape and number of tokens on a GPU, one column a scheme and precision."""
    tokens = (1, 4, 16, 64, 512, 2048)
    rows = [
        r for r in rows if r["bench"] == "matmul" and r["backend"] == "cuda" and r["M"] in tokens
    ]
    if not rows:
        return "No rows yet.\n"
    found = latest(rows, "N", "K", "M", "scheme", "precision")
    counts = Counter(key[3:] for key in found)
    schemes = [key for key, _ in counts.most_common(6)]
    places = sorted({key[:3] for key in found if key[3:] in schemes})
    lines, used = [], []
    for N, K, M in places:
        cells = [found.get((N, K, M, *scheme)) for scheme in schemes]
        present = [row for row in cells if row]
        used += present
        lines.append([
            f"{N} x {K}", str(M), number(present[0]["dense_us"]),
            *(number(row and row["median_us"]) for row in cells),
        ])  # fmt: skip
    devices = {row.get("device_name") or row["device"]: None for row in used}
    dates = sorted(row["date"][:10] for row in used)
    titles = [f"{scheme.removeprefix('aqlm-')} {precision}" for scheme, precision in schemes]
    columns = ["N x K", "M", "fp16 cuBLAS", *titles]
    return f"{', '.join(devices)}, {dates[-1]}, microseconds.\n\n" + markdown(columns, lines)


def quality(rows: list[Row]) -> str:
    """Perplexity on test_prose by model and method, the dense model's beside it."""
    rows = [r for r in rows if r["bench"] == "quality" and r["split"] == "test_prose"]
    found = latest(rows, "model", "scheme", "method", "bits")
    shown = [row for row in found.values() if row["method"] != "dense"]
    if not shown:
        return "No rows yet.\n"
    shown.sort(key=lambda row: (row["model"], -row["ppl"]))
    lines = [
        [
            row["model"], row["scheme"], row["method"], f"{row['bits']:.2f}", number(row["ppl"]),
            number(row["dense_ppl"]), f"{row['ppl'] / row['dense_ppl']:.3f}",
            f"{row['relative_error']:.4f}" if row.get("relative_error") else "",
        ]
        for row in shown
    ]  # fmt: skip
    columns = ["model", "scheme", "method", "bits", "perplexity", "dense", "ratio", "layer error"]
    return markdown(columns, lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "cpu-matmul": cpu_matmul,
    "cpu-isa": cpu_isa,
    "cpu-batch": cpu_batch,
    "cpu-generate": cpu_generate,
    "cuda-matmul": cuda_matmul,
    "quality": quality,
}


def filled(text: str, rows: list[Row], name: str) -> str:
    """``text`` with every marked table made anew. Raises SystemExit for an unknown table."""

    def make(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise SystemExit(f"error: {name}: unknown table {match[2]!r}; known: {list(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]](rows)}\n{match[4]}"

    return _MARKED.sub(make, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="*", type=Path, default=[ROOT / "README.md"])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    arguments = parser.parse_args()
    rows = one_cpu(read_rows(arguments.results))
    stale = []
    for document in arguments.documents:
        text = document.read_text(encoding="utf-8")
        made = filled(text, rows, str(document))
        if made == text:
            continue
        stale.append(str(document))
        if not arguments.check:
            document.write_text(made, encoding="utf-8")
    if stale and arguments.check:
        sys.exit(f"error: out of date: {', '.join(stale)}; run python benchmarks/report.py")


if __name__ == "__main__":
    main()
