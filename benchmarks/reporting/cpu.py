"""Tables of one layer on a CPU."""

from __future__ import annotations

from .rows import Row, best_isa, is_cpu, latest, matmuls, of
from .text import bits, milliseconds, number, table, times

SQUARE = {"N": 4096, "K": 4096}


def short(rows: list[Row]) -> str:
    """One thread, one token, 4096 x 4096: from DRAM as in a model, and in the caches."""
    fixed = {**SQUARE, "M": 1, "dtype": "float32", "threads": 1}
    found = matmuls(rows, True, **fixed, precision="exact")
    kept = latest(best_isa(found), "scheme", "cache")
    peers = latest(of(rows, "matmul", **fixed, backend="aqlm"), "scheme", "cache")
    lines = []
    for scheme in sorted({scheme for scheme, _ in kept}):
        cold, warm = kept.get((scheme, "dram")), kept.get((scheme, "warm"))
        peer = peers.get((scheme, "warm"))
        lines.append([
            f"`{scheme}`", bits(cold or warm), milliseconds(cold and cold["median_us"]),
            milliseconds(cold and cold["dense_bf16_us"]),
            times(cold["dense_bf16_us"], cold["median_us"]) if cold else "",
            milliseconds(warm and warm["median_us"]), milliseconds(peer and peer["median_us"]),
        ])  # fmt: skip
    columns = ["scheme", "bits", "from DRAM, ms", "dense bf16, ms", "faster", "in cache, ms",
               "aqlm 1.1.7 in cache, ms"]  # fmt: skip
    return table(kept.values(), columns, lines, "one thread")


def matmul(rows: list[Row]) -> str:
    """M = 1 at 4096 x 4096 in float32, by threads and cache: ours, aqlm and dense, in ms."""
    fixed = {**SQUARE, "M": 1, "dtype": "float32"}
    found = [r for r in of(rows, "matmul", **fixed) if is_cpu(r)]
    keyed = latest(best_isa(found), "backend", "scheme", "cache", "threads", "precision")
    lines, used = [], []
    for (backend, scheme, cache, threads, precision), row in sorted(keyed.items()):
        if backend in ("aqlm", "torch") or precision != "exact":
            continue
        fast = keyed.get((backend, scheme, cache, threads, "fast"))
        peer = keyed.get(("aqlm", scheme, cache, threads, "exact"))
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
    return table(used, columns, lines)


def isa(rows: list[Row]) -> str:
    """The same layer by instruction set: M = 1, 4096 x 4096, float32, one thread, in the caches."""
    fixed = {"M": 1, "threads": 1, "dtype": "float32", "cache": "warm", "precision": "exact"}
    found = latest(matmuls(rows, True, **SQUARE, **fixed), "scheme", "device")
    compared = {scheme for scheme, device in found if device == "cpu-portable"}
    shown = {key: row for key, row in sorted(found.items()) if key[0] in compared}
    ranked = sorted(shown.items(), key=lambda item: (item[0][0], item[1]["median_us"]))
    lines = [
        [scheme, device.removeprefix("cpu-"), milliseconds(row["median_us"])]
        for (scheme, device), row in ranked
    ]
    return table(shown.values(), ["scheme", "instruction set", "ms"], lines)


def batch(rows: list[Row]) -> str:
    """Times by number of tokens at 4096 x 4096 on one thread, beside dense layers, in ms."""
    found = matmuls(rows, True, **SQUARE, precision="exact", cache="warm", threads=1)
    kept = [r for r in best_isa(found) if r["M"] in (1, 2, 4, 8, 16, 64, 512)]
    keyed = latest(kept, "scheme", "dtype", "M")
    batched = {key[:2] for key in keyed if key[2] > 1}
    shown = {key: row for key, row in sorted(keyed.items()) if key[:2] in batched}
    lines = [
        [scheme, dtype, str(M), milliseconds(row["median_us"]), milliseconds(row["dense_us"]),
         milliseconds(row["dense_bf16_us"])]
        for (scheme, dtype, M), row in shown.items()
    ]  # fmt: skip
    columns = ["scheme", "dtype", "M", "ms", "dense ms", "dense bf16 ms"]
    return table(shown.values(), columns, lines, "one thread")
