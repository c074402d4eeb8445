"""Microseconds of whole rotated layers and of their parts, by launch shape.

    python3 benchmarks/ladder/cuda/rotated_layers.py layers|hadamards|prompts|groups|short|...

Uses the ladder build (rotated.mk). Every row names the overrides that it ran under.
"""

import ctypes
import os
import sys
from functools import partial

import torch
from rotated_times import show, time_layers, timed_graph
from rotated_weights import (
    BIG,
    DEV,
    E8P,
    FULL,
    LIB,
    MEDIUM,
    SMALL,
    Scalar,
    copies,
    many,
    override,
    share,
)

from aqlm_infer import ops
from aqlm_infer.formats.rotation import Hadamard

SHAPES = (SMALL, (6144, 4096), MEDIUM, (28672, 4096), (4096, 14336), BIG, (8192, 28672))


def local_bits(most=-1):
    ctypes.CDLL(os.path.abspath(LIB)).aqlm_rotated_local_bits(most)


def layers():
    """E8P 2 bit: matmul alone, the whole layer, and the layer without folded rotations."""
    torch.manual_seed(2)
    for shape in SHAPES:
        plain, rotated = (
            copies(partial(E8P, 2, *shape)),
            copies(partial(E8P, 2, *shape, FULL, True)),
        )
        for M in (1, 4, 16, 64) if shape in (SMALL, BIG) else (1,):
            alone = time_layers(plain, M, 9)[0]
            inner = time_layers(rotated, M, 9)[0]
            whole = time_layers(rotated, M, 9, True)[0]
            local_bits(5)
            within = time_layers(rotated, M, 9, True)[0]
            local_bits()
            print(
                f"e8p2 {shape[0]}x{shape[1]} M={M:<3d} alone {alone:.2f}  with output rotation"
                f" {inner:.2f}  whole {whole:.2f} = {whole / alone:.2f}x"
                f"  no exchange between warps {within:.2f}",
                flush=True,
            )


def hadamards():
    for n in (4096, 8192, 14336, 28672, 11008, 18944):
        r = Hadamard.full(n)
        h, su = r.matrix(DEV), torch.randn(n, device=DEV)
        for M in (1, 4, 16, 64):
            x = torch.randn(M, n, device=DEV).half()
            calls = [partial(ops.hadamard, x, su, None, h, r.factor, 0, True)] * 20
            row = [f"{timed_graph(calls)[0]:.2f}"]
            for cluster in (4, 8):
                override(cluster)
                row.append(f"cluster {cluster}: {timed_graph(calls)[0]:.2f}")
            override()
            print(f"hadamard {n} F={r.factor} M={M}  ", "  ".join(row), flush=True)


def prompts():
    """Rotations of many tokens, inputs (pre) and outputs (post): new kernel, the others."""
    for n in (4096, 6144, 8192, 14336, 28672):
        r = Hadamard.full(n)
        h, vector = r.matrix(DEV), torch.randn(n, device=DEV)
        for M in (4, 16, 32, 64, 128, 512, 2048):
            x, row = torch.randn(M, n, device=DEV).half(), []
            for least in (1, 1 << 30):
                many(least)
                for pair in ((vector, None), (None, vector)):
                    calls = [partial(ops.hadamard, x, *pair, h, r.factor, 0, True)] * 20
                    row.append(f"{timed_graph(calls, 9)[0]:.2f}")
            many()
            print(f"prompt {n} M={M}: pre, post", *row[:2], "before", *row[2:], flush=True)


def groups():
    for bits in (2, 3, 4, 8):
        rows = copies(partial(Scalar, bits, *BIG, 128))
        print(
            f"int{bits}-g128",
            [round(time_layers(rows, M, 9)[0], 2) for M in (1, 2, 4, 16)],
            flush=True,
        )
        if bits < 8:
            rows = copies(partial(Scalar, bits, *BIG, BIG[1], zeros=False, dtype=torch.float32))
            print(
                f"quip-int{bits}",
                [round(time_layers(rows, M, 9)[0], 2) for M in (1, 4, 16, 64)],
                flush=True,
            )
        del rows


def halves():
    """Scale groups: operands in float16, in int8."""
    for bits, shape, G in (
        (4, BIG, 128), (2, BIG, 128), (3, BIG, 128), (8, BIG, 128), (4, BIG, 64), (4, SMALL, 128),
        (4, MEDIUM, 128),
    ):  # fmt: skip
        rows = copies(partial(Scalar, bits, *shape, G))
        for M in (5, 8, 16, 32, 64, 128):
            show(f"int{bits}-g{G}", rows, [M], variants=((), (0, 0, 2)))
        del rows


def short():
    for shape in (BIG, MEDIUM, SMALL):
        rows = copies(partial(E8P, 2, *shape))
        print("e8p2", shape, [round(time_layers(rows, M, 15)[0], 2) for M in (1, 2, 4)], flush=True)
    for bits in (2, 3):
        rows = copies(partial(Scalar, bits, *BIG, BIG[1], zeros=False, dtype=torch.float32))
        print(
            f"quip-int{bits}",
            [round(time_layers(rows, M, 15)[0], 2) for M in (1, 2, 4)],
            flush=True,
        )


def sanitize():
    """One call of every body, for compute-sanitizer: racecheck is a thousand times slower."""
    cases = [
        (partial(E8P, bits, 768, 192, FULL, True), (1, 3, 7, 16, 33, 64)) for bits in (2, 3, 4)
    ]
    cases += [(partial(E8P, 2, 4096, 128, FULL, True), (1, 16)), (partial(E8P, 2, 96, 64), (1,))]
    cases.append((partial(E8P, 2, 3584, 320), (1, 3, 6, 12)))
    cases.append((partial(E8P, 2, 16384, 2560), (16,)))
    # Owned rows: more blocks than SMs, more cells than a warp has looked up.
    cases += [(partial(E8P, 2, 4416, 64), (1,)), (partial(E8P, 2, 4096, 4160), (1,))]
    cases.append((partial(Scalar, 4, 4096, 4224, 4224), (1,)))
    for bits in (2, 3, 4, 8):
        cases.append((partial(Scalar, bits, 97, 256, 128), (1, 4, 9, 20)))
        cases.append((partial(Scalar, bits, 400, 640, 64), (1, 4, 9)))
        cases.append((partial(Scalar, bits, 97, 384, 128), (1,)))
        cases.append((partial(Scalar, bits, 128, 192, 192, FULL, True, False), (2, 40)))
    for make, tokens in cases:
        layer = make()
        for M in tokens:
            y = layer.call(torch.randn(M, layer.K, device=DEV).half())
            assert torch.isfinite(y).all(), (layer.name, M)
    share(0)  # x of 16 tokens staged by a kernel
    for N, K in ((3584, 320), (8448, 192)):
        y = E8P(2, N, K, FULL if N == 3584 else "none").call(torch.randn(16, K, device=DEV).half())
        assert torch.isfinite(y).all(), (N, K)
    share()
    for n in (384, 768, 3072, 11008, 4096, 8192):
        r = Hadamard.full(n)
        x, vector = torch.randn(2, n, device=DEV).half(), torch.rand(n, device=DEV)
        for M in (1, 2):
            for pre in (None, vector):
                y = ops.hadamard(x[:M], pre, None, r.matrix(DEV), r.factor, 0, True)
                assert torch.isfinite(y).all(), n
    for bits in (2, 3, 4, 8):  # float16 operands: whole and half steps, one pass and two
        for N, K, G, M in ((97, 256, 128, 20), (97, 256, 128, 70), (400, 640, 64, 9)):
            layer = Scalar(bits, N, K, G)
            assert torch.isfinite(layer.call(torch.randn(M, K, device=DEV).half())).all()
    many(1)
    for n in (1024, 3072, 4096, 8192, 14336, 28672):
        r = Hadamard.full(n)
        x, vector = torch.randn(5, n, device=DEV).half(), torch.rand(n, device=DEV)
        for pair in ((None, None), (vector, None), (None, vector)):
            y = ops.hadamard(x, *pair, r.matrix(DEV), r.factor, 0, True)
            assert torch.isfinite(y).all(), n
    many()
    torch.cuda.synchronize()
    print("-- sanitize OK", flush=True)


def one():
    """A few launches for a profiler."""
    for shape in (BIG, SMALL):
        layer = E8P(2, *shape, FULL, True)
        layer.call(torch.randn(1, shape[1], device=DEV).half())
    for bits in (2, 4):
        Scalar(bits, *BIG, 128).call(torch.randn(1, BIG[1], device=DEV).half())
    torch.cuda.synchronize()


if __name__ == "__main__":
    actions = {
        "layers": layers,
        "hadamards": hadamards,
        "prompts": prompts,
        "groups": groups,
        "halves": halves,
        "short": short,
        "one": one,
        "sanitize": sanitize,
    }
    for what in sys.argv[1:]:
        actions[what]()
