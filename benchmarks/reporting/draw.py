"""Plots as SVG files: small, and the same bytes from the same rows and matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from .plots import BARS, DASHED, DOTS, Panel, Plot

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogFormatter

STYLE = {
    "svg.hashsalt": "aqlm-infer",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
MARKERS = "osD^vP*X<>ph"
COLORS = {"aqlm-infer": "C0", "aqlm 1.1.7": "C1"}


plain = FuncFormatter(lambda value, _: f"{value:g}")
sparse = LogFormatter(labelOnlyBase=False, minor_thresholds=(3, 1))


def draw_bars(axes, panel: Panel) -> None:
    names = list(dict.fromkeys(x for one in panel.series for x, _ in one.points))
    width = 0.8 / len(panel.series)
    for place, one in enumerate(panel.series):
        at = [names.index(x) + (place - (len(panel.series) - 1) / 2) * width for x, _ in one.points]
        values = [y for _, y in one.points]
        color = "0.65" if one.dense else COLORS.get(one.name)
        bars = axes.bar(at, values, width, label=one.name, color=color)
        axes.bar_label(bars, [f"{y:.3g}" for y in values], fontsize=7)
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.grid(False, axis="x")


def draw_points(axes, panel: Panel) -> None:
    colors = 0
    for number, one in enumerate(panel.series):
        style = {"color": "k"} if one.dense else {"color": f"C{colors % 10}"}
        colors += not one.dense
        marker = MARKERS[number % len(MARKERS)] if one.kind == DOTS else "."
        line = "none" if one.kind == DOTS else "--" if one.kind == DASHED else "-"
        x, y = zip(*one.points, strict=True)
        axes.plot(x, y, linestyle=line, marker=marker, label=one.name, **style)


def draw(plot: Plot, path: Path) -> None:
    """Write ``plot`` to an SVG file, or to a picture of the path's kind."""
    columns = min(3, len(plot.panels))
    lines = -(-len(plot.panels) // columns)
    with pyplot.rc_context(STYLE):
        size = (max(7.0, 4.4 * columns), 3.9 * lines)
        figure, grid = pyplot.subplots(
            lines, columns, figsize=size, squeeze=False, layout="constrained"
        )
        for axes in grid.flat[len(plot.panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, plot.panels, strict=False):
            bars = any(one.kind == BARS for one in panel.series)
            (draw_bars if bars else draw_points)(axes, panel)
            if panel.log_x:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(plain)
            if panel.log_y:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(plain)
                axes.yaxis.set_minor_formatter(sparse)
            else:
                axes.set_ylim(0, 1.15 * max(y for one in panel.series for _, y in one.points))
            axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
            axes.legend(fontsize=7)
        figure.suptitle(plot.title)
        path.parent.mkdir(parents=True, exist_ok=True)
        svg = path.suffix == ".svg"
        about = {"Date": None, "Description": f"rows {plot.digest}"} if svg else None
        figure.savefig(path, metadata=about, dpi=110)
        pyplot.close(figure)
