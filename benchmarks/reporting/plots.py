"""What the plots show, from rows: plain records, drawn by ``draw.py``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from .cuda import SHORT_SHAPES
from .models import extras
from .rows import Row, best_isa, is_cpu, latest, layers, of

DENSE_BITS = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0}
LINE, DASHED, DOTS, BARS = "line", "dashed", "dots", "bars"


SHOWN = ("aqlm-1x8-g8", "aqlm-2x8-g8", "aqlm-1x16-g8", "quip-e8p-2bit", "quip-int2",
         "gptq-int4-g128")  # fmt: skip
"""Schemes in pictures of layers; the tables have all."""


@dataclass(frozen=True)
class Series:
    """Points of one name; ``dense`` ones are drawn in black. Of bars x is a category's name."""

    name: str
    points: tuple[tuple[float | str, float], ...]
    kind: str = LINE
    dense: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    xlabel: str
    ylabel: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Plot:
    """One picture. ``digest`` changes when what is drawn does, and no other time."""

    title: str
    panels: tuple[Panel, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def by_tokens(rows: list[Row], title: str, unit: str, scale: float, least: int = 3) -> Panel:
    """Time by number of tokens: the dense layer, and a line a scheme with ``least`` points."""
    found: dict[str, dict[int, float]] = {}
    dense: dict[int, float] = {}
    for row in rows:
        name = row["scheme"] + ("" if row["precision"] == "exact" else f" {row['precision']}")
        if row["backend"] == "aqlm":
            name += " (aqlm package)"
        elif row["dense_us"]:
            dense[row["M"]] = row["dense_us"] / scale
        found.setdefault(name, {})[row["M"]] = row["median_us"] / scale
    lines = [
        Series(name, tuple(sorted(points.items())), DASHED if " " in name else LINE)
        for name, points in sorted(found.items())
        if len(points) >= least
    ]
    if dense:
        lines.append(Series("dense", tuple(sorted(dense.items())), dense=True))
    return Panel(title, "tokens M", unit, tuple(lines), True, True)


def shown(rows: list[Row], cpu: bool, **fixed) -> list[Row]:
    """Matmul rows of the schemes in pictures, this package's and its peer's."""
    theirs = [r for r in of(rows, "matmul", backend="aqlm", **fixed) if is_cpu(r) == cpu]
    both = [*layers(rows, cpu, **fixed), *theirs]
    return [r for r in both if r["scheme"] in SHOWN and r["backend"] != "triton"]


def cpu_tokens(rows: list[Row]) -> Plot | None:
    fixed = {"N": 4096, "K": 4096, "threads": 1, "cache": "warm", "precision": "exact"}
    found = best_isa(shown(rows, True, **fixed))
    panels = [
        by_tokens([r for r in found if r["dtype"] == dtype], f"4096 x 4096, {dtype}", "ms", 1e3)
        for dtype in ("float32", "bfloat16")
        if len({r["M"] for r in found if r["dtype"] == dtype}) >= 3
    ]
    return Plot(f"{found[0]['device_name']}, one thread", tuple(panels)) if panels else None


def cuda_tokens(rows: list[Row]) -> Plot | None:
    found = shown(rows, False)
    panels = []
    for N, K in SHORT_SHAPES:
        here = [r for r in found if (r["N"], r["K"]) == (N, K)]
        panel = by_tokens(here, f"{N} x {K}", "microseconds", 1)
        if len(panel.series) >= 2:
            panels.append(panel)
    return Plot(found[0]["device_name"], tuple(panels)) if panels else None


def peers(rows: list[Row]) -> Plot | None:
    """One token: this package beside the dense layer and the aqlm package, on CPU and GPU."""
    places = (
        (True, (4096, 4096), {"threads": 1, "cache": "warm", "dtype": "float32"}, "ms", 1e3),
        (False, (28672, 8192), {}, "microseconds", 1),
    )
    panels = []
    for cpu, (N, K), fixed, unit, scale in places:
        fixed = {**fixed, "N": N, "K": K, "M": 1}
        found = layers(rows, cpu, **fixed, precision="exact")
        found = [r for r in found if r["backend"] != "triton"]
        kept = latest(best_isa(found) if cpu else found, "scheme")
        theirs = latest([r for r in of(rows, "matmul", **fixed, backend="aqlm")
                         if is_cpu(r) == cpu], "scheme")  # fmt: skip
        schemes = [s for s in SHOWN if (s,) in kept]
        if not schemes:
            continue
        device, dense = kept[schemes[0],]["device_name"], "dense_bf16_us" if cpu else "dense_us"
        series = [
            Series("dense bf16" if cpu else "dense fp16",
                   tuple((s, kept[s,][dense] / scale) for s in schemes), BARS, True),
            Series("aqlm 1.1.7", tuple((s, theirs[s,]["median_us"] / scale)
                                       for s in schemes if (s,) in theirs), BARS),
            Series("aqlm-infer", tuple((s, kept[s,]["median_us"] / scale) for s in schemes), BARS),
        ]  # fmt: skip
        title = f"{N} x {K}, one token, {device}" + (", one thread, in cache" if cpu else "")
        values = [y for one in series for _, y in one.points]
        panels.append(Panel(title, "", unit, tuple(s for s in series if s.points),
                            log_y=max(values) > 20 * min(values)))  # fmt: skip
    return Plot("Time of one layer: lower is better", tuple(panels)) if panels else None


def speed_bits(rows: list[Row]) -> Plot | None:
    """Decode rate by bits a weight, one request at a time: a panel a model and machine."""
    found: dict[tuple, list[Row]] = {}
    kept = latest(of(rows, "generate", batch=1), "model", "device", "dtype", "scheme", "lm_head",
                  "mode", "backend", "threads", "precision")  # fmt: skip
    for row in kept.values():
        if row.get("bits_per_weight"):
            found.setdefault((row["model"], row["device_name"], row["dtype"]), []).append(row)
    panels = []
    for (model, device, dtype), its in sorted(found.items()):
        names = {}
        for row in its:
            name = row["scheme"] + extras(row)
            names[name] = max(names.get(name, (0, 0)),
                              (row["tokens_per_s"], row["bits_per_weight"]))  # fmt: skip
        series = [Series(n, ((b, rate),), DOTS) for n, (rate, b) in sorted(names.items())]
        for key, name in (("dense_tokens_per_s", "dense"),
                          ("dense_compiled_tokens_per_s", "dense, compiled")):  # fmt: skip
            rates = [row[key] for row in its if row.get(key)]
            if rates:
                series.append(Series(name, ((DENSE_BITS[dtype], max(rates)),), DOTS, True))
        panels.append(Panel(f"{model}, {dtype}, {device}", "bits a weight", "tokens/s",
                            tuple(series)))  # fmt: skip
    return Plot("Decoding, batch 1, best setting of each scheme", tuple(panels)) if panels else None


def quality_bits(rows: list[Row]) -> Plot | None:
    """Perplexity over the dense model's by bits a weight: a panel a model."""
    kept = latest(of(rows, "quality", split="test_prose"), "model", "scheme", "method", "bits")
    panels = []
    for model in sorted({row["model"] for row in kept.values()}):
        its = [r for r in kept.values() if r["model"] == model and r["method"] != "dense"]
        series = [
            Series(f"{r['scheme']}, {r['method']}", ((r["bits"], r["ppl"] / r["dense_ppl"]),), DOTS)
            for r in sorted(its, key=lambda r: (r["ppl"] / r["dense_ppl"], r["scheme"]))
        ]
        if series:
            panels.append(Panel(model, "bits a weight", "perplexity / dense", tuple(series),
                                log_y=True))  # fmt: skip
    return Plot("Perplexity on test_prose: lower is better", tuple(panels)) if panels else None


PLOTS: dict[str, Callable[[list[Row]], Plot | None]] = {
    "peers": peers,
    "cpu-tokens": cpu_tokens,
    "cuda-tokens": cuda_tokens,
    "speed-bits": speed_bits,
    "quality-bits": quality_bits,
}
