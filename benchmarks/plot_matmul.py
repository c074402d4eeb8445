"""Times by number of tokens, one panel a shape, from the rows of ``bench_matmul.py``.

python benchmarks/plot_matmul.py ROWS.jsonl PICTURE.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def series(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Curves of one shape: name -> (M, microseconds), dense first; newer rows replace older."""
    found: dict[str, dict[int, float]] = {"dense": {}}
    for row in sorted(rows, key=lambda row: row["date"]):
        scheme = row["scheme"].removeprefix("aqlm-")
        if row["backend"] == "aqlm":
            name = f"{scheme}, aqlm package"
        else:
            name = f"{scheme} {row['precision']}"
            found["dense"][row["M"]] = row["dense_us"]
        found.setdefault(name, {})[row["M"]] = row["median_us"]
    return {name: sorted(points.items()) for name, points in found.items() if points}


def plot(source: Path, target: Path) -> None:
    """Draw every shape that ``source`` has matmul rows of."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["bench"] == "matmul" and row["scheme"] != "dense"]
    shapes = sorted({(row["N"], row["K"]) for row in rows}, key=lambda shape: shape[0] * shape[1])
    columns = min(4, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(5 * columns, 4.2 * lines), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(shapes) :]:
        panel.set_visible(False)
    for panel, (N, K) in zip(panels.flat, shapes, strict=False):
        curves = series([row for row in rows if (row["N"], row["K"]) == (N, K)])
        for name, points in curves.items():
            style = "k-" if name == "dense" else ":" if "package" in name else "--"
            style = "-" if "exact" in name else style
            panel.plot(*zip(*points, strict=True), style, marker=".", label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_title(f"{N} x {K}")
        panel.set_xlabel("tokens M")
        panel.set_ylabel("microseconds")
        panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=7)
    figure.suptitle(f"y = x W^T, {rows[0]['device_name']}, {rows[0]['dtype']}")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
