"""How long does one decoder block take to quantize, and how much device memory?

Random weights and synthetic second moments of the shapes of one Llama-3-8B block, one layer of each
distinct shape; a block's time is the sum over its seven layers. One JSON line a layer and one a
block goes to --out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from aqlm_infer.bench import append_rows
from aqlm_infer.bench.record import environment, rounded
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--block", default="llama-3-8b", choices=BLOCKS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scheme", nargs="+", default=["aqlm-2x8-g8"])
    parser.add_argument("--shape", nargs="+", help="only these, as NxK")
    arguments = parser.parse_args()
    cuda = arguments.device != "cpu"
    shapes = BLOCKS[arguments.block]
    if arguments.shape:
        shapes = {s: n for s, n in shapes.items() if f"{s[0]}x{s[1]}" in arguments.shape}
    for scheme in arguments.scheme:
        total, peak = 0.0, 0
        shared = environment("quantizers", arguments.device)
        for (N, K), count in shapes.items():
            generator = torch.Generator(arguments.device).manual_seed(N)
            weight = torch.randn(N, K, generator=generator, device=arguments.device) * 0.02
            hessian = second_moment(K, arguments.device)
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            tensors = quantizer_for(scheme).fit(weight, hessian)
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            memory = torch.cuda.max_memory_allocated() if cuda else 0
            found = parse_scheme(scheme).dequantize(tensors, torch.float32)
            row = {
                **shared,
                "block": arguments.block,
                "scheme": scheme,
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
            row = {**shared, "block": arguments.block, "scheme": scheme, "seconds": total}
            append_rows(arguments.out, [rounded({**row, "peak_bytes": peak})])
            print(scheme, "block", f"{total:.1f} s", flush=True)


if __name__ == "__main__":
    main()
