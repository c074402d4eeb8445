"""How long does ``y = x W^T`` take in each format, beside dense ``F.linear`` and ``aqlm``?

Writes JSON lines to --out (see README.md for the protocol). Without options it measures the suite
behind the README's tables: M = 1 in every scheme, warm and from memory, with one thread and two;
batches; the other instruction sets. Ideal machine: idle, with the clock fixed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import peers  # first: it fixes the peers' threads before their libraries load
from tqdm import tqdm

from aqlm_infer.backends import native
from aqlm_infer.bench import MatmulCase, append_rows, bench_matmul, matmul_cases
from aqlm_infer.formats import parse_scheme

SCHEMES = ("aqlm-2x8-g8", "aqlm-1x16-g8", "aqlm-1x8-g8", "aqlm-4x8-g8", "aqlm-8x8-g32")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512)
BATCH_SCHEMES = ("aqlm-2x8-g8", "aqlm-1x16-g8")

Step = tuple[str, MatmulCase, str | None]
"""What to measure ("ours", "aqlm" or a dense dtype), where, and with which instruction set."""


def suite(arguments: argparse.Namespace) -> list[Step]:
    """The measurements in order: most wanted first."""
    fixed = {"dtype": arguments.dtype, "device": arguments.device}
    shapes = [tuple(int(n) for n in s.split("x")) for s in arguments.shape]
    caches = ("warm", "dram")
    single = matmul_cases(arguments.scheme, shapes, (1,), arguments.threads, caches, **fixed)
    steps: list[Step] = [("ours", case, None) for case in single]
    if arguments.device == "cpu" and native.cpu is not None:
        byte_schemes = [s for s in arguments.scheme if parse_scheme(s).nbits <= 8]
        fast = matmul_cases(
            byte_schemes, shapes, (1,), arguments.threads, caches, precision="fast", **fixed
        )
        steps += [("ours", case, None) for case in fast]
        others = native.cpu.supported_isas()[1:]
        warm = matmul_cases(arguments.scheme[:1], shapes, (1,), (1,), **fixed)
        steps += [("ours", case, isa) for case, isa in product(warm, others)]
    reason = peers.missing_aqlm()
    if reason is None and arguments.device == "cpu" and arguments.dtype != "float32":
        reason = f"its CPU kernels take float32, not {arguments.dtype}"
    if reason is None:
        alone = matmul_cases(arguments.scheme, shapes, (1,), (1,), **fixed)
        steps += [("aqlm", case, None) for case in alone]
    else:
        print(f"aqlm is not timed: {reason}", file=sys.stderr)
    dense = matmul_cases(arguments.scheme[:1], shapes, arguments.m, arguments.threads, **fixed)
    steps += [(dtype, case, None) for case, dtype in product(dense, ("float32", "bfloat16"))]
    batched = [s for s in arguments.scheme if s in BATCH_SCHEMES]
    many = [m for m in arguments.m if m > 1]
    for dtype in dict.fromkeys((arguments.dtype, "bfloat16")):
        batch = {**fixed, "dtype": dtype}
        cases = matmul_cases(batched, shapes, many, arguments.threads, **batch)
        steps += [("ours", case, None) for case in cases]
    return steps


def measure(step: Step) -> Iterator[dict]:
    """The rows of one step."""
    what, case, isa = step
    if what == "ours":
        yield from bench_matmul([case], isa)
    elif what == "aqlm":
        yield peers.aqlm_row(case)
    else:
        yield peers.dense_row(case, what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES))
    parser.add_argument("--shape", nargs="+", default=["4096x4096"], metavar="NxK")
    parser.add_argument("--m", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    for step in (bar := tqdm(suite(arguments), unit="case")):
        bar.set_postfix_str(f"{step[0]} {step[1]}")
        append_rows(arguments.out, measure(step))


if __name__ == "__main__":
    main()
