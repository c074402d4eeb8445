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
        str | None,
        typer.Option(
            help="One scheme for all layers, such as aqlm-2x8-g8; with --target-bits several,"
            " separated by commas, to choose from."
        ),
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
        typer.Option(
            help="Glob of layers to keep dense (default: the head, unless the plan has it)."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Tokens to calibrate on: FILE.bin of raw uint16 ids, or UTF-8 text. Without it"
            " the layers are quantized data-free.",
            metavar="FILE",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 2048,
    fine_tune: Annotated[
        bool, typer.Option(help="Train each block's values towards the dense block's outputs.")
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(help="Most passes over the windows when fine-tuning (default 5).")
    ] = None,
    fine_tune_ahead: Annotated[
        int | None,
        typer.Option(
            help="Dense blocks that a fine-tuned block's outputs pass through before they are"
            " compared (default 0). Better and slower: 3 on small models.",
            metavar="N",
        ),
    ] = None,
    fine_tune_per_token: Annotated[
        bool,
        typer.Option(
            "--fine-tune-per-token",
            help="Count each token's error relative to its own energy when fine-tuning.",
        ),
    ] = False,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Choose among the schemes layer by layer, for this average."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all random choices.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of stored values: float16, bfloat16 or float32.")
    ] = "float16",
    device: Device = "cpu",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize MODEL's linear layers and write a checkpoint that transformers loads.

    With --calibration block by block, in the norm of each layer's inputs; without, data-free.
    The same command goes on where an interrupted one stopped, from DIR.partial.
    """
    from ..formats import parse_scheme

    if (scheme is None) == (plan is None):
        raise OptionError("give either --scheme ID or --plan FILE")
    if calibration is None and (fine_tune or target_bits is not None):
        raise OptionError("--fine-tune and --target-bits need --calibration FILE")
    if epochs is not None and not (fine_tune and epochs >= 1):
        raise OptionError(f"--epochs {epochs}: at least 1, and only with --fine-tune")
    if fine_tune_ahead is not None and not (fine_tune and fine_tune_ahead >= 0):
        raise OptionError(
            f"--fine-tune-ahead {fine_tune_ahead}: at least 0, and only with --fine-tune"
        )
    if fine_tune_per_token and not fine_tune:
        raise OptionError("--fine-tune-per-token goes with --fine-tune")
    if target_bits is not None and scheme is None:
        raise OptionError("--target-bits chooses among the schemes of --scheme A,B,..")
    schemes = [] if scheme is None else scheme.split(",") if target_bits is not None else [scheme]
    for one in schemes:
        parse_scheme(one)
    rules = scheme if plan is None else read_plan(plan)
    torch_dtype, device = parse_dtype(dtype), parse_device(device)
    shared = {"skip": skip or None, "seed": seed, "device": device, "progress": True}
    with working(json):
        from .. import calibration as jobs

        if calibration is None:
            report = jobs.quantize_checkpoint(model, out, rules, dtype=torch_dtype, **shared)
            rows = data_free_rows(report)
        else:
            if target_bits is not None:
                rules = jobs.plan_for_bits(
                    model,
                    schemes,
                    target_bits,
                    calibration,
                    samples=samples,
                    seq_len=seq_len,
                    **shared,
                )
            report = jobs.quantize_calibrated(
                model,
                out,
                rules,
                calibration,
                samples=samples,
                seq_len=seq_len,
                dtype=torch_dtype,
                tune=tune_options(epochs, fine_tune_ahead, fine_tune_per_token)
                if fine_tune
                else None,
                **shared,
            )
            rows = calibrated_rows(report)
    emit(asdict(report), json, pairs(rows))


def tune_options(epochs: int | None, ahead: int | None, per_token: bool):
    """Settings of fine-tuning, the default where an option was not given."""
    from ..calibration import TuneOptions

    given = {"epochs": epochs, "ahead": ahead, "per_token": per_token or None}
    return TuneOptions(**{name: value for name, value in given.items() if value is not None})


def data_free_rows(report) -> list[tuple[str, str]]:
    """What a person reads of a data-free result."""
    layers = f"{len(report.layers)}"
    if report.reused:
        layers += f" ({report.reused} from the interrupted run)"
    return [
        ("layers", layers),
        *size_rows(report),
        ("weight error", f"{report.relative_error:.4f} (relative, root mean square)"),
        *file_rows(report),
    ]


def calibrated_rows(report) -> list[tuple[str, str]]:
    """What a person reads of a calibrated result; the rest is in OUT/quantize_report.txt."""
    blocks = f"{len(report.blocks)}"
    if report.reused:
        blocks += f" ({report.reused} from the interrupted run)"
    tuned = [b for b in report.blocks if b.error_before is not None]
    rows = [
        ("blocks", blocks),
        *size_rows(report),
        (
            "output error",
            f"{report.relative_error:.4f} (relative, of the layers' outputs, squared)",
        ),
    ]
    if tuned:
        before = sum(b.error_before for b in tuned) / len(tuned)
        after = sum(b.error_after for b in tuned) / len(tuned)
        rows.append(("fine-tuning", f"{before:.4f} -> {after:.4f} (blocks' outputs, squared)"))
    return [*rows, *file_rows(report), ("layer by layer", f"{report.out}/quantize_report.txt")]


def size_rows(report) -> list[tuple[str, str]]:
    return [
        ("weights", f"{report.weights:,}"),
        ("bits a weight", f"{report.bits_per_weight:.3f}"),
        ("their bytes", f"{megabytes(report.quantized_bytes)}, 16-bit dense"
                        f" {megabytes(report.dense_bytes)}"),
    ]  # fmt: skip


def file_rows(report) -> list[tuple[str, str]]:
    return [
        ("files", f"{megabytes(report.file_bytes)} in {report.out}"),
        ("seconds", f"{report.seconds:.1f}"),
    ]
