"""Checks and times build/cuda/_cuda.so on a GPU machine; needs only torch.

    python3 benchmarks/ladder/cuda/device.py check|tiny|tune|bench|chain [--out DIR] [--commit ID]

``check`` compares with a float64 dequantize-and-matmul; ``tune`` sweeps launch variants through the
override of the ladder build; ``bench`` writes the published rows.
"""

import argparse
import ctypes
import datetime
import json
import math
import os
import statistics
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F

LIB = "build/cuda/_cuda.so"
SCHEMAS = [
    "additive_pack(Tensor codes, int nbits, int out_group_size, int in_group_size,"
    " int[] partitions) -> Tensor",
    "additive_unpack(Tensor packed, SymInt out_groups, SymInt in_groups, int num_codebooks,"
    " int nbits, int out_group_size, int in_group_size, int[] partitions) -> Tensor",
    "additive_prepare(Tensor codebooks, str precision, int[] partitions) -> Tensor",
    "additive_matmul(Tensor x, Tensor packed, Tensor codebooks, Tensor scales, Tensor? bias,"
    " Tensor aux, int[] partitions, str precision) -> Tensor",
    "additive_matmul_dx(Tensor dy, Tensor packed, Tensor codebooks, Tensor scales,"
    " SymInt in_features, int[] partitions) -> Tensor",
    "additive_dequantize(Tensor packed, Tensor codebooks, Tensor scales, SymInt in_features,"
    " int[] partitions) -> Tensor",
]
library = torch.library.Library("aqlm_infer", "DEF")
for schema in SCHEMAS:
    library.define(schema)
torch.ops.load_library(LIB)
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
    tokens = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65, 130]
    if tiny:
        formats = [(2, 8, 8), (1, 16, 8), (2, 12, 8)]
        cases, tokens = [(70, 256, None, 1), (4200, 256, None, 1)], [1, 2, 9]
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


def timed_graph(calls, repeats=15):
    for c in calls[:2]:
        c()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for c in calls:
            c()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / len(calls))
    times.sort()

    def q(f):
        return times[min(len(times) - 1, int(f * len(times)))]

    del graph
    return statistics.median(times), q(0.2), q(0.8)


def layers_for(B, b, G, N, K, dtype, precision):
    codes = N * K // G * B * b // 8
    n = max(2, math.ceil(256e6 / codes))
    out = [Layer(B, b, G, N, K, dtype, precision=precision) for _ in range(n)]
    for layer in out:
        layer.codes = None
    return out, codes


def time_layers(layers, M, K, dtype, repeats=15):
    x = torch.randn(M, K, device=DEV).to(dtype)
    n = max(16, len(layers))
    keep = []

    def call(layer):
        keep.append(layer(x))
        if len(keep) > 4:
            keep.pop(0)

    return timed_graph([partial(call, layers[i % len(layers)]) for i in range(n)], repeats)


SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]


def sweep(label, fmt, shapes, Ms, precision, grid):
    for N, K in shapes:
        override()
        layers, codes = layers_for(*fmt, N, K, torch.float16, precision)
        for M in Ms:
            row = []
            for variant, occ, body in grid:
                override(variant, occ, body)
                try:
                    t = time_layers(layers, M, K, torch.float16, 7)[0]
                    row.append((t, f"{variant}/{occ}"))
                except RuntimeError as e:
                    row.append((9e9, f"{variant}/{occ}!" + str(e)[:60]))
            override()
            base = time_layers(layers, M, K, torch.float16, 7)[0]
            text = "  ".join(f"{n}:{t:.1f}" for t, n in row)
            best = min(row)
            print(
                f"{label} {N}x{K} M={M} tuned {base:.1f} best {best[1]} {best[0]:.2f}"
                f" ({codes / best[0] / 1e6:.2f} TB/s) | {text}",
                flush=True,
            )
        del layers
        torch.cuda.empty_cache()


def tune(which):
    torch.manual_seed(2)
    small = [(4096, 4096), (28672, 8192)]
    if "lut" in which:
        sweep(
            "2x8 lut",
            (2, 8, 8),
            SHAPES,
            [1],
            "exact",
            [(2, 2, 0), (4, 2, 0), (8, 1, 0), (16, 1, 0)],
        )
        sweep(
            "1x8 lut", (1, 8, 8), SHAPES, [1], "exact", [(2, 1, 0), (2, 2, 0), (4, 2, 0), (8, 1, 0)]
        )
        sweep("2x8 lut", (2, 8, 8), SHAPES, [2], "exact", [(0, 0, 0), (0, 0, 1)])
        sweep("8x8g32 lut", (8, 8, 32), small, [1, 8], "exact", [(4, 2, 0), (8, 1, 0), (16, 1, 0)])
    if "mma" in which:
        sweep(
            "2x8 mma",
            (2, 8, 8),
            small,
            [4, 8, 16, 32, 64, 128],
            "exact",
            [(8, o, 1) for o in (-66, 1, 2, 3)],
        )
        sweep(
            "2x8 mma-int8",
            (2, 8, 8),
            small,
            [1, 2, 4, 8, 16, 32],
            "int8",
            [(8, o, 1) for o in (1, 2, 3)],
        )
        sweep("4x8 mma", (4, 8, 8), small, [4, 16], "exact", [(8, 1, 1), (16, 1, 1)])
    if "split" in which:
        sweep("1x16 split", (1, 16, 8), SHAPES, [1, 16], "int8", [(v, 1, -1) for v in (16, 32)])
        sweep("1x16 split", (1, 16, 8), small, [1, 16], "exact", [(v, 1, -1) for v in (16, 32)])
    if "prefill" in which:
        for fmt in ((2, 8, 8), (1, 16, 8)):
            tokens = [128, 256, 512, 2048]
            sweep(f"{fmt} prefill", fmt, [(28672, 8192)], tokens, "exact", [(0, 0, -1)])


def copy_bandwidth():
    """GB/s read plus written by an elementwise kernel (a graph's memcpy node is much slower)."""
    a = torch.randn(1 << 29, device=DEV)
    b = torch.empty_like(a)
    t = timed_graph([lambda: torch.neg(a, out=b)] * 2, 9)[0]
    return 2 * a.numel() * 4 / t / 1e3


def dense_times(N, K, M, dtype):
    n = max(2, math.ceil(256e6 / (N * K * 2)))
    ws = [(torch.randn(N, K, device=DEV) * 0.02).to(dtype) for _ in range(n)]
    x = torch.randn(M, K, device=DEV).to(dtype)
    y = [None]

    def call(w):
        y[0] = F.linear(x, w)

    return timed_graph([lambda w=ws[i % n]: call(w) for i in range(max(16, n))])[0]


def bench(out, commit):
    torch.manual_seed(3)
    copy = copy_bandwidth()
    name = torch.cuda.get_device_name()
    print("device", name, "copy GB/s", round(copy), "torch", torch.__version__)
    rows = []
    schemes = [
        ("aqlm-2x8-g8", (2, 8, 8)),
        ("aqlm-1x16-g8", (1, 16, 8)),
        ("aqlm-1x8-g8", (1, 8, 8)),
        ("aqlm-4x8-g8", (4, 8, 8)),
        ("aqlm-8x8-g32", (8, 8, 32)),
    ]
    dense = {}
    jobs, prefill = [], []  # prefill last: it heats the card and lowers the clocks for a while
    for scheme, fmt in schemes:
        main = scheme in ("aqlm-2x8-g8", "aqlm-1x16-g8")
        shapes = SHAPES if main or scheme == "aqlm-1x8-g8" else [(28672, 8192)]
        for N, K in shapes:
            big = (N, K) == (28672, 8192)
            for precision in ("exact", "int8") if main else ("exact",):
                Ms = [1, 2, 4, 8, 16, 32, 64] if big or main else [1, 16]
                jobs.append((scheme, fmt, N, K, precision, Ms))
                if big and main and precision == "exact":
                    prefill.append((scheme, fmt, N, K, precision, [128, 512, 2048]))
    for scheme, fmt, N, K, precision, Ms in jobs + prefill:
        layers, codes = layers_for(*fmt, N, K, torch.float16, precision)
        for M in Ms:
            if (N, K, M) not in dense:
                dense[N, K, M] = dense_times(N, K, M, torch.float16)
            t, lo, hi = time_layers(layers, M, K, torch.float16)
            rows.append(
                {
                    "bench": "matmul",
                    "date": datetime.date.today().isoformat(),
                    "commit": commit,
                    "device": name,
                    "backend": "cuda",
                    "scheme": scheme,
                    "precision": precision,
                    "dtype": "float16",
                    "N": N,
                    "K": K,
                    "M": M,
                    "median_us": round(t, 3),
                    "p20_us": round(lo, 3),
                    "p80_us": round(hi, 3),
                    "gb_per_s": round(codes / t / 1e3, 1),
                    "copy_gb_per_s": round(copy, 1),
                    "dense_us": round(dense[N, K, M], 3),
                    "command": "python3 benchmarks/ladder/cuda/device.py bench",
                }
            )
            print(
                f"{scheme:13s} {precision:5s} {N}x{K} M={M:<4d} {t:8.2f} us "
                f"[{lo:.2f} {hi:.2f}] dense {dense[N, K, M]:.2f} "
                f"{codes / t / 1e3 / copy * 100:.0f}% of copy",
                flush=True,
            )
        del layers
        torch.cuda.empty_cache()
    with open(os.path.join(out, "matmul.jsonl"), "w") as f:
        for r in rows:
            f.write(json.dumps(r) + "\n")


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
        ((2, 8, 8), "exact", 28672, 8192, 1, (4, 2, 0)),
        ((2, 8, 8), "exact", 28672, 8192, 1, (8, 1, 0)),
        ((2, 8, 8), "exact", 28672, 8192, 1, (8, 3, 1)),
        ((2, 8, 8), "int8", 28672, 8192, 4, (8, 0, 1)),
        ((2, 8, 8), "exact", 28672, 8192, 16, (8, 0, 1)),
        ((2, 8, 8), "exact", 28672, 8192, 64, (8, 0, 1)),
        ((1, 16, 8), "int8", 28672, 8192, 1, (32, 1, -1)),
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
            t = timed_graph([run])[0] / len(layers)
            print(f"chain {fmt} {precision} dependent={dependent}: {t:.2f} us per layer")
    override()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="+")
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--commit", default="worktree")
    args = parser.parse_args()
    for what in args.what:
        start = time.time()
        if what == "check":
            check()
        elif what == "tiny":
            check(tiny=True)
        elif what.startswith("tune"):
            tune(what)
        elif what == "bench":
            bench(args.out, args.commit)
        elif what == "chain":
            chain()
        elif what == "one":
            one()
        elif what == "profile":
            profile()
        else:
            sys.exit(f"unknown {what}")
        print(f"-- {what}: {time.time() - start:.0f} s", flush=True)
