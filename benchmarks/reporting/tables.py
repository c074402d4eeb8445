"""Every table by its name in the documents."""

from __future__ import annotations

from collections.abc import Callable

from . import cpu, cuda, models
from .rows import Row, of
from .text import markdown


def others(rows: list[Row]) -> str:
    """Rows that no table here shows, so that none is overlooked."""
    shown = {"matmul", "layer", "generate", "quality", "quantizers", "tuning", "tuning-step"}
    left = [r for r in rows if r["bench"] not in shown]
    if not left:
        return "None.\n"
    lines = []
    for bench in sorted({r["bench"] for r in left}):
        its = of(left, bench)
        devices = ", ".join(sorted({r["device_name"] for r in its}))
        lines.append([bench, devices, str(len(its)), its[-1]["date"][:10]])
    return markdown(["bench", "on", "rows", "newest"], lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "cpu-short": cpu.short,
    "cpu-matmul": cpu.matmul,
    "cpu-isa": cpu.isa,
    "cpu-batch": cpu.batch,
    "cpu-generate": lambda rows: models.generate(rows, True),
    "cuda-short": cuda.short,
    "cuda-matmul": cuda.matmul,
    "cuda-alone": cuda.alone,
    "cuda-generate": lambda rows: models.generate(rows, False),
    "cuda-generate-short": models.generate_short,
    "quality": models.quality,
    "quality-short": lambda rows: models.quality(rows, "lm30"),
    "quantizers": models.quantizers,
    "tuning": models.tuning,
    "tuning-short": models.tuning_short,
    "tuning-step": models.tuning_step,
    "others": others,
}
