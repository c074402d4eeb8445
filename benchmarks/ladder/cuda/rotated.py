"""Checks and times build/rotated/_rotated.so (rotated.mk) on a GPU machine.

    python3 benchmarks/ladder/cuda/rotated.py check|tiny|golden|tune|profile|bench [--out DIR]

``check`` compares every operator with float64 on the same inputs; ``tune`` tries launch shapes
through the overrides of the ladder build; ``bench`` writes the published rows. Needs only torch and
the package's Python files.
"""

import argparse
import ctypes
import datetime
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from aqlm_infer import ops
from aqlm_infer.bench.timing import time_graph
from aqlm_infer.formats import E8PFormat
from aqlm_infer.formats.rotation import Hadamard, hadamard_transform
from aqlm_infer.formats.scalar import pack_bits

LIB = "build/rotated/_rotated.so"
torch.ops.load_library(LIB)
DEV = "cuda"
# Relative 2-norm against float64.
LIMITS = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-4}
NONE, FULL, BLOCK = "none", "full", "block"


def override(cluster=0, ctas=0, body=0, dependent=1):
    ctypes.CDLL(os.path.abspath(LIB)).aqlm_rotated_override(cluster, ctas, body, dependent)


def rotation(kind, size):
    if kind == NONE:
        return Hadamard(size, 0)
    return Hadamard.full(size) if kind == FULL else Hadamard.blocks(size)


class E8P:
    """Random E8P weight in the rotated basis; ``weight64`` is the oracle."""

    def __init__(self, bits, N, K, kind=NONE, sv=False):
        self.name = f"quip-e8p-{bits}bit"
        self.format, self.N, self.K = E8PFormat(bits), N, K
        shape = (N, K * bits // 64)
        high, low = (torch.randint(-(2**31), 2**31, shape, device=DEV) for _ in range(2))
        self.codes = high << 32 | low & 0xFFFFFFFF
        self.rotation = rotation(kind, N)
        self.h = self.rotation.matrix(DEV)
        self.sv = torch.rand(N, device=DEV) + 0.5 if sv else None
        self.packed = ops.e8p_pack(self.codes, bits)
        self.bytes = self.packed.numel()

    def unpacked(self):
        return ops.e8p_unpack(self.packed, self.format.bits, self.N, self.K)

    def call(self, x, bias=None):
        r = self.rotation
        return ops.e8p_matmul(
            x,
            self.packed,
            self.sv,
            bias,
            self.h,
            self.format.bits,
            1 / self.format.residual,
            self.N,
            r.factor,
            r.block,
            "exact",
        )

    def dx(self, dy):
        r = self.rotation
        return ops.e8p_matmul_dx(
            dy,
            self.packed,
            self.sv,
            self.h,
            self.format.bits,
            1 / self.format.residual,
            self.K,
            r.factor,
            r.block,
        )

    def dequantized(self):
        bits, residual = self.format.bits, 1 / self.format.residual
        return ops.e8p_dequantize(self.packed, bits, residual, self.N, self.K)

    def weight64(self):
        return self.format.decode(self.codes, torch.float64)


class Scalar:
    """Random scalar grid; G = K and no zeros: the grid of quip-int."""

    def __init__(self, bits, N, K, G, kind=NONE, sv=False, zeros=True, dtype=torch.float16):
        self.name = f"gptq-int{bits}-g{G}" if zeros else f"quip-int{bits}"
        self.bits, self.N, self.K, self.G = bits, N, K, G
        self.codes = pack_bits(torch.randint(0, 2**bits, (N, K), device=DEV), bits)
        self.scales = (torch.rand(N, K // G, device=DEV) * 0.02 + 0.01).to(dtype)
        z = torch.randint(0, 2**bits, (N, K // G), device=DEV)
        self.zeros = z.to(dtype) if zeros else None
        self.rotation = rotation(kind, N)
        self.h = self.rotation.matrix(DEV)
        self.sv = torch.rand(N, device=DEV) + 0.5 if sv else None
        self.packed = ops.scalar_pack(self.codes, bits, K)
        self.bytes = self.packed.numel()

    def unpacked(self):
        return ops.scalar_unpack(self.packed, self.bits, self.N, self.K)

    def call(self, x, bias=None):
        r = self.rotation
        return ops.scalar_matmul(
            x,
            self.packed,
            self.scales,
            self.zeros,
            self.sv,
            bias,
            self.h,
            self.bits,
            self.G,
            self.N,
            r.factor,
            r.block,
            "exact",
        )

    def dx(self, dy):
        r = self.rotation
        return ops.scalar_matmul_dx(
            dy,
            self.packed,
            self.scales,
            self.zeros,
            self.sv,
            self.h,
            self.bits,
            self.G,
            self.K,
            r.factor,
            r.block,
        )

    def dequantized(self):
        return ops.scalar_dequantize(
            self.packed, self.scales, self.zeros, self.bits, self.G, self.K
        )

    def weight64(self):
        from aqlm_infer.formats.scalar import unpack_bits

        q = unpack_bits(self.codes, self.bits, self.K).double().unflatten(1, (-1, self.G))
        zeros = (2**self.bits - 1) / 2 if self.zeros is None else self.zeros.double()[..., None]
        return (self.scales.double()[..., None] * (q - zeros)).flatten(1)


def poison(*shape, dtype):
    t = torch.full(shape, float("nan"), device=DEV, dtype=dtype)
    torch.cuda.synchronize()
    del t


def rel(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def rotate64(x, r, transpose=False):
    return hadamard_transform(x.double(), r.factor, r.block, transpose)


class Report:
    """Failures printed at once (a few), the worst error per key at the end."""

    def __init__(self):
        self.bad, self.worst = 0, {}

    def error(self, key, what, value, limit):
        self.worst[key] = max(self.worst.get(key, 0.0), value if value == value else 9.0)
        self.expect(value < limit, f"{key} {what}: error {value:.2e} >= {limit:.0e}")

    def expect(self, ok, what):
        if not ok:
            self.bad += 1
            if self.bad < 40:
                print("FAIL", what, flush=True)

    def finish(self, name):
        for key, value in sorted(self.worst.items()):
            print(f"worst {key:40s} {value:.2e}")
        print(f"-- {name}", "FAILED" if self.bad else "OK", self.bad, flush=True)


def check_matmul(report, layer, dtypes, tokens):
    w = layer.weight64()
    report.expect(torch.equal(layer.unpacked(), layer.codes), f"{layer.name} unpack")
    report.error(
        "dequantize", f"{layer.name} {layer.N}x{layer.K}", rel(layer.dequantized(), w), 1e-6
    )
    sv = 1.0 if layer.sv is None else layer.sv.double()
    for dtype in dtypes:
        key = f"{layer.name} {str(dtype)[6:]}"
        what = f"{layer.N}x{layer.K} F={layer.rotation.factor} b={layer.rotation.block}"
        bias = torch.randn(layer.N, device=DEV).to(dtype) if layer.sv is not None else None
        for M in tokens:
            wide = torch.full((M, layer.K + 5), float("nan"), device=DEV, dtype=dtype)
            off = (0, 3, 5)[M % 3]
            x = wide[:, off : off + layer.K]
            x.copy_(torch.randn(M, layer.K, device=DEV))
            ref = rotate64(x.double() @ w.T, layer.rotation) * sv
            ref = ref + (0 if bias is None else bias.double())
            poison(M, layer.N, dtype=dtype)
            poison(4 << 20, dtype=torch.float32)
            y = layer.call(x, bias)
            report.error(key, f"{what} M={M}", rel(y, ref), LIMITS[dtype])
            report.expect(torch.equal(y, layer.call(x, bias)), f"{key} {what} M={M} repeat")
        dy = torch.randn(3, layer.N, device=DEV).to(dtype)
        ref = rotate64(dy.double() * sv, layer.rotation, True) @ w
        report.error(key + " dx", what, rel(layer.dx(dy), ref), 2 * LIMITS[dtype])


def check_hadamard(report, sizes, dtypes):
    for kind, n in sizes:
        r = rotation(kind, n)
        h = r.matrix(DEV)
        for dtype in dtypes:
            for M in (1, 3):
                x = torch.randn(M, n + 3, device=DEV).to(dtype)[:, 1 : n + 1]
                pre, post = torch.randn(n, device=DEV), torch.randn(n, device=DEV)
                for transpose in (False, True):
                    for a, b in ((None, None), (pre, None), (pre, post)):
                        ref = rotate64(x.double() * (1 if a is None else a), r, transpose)
                        ref = ref * (1 if b is None else b)
                        poison(M, n, dtype=dtype)
                        y = ops.hadamard(x, a, b, h, r.factor, r.block, transpose)
                        limit = 5e-6 if dtype == torch.float32 else LIMITS[dtype]
                        report.error(
                            f"hadamard {str(dtype)[6:]}",
                            f"{kind} {n} T={transpose}",
                            rel(y, ref),
                            limit,
                        )


def check(tiny=False):
    torch.manual_seed(1)
    report = Report()
    half, both = (torch.float16,), (torch.float16, torch.bfloat16)
    tokens = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65, 129, 200]
    sizes = [
        (FULL, n)
        for n in (
            4,
            64,
            512,
            4096,
            8192,
            12,
            24,
            2880,
            3072,
            11008,
            14336,
            28672,
            18944,
            9728,
            57344,
            16384,
            5120,
            4544,
            29568,
        )
    ]
    sizes += [(BLOCK, n) for n in (128, 384, 8192, 13696)]
    if tiny:
        tokens, sizes = [1, 3, 9, 33, 70, 200], [(FULL, 3072), (FULL, 8192), (BLOCK, 384)]
    check_hadamard(report, sizes, half if tiny else (*both, torch.float32))
    for bits in (2, 3, 4):
        for N, K, kind in (
            (48, 64, FULL),
            (528, 320, NONE),
            (3072, 1024, FULL),
            (384, 448, BLOCK),
            (4096, 4096, FULL),
        ):
            if tiny and N > 600:
                continue
            few = (*both, torch.float32) if N == 3072 else both if N < 3072 else half
            check_matmul(report, E8P(bits, N, K, kind, sv=kind != NONE), few, tokens)
    for bits in (2, 3, 4, 8):
        for N, K, G, kind, zeros in (
            (33, 64, 64, NONE, True),
            (1001, 1024, 128, NONE, True),
            (517, 1088, 64, NONE, False),
            (770, 4096, 1024, NONE, True),
            (77, 104, 104, NONE, True),
            (77, 104, 104, NONE, False),
            (130, 192, 32, NONE, True),
            (3072, 2048, 2048, FULL, False),
            (384, 1984, 1984, BLOCK, False),
        ):
            if tiny and N > 600:
                continue
            scale = torch.float32 if kind != NONE else both[N % 2]
            layer = Scalar(bits, N, K, G, kind, kind != NONE, zeros, scale)
            check_matmul(report, layer, both if N < 1000 else half, tokens)
    if not tiny:
        check_calls(report)
    torch.cuda.synchronize()
    report.finish("tiny" if tiny else "check")


def check_calls(report):
    """Shapes, streams, graphs, messages."""
    for make in (partial(E8P, 2, 512, 1024, FULL, True), partial(Scalar, 4, 512, 1024, 128)):
        layer, other = make(), make()
        half = {"device": DEV, "dtype": torch.float16}
        report.expect(layer.call(torch.empty(0, 1024, **half)).shape == (0, 512), "M=0")
        x = torch.randn(3, 2, 1024, **half)
        y = layer.call(x)
        report.expect(torch.equal(y.reshape(6, 512), layer.call(x.reshape(6, -1))), "3-D")
        report.expect(torch.equal(layer.call(x.transpose(0, 1)), y.transpose(0, 1)), "strides")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            ys = layer.call(x)
        side.synchronize()
        report.expect(torch.equal(ys, y), "side stream")
        for M in (1, 12, 100, 300):
            x = torch.randn(M, 1024, **half)
            layer.call(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer.call(x)
            for weight in (layer, other):
                layer.packed.copy_(weight.packed)
                for name in ("sv", "scales", "zeros"):
                    if getattr(layer, name, None) is not None:
                        getattr(layer, name).copy_(getattr(weight, name))
                x.copy_(torch.randn(M, 1024, **half))
                y.fill_(float("nan"))
                graph.replay()
                report.expect(torch.equal(y, layer.call(x)), f"graph M={M}")
        for bad in (torch.randn(2, 960, **half), torch.randn(2, 1024, device=DEV).double()):
            try:
                layer.call(bad)
                report.expect(False, f"no error for {bad.shape} {bad.dtype}")
            except (RuntimeError, ValueError) as error:
                print("message:", str(error).splitlines()[0][:150])


def golden():
    """The published layers: codes bit for bit, y of every layer against float64."""
    from safetensors.torch import load_file

    report = Report()
    for bits in (2, 3, 4):
        tensors = load_file(Path("tests/golden") / f"quip_layer_{bits}bit.safetensors", device=DEV)
        for name in {k.split(".")[0] for k in tensors if k.endswith("Qidxs")}:
            t = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(name + ".")}
            N, K = t["SV"].shape[0], t["SU"].shape[0]
            packed = ops.e8p_pack(t["Qidxs"], bits)
            report.expect(torch.equal(ops.e8p_unpack(packed, bits, N, K), t["Qidxs"]), name)
            format = E8PFormat(bits)
            output, input = Hadamard.full(N), Hadamard.full(K)
            sv = t["SV"].float() * t.get("Wscale", torch.ones((), device=DEV))
            for m in (1, 5):
                if f"x{m}" not in t or f"y{m}_f64" not in t:
                    continue
                x = ops.hadamard(
                    t[f"x{m}"].half(),
                    t["SU"].float(),
                    None,
                    input.matrix(DEV),
                    input.factor,
                    0,
                    True,
                )
                y = ops.e8p_matmul(
                    x,
                    packed,
                    sv,
                    None,
                    output.matrix(DEV),
                    bits,
                    1 / format.residual,
                    N,
                    output.factor,
                    0,
                    "exact",
                )
                report.error(f"golden {bits} bit", name, rel(y, t[f"y{m}_f64"].double()), 1e-3)
    report.finish("golden")


def timed_graph(calls, repeats=15):
    """Microseconds a call: median, 20th and 80th percentile of graph replays."""
    t = time_graph(calls, repeats)
    return t.median_us, t.p20_us, t.p80_us


def copies(make, at_least=256e6):
    """Distinct weights, more of them than the L2 holds."""
    first = make()
    return [first] + [make() for _ in range(max(1, math.ceil(at_least / first.bytes) - 1))]


def rotated_call(layer, su, input, h_in):
    def call(x):
        x = ops.hadamard(x, su, None, h_in, input.factor, input.block, True)
        return layer.call(x)

    return call


def time_layers(layers, M, repeats=15, whole=False):
    K = layers[0].K
    x = torch.randn(M, K, device=DEV).half()
    functions = [layer.call for layer in layers]
    if whole:
        input, su = Hadamard.full(K), torch.randn(K, device=DEV)
        functions = [rotated_call(layer, su, input, input.matrix(DEV)) for layer in layers]
    n, keep = max(16, len(layers)), []

    def run(function):
        keep.append(function(x))
        if len(keep) > 4:
            keep.pop(0)

    return timed_graph([partial(run, functions[i % len(functions)]) for i in range(n)], repeats)


def dense_times(N, K, M):
    n = max(2, math.ceil(256e6 / (N * K * 2)))
    weights = [torch.randn(N, K, device=DEV).half() for _ in range(n)]
    x = torch.randn(M, K, device=DEV).half()
    return timed_graph([partial(F.linear, x, weights[i % n]) for i in range(max(8, n))])[0]


def show(name, layers, Ms, whole=False, variants=((),)):
    for M in Ms:
        row = []
        for v in variants:
            override(*v)
            row.append(f"{v}: {time_layers(layers, M, 9, whole)[0]:.2f}")
        override()
        size = f"{layers[0].N}x{layers[0].K}"
        print(
            f"{name:17s} {size} M={M:<4d} {'whole' if whole else ''} {'  '.join(row)}", flush=True
        )


BIG, MEDIUM, SMALL = (28672, 8192), (14336, 4096), (4096, 4096)


def tune():
    torch.manual_seed(2)
    bodies = ((0, 0, 0), (0, 0, 1))
    for shape in (BIG, MEDIUM, SMALL):
        layers = copies(partial(E8P, 2, *shape))
        show("e8p2", layers, [1, 4], variants=((), (0, 0, 0, 0)))
        show("e8p2", layers, [8, 16, 32, 64] if shape == BIG else [16], variants=bodies)
        layers = copies(partial(E8P, 2, *shape, FULL, True))
        show("e8p2 rotated", layers, [1], True, ((), (4,), (8,)))
        show("e8p2 rotated", layers, [16, 64], True)
        del layers
    for bits in (3, 4):
        layers = copies(partial(E8P, bits, *BIG))
        show(f"e8p{bits}", layers, [1, 4, 16, 32, 64])
        del layers
    for bits in (2, 3, 4, 8):
        layers = copies(partial(Scalar, bits, *BIG, BIG[1], zeros=False, dtype=torch.float32))
        show(f"quip-int{bits}", layers, [1, 4, 16, 64])
        layers = copies(partial(Scalar, bits, *BIG, 128))
        show(f"gptq-int{bits}-g128", layers, [1, 4, 16, 64])
        del layers
    layers = copies(partial(E8P, 2, *BIG))
    show("e8p2", layers, [128, 192, 256, 2048])
    hadamards()


def profile():
    """Mean microseconds of each kernel of a call, without dependent launch."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as prof

    torch.manual_seed(5)
    jobs = [(partial(E8P, 2, *shape, FULL, True), M) for shape in (BIG, SMALL) for M in (1, 16, 64)]
    jobs += [(partial(E8P, 2, *BIG, FULL, True), 2048), (partial(Scalar, 2, *BIG, 128), 1)]
    for make, M in jobs:
        layers = copies(make)
        x = torch.randn(M, layers[0].K, device=DEV).half()
        override(dependent=0)
        for _ in range(2):
            with prof(activities=[ProfilerActivity.CUDA]) as p:
                for layer in layers:
                    layer.call(x)
                torch.cuda.synchronize()
        override()
        times = {}
        for e in p.key_averages():
            if e.device_time > 0:
                name = e.key.split("<")[0].split("::")[-1][:24]
                times[name] = round(times.get(name, 0) + e.device_time * e.count / len(layers), 1)
        print(layers[0].name, f"{layers[0].N}x{layers[0].K} M={M}", times, flush=True)


def hadamards():
    for n in (4096, 8192, 14336, 28672):
        r = Hadamard.full(n)
        h, su = r.matrix(DEV), torch.randn(n, device=DEV)
        for M in (1, 16, 2048):
            x = torch.randn(M, n, device=DEV).half()
            row = []
            for cluster in (0, 1, 2, 4, 8):
                override(cluster)
                calls = [partial(ops.hadamard, x, su, None, h, r.factor, 0, True)] * 20
                row.append(f"{cluster}: {timed_graph(calls)[0]:.2f}")
            override()
            print(f"hadamard {n} F={r.factor} M={M}  ", "  ".join(row), flush=True)


def bench(out, commit):
    torch.manual_seed(3)
    device = torch.cuda.get_device_name()
    rows, dense = [], {}

    def record(name, scheme, N, K, M, timing, size, reference):
        t, lo, hi = timing
        rows.append(
            {
                "bench": name,
                "date": datetime.date.today().isoformat(),
                "commit": commit,
                "device": device,
                "backend": "cuda",
                "scheme": scheme,
                "precision": "exact",
                "dtype": "float16",
                "N": N,
                "K": K,
                "M": M,
                "median_us": round(t, 3),
                "p20_us": round(lo, 3),
                "p80_us": round(hi, 3),
                "gb_per_s": round(size / t / 1e3, 1),
                "dense_us": round(reference, 3) if reference else None,
                "command": "python3 benchmarks/ladder/cuda/rotated.py bench",
            }
        )
        ratio = f"fp16 {reference:.1f}" if reference else ""
        print(
            f"{name:8s} {scheme:18s} {N}x{K} M={M:<4d} {t:8.2f} us [{lo:.2f} {hi:.2f}] {ratio}",
            flush=True,
        )

    def run(make, Ms, whole=False):
        layers = copies(make)
        N, K = layers[0].N, layers[0].K
        for M in Ms:
            if (N, K, M) not in dense:
                dense[N, K, M] = dense_times(N, K, M)
            record(
                "layer" if whole else "matmul",
                layers[0].name,
                N,
                K,
                M,
                time_layers(layers, M, whole=whole),
                layers[0].bytes,
                dense[N, K, M],
            )

    shapes = (SMALL, MEDIUM, (4096, 14336), BIG, (8192, 28672))
    short = [1, 2, 4, 8, 16, 32, 64]
    for shape in shapes:
        run(partial(E8P, 2, *shape), short if shape in (SMALL, BIG) else [1, 4, 16])
        run(partial(E8P, 2, *shape, FULL, True), short if shape in (SMALL, BIG) else [1, 16], True)
    for bits in (3, 4):
        run(partial(E8P, bits, *BIG), short)
        run(partial(E8P, bits, *BIG, FULL, True), [1, 16], True)
    for bits in (2, 3, 4, 8):
        if bits < 8:  # quip-int has 2 to 4
            run(partial(Scalar, bits, *BIG, BIG[1], zeros=False, dtype=torch.float32), short)
        run(partial(Scalar, bits, *BIG, 128), [1, 4, 16])
    for n in (4096, 8192, 14336, 28672):
        r = Hadamard.full(n)
        h, su = r.matrix(DEV), torch.randn(n, device=DEV)
        for M in (1, 64, 2048):
            x = torch.randn(M, n, device=DEV).half()
            calls = [partial(ops.hadamard, x, su, None, h, r.factor, 0, True)] * 20
            record(
                "hadamard", f"hadamard-F{r.factor}", n, n, M, timed_graph(calls), 4 * M * n, None
            )
    run(partial(E8P, 2, *BIG), [128, 512, 2048])  # last: it heats the card
    run(partial(E8P, 2, *BIG, FULL, True), [2048], True)
    with open(os.path.join(out, "rotated.jsonl"), "w") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="+")
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--commit", default="worktree")
    args = parser.parse_args()
    actions = {
        "check": check,
        "tiny": partial(check, True),
        "golden": golden,
        "tune": tune,
        "hadamards": hadamards,
        "profile": profile,
        "bench": partial(bench, args.out, args.commit),
    }
    for what in args.what:
        if what not in actions:
            sys.exit(f"unknown {what}")
        start = time.time()
        actions[what]()
        print(f"-- {what}: {time.time() - start:.0f} s", flush=True)
