"""How long does ``y = x W^T`` take in each format, beside dense ``F.linear`` and ``aqlm``?

Writes JSON lines to --out (see README.md for the protocol), and with --plot a picture of them.
Without options it measures the suite behind the README's tables. On a CPU: M = 1 in every scheme,
warm and from memory, with one thread and two; batches; the other instruction sets. On a GPU
(--device cuda): the shapes of Llama 3 8B and 70B, every M, every precision, weights from memory.
Ideal machine: idle, with the clock fixed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import peers  # first: it fixes the peers' threads before their libraries load
from tqdm import tqdm

from aqlm_infer.backends import KERNELS, Problem, native
from aqlm_infer.bench import BenchError, MatmulCase, append_rows, bench_matmul, matmul_cases
from aqlm_infer.evaluation import DTYPES
from aqlm_infer.formats import parse_scheme

SCHEMES = ("aqlm-2x8-g8", "aqlm-1x16-g8", "aqlm-1x8-g8", "aqlm-4x8-g8", "aqlm-8x8-g32")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512)
BATCH_SCHEMES = ("aqlm-2x8-g8", "aqlm-1x16-g8", "quip-e8p-2bit")

# q/o, fused q/k/v, gate or up, down of Llama 3 8B, then of 70B.
LLAMA_SHAPES = (
    "4096x4096", "6144x4096", "14336x4096", "4096x14336",
    "8192x8192", "10240x8192", "28672x8192", "8192x28672",
)  # fmt: skip
CUDA_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
PEER_BATCHES = (1, 4, 16, 64, 2048)
PEER_SCHEMES = ("aqlm-2x8-g8", "aqlm-1x16-g8", "aqlm-1x8-g8")  # that aqlm has CUDA kernels for
INT8_SCHEMES = ("aqlm-2x8-g8", "aqlm-1x16-g8")
INT8_TOKENS = 64  # past these int8 runs the exact path

Step = tuple[str, MatmulCase, str | None]
"""What to measure ("ours", "aqlm", "aqlm-triton" or a dense dtype), where, and with which
instruction set."""


def kernel_of(backend: str | None, scheme: str, N: int, K: int, dtype: str) -> str | None:
    """Id of the backend's kernel for a layer on a GPU; None when the registry is to choose."""
    if backend is None:
        return None
    problem = Problem(parse_scheme(scheme), N, K, DTYPES[dtype], "cuda")
    own = [k for k in KERNELS.values() if k.id.startswith(f"{backend}.")]
    fits = [k.id for k in own if k.why_not(problem) is None]
    if not fits:
        reasons = "; ".join(f"{k.id}: {k.why_not(problem)}" for k in own) or "no such backend"
        raise BenchError(f"--backend {backend}: no kernel for {problem} ({reasons})")
    return fits[0]


def cuda_suite(arguments: argparse.Namespace, shapes: list[tuple[int, int]]) -> list[Step]:
    """Large batches last: they heat the card and lower its clocks for a while."""
    fixed = {"dtype": arguments.dtype, "device": arguments.device}
    reason = peers.missing_aqlm()
    if reason is not None:
        print(f"aqlm is not timed: {reason}", file=sys.stderr)
    steps: list[Step] = []
    small = [m for m in arguments.m if m <= INT8_TOKENS]
    for ms in (small, [m for m in arguments.m if m > INT8_TOKENS]):
        for shape, scheme in product(shapes, arguments.scheme):
            peer = [m for m in ms if m in PEER_BATCHES and scheme in PEER_SCHEMES and not reason]
            kernels = [kernel_of(b, scheme, *shape, arguments.dtype) for b in arguments.backend]
            int8 = ms if ms is small and scheme in INT8_SCHEMES and None in kernels else []
            slow = peer if "triton" in arguments.backend and ms is small else []
            for what, precision, kernel, some in (
                ("aqlm", "exact", None, peer),
                ("aqlm-triton", "exact", None, slow),
                *(("ours", "exact", kernel, ms) for kernel in kernels),
                ("ours", "int8", None, int8),
            ):
                cases = matmul_cases(
                    [scheme], [shape], some, (1,), ("dram",), precision=precision, kernel=kernel,
                    **fixed,
                )  # fmt: skip
                steps += [(what, case, None) for case in cases]
    return steps


def suite(arguments: argparse.Namespace) -> list[Step]:
    """The measurements in order: most wanted first."""
    fixed = {"dtype": arguments.dtype, "device": arguments.device}
    shapes = [tuple(int(n) for n in s.split("x")) for s in arguments.shape]
    if arguments.device == "cuda":
        return cuda_suite(arguments, shapes)
    caches = ("warm", "dram")
    single = matmul_cases(arguments.scheme, shapes, (1,), arguments.threads, caches, **fixed)
    steps: list[Step] = [("ours", case, None) for case in single]
    if native.cpu is not None:
        # Codes of more than 8 bits have no look-up tables, so nothing to make faster.
        shortened = [s for s in arguments.scheme if getattr(parse_scheme(s), "nbits", 0) <= 8]
        fast = matmul_cases(
            shortened, shapes, (1,), arguments.threads, caches, precision="fast", **fixed
        )
        steps += [("ours", case, None) for case in fast]
        others = native.cpu.supported_isas()[1:]
        warm = matmul_cases(arguments.scheme[:1], shapes, (1,), (1,), **fixed)
        steps += [("ours", case, isa) for case, isa in product(warm, others)]
    reason = peers.missing_aqlm()
    if reason is None and arguments.dtype != "float32":
        reason = f"its CPU kernels take float32, not {arguments.dtype}"
    if reason is None:
        additive = [s for s in arguments.scheme if s.startswith("aqlm-")]
        alone = matmul_cases(additive, shapes, (1,), (1,), **fixed)
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


def measure(step: Step, aqlm_us: dict[MatmulCase, float]) -> Iterator[dict]:
    """The rows of one step; ``aqlm_us`` collects the times of the peer for the rows beside them."""
    what, case, isa = step
    if what == "ours":
        for row in bench_matmul([case], isa):
            exact = replace(case, precision="exact", kernel=None)
            yield {**row, "aqlm_us": aqlm_us.get(exact)}
    elif what == "aqlm":
        row = peers.aqlm_row(case)
        aqlm_us[case] = row["median_us"]
        yield row
    elif what == "aqlm-triton":
        yield peers.aqlm_row(case, triton=True)
    else:
        yield peers.dense_row(case, what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES))
    parser.add_argument("--shape", nargs="+", metavar="NxK")
    parser.add_argument("--m", nargs="+", type=int)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype")
    parser.add_argument(
        "--backend",
        nargs="+",
        default=[None],
        metavar="NAME",
        help="with --device cuda: force kernels of these backends, such as cuda triton",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the rows of --out")
    parser.add_argument(
        "--aqlm-extension",
        type=Path,
        metavar="SO",
        help="aqlm's CUDA kernels, built beforehand; without it aqlm compiles them (minutes)",
    )
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    arguments.shape = arguments.shape or (LLAMA_SHAPES if cuda else ["4096x4096"])
    arguments.m = arguments.m or (CUDA_BATCHES if cuda else BATCHES)
    arguments.dtype = arguments.dtype or ("float16" if cuda else "float32")
    if arguments.aqlm_extension is not None:
        peers.use_built_extension(arguments.aqlm_extension)
    aqlm_us: dict[MatmulCase, float] = {}
    for step in (bar := tqdm(suite(arguments), unit="case", mininterval=5)):
        bar.set_postfix_str(f"{step[0]} {step[1]}")
        append_rows(arguments.out, measure(step, aqlm_us))
    if arguments.plot is not None:
        from plot_matmul import plot

        plot(arguments.out, arguments.plot)


if __name__ == "__main__":
    main()
