"""Results on stdout: rich tables for people, exactly one JSON object with ``--json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

_WIDEST = 1000
"""Columns that a table may take, whatever the terminal has."""


@contextmanager
def working(as_json: bool) -> Iterator[None]:
    """While a verb works: one progress bar (ours), and nothing but the result on stdout."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not as_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def emit(record: Mapping[str, Any], as_json: bool, *shown: RenderableType) -> None:
    """Print a verb's result."""
    if as_json:
        print(json.dumps(record, allow_nan=False))
        return
    console = Console()
    for item in shown:
        # Never cut a column: a terminal that is too narrow wraps the lines itself.
        wide = console.options.update(max_width=_WIDEST)
        console.width = max(console.width, console.measure(item, options=wide).maximum)
        console.print(item, crop=False)


def table(title: str | None, columns: list[str], rows: list[list[Any]]) -> Table:
    """A plain table: first column left, the others right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*("" if cell is None else str(cell) for cell in row))
    return made


def pairs(rows: list[tuple[str, Any]]) -> Table:
    """Names and values, one pair a line."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in rows:
        made.add_row(name, str(value))
    return made


def megabytes(count: float) -> str:
    """Bytes as decimal megabytes."""
    return f"{count / 1e6:.2f} MB"
