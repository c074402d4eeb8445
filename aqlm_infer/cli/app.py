"""The typer application, and how its failures look.

A failure is one line ``error: ...`` on stderr and exit status 1 (130 for an interrupt). Verbs
import transformers and the libraries that they need only when they run, so that help is quick.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from ..version import __version__
from . import bench, bench_generate, convert, eval, generate, info, quantize, tune
from .options import DEBUG_VARIABLE

INTERRUPTED = 130

app = typer.Typer(
    name="aqlm-infer",
    help="Large language models at about 2 bits a weight: quantize, evaluate, generate, measure.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"aqlm-infer {__version__}")
        raise typer.Exit


@app.callback()
def _of_every_verb(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options that stand before a verb."""


app.command("info")(info.info)
app.command("quantize")(quantize.quantize)
app.command("tune")(tune.tune)
app.command("convert")(convert.convert)
app.command("eval")(eval.eval_)
app.command("generate")(generate.generate)
bench.app.command("generate")(bench_generate.generate)
app.add_typer(bench.app, name="bench")


def _message(error: BaseException) -> str:
    """One line for an error: its message, with the type's name where the message alone is bare."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    text = " ".join(text.split())
    plain = isinstance(error, (ValueError, RuntimeError, OSError)) or hasattr(
        error, "format_message"
    )
    return text if plain and text else f"{type(error).__name__}: {text}".rstrip(": ")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    try:
        status = app(args=arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout went away: point stdout nowhere, so that its flush at exit is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            traceback.print_exc()
        print(f"error: {_message(error)}", file=sys.stderr)
        status = 1
    if status == INTERRUPTED:  # newer typer returns it, older typer raises Abort
        print("error: interrupted", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)
