"""Which configuration of the Triton kernels is fastest here, for each scheme, shape and M?

Writes triton_kernels/configs/<device>.json (--out), which ``triton_kernels/tuning.py`` reads:
rows of --merge stay where nothing was measured, and what they name for a shape so far is measured
beside the candidates. Times are CUDA-graph replays over weights from memory, of the matmul alone
(no rotations), after a load, so that the first are not of another state. First --jobs processes
compile every candidate, without opening the device (94 kernels of an H200 in 24 s of a core);
--compile-only stops there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from aqlm_infer.backends import KERNELS
from aqlm_infer.backends.triton import kernels
from aqlm_infer.bench.layers import copies_for, random_tensors
from aqlm_infer.bench.timing import time_graph
from aqlm_infer.formats import AdditiveFormat, E8PFormat, ScalarFormat, parse_scheme

SCHEMES = (
    "aqlm-2x8-g8", "aqlm-1x16-g8", "aqlm-1x8-g8", "quip-e8p-2bit", "quip-e8p-3bit",
    "quip-e8p-4bit", "quip-int2", "quip-int3", "quip-int4", "gptq-int2-g128", "gptq-int3-g128",
    "gptq-int4-g128", "gptq-int8-g128",
)  # fmt: skip
SHAPES = (
    "28672x8192", "4096x4096", "14336x4096", "4096x14336", "8192x8192", "8192x28672", "1024x4096",
)  # fmt: skip
TOKENS = (1, 16, 32, 64)
FAMILIES = ("additive", "e8p", "scalar")
COMPILED_N = 512  # rows of layers that are compiled for all others
LARGEST_ERROR = 2e-3  # of a config's result, against the portable body's
WARM_SECONDS = 2.0  # of load, so that all candidates find the device in one state

GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "additive.lookup": {
        "BLOCK_N": (512, 1024, 2048), "GROUPS": (4,), "PROGRAMS": (528, 1056), "num_warps": (4,),
    },
    "additive.gemv": {
        "BLOCK_N": (128, 256), "BLOCK_G": (4,), "PROGRAMS": (1056, 2112), "num_warps": (4,),
        "num_stages": (1,),
    },
    "additive.words_dot": {
        "BLOCK_M": (16, 32, 64), "WIDTH": (1, 2), "Q": (1, 2, 4, 8), "BOOKS": (1, 0),
        "COPIES": (1,), "FIRST": (0, 1), "FILL": (1,), "PROGRAMS": (264, 396, 528),
        "num_warps": (4,), "num_stages": (1, 4),
    },
    "additive.planes_dot": {
        "WIDTH": (2, 4), "Q": (4,), "PROGRAMS": (132,), "num_warps": (16,),
    },
    "additive.dot": {
        "BLOCK_M": (64, 16), "BLOCK_N": (64, 128), "BLOCK_K": (128,), "PROGRAMS": (2112,),
        "num_warps": (4,), "num_stages": (1,),
    },
    "e8p.gemv": {
        "BLOCK_N": (64,), "BLOCK_G": (32,), "SHARED": (1,), "PROGRAMS": (2112,), "num_warps": (4,),
        "num_stages": (1,),
    },
    "e8p.integers": {
        "BLOCK_N": (64, 128), "BLOCK_G": (32,), "SHARED": (0,), "COPIES": (1,),
        "PROGRAMS": (528, 1056), "num_warps": (4,), "num_stages": (1,),
    },
    "e8p.integer_dot": {
        "BLOCK_M": (16, 32), "BLOCK_N": (64, 128), "COPIES": (1,), "FILL": (1,),
        "PROGRAMS": (264, 528, 1056), "num_warps": (4,), "num_stages": (1,),
    },
    "e8p.first_dot": {
        "BLOCK_N": (64, 128), "COPIES": (1,), "FILL": (0, 1), "PROGRAMS": (264, 528),
        "num_warps": (4, 8), "num_stages": (2,),
    },
    "e8p.dot": {
        "BLOCK_M": (16, 64), "BLOCK_N": (64,), "BLOCK_G": (8, 16), "FIRST": (1, 0),
        "SHARED": (0,), "PROGRAMS": (2112,), "num_warps": (4,), "num_stages": (1,),
    },
    "scalar.gemv": {
        "BLOCK_N": (32, 64), "PROGRAMS": (1056, 2112), "num_warps": (2, 4), "num_stages": (1,),
    },
    "scalar.integers": {
        "BLOCK_N": (32, 64, 128), "PROGRAMS": (528, 1056), "num_warps": (4,), "num_stages": (1,),
    },
    "scalar.integer_dot": {
        "BLOCK_M": (16, 32, 64), "BLOCK_N": (64, 128, 256), "FILL": (1,),
        "PROGRAMS": (264, 528, 1056), "num_warps": (4,), "num_stages": (1,),
    },
    "scalar.first_dot": {
        "BLOCK_N": (64, 128), "FILL": (0, 1), "PROGRAMS": (264, 528), "num_warps": (4, 8),
        "num_stages": (3,),
    },
    "scalar.dot": {
        "BLOCK_M": (16, 64), "BLOCK_N": (64, 128), "BLOCK_K": (64,), "FIRST": (1, 0),
        "PROGRAMS": (1056,), "num_warps": (4,), "num_stages": (1,),
    },
}  # fmt: skip

BYTES = ("scalar.integers", "scalar.integer_dot", "scalar.first_dot")
"""For scalar schemes whose fields fill bytes."""

Case = tuple[str, int, int, int]
"""Scheme, N, K, M."""


def token_block(M: int) -> int:
    """Tokens of a tile: 16, 32 or 64."""
    return kernels("additive").tuning.token_block(M)


def family_of(scheme: str) -> str:
    kinds = {AdditiveFormat: "additive", E8PFormat: "e8p"}
    return kinds.get(type(parse_scheme(scheme)), "scalar")


def row_scheme(scheme: str) -> str:
    """The name under which ``tuning`` looks a scheme up."""
    format = parse_scheme(scheme)
    if isinstance(format, AdditiveFormat):
        return f"{format.num_codebooks}x{format.nbits}-g{format.in_group_size}"
    if isinstance(format, E8PFormat):
        return f"{format.bits}bit"
    grouped = isinstance(format, ScalarFormat)
    return f"int{format.bits}" + (f"-g{format.group_size}" if grouped else "")


def fills_bytes(scheme: str) -> bool:
    """Whether a scalar scheme has fields that fill bytes, and groups of whole sets of 64."""
    format = parse_scheme(scheme)
    grouped = isinstance(format, ScalarFormat)
    return format.bits != 3 and not (grouped and format.group_size % 64)


def candidates(case: Case, thin: int, bodies: list[str] | None = None) -> list[dict]:
    """Configs worth trying: tiles of at most 8192 words, and every ``thin``-th of them."""
    scheme, _, _, M = case
    nbits, bits = (getattr(parse_scheme(scheme), name, 2) for name in ("nbits", "bits"))
    found = []
    for name, grid in GRIDS.items():
        family, body = name.split(".")
        if bodies is not None and body not in bodies:
            continue
        large_books = nbits > 8
        both = body in ("words_dot", "planes_dot") and M == 1  # of one token and several
        if family != family_of(scheme) or (M == 1) == (body.endswith("dot") and not both):
            continue
        if body in (("lookup", "words_dot") if large_books else ("planes_dot",)):
            continue
        if body == "planes_dot" and M > 32:
            continue
        # Portable bodies lost wherever another one takes the scheme, but for large codebooks.
        if name in ("e8p.gemv", "e8p.dot") or (name == "additive.dot" and not large_books):
            continue
        if name == "additive.gemv" and parse_scheme(scheme).num_codebooks > 1:
            continue
        if (body == "integer_dot" and M > 32) or (body == "first_dot" and M <= 16):
            continue
        if name in ("scalar.gemv", "scalar.dot") and fills_bytes(scheme) and bits != 8:
            continue
        if name in BYTES and not fills_bytes(scheme):
            continue
        if name in BYTES and body.endswith("dot") and bits == 8:
            continue
        for values in product(*grid.values()):
            config = {"body": body, **dict(zip(grid, values, strict=True))}
            large = config.get("BLOCK_N", 1) * config.get("BLOCK_G", 1) > 8192
            if large or (body == "dot" and config["BLOCK_M"] < M):
                continue
            # All codebooks at once save MMAs and inputs; with one they are the same.
            if config.get("BOOKS") == 0 and parse_scheme(scheme).num_codebooks == 1:
                continue
            # Each warp reads all inputs.
            if body == "integer_dot" and config["BLOCK_N"] < 16 * config["num_warps"]:
                continue
            if body == "first_dot" and config["BLOCK_N"] != 16 * config["num_warps"]:
                continue
            # Rows of a lane's words are as many as registers allow; with the weight first, stages
            # of inputs are loaded ahead.
            if body == "words_dot":
                ahead = config["FIRST"]
                fits = M > 16 and config["WIDTH"] == 1 and config["Q"] in (1, 4)
                if not ahead:
                    fits = M <= 32 and config["WIDTH"] == 2 and config["Q"] in (2, 8)
                if not fits or config["num_stages"] != (4 if ahead else 1):
                    continue
            blocks = body in ("integer_dot", "words_dot")
            most = 32 if name == "e8p.integer_dot" else 64
            if blocks and config["BLOCK_M"] != min(most, max(16, token_block(M))):
                continue
            # Less than 64 tokens as the first operand: MMAs of one warp instead of Hopper's.
            if body == "dot" and M <= 16 and config.get("FIRST") == 1 and config["BLOCK_M"] != 16:
                continue
            found.append(config)
    return found[::thin]


def layers(scheme: str, N: int, K: int, copies: int, device: str = "cuda") -> list[Callable]:
    """x -> x W^T over copies of a weight, each in memory of its own, without rotations."""
    format, family = parse_scheme(scheme), family_of(scheme)
    rotated = family == "scalar" and not isinstance(format, ScalarFormat)
    kernel = KERNELS[f"triton.{family}" + (".rotated" if rotated else "")]
    none = torch.empty(0, dtype=torch.int8, device=device)
    tensors = random_tensors(format, N, K, torch.float16, 0, device)
    buffers = kernel.repack(format, tensors, (N,), "exact")
    if family == "additive":
        op = kernels("additive").additive_matmul
        rest = (tensors["codebooks"], tensors["scales"], None, buffers["widest"], [N])
        args = (buffers["packed_codes"], *rest)
    elif family == "e8p":
        op = kernels("e8p").e8p_matmul
        rest = (None, None, none, format.bits, 1 / format.residual, N, 0, 0, "exact")
        args = (buffers["packed_Qidxs"], *rest)
    else:
        op = kernels("scalar").scalar_matmul
        scales = buffers["grid_step"] if rotated else tensors["scales"]
        G = K if rotated else format.group_size
        rest = (scales, buffers.get("packed_zeros"), None, None, none, format.bits, G, N, 0, 0)
        args = (buffers["packed_qweight"], *rest, "exact")
    made = []
    for _ in range(copies):
        own = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        made.append(lambda x, own=own: op(x, *own))
    return made


class NoDevice:
    """Triton's driver of a process that compiles for a device and never opens it."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_for(target: GPUTarget) -> None:
    """Make launches in this process compile, for operands on the CPU, and stop there."""
    torch.set_num_threads(1)
    driver.set_active(NoDevice(target))
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **options: run(
        self, *args, grid=grid, warmup=True, **options
    )
    for family in FAMILIES:
        kernels(family).has_dp4a = lambda x: target.backend == "cuda"


def compile_one(scheme: str, K: int, M: int, config: dict) -> None:
    """Triton keeps the compiled kernels on disk; those of all shapes of whole blocks are equal."""
    (layer,) = layers(scheme, COMPILED_N, K, 1, "cpu")
    with kernels("additive").tuning.forced(config), torch.no_grad():
        try:
            layer(torch.zeros(M, K).half())
        except Exception as error:  # does not compile: the timing run says so
            print(f"{scheme} {M} {config}: {str(error)[:100]}", flush=True)


def compile_all(work: dict[tuple, list[tuple[int, list[dict]]]], jobs: int) -> None:
    """Compile every kernel once: shapes make no other one, and numbers of programs only whether
    rows have several splits, which are partial sums."""
    distinct = {}
    for (scheme, _, K), cases in work.items():
        # Triton makes another kernel for a number of blocks that 16 divides (a scalar block is of
        # 32 x 16 / bits inputs, 3 bits: 16).
        blocks = family_of(scheme) == "scalar" and K // 256 % 16 == 0
        for m, configs in cases:
            one_split = [{**config, "PROGRAMS": 1} for config in configs]
            for config in [*configs, *one_split, portable_body(m)]:
                rest = tuple((k, v) for k, v in config.items() if k not in ("PROGRAMS", "FILL"))
                one = config.get("PROGRAMS") == 1
                distinct.setdefault((scheme, blocks, token_block(m), one, rest),
                                    (scheme, K, m, config))  # fmt: skip
    context, target = get_context("fork"), driver.active.get_current_target()
    with ProcessPoolExecutor(jobs, context, compile_for, (target,)) as pool:
        list(pool.map(compile_one, *zip(*distinct.values(), strict=True)))


def warm_up() -> None:
    """Load the device until its clocks have settled."""
    x = torch.randn(4096, 4096, device="cuda").half()
    begin = time.time()
    while time.time() - begin < WARM_SECONDS:
        for _ in range(50):
            x @ x
        torch.cuda.synchronize()


def with_present(configs: list[dict], earlier: dict, case: Case) -> list[dict]:
    """The candidates and what the rows of ``earlier`` name for the case, if they name one."""
    scheme, N, K, M = case
    rows = earlier.get(family_of(scheme), [])
    present = kernels("additive").tuning.nearest(rows, row_scheme(scheme), N, K, M)
    return configs if present is None or present in configs else [present, *configs]


def portable_body(M: int) -> dict:
    """What results are compared with."""
    return {"body": "gemv" if M == 1 else "dot"}


@torch.no_grad()
def measure(
    made: list[Callable], case: Case, configs: list[dict], replays: int
) -> Iterator[tuple[float, dict]]:
    """(us, config) of each config that runs, repeats bit by bit and is right."""
    tuning = kernels("additive").tuning
    scheme, _, K, M = case
    x = torch.randn(M, K, device="cuda").half()
    with tuning.forced(portable_body(M)):
        expected = made[0](x).float()
    for config in configs:
        with tuning.forced(config):
            try:
                y = made[0](x)
                error = ((y.float() - expected).norm() / expected.norm()).item()
                if not error <= LARGEST_ERROR or not torch.equal(y, made[0](x)):
                    print(f"{case} {config}: off by {error:.1e}, or another result", flush=True)
                    continue
                timed = time_graph([lambda f=f: f(x) for f in made], replays)
                yield round(timed.median_us, 2), config
            except Exception as error:
                print(f"{case} {config}: {str(error)[:100]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--merge", type=Path, help="an earlier file, whose other rows are kept")
    parser.add_argument("--log", type=Path, help="JSON lines of every timing")
    parser.add_argument("--scheme", nargs="+", default=SCHEMES)
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--m", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--body", nargs="+", help="try these bodies only")
    parser.add_argument("--thin", type=int, default=1, help="try every n-th candidate")
    parser.add_argument("--replays", type=int, default=7)
    parser.add_argument("--seconds", type=float, help="start no case after this time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="the cache holds every kernel")
    arguments = parser.parse_args()
    shapes = [tuple(map(int, s.split("x"))) for s in arguments.shape]
    earlier = json.loads(arguments.merge.read_text()) if arguments.merge else {}
    work: dict[tuple, list[tuple[int, list[dict]]]] = {}
    for ((N, K), scheme), m in product(product(shapes, arguments.scheme), arguments.m):
        case = (scheme, N, K, m)
        configs = candidates(case, arguments.thin, arguments.body)
        work.setdefault(case[:3], []).append((m, with_present(configs, earlier, case)))
    if not arguments.no_compile:
        compile_all(work, arguments.jobs)
    if arguments.compile_only:
        return
    warm_up()
    begin, best = time.time(), {}
    for layer, cases in work.items():
        if arguments.seconds and time.time() - begin > arguments.seconds:
            print(f"out of time before {layer}", flush=True)
            break
        size = int(layer[1] * layer[2] * parse_scheme(layer[0]).bits_per_weight(*layer[1:]) / 8)
        made = layers(*layer, copies_for("dram", size))
        for m, configs in cases:
            case = (*layer, m)
            timed = sorted(measure(made, case, configs, arguments.replays), key=lambda t: t[0])
            if arguments.log:
                with arguments.log.open("a") as log:
                    log.writelines(json.dumps([*case, us, c]) + "\n" for us, c in timed)
            if timed:
                best[case] = timed[0]
                print(*case, *timed[0], flush=True)
        write(arguments.out, earlier, best)


def write(out: Path, earlier: dict, best: dict[Case, tuple[float, dict]]) -> None:
    """One file of all rows, in a fixed order."""
    rows = {}
    for family, old in earlier.items():
        rows |= {(family, r["scheme"], r["N"], r["K"], r["M"]): r for r in old}
    for (scheme, N, K, M), (us, config) in best.items():
        row = {"scheme": row_scheme(scheme), "N": N, "K": K, "M": M, "us": us, "config": config}
        rows[family_of(scheme), row["scheme"], N, K, M] = row
    table: dict[str, list[dict]] = {}
    for key in sorted(rows):
        table.setdefault(key[0], []).append(rows[key])
    lines = [
        f'  "{family}": [\n' + ",\n".join(f"    {json.dumps(row)}" for row in found) + "\n  ]"
        for family, found in table.items()
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
