"""``aqlm-infer quantize``: a dense checkpoint in, a quantized one out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Device, Json, Model, OptionError, parse_device, parse_dtype
from .output import emit, megabytes, pairs, working


def read_plan(path: Path) -> dict[str, str]:
    """The plan of a YAML or JSON file: one mapping of layer globs to scheme ids."""
    import yaml

    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(plan, dict) or not plan:
        raise OptionError(f"{path} holds no mapping of layer globs to schemes")
    for pattern, scheme in plan.items():
        if not isinstance(pattern, str) or not isinstance(scheme, str):
            raise OptionError(f"{path}: {pattern!r}: {scheme!r} is not a glob and a scheme id")
    return plan


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write.", metavar="DIR")],
    scheme: Annotated[
        str | None, typer.Option(help="One scheme for all layers, such as aqlm-2x8-g8.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON file of {layer glob: scheme}: the first match wins, layers that"
            " match none stay dense.",
            metavar="FILE",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Glob of layers to keep dense (default: the output head)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the quantizer.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of stored values: float16, bfloat16 or float32.")
    ] = "float16",
    device: Device = "cpu",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize MODEL's linear layers, data-free, and write a checkpoint that transformers loads.

    The same command goes on where an interrupted one stopped, from DIR.partial.
    """
    from ..formats import parse_scheme

    if (scheme is None) == (plan is None):
        raise OptionError("give either --scheme ID or --plan FILE")
    if scheme is not None:
        parse_scheme(scheme)
    rules = scheme if plan is None else read_plan(plan)
    torch_dtype, device = parse_dtype(dtype), parse_device(device)
    with working(json):
        from .quantize_job import quantize_checkpoint

        report = quantize_checkpoint(
            model,
            out,
            rules,
            skip=skip or None,
            seed=seed,
            dtype=torch_dtype,
            device=device,
            progress=True,
        )
    layers = f"{len(report.layers)}"
    if report.reused:
        layers += f" ({report.reused} from the interrupted run)"
    rows = [
        ("layers", layers),
        ("weights", f"{report.weights:,}"),
        ("bits a weight", f"{report.bits_per_weight:.3f}"),
        ("their bytes", f"{megabytes(report.quantized_bytes)}, 16-bit dense"
                        f" {megabytes(report.dense_bytes)}"),
        ("weight error", f"{report.relative_error:.4f} (relative, root mean square)"),
        ("files", f"{megabytes(report.file_bytes)} in {report.out}"),
        ("seconds", f"{report.seconds:.1f}"),
    ]  # fmt: skip
    emit(asdict(report), json, pairs(rows))
