"""Options that several verbs share, and how their values are parsed."""

from __future__ import annotations

import os
from typing import Annotated

import typer

DEBUG_VARIABLE = "AQLM_DEBUG"


class OptionError(ValueError):
    """An option value that cannot be used."""


def _debug(value: bool) -> bool:
    if value:
        os.environ[DEBUG_VARIABLE] = "1"
    return value


Model = Annotated[
    str, typer.Argument(help="Checkpoint folder, or a hub id ORGANISATION/NAME.", metavar="MODEL")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        help=f"Show the traceback of an error (also {DEBUG_VARIABLE}=1).",
        callback=_debug,
        is_eager=True,
    ),
]
Device = Annotated[str, typer.Option(help="Device to run on: cpu, cuda, cuda:1.")]
Precision = Annotated[
    str,
    typer.Option(
        help="What the kernels may round: exact, fast (8-bit tables, CPU) or int8 (activations,"
        " CUDA)."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16 (default: float32 on the CPU, else the checkpoint's).",
        show_default=False,
    ),
]


def parse_dtype(name: str | None):
    """The torch dtype of a name, None for None."""
    from ..evaluation import DTYPES

    if name is not None and name not in DTYPES:
        raise OptionError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def parse_device(name: str) -> str:
    """The device name, checked to exist here."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"unknown device {name!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise OptionError(f"device {name!r}: this machine has {count} CUDA devices")
    elif device.type != "cpu":
        raise OptionError(f"device {name!r}: only cpu and cuda are supported")
    return name


def parse_shape(text: str) -> tuple[int, int]:
    """ "4096x11008" -> (N=4096, K=11008)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise OptionError(f"shape {text!r} is not NxK (out_features x in_features)")
    return int(parts[0]), int(parts[1])


def parse_ints(text: str, what: str) -> list[int]:
    """ "1,2,4" -> [1, 2, 4], all at least 1."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise OptionError(f"{what} {text!r} is not a list of positive integers such as 1,2,4")
    return [int(part) for part in parts]
