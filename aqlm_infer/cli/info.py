"""``aqlm-infer info``: what runs here, what a checkpoint holds, which kernel a layer gets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Json, OptionError, Precision, parse_dtype, parse_shape
from .output import emit, megabytes, pairs, table


def _show_system(found: dict):
    cpu = found["cpu"]
    features = " ".join(name for name, present in cpu["features"].items() if present)
    modules = [
        (name, "loaded" if state["loaded"] else state["problem"])
        for name, state in found["modules"].items()
    ]
    packages = ", ".join(f"{name} {v}" for name, v in found["packages"].items() if v)
    isa = f"{cpu['isa']} of {', '.join(cpu['isas'])}" if cpu["isa"] else "the CPU module is missing"
    return pairs(
        [
            ("aqlm-infer", f"{found['version']}, Python {found['python']}, {found['platform']}"),
            ("packages", packages),
            ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads"),
            ("CPU features", features or "unknown"),
            ("CPU kernels run", isa),
            ("CUDA devices", ", ".join(found["cuda"]) or "none"),
            *modules,
            ("kernels", ", ".join(found["kernels"])),
            ("schemes", ", ".join(found["schemes"])),
        ]
    )


def _show_checkpoint(found: dict):
    rows = [
        [s["scheme"], s["quantized_layers"], f"{s['quantized_weights']:,}",
         f"{s['bits_per_weight']:.3f}", megabytes(s["quantized_bytes"])]
        for s in found["schemes"]
    ]  # fmt: skip
    rows.append(["dense tensors", None, None, None, megabytes(found["dense_bytes"])])
    title = f"{found['model']}: {', '.join(found['architectures'] or ['unknown'])}"
    columns = ["scheme", "layers", "weights", "bits a weight", "bytes"]
    return table(f"{title}, {megabytes(found['bytes'])}", columns, rows)


def _show_verdicts(verdicts: list[dict]):
    rows = []
    for row in verdicts:
        verdict = row["reason"] or ("chosen" if row["chosen"] else "can")
        cost = None if row["predicted_us"] is None else f"{row['predicted_us']:.0f}"
        rows.append([row["kernel"], cost, verdict])
    made = table(None, ["kernel", "predicted us", "verdict"], rows)
    made.columns[2].justify, made.columns[2].no_wrap = "left", False
    return made


def info(
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder; only headers are read.", metavar="[MODEL]"),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            help="Show each kernel's verdict on a layer in this scheme.", metavar="SCHEME"
        ),
    ] = None,
    shape: Annotated[str, typer.Option(help="NxK of that layer.", metavar="NxK")] = "4096x4096",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    precision: Precision = "exact",
    device: Annotated[
        str | None, typer.Option(help="Its device (default: cuda where there is one, else cpu).")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show versions, devices and kernels; with MODEL, what the checkpoint holds."""
    if model is not None and explain is not None:
        raise OptionError("give either MODEL or --explain")
    from ..inventory import checkpoint_info, explain_scheme, system_info

    if explain is not None:
        import torch

        N, K = parse_shape(shape)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        verdicts = explain_scheme(explain, N, K, parse_dtype(dtype), precision, device)
        emit({"scheme": explain, "N": N, "K": K, "dtype": dtype, "precision": precision,
              "device": device, "kernels": verdicts}, json, _show_verdicts(verdicts))  # fmt: skip
    elif model is not None:
        if not Path(model).is_dir():
            raise OptionError(f"{model} is no folder: info reads local checkpoints only")
        found = checkpoint_info(model)
        emit(found, json, _show_checkpoint(found))
    else:
        found = system_info()
        emit(found, json, _show_system(found))
