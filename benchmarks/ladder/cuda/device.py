"""Checks build/cuda/_cuda.so on a GPU machine and times variants that no user can choose.

    PYTHONPATH=. python3 benchmarks/ladder/cuda/device.py VERB...

with the verbs check, tiny, bodies, names, tune, chain, profile and one.

``check`` compares with a float64 dequantize-and-matmul; ``bodies`` calls each body once, for
compute-sanitizer (``--share 0/8``: every eighth from the first on; racecheck: the library of
``SANITIZE=1``, named by LADDER_LIB, and ``--kernel-name kns=4aqlm``); ``names`` lists the kernels
of each of these calls; ``tune`` sweeps bodies and launch variants through the override of the
ladder build; ``chain`` times dependent layers with and without dependent launch. Published rows
come from ``benchmarks/bench_matmul.py --device cuda``. The package must be the source tree,
without its own ``_cuda``.
"""

import argparse
import ctypes
import math
import os
import sys
import time
from functools import partial

import torch

import aqlm_infer  # noqa: F401  (declares the operators)
from aqlm_infer.bench.timing import time_graph

LIB = os.environ.get("LADDER_LIB", "build/cuda/_cuda.so")
torch.ops.load_library(LIB)  # kernels for the operators that the package declares
ops = torch.ops.aqlm_infer
DEV = "cuda"


def override(variant=0, occupancy=0, body=-1, dependent=1):
    ctypes.CDLL(os.path.abspath(LIB)).aqlm_cuda_override(variant, occupancy, body, dependent)


class Layer:
    """Random layer; ``weight64`` is the oracle."""

    def __init__(self, B, b, G, N, K, dtype, parts=None, og=1, precision="exact", bias=False):
        self.B, self.b, self.G, self.N, self.K, self.og = B, b, G, N, K, og
        self.parts = parts or [N]
        self.precision = precision
        P, C = len(self.parts), 2**b
        out_groups, in_groups = N // og, K // G
        container = torch.int8 if b <= 8 else torch.int16
        self.codes = torch.randint(
            -(C // 2), C // 2, (out_groups, in_groups, B), device=DEV, dtype=container
        )
        self.codebooks = (torch.randn(P * B, C, og, G, device=DEV) * 0.02).to(dtype)
        self.scales = (torch.rand(out_groups, 1, 1, 1, device=DEV) + 0.5).to(dtype)
        self.bias = torch.randn(N, device=DEV).to(dtype) if bias else None
        self.packed = ops.additive_pack(self.codes, b, og, G, self.parts)
        self.aux = ops.additive_prepare(self.codebooks, precision, self.parts)

    def __call__(self, x):
        return ops.additive_matmul(
            x,
            self.packed,
            self.codebooks,
            self.scales,
            self.bias,
            self.aux,
            self.parts,
            self.precision,
        )

    def weight32(self):
        out, row = [], 0
        for p, n in enumerate(self.parts):
            codes = self.codes[row // self.og : (row + n) // self.og].long() & (2**self.b - 1)
            w = 0
            for k in range(self.B):
                w = w + self.codebooks[p * self.B + k].float()[codes[:, :, k]]
            w = w * self.scales[row // self.og : (row + n) // self.og].float()
            out.append(w.permute(0, 2, 1, 3).reshape(n, self.K))
            row += n
        return torch.cat(out)


def poison(*shape, dtype):
    t = torch.full(shape, float("nan"), device=DEV, dtype=dtype)
    torch.cuda.synchronize()
    del t


def rel(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def check(tiny=False):
    torch.manual_seed(1)
    bad = 0
    worst = {}
    formats = [
        (2, 8, 8),
        (1, 8, 8),
        (4, 8, 8),
        (3, 8, 8),
        (8, 8, 32),
        (2, 8, 16),
        (1, 6, 8),
        (1, 16, 8),
        (1, 12, 8),
        (1, 16, 16),
        (2, 16, 8),
        (2, 12, 8),
        (1, 4, 4),
        (2, 5, 32),
    ]
    cases = [
        (64, 256, None, 1),
        (129, 416, None, 1),
        (1001, 1056, None, 1),
        (226, 288, [128, 33, 65], 1),
        (2048, 4096, None, 1),
        (96, 256, None, 2),
    ]
    tokens = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65, 130, 300]
    if tiny:
        formats = [(2, 8, 8), (8, 8, 32), (1, 16, 8), (2, 12, 8)]
        cases, tokens = [(70, 256, None, 1), (4200, 256, None, 1)], [1, 2, 9, 17, 65]
    for dtype in (torch.float16, torch.bfloat16):
        limit = 1e-3 if dtype == torch.float16 else 5e-3
        for B, b, G in formats:
            if tiny and dtype == torch.bfloat16:
                continue
            for N, K, parts, og in cases:
                if og > 1 and (B, b, G) not in [(2, 8, 8), (1, 16, 8)]:
                    continue
                for precision in ("exact", "int8"):
                    bias = N % 2 == 1
                    name = f"{B}x{b}g{G}og{og} {N}x{K} {precision} {str(dtype)[6:]}"
                    try:
                        layer = Layer(B, b, G, N, K, dtype, parts, og, precision, bias)
                        w = layer.weight32()
                        back = ops.additive_unpack(
                            layer.packed, N // og, K // G, B, b, og, G, layer.parts
                        )
                        if not torch.equal(back, layer.codes):
                            bad += 1
                            print("FAIL unpack", name)
                        poison(N, K, dtype=dtype)
                        dq = ops.additive_dequantize(
                            layer.packed, layer.codebooks, layer.scales, K, layer.parts
                        )
                        if not torch.equal(dq, w.to(dtype)):
                            bad += 1
                            print("FAIL dequantize", name, rel(dq, w.double()))
                        for M in tokens:
                            x = torch.randn(M, K, device=DEV).to(dtype)
                            ref = x.double() @ w.double().T
                            if bias:
                                ref = ref + layer.bias.double()
                            poison(M, N, dtype=dtype)
                            y = layer(x)
                            e = rel(y, ref)
                            same = all(torch.equal(y, layer(x)) for _ in range(3))
                            key = (f"{B}x{b}g{G}", precision, str(dtype)[6:])
                            worst[key] = max(worst.get(key, 0), e if e == e else 9)
                            top = 2.5e-2 if precision == "int8" and b >= 4 else limit
                            top = max(top, limit)
                            if not (e < top) or not same:
                                bad += 1
                                if bad < 40:
                                    print(f"FAIL {name} M={M} err={e:.2e} same={same}")
                        dy = torch.randn(5, N, device=DEV).to(dtype)
                        dx = ops.additive_matmul_dx(
                            dy, layer.packed, layer.codebooks, layer.scales, K, layer.parts
                        )
                        e = rel(dx, dy.double() @ w.double())
                        if not e < 6e-3:
                            bad += 1
                            print("FAIL dx", name, e)
                    except RuntimeError as error:
                        bad += 1
                        print("ERROR", name, str(error)[:300])
                        if "CUDA" in str(error) or "illegal" in str(error):
                            print("aborting")
                            return
    for B in (1, 2) if tiny else ():  # a body for larger matrices only
        override(body=9)
        layer = Layer(B, 8, 8, 200, 256, torch.float16)
        x = torch.randn(300, 256, device=DEV).half()
        e = rel(layer(x), x.double() @ layer.weight32().double().T)
        bad += not e < 1e-3
        print(f"long {B}x8 {e:.2e}")
        override()
    if not tiny:
        layer = Layer(2, 8, 8, 512, 1024, torch.float16)
        assert layer(torch.zeros(0, 1024, device=DEV, dtype=torch.float16)).shape == (0, 512)
        x = torch.randn(3, 2, 1024, device=DEV).half()
        y3 = layer(x)
        assert y3.shape == (3, 2, 512) and torch.equal(y3.reshape(6, 512), layer(x.reshape(6, -1)))
        wide = torch.randn(4, 2048 + 8, device=DEV).half()
        for off in (0, 3, 8):
            v = wide[:, off : off + 1024]
            assert torch.equal(layer(v), layer(v.contiguous())), off
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            ys = layer(x)
        side.synchronize()
        assert torch.equal(ys, y3)
        # graph replay after the weights change
        xs = torch.randn(1, 1024, device=DEV).half()
        g = torch.cuda.CUDAGraph()
        layer(xs)
        with torch.cuda.graph(g):
            yg = layer(xs)
        g.replay()
        assert torch.equal(yg, layer(xs))
        other = Layer(2, 8, 8, 512, 1024, torch.float16)
        for name in ("packed", "codebooks", "scales"):
            getattr(layer, name).copy_(getattr(other, name))
        g.replay()
        assert torch.equal(yg, other(xs))
        f32 = Layer(2, 8, 8, 512, 1024, torch.float32)
        x = torch.randn(3, 1024, device=DEV)
        print("float32 err", rel(f32(x), x.double() @ f32.weight32().double().T))
        for bad_x in (x, torch.randn(3, 1023, device=DEV).half()):
            try:
                layer(bad_x)
                print("FAIL: no error for", bad_x.shape, bad_x.dtype)
            except RuntimeError as error:
                print("message:", str(error).splitlines()[0][:160])
    for key, e in sorted(worst.items()):
        print(f"worst {key[0]:8s} {key[1]:6s} {key[2]:9s} {e:.2e}")
    torch.cuda.synchronize()
    print("CHECK", "FAILED" if bad else "OK", bad)


# Format, tokens, precisions, and variant, CTAs and body as in launch.cu: each kernel of one dtype.
BOTH = ("exact", "int8")
ONE_CALL = [
    *(((B, 8, 8), 1, ("exact",), (v, 0, -1)) for B in (1, 2, 4) for v in (1, 2)),  # columns
    *(((3, 8, 8), 1, ("exact",), (v, 0, 0)) for v in (1, 2, 4, 8, 16)),  # lut
    *(((8, 8, 32), 1, ("exact",), (v, 0, 0)) for v in (1, 2, 4, 8, 16)),
    *(((B, 8, 8), M, BOTH, (0, 0, 1)) for B in (1, 2, 4) for M in (2, 12, 30, 60)),  # mma
    *(((B, 8, 8), M, ("exact",), (0, 0, 3)) for B in (1, 2, 4) for M in (9, 20, 40, 100)),  # wgmma
    *(((B, 8, 8), M, ("int8",), (0, 0, 7)) for B in (1, 2) for M in (5, 9, 20)),  # wgmma_int8
    *(((B, 8, 8), M, ("int8",), (0, 0, 11)) for B in (1, 2) for M in (1, 2, 4)),  # owned_int8
    *(((B, 8, 8), M, ("exact",), (0, 0, 10)) for B in (1, 2) for M in (3, 16)),  # mma_ring
    *(((B, 8, 8), 200, ("exact",), (0, 0, 9)) for B in (1, 2)),  # wgmma_long
    *(((8, 8, 32), M, ("exact",), (0, 0, 8)) for M in (9, 40, 100)),  # wgmma_wide
    *(((1, 16, 8), M, BOTH, (0, 0, 1)) for M in (1, 4, 8, 16, 30)),  # split
    *(((1, 16, 8), M, BOTH, (0, 0, 3)) for M in (9, 20, 60)),  # split_wgmma
    ((1, 12, 16), 1, BOTH, (0, 0, -1)),
    *(((2, 12, 8), M, ("exact",), (0, 0, -1)) for M in (3, 9)),  # gather, dequantize
]


def body(fmt, M, precision, knobs):
    """One body on a small odd shape, against float64; whether it is right."""
    torch.manual_seed(3)
    N, K = 70, 256
    override(*knobs)
    layer = Layer(*fmt, N, K, torch.float16, precision=precision, bias=True)
    x = torch.randn(M, K, device=DEV).half()
    y = layer(x)
    w = layer.weight32().double()
    back = ops.additive_unpack(layer.packed, N, K // fmt[2], *fmt[:2], 1, fmt[2], layer.parts)
    dense = ops.additive_dequantize(layer.packed, layer.codebooks, layer.scales, K, layer.parts)
    e = rel(y, x.double() @ w.T + layer.bias.double())
    fine = torch.equal(back, layer.codes) and torch.equal(dense, w.half())
    print(fmt, precision, M, knobs, f"error {e:.1e}, codes and weights {fine}", flush=True)
    override()
    return fine and e < (2.5e-2 if precision == "int8" else 1e-3)


def one_calls(share="0/1"):
    first, stride = map(int, share.split("/"))
    calls = [(fmt, M, p, knobs) for fmt, M, precisions, knobs in ONE_CALL for p in precisions]
    return calls[first::stride]


def bodies(share):
    bad = sum(not body(*call) for call in one_calls(share))
    print("BODIES", "FAILED" if bad else "OK", bad)


def names():
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as prof

    for call in one_calls():
        with prof(activities=[ProfilerActivity.CUDA]) as p:
            body(*call)
            torch.cuda.synchronize()
        print("   ", sorted({e.key for e in p.key_averages() if "aqlm" in e.key}), flush=True)


def layers_for(B, b, G, N, K, dtype, precision):
    codes = N * K // G * B * b // 8
    n = max(2, math.ceil(256e6 / codes))
    out = [Layer(B, b, G, N, K, dtype, precision=precision) for _ in range(n)]
    for layer in out:
        layer.codes = None
    return out, codes


def time_layers(layers, M, K, dtype, replays=7):
    """Median microseconds of one call, layers in rotation."""
    x = torch.randn(M, K, device=DEV).to(dtype)
    return time_graph([partial(layer, x) for layer in layers], replays).median_us


SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]


def sweep(label, fmt, shapes, Ms, precision, grid):
    for N, K in shapes:
        override()
        layers, codes = layers_for(*fmt, N, K, torch.float16, precision)
        for M in Ms:
            row = []
            for name, knobs in grid.items():
                override(*knobs)
                row.append((time_layers(layers, M, K, torch.float16), name))
            override()
            base = time_layers(layers, M, K, torch.float16)
            best = min(row)
            print(
                f"{label} {N}x{K} M={M} tuned {base:.1f} best {best[1]} {best[0]:.2f}"
                f" ({codes / best[0] / 1e6:.2f} TB/s) | "
                + "  ".join(f"{name}:{t:.1f}" for t, name in row),
                flush=True,
            )
        del layers
        torch.cuda.empty_cache()


BODIES = {"mma": (0, 0, 1), "dense": (0, 0, 2), "wgmma": (0, 0, 3)}
LONG = {"long": (0, 0, 9), "long whole": (0, -3, 9)}
TABLES = {f"table{variant}": (variant, 0, 0) for variant in (1, 2)}


def tune():
    """The comparisons behind the rows of csrc/cuda/tune.h."""
    torch.manual_seed(2)
    big, small = [(28672, 8192)], [(4096, 4096)]
    for name, fmt in (("2x8", (2, 8, 8)), ("1x8", (1, 8, 8))):
        sweep(f"{name} table", fmt, SHAPES, [1], "exact", TABLES)
        sweep(f"{name} mma", fmt, big + small, [2, 8], "exact", {"mma": (0, 0, 1), **TABLES})
    sweep("2x8 int8", (2, 8, 8), big, [4, 8, 16, 32], "int8", {**BODIES, "wgmma_int8": (0, 0, 7)})
    sweep("8x8 g32", (8, 8, 32), big + small, [4, 8, 64], "exact", {"wide": (0, 0, 8)})
    for name, fmt in (("2x8", (2, 8, 8)), ("1x8", (1, 8, 8)), ("4x8", (4, 8, 8))):
        sweep(f"{name} batch", fmt, big + small, [8, 9, 16, 32, 64, 128], "exact", BODIES)
        passes = {k: BODIES[k] for k in ("dense", "wgmma")}
        long = LONG if fmt[0] < 4 else {}
        sweep(f"{name} prefill", fmt, big, [256, 512, 1024], "exact", {**passes, **long})
    for precision in ("exact", "int8"):
        sweep("1x16", (1, 16, 8), big + small, [8, 9, 16, 32, 64, 128], precision, BODIES)


def profile():
    """Mean duration of each kernel of a call (no dependent launch), weights rotated past L2."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as prof

    torch.manual_seed(5)
    override(dependent=0)
    for fmt, precision, Ms in (
        ((2, 8, 8), "exact", (1, 16, 64, 512, 2048)),
        ((2, 8, 8), "int8", (4, 16)),
        ((1, 16, 8), "int8", (1, 16)),
        ((1, 16, 8), "exact", (1, 512)),
    ):
        for N, K in ((4096, 4096), (28672, 8192)):
            layers, _ = layers_for(*fmt, N, K, torch.float16, precision)
            for M in Ms:
                x = torch.randn(M, K, device=DEV).half()
                for layer in layers:
                    layer(x)
                torch.cuda.synchronize()
                with prof(activities=[ProfilerActivity.CUDA]) as p:
                    for layer in layers:
                        layer(x)
                    torch.cuda.synchronize()
                rows = {
                    e.key.split("<")[0].split("::")[-1][:24]: (round(e.device_time, 1), e.count)
                    for e in p.key_averages()
                    if e.device_time > 0
                }
                print(fmt, precision, f"{N}x{K} M={M}", len(layers), "calls", rows, flush=True)
            del layers
            torch.cuda.empty_cache()
    override()


def one():
    """A few single calls, for ncu: `ncu --clock-control none ... device.py one`."""
    for fmt, precision, N, K, M, knobs in (
        ((2, 8, 8), "exact", 28672, 8192, 1, (2, 0, 0)),
        ((2, 8, 8), "exact", 28672, 8192, 1, (1, 0, 0)),
        ((2, 8, 8), "exact", 28672, 8192, 1, (8, 3, 1)),
        ((2, 8, 8), "int8", 28672, 8192, 4, (8, 0, 1)),
        ((2, 8, 8), "exact", 28672, 8192, 16, (8, 0, 1)),
        ((2, 8, 8), "exact", 28672, 8192, 64, (8, 0, 1)),
        ((1, 16, 8), "int8", 28672, 8192, 1, (0, 0, -1)),
        ((1, 16, 8), "int8", 28672, 8192, 16, (0, 0, -1)),
    ):
        override(*knobs)
        layer = Layer(*fmt, N, K, torch.float16, precision=precision)
        layer(torch.randn(M, K, device=DEV).half())
        torch.cuda.synchronize()
    override()


def chain():
    """A stack of dependent layers y = W x, with and without programmatic dependent launch."""
    torch.manual_seed(4)
    for fmt, precision in (((2, 8, 8), "exact"), ((1, 16, 8), "int8")):
        layers, _ = layers_for(*fmt, 4096, 4096, torch.float16, precision)

        def run(layers=layers):
            x = torch.ones(1, 4096, device=DEV, dtype=torch.float16)
            for layer in layers:
                x = layer(x)
            return x

        for dependent in (1, 0):
            override(dependent=dependent)
            t = time_graph([run]).median_us / len(layers)
            print(f"chain {fmt} {precision} dependent={dependent}: {t:.2f} us per layer")
    override()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="+")
    parser.add_argument("--share", default="0/1", help="of bodies: first/stride")
    args = parser.parse_args()
    for what in args.what:
        start = time.time()
        if what == "check":
            check()
        elif what == "tiny":
            check(tiny=True)
        elif what == "bodies":
            bodies(args.share)
        elif what == "names":
            names()
        elif what == "tune":
            tune()
        elif what == "chain":
            chain()
        elif what == "one":
            one()
        elif what == "profile":
            profile()
        else:
            sys.exit(f"unknown {what}")
        print(f"-- {what}: {time.time() - start:.0f} s", flush=True)
