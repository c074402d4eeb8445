"""A picture of the rows of ``bench generate``: tokens per second by batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .layers import BenchError
from .record import Row

_DENSE = {"dense_tokens_per_s": "dense", "dense_compiled_tokens_per_s": "dense, compiled"}


def plot_generate(rows: Sequence[Row], path: Path) -> None:
    """Draw decode rates by batch size, a line for each scheme, mode and prompt length.

    The file's kind is its suffix. Raises BenchError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError("--plot needs matplotlib (pip install aqlm-infer[bench])") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        name = f"{row['scheme']}, {row['mode']}, {row['prompt_tokens']} prompt tokens"
        lines.setdefault(name, {})[row["batch"]] = row["tokens_per_s"]
        for key, dense in _DENSE.items():
            if row[key] is not None:
                lines.setdefault(dense, {})[row["batch"]] = row[key]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in sorted(lines.items()):
        style = {"color": "0.5", "linestyle": "--"} if name.startswith("dense") else {}
        axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=name, **style)
    first = rows[0]
    axes.set(title=f"{first['model']}, {first['dtype']}, {first['device_name']}",
             xlabel="batch", ylabel="tokens/s", ylim=(0, None))  # fmt: skip
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
