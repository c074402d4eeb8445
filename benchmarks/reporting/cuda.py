"""Tables of one layer on a GPU."""

from __future__ import annotations

from .rows import Row, caption, is_rotated, latest, layers, matmuls
from .text import NONE, bits, markdown, number, table

SHORT_SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))


def named(row: Row) -> str:
    """Scheme and, where it is not exact or not of the CUDA kernels, what it is."""
    words = ["" if row["precision"] == "exact" else row["precision"],
             "Triton" if row["backend"] == "triton" else ""]  # fmt: skip
    return " ".join([row["scheme"], *filter(None, words)])


def short(rows: list[Row]) -> str:
    """One token on a GPU: microseconds of three layers, one line a scheme measured at all three."""
    found = latest(layers(rows, False, M=1, backend="cuda"), "scheme", "precision", "N", "K")
    names = {key[:2] for key in found}
    whole = sorted(n for n in names if all((*n, *shape) in found for shape in SHORT_SHAPES))
    lines, used = [], []
    for scheme, precision in whole:
        cells = [found[(scheme, precision, *shape)] for shape in SHORT_SHAPES]
        if not lines:
            lines.append(["dense fp16 (cuBLAS)", "16", *(number(c["dense_us"]) for c in cells)])
        name = f"`{scheme}`" + ("" if precision == "exact" else f" {precision}")
        lines.append([name, bits(cells[-1]), *(number(cell["median_us"]) for cell in cells)])
        used += cells
    columns = ["scheme", "bits", *(f"{N} x {K}, us" for N, K in SHORT_SHAPES)]
    return table(used, columns, lines, "one token")


def matmul(rows: list[Row]) -> str:
    """Microseconds of whole layers by number of tokens: one table a shape, one line a scheme."""
    return by_shape(layers(rows, False))


def alone(rows: list[Row]) -> str:
    """The matmul of rotated formats without their rotations."""
    return by_shape([r for r in matmuls(rows, False) if is_rotated(r)])


def by_shape(rows: list[Row]) -> str:
    found = latest(rows, "N", "K", "scheme", "precision", "backend", "M")
    text = caption(found.values(), "microseconds") if found else NONE
    for N, K in sorted({key[:2] for key in found}, key=lambda shape: shape[0] * shape[1]):
        here = {key[2:]: row for key, row in found.items() if key[:2] == (N, K)}
        tokens = sorted({M for *_, M in here})
        dense = {M: row["dense_us"] for (*_, M), row in here.items() if row["dense_us"]}
        lines = [["dense fp16 (cuBLAS)", *(number(dense.get(M)) for M in tokens)]]
        for key in sorted({key[:3] for key in here}):
            cells = [here.get((*key, M)) for M in tokens]
            title = named(next(cell for cell in cells if cell))
            lines.append([title, *(number(cell and cell["median_us"]) for cell in cells)])
        text += f"{N} x {K}:\n\n" + markdown(["M", *map(str, tokens)], lines) + "\n"
    return text.rstrip("\n") + "\n"
