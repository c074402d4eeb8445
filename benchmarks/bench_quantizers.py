"""How long does one decoder block take to quantize, and how much device memory?

Random weights and synthetic second moments of the shapes of one Llama-3-8B block, one layer of each
distinct shape; a block's time is the sum over its seven layers. One JSON line a layer and one a
block goes to --out. With --job a checkpoint of one such block is written and quantized as a user
would (``quantize_calibrated``), for the memory of the whole: moments, weights, fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from aqlm_infer.bench import append_rows
from aqlm_infer.bench.record import environment, rounded
from aqlm_infer.calibration import TuneOptions, quantize_calibrated
from aqlm_infer.formats import parse_scheme
from aqlm_infer.quantizers import quantizer_for
from aqlm_infer.quantizers.hessian import relative_loss

BLOCKS = {
    "llama-3-8b": {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1},
    "llama-3-70b": {(8192, 8192): 2, (1024, 8192): 2, (28672, 8192): 2, (8192, 28672): 1},
    "lm30": {(512, 512): 2, (256, 512): 2, (1536, 512): 2, (512, 1536): 1},
}
"""Shapes (N, K) of a block's layers, and how many there are of each."""


def second_moment(K: int, device: str) -> torch.Tensor:
    """Of correlated inputs, with a few columns ten times larger, float64 [K, K]."""
    generator = torch.Generator(device).manual_seed(K)
    rows = torch.randn(2 * K, K, generator=generator, device=device)
    rows[:, 1:] += 0.7 * rows[:, :-1]
    rows[:, :: K // 8] *= 10
    return (rows.T @ rows).double() / len(rows)


def option(text: str) -> tuple[str, object]:
    """``name=value`` of a quantizer's or of fine-tuning's option."""
    name, _, value = text.partition("=")
    return name, json.loads(value)


def one_block(shapes: dict, folder: Path) -> tuple[Path, Path]:
    """A bfloat16 Llama of one block of random weights, and a file of random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wide, narrow = (sorted(N for N, K in shapes if (N, K) != (K, N))[i] for i in (-1, 0))
    hidden, head = min(K for _, K in shapes), min(128, narrow // 4)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=1, vocab_size=256,
        num_attention_heads=hidden // head, num_key_value_heads=narrow // head,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "model")
    tokens = torch.randint(256, (1 << 17,), dtype=torch.int32).to(torch.uint16)
    tokens.numpy().tofile(folder / "calib.bin")
    return folder / "model", folder / "calib.bin"


def run_job(arguments: argparse.Namespace, shapes: dict, scheme: str) -> dict:
    """Quantize one block from files; the fields of its row."""
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        model, tokens = one_block(shapes, Path(folder))
        if arguments.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        tune = None if arguments.tune is None else TuneOptions(**dict(arguments.tune))
        report = quantize_calibrated(
            model, Path(folder) / "out", scheme, tokens, samples=arguments.samples,
            seq_len=arguments.window, device=arguments.device, tune=tune,
            options=dict(arguments.option),
        )  # fmt: skip
        block = report.blocks[0]
    return {
        "job": True,
        "samples": arguments.samples,
        "window": arguments.window,
        "tune": None if arguments.tune is None else dict(arguments.tune),
        "seconds": block.seconds,
        "layer_seconds": sum(layer.seconds for layer in block.layers),
        "relative_error": report.relative_error,
        "output_errors": [block.error_before, block.error_after],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--block", default="llama-3-8b", choices=BLOCKS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scheme", nargs="+", default=["aqlm-2x8-g8"])
    parser.add_argument("--shape", nargs="+", help="only these, as NxK")
    parser.add_argument(
        "--option", nargs="+", type=option, default=[], help="of the quantizer, as name=value"
    )
    parser.add_argument("--job", action="store_true", help="one block from files instead")
    parser.add_argument("--work", type=Path, help="with --job: where its files go for a while")
    parser.add_argument("--samples", type=int, default=64, help="with --job: windows")
    parser.add_argument("--window", type=int, default=2048, help="with --job: tokens of a window")
    parser.add_argument(
        "--tune", nargs="*", type=option, help="with --job: fine-tune, with options name=value"
    )
    arguments = parser.parse_args()
    cuda = arguments.device != "cpu"
    shapes = BLOCKS[arguments.block]
    if arguments.shape:
        shapes = {s: n for s, n in shapes.items() if f"{s[0]}x{s[1]}" in arguments.shape}
    for scheme in arguments.scheme:
        total, peak = 0.0, 0
        shared = environment("quantizers", arguments.device)
        shared |= {"block": arguments.block, "scheme": scheme, "options": dict(arguments.option)}
        if arguments.job:
            row = {**shared, **run_job(arguments, shapes, scheme)}
            row["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else 0
            append_rows(arguments.out, [rounded(row)])
            print(scheme, "job", f"{row['seconds']:.1f} s {row['peak_bytes'] / 1e9:.1f} GB")
            continue
        for (N, K), count in shapes.items():
            generator = torch.Generator(arguments.device).manual_seed(N)
            weight = torch.randn(N, K, generator=generator, device=arguments.device) * 0.02
            hessian = second_moment(K, arguments.device)
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            tensors = quantizer_for(scheme, **dict(arguments.option)).fit(weight, hessian)
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            memory = torch.cuda.max_memory_allocated() if cuda else 0
            found = parse_scheme(scheme).dequantize(tensors, torch.float32)
            row = {
                **shared,
                "N": N,
                "K": K,
                "seconds": seconds,
                "relative_error": relative_loss(weight, found, hessian),
                "peak_bytes": memory,
            }
            append_rows(arguments.out, [rounded(row)])
            print(scheme, N, K, f"{seconds:.2f} s {memory / 1e9:.1f} GB", flush=True)
            total, peak = total + count * seconds, max(peak, memory)
            del weight, hessian, tensors, found
        if not arguments.shape:
            row = {**shared, "seconds": total, "peak_bytes": peak}
            append_rows(arguments.out, [rounded(row)])
            print(scheme, "block", f"{total:.1f} s", flush=True)


if __name__ == "__main__":
    main()
