"""How tables are written: Markdown, numbers, what stands for no rows."""

from __future__ import annotations

from collections.abc import Iterable

from .rows import Row, caption, weight_bits

NONE = "No rows yet.\n"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """One Markdown table; the first column is left-aligned."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def table(used: Iterable[Row], columns: list[str], lines: list[list[str]], *notes: str) -> str:
    """A table under the caption of the rows that it used; NONE without a line."""
    return caption(used, *notes) + markdown(columns, lines) if lines else NONE


def number(value: float | None) -> str:
    """Three digits, without an exponent below a million."""
    if value is None:
        return ""
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:#.3g}".rstrip(".")


def milliseconds(us: float | None) -> str:
    """Microseconds as milliseconds with three digits."""
    return number(None if us is None else us / 1e3)


def times(slow: float | None, fast: float | None) -> str:
    """How many times faster."""
    return f"{slow / fast:.1f}x" if slow and fast else ""


def bits(row: Row) -> str:
    found = row.get("bits_per_weight") or row.get("bits")
    if found is None:
        found = weight_bits(row["scheme"], row["N"], row["K"])
    return f"{found:.2f}" if found else ""
