"""Tables and plots from the rows in ``results/``, put between markers in the documents:

    <!-- table:cpu-matmul -->          <!-- plot:peers -->
    ...                                ...
    <!-- /table -->                    <!-- /plot -->

``<!-- table:cpu-matmul on:Xeon -->`` takes the CPU with that in its name instead of the one with
most rows. ``--check`` writes nothing and fails when a document or a picture is out of date.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from reporting.plots import PLOTS, Plot
from reporting.rows import Row, one_cpu, read_rows
from reporting.tables import TABLES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "results.md"]

_MARKED = re.compile(
    r"(?P<open><!-- (?P<kind>table|plot):(?P<name>[\w-]+)(?: on:(?P<on>[^>]+?))? -->\n)"
    r".*?(?P<close><!-- /(?P=kind) -->)",
    re.DOTALL,
)


def filled(text: str, rows: list[Row], document: Path, plots: Path) -> tuple[str, dict[str, Plot]]:
    """``text`` with every marked place made anew, and the plots that it shows, by name.

    Raises SystemExit for an unknown name.
    """
    shown: dict[str, Plot] = {}

    def make(match: re.Match) -> str:
        known = TABLES if match["kind"] == "table" else PLOTS
        name = match["name"]
        if name not in known:
            what = f"unknown {match['kind']} {name!r}; known: {list(known)}"
            raise SystemExit(f"error: {document}: {what}")
        made = known[name](one_cpu(rows, match["on"]))
        if isinstance(made, Plot):
            shown[name] = made
            link = os.path.relpath(plots / f"{name}.svg", document.parent)
            made = f"![{made.title}]({link})\n"
        return f"{match['open']}\n{made or 'No rows yet.' + chr(10)}\n{match['close']}"

    return _MARKED.sub(make, text), shown


def is_drawn(plot: Plot, path: Path) -> bool:
    """Whether the file was drawn from the same points."""
    return path.is_file() and f"rows {plot.digest}" in path.read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="*", type=Path, default=DOCUMENTS)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "plots")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    arguments = parser.parse_args()
    rows = read_rows(arguments.results)
    stale, plots = [], {}
    for document in arguments.documents:
        text = document.read_text(encoding="utf-8")
        made, shown = filled(text, rows, document, arguments.plots)
        plots |= shown
        if made == text:
            continue
        stale.append(str(document))
        if not arguments.check:
            document.write_text(made, encoding="utf-8")
    for name, plot in plots.items():
        path = arguments.plots / f"{name}.svg"
        if is_drawn(plot, path):
            continue
        stale.append(str(path))
        if not arguments.check:
            from reporting.draw import draw

            draw(plot, path)
    if stale and arguments.check:
        sys.exit(f"error: out of date: {', '.join(stale)}; run python benchmarks/report.py")


if __name__ == "__main__":
    main()
