"""Times by number of tokens, one panel a shape, from the rows of ``bench_matmul.py``.

python benchmarks/plot_matmul.py ROWS.jsonl PICTURE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from reporting.draw import draw
from reporting.plots import Plot, by_tokens


def plot(source: Path, target: Path) -> None:
    """Draw every shape that ``source`` has matmul rows of; newer rows replace older."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["bench"] == "matmul" and row["scheme"] != "dense"]
    rows.sort(key=lambda row: row["date"])
    shapes = sorted({(row["N"], row["K"]) for row in rows}, key=lambda shape: shape[0] * shape[1])
    panels = [
        by_tokens(
            [row for row in rows if (row["N"], row["K"]) == (N, K)],
            f"{N} x {K}",
            "microseconds",
            scale=1,
            least=1,
        )
        for N, K in shapes
    ]
    draw(Plot(f"{rows[0]['device_name']}, {rows[0]['dtype']}", tuple(panels)), target)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
