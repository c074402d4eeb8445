"""Tables of whole models: speed, perplexity, quantizing, tuning."""

from __future__ import annotations

from .rows import Row, best_isa, is_cpu, latest, of
from .text import bits, number, table


def generate(rows: list[Row], cpu: bool) -> str:
    """Decode rate and time to first token beside the dense model."""
    found = [r for r in of(rows, "generate") if is_cpu(r) == cpu]
    found = best_isa(found) if cpu else found
    keys = ("model", "scheme", "dtype", "precision", "lm_head", "mode", "backend", "threads",
            "batch", "context")  # fmt: skip
    keyed = latest(found, *keys)
    shown = sorted(keyed.values(), key=lambda row: [str(row.get(k)).zfill(12) for k in keys])
    lines = [
        [
            row["model"], row["scheme"] + extras(row), bits(row), row["dtype"],
            str(row.get("context") or ""), str(row["batch"]),
            *([str(row["threads"])] if cpu else []), number(row["tokens_per_s"]),
            number(row.get("dense_tokens_per_s")), number(row.get("dense_compiled_tokens_per_s")),
            number(row["ttft_ms"]), number(row.get("dense_ttft_ms")),
        ]
        for row in shown
    ]  # fmt: skip
    columns = ["model", "scheme", "bits", "dtype", "context", "batch",
               *(["threads"] if cpu else []), "tokens/s", "dense tokens/s",
               "dense compiled tokens/s", "first token ms", "dense ms"]  # fmt: skip
    empty = [i for i in range(len(columns)) if all(not line[i] for line in lines)]
    kept = [i for i in range(len(columns)) if i not in empty]
    picked = [[line[i] for i in kept] for line in [columns, *lines]]
    return table(shown, picked[0], picked[1:])


def generate_short(rows: list[Row]) -> str:
    """One GPU row a model and format, one request at a time: beside the dense model if there is
    such a row of the same day, the newest else."""
    found = [r for r in of(rows, "generate", batch=1) if not is_cpu(r)]
    found = [r for r in found if (r.get("context") or 0) <= 512]
    found.sort(key=lambda row: (row["date"][:10], row.get("dense_tokens_per_s") is not None))
    keys = ("model", "scheme", "precision", "lm_head", "mode", "backend")
    return generate(list(latest(found, *keys).values()), False)


def extras(row: Row) -> str:
    """What sets a generation row apart besides its scheme: precision, mode, head, package."""
    backend = row["backend"] if row["backend"] in ("aqlm", "torch") else None
    precision = None if row.get("precision") == "exact" else row.get("precision")
    words = [precision, row.get("mode"), row.get("lm_head") and f"head {row['lm_head']}", backend]
    return "".join(f", {name}" for name in words if name)


def quality(rows: list[Row], model: str | None = None) -> str:
    """Perplexity on test_prose by method, the dense model's beside it, of one model or all.

    One model's table leaves out the arms that compare starts of one quantizer.
    """
    found = latest(of(rows, "quality", split="test_prose"), "model", "scheme", "method", "bits")
    shown = [
        row
        for row in found.values()
        if row["method"] != "dense"
        and (model is None or (row["model"] == model and "-start" not in row["method"]))
    ]
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
    return table(shown, columns, lines)


def quantizers(rows: list[Row]) -> str:
    """Seconds and memory of quantizing each layer of a block, and the block as a whole."""
    found = latest(of(rows, "quantizers"), "block", "scheme", "N", "K", "device")
    lines = [
        [
            scheme, block, f"{N} x {K}" if N else "the block", number(row["seconds"]),
            f"{row['relative_error']:.4f}" if "relative_error" in row else "",
            number(row["peak_bytes"] / 1e9),
        ]
        for (block, scheme, N, K, _), row in sorted(found.items(), key=str)
    ]  # fmt: skip
    columns = ["scheme", "block of", "N x K", "seconds", "output error", "peak GB"]
    return table(found.values(), columns, lines)


def tuning(rows: list[Row]) -> str:
    """Perplexity after PV-Tuning by method, its ratio to the dense model's, and the gain."""
    found = latest([r for r in of(rows, "tuning") if r.get("test")], "model", "method")
    lines = [
        [
            model, method, bits(row), name, number(test["ppl"]), interval(test.get("ratio")),
            interval(test.get("gain")), number(sum(row["seconds"]) / len(row["seconds"])),
        ]
        for (model, method), row in sorted(found.items())
        for name, test in row["test"].items()
    ]  # fmt: skip
    columns = ["model", "method", "bits", "tokens", "perplexity", "over dense [95 %]",
               "over continuous [95 %]", "seconds a run"]  # fmt: skip
    return table(found.values(), columns, lines)


def tuning_short(rows: list[Row]) -> str:
    """One line a checkpoint: perplexity over the dense model's, at the start and by method.

    Checkpoints that PV-STE was not run on are left to the full table.
    """
    methods = ("start", "continuous", "ste", "pv-ste")
    found = latest([r for r in of(rows, "tuning") if r.get("test")], "model", "method")
    pairs = {(model, name) for (model, method), row in found.items() if method == "pv-ste"
             for name in row["test"]}  # fmt: skip
    shown = {
        (model, name): [found.get((model, method)) for method in methods] for model, name in pairs
    }
    lines = [
        [
            model, bits(of_methods[-1]), name,
            *(interval(row["test"][name].get("ratio")) if row else "" for row in of_methods),
        ]
        for (model, name), of_methods in sorted(shown.items(), key=lambda item: item[1][-1]["bits"])
    ]  # fmt: skip
    used = [row for of_methods in shown.values() for row in of_methods if row]
    return table(used, ["model", "bits", "tokens", *methods], lines)


def tuning_step(rows: list[Row]) -> str:
    """Time and memory of a tuning step beside a plain training step of the dense model."""
    found = latest(of(rows, "tuning-step"), "model", "scheme", "method", "batch", "device")
    lines = [
        [
            model, scheme, method, f"{batch} x {row['seq_len']}", f"{1e3 * row['seconds']:.0f}",
            f"{1e3 * row['plain_seconds']:.0f}", f"{row['ratio']:.2f}",
            number(row["peak_bytes"] / 1e9), number(row["plain_peak_bytes"] / 1e9),
        ]
        for (model, scheme, method, batch, _), row in sorted(found.items(), key=str)
    ]  # fmt: skip
    columns = ["model", "scheme", "method", "windows", "ms", "plain step ms", "ratio", "peak GB",
               "plain peak GB"]  # fmt: skip
    return table(found.values(), columns, lines)


def interval(values: list[float] | None) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values) if values else ""
