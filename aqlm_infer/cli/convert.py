"""``aqlm-infer convert``: a published checkpoint in a layout that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Json
from .output import emit, megabytes, pairs, working


def convert(
    source: Annotated[Path, typer.Argument(help="Folder to read.", metavar="SRC")],
    out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="DST")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a QuIP# or legacy AQLM checkpoint; codes are copied bit for bit."""
    with working(json):
        from ..checkpoint import convert as convert_checkpoint
        from ..inventory import checkpoint_info

        kind, folder = convert_checkpoint(source, out)
        found = checkpoint_info(folder)
    report = {
        "source": str(source),
        "out": str(folder),
        "kind": kind,
        "quantized_layers": found["quantized_layers"],
        "bits_per_weight": found["bits_per_weight"],
        "bytes": found["bytes"],
    }
    rows = [
        ("kind", kind),
        ("layers", found["quantized_layers"]),
        ("bits a weight", f"{found['bits_per_weight']:.3f}"),
        ("files", f"{megabytes(found['bytes'])} in {folder}"),
    ]
    emit(report, json, pairs(rows))
