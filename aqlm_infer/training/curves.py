"""The log of a run as a plot (matplotlib, an optional dependency)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .representation import TuningError


def plotting():
    """The module ``matplotlib.pyplot`` without a display; TuningError says how to install it."""
    try:
        import matplotlib
    except ImportError as error:
        raise TuningError(
            "a plot needs matplotlib: pip install matplotlib (or leave --plot out)"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_log(rows: Sequence[dict], title: str, path: Path) -> None:
    """Draw loss and evaluations, and below them flips and relative norms, over the steps."""
    pyplot = plotting()
    steps = [r for r in rows if r["kind"] == "step"]
    evals = [r for r in rows if r["kind"] == "eval"]
    metric = "kl" if evals and "kl" in evals[0] else "nll"
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True)
    top.plot([r["step"] for r in steps], [r["loss"] for r in steps], label="training loss")
    top.plot([r["step"] for r in evals], [r[metric] for r in evals], "o-", label=f"valid {metric}")
    top.set_ylabel("nats a token")
    top.set_title(title)
    for key, label in (
        ("flips", "groups flipped"),
        ("moved", "|dW| of the V step / |W|"),
        ("drift", "|Buf - What| / |What|"),
    ):
        shown = [(r["step"], r[key]) for r in steps if r.get(key)]
        if shown:
            bottom.plot(*zip(*shown, strict=True), label=label)
    bottom.set_yscale("log")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
