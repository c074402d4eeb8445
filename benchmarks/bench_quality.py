"""How much quality does each scheme keep at equal bits? (What tuning gains: bench_tuning.py.)

Quantizes the dense MODEL by each arm with ``quantize_calibrated`` and scores the checkpoint read
back from disk, its layers dequantized, over non-overlapping windows of 512 tokens. One JSON line an
arm and split goes to --out as soon as it is known; arms whose rows are there already are skipped,
and an arm that was interrupted goes on from its finished blocks in --work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from aqlm_infer.bench import append_rows
from aqlm_infer.bench.record import environment, rounded
from aqlm_infer.calibration import CalibratedReport, TuneOptions, quantize_calibrated
from aqlm_infer.evaluation import load_model, perplexity, read_token_file
from aqlm_infer.layers import quantized_layers


@dataclass(frozen=True)
class Arm:
    """One way to quantize: its name in the rows, a scheme, and settings that differ."""

    method: str
    scheme: str
    tune: bool = False
    options: Mapping[str, object] = field(default_factory=dict)


ARMS = (
    Arm("rtn-minmax", "rtn-int2-g128", options={"clip": False}),
    Arm("rtn", "rtn-int2-g128"),
    Arm("gptq", "gptq-int2-g128"),
    Arm("gptq-hadamard", "quip-int2"),
    Arm("quip-sharp", "quip-e8p-2bit"),
    Arm("aqlm", "aqlm-2x8-g8"),
    Arm("aqlm+tune", "aqlm-2x8-g8", tune=True),
    Arm("aqlm-plain-start", "aqlm-1x8-g8", options={"metric_rounds": 0}),
    Arm("aqlm-metric-start", "aqlm-1x8-g8"),
    Arm("aqlm-plain-start-alone", "aqlm-1x8-g8", options={"metric_rounds": 0, "refit_rounds": 0}),
    Arm("aqlm-metric-start-alone", "aqlm-1x8-g8", options={"refit_rounds": 0}),
    Arm("quip-sharp+tune", "quip-e8p-2bit", tune=True),
    Arm("gptq+tune", "gptq-int2-g128", tune=True),
)


def option(text: str) -> tuple[str, object]:
    """``name=value`` of fine-tuning's option."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


def with_dense_weights(model: nn.Module) -> nn.Module:
    """The model with every quantized layer replaced by its dequantized weight: what a score is
    measured with, so that it does not depend on a kernel's rounding or speed."""
    for name, layer in list(quantized_layers(model)):
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight = nn.Parameter(layer.weight.detach().float(), requires_grad=False)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
        model.set_submodule(name, dense)
    return model


def quantize(arguments: argparse.Namespace, arm: Arm, folder: Path) -> CalibratedReport:
    return quantize_calibrated(
        arguments.model,
        folder,
        arm.scheme,
        arguments.data / "calib.bin",
        samples=arguments.samples,
        seq_len=arguments.window,
        seed=arguments.seed,
        device=arguments.device,
        tune=TuneOptions(**dict(arguments.tune)) if arm.tune else None,
        options=arm.options,
        progress=True,
    )


def score(model: nn.Module, arguments: argparse.Namespace, split: str) -> float:
    vocab = model.get_input_embeddings().num_embeddings
    ids, window = read_token_file(arguments.data / f"{split}.bin", vocab), arguments.window
    windows = ids[: ids.numel() // window * window].view(-1, window)[:: arguments.every]
    return perplexity(model, windows.flatten(), window=window, progress=True).ppl


def done(path: Path) -> dict[tuple, dict]:
    """Rows already in the file, by everything that tells one measurement from another."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys = ("model", "method", "scheme", "split", "every", "seed", "samples")
    return {tuple(row[k] for k in keys): row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the dense checkpoint")
    parser.add_argument("data", type=Path, help="folder with calib.bin and {split}.bin")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--arm", nargs="+", choices=[a.method for a in ARMS], help="default: all")
    parser.add_argument("--split", nargs="+", default=["valid"], help="tests: once, at the end")
    parser.add_argument("--every", type=int, default=1, help="score every so many windows")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tune", nargs="+", type=option, default=[], help="of the tuned arms, as name=value"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = arguments.model.name
    arguments.work.mkdir(parents=True, exist_ok=True)

    def key(arm: Arm, split: str) -> tuple:
        samples = 0 if arm.method == "dense" else arguments.samples
        return name, arm.method, arm.scheme, split, arguments.every, arguments.seed, samples

    def record(arm: Arm, split: str, model: nn.Module, report: CalibratedReport | None) -> None:
        rows = done(arguments.out)
        dense = rows.get(key(Arm("dense", "dense"), split), {}).get("ppl")
        ppl = score(model, arguments, split)
        row = {
            **environment("quality", arguments.device),
            "backend": arguments.device.split(":")[0],
            "model": name,
            "scheme": arm.scheme,
            "method": arm.method,
            "bits": report.bits_per_weight if report else 16.0,
            "relative_error": report.relative_error if report else 0.0,
            "split": split,
            "every": arguments.every,
            "ppl": ppl,
            "dense_ppl": dense if report else ppl,
            "ratio": ppl / dense if report else 1.0,
            "seconds": report.seconds if report else 0.0,
            "seed": arguments.seed,
            "samples": key(arm, split)[-1],
            "tune": asdict(TuneOptions(**dict(arguments.tune))) if arm.tune else None,
            "threads": arguments.threads,
        }
        append_rows(arguments.out, [rounded(row, 5)])
        print(f"{arm.method} {arm.scheme} {split}: ppl {ppl:.3f}", flush=True)

    arms = [a for a in ARMS if arguments.arm is None or a.method in arguments.arm]
    for arm in (Arm("dense", "dense"), *arms):
        rows = done(arguments.out)
        splits = [s for s in arguments.split if key(arm, s) not in rows]
        if not splits:
            continue
        report = None
        folder = arguments.work / f"{name}-{arm.method}-{arguments.seed}-{arguments.samples}"
        if arm.method == "dense":
            model = load_model(arguments.model, torch.float32, arguments.device)
        else:
            if (folder / "quantize_report.json").is_file():
                body = json.loads((folder / "quantize_report.json").read_text())
                report = CalibratedReport(**body)
            else:
                report = quantize(arguments, arm, folder)
            model = with_dense_weights(load_model(folder, torch.float32)).to(arguments.device)
        for split in splits:
            record(arm, split, model, report)


if __name__ == "__main__":
    main()
