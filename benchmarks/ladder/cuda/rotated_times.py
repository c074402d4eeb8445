"""Times of rotated and scalar operators on a GPU: graph replays over weights beyond the L2."""

import datetime
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rotated_weights import BIG, DEV, E8P, FULL, MEDIUM, SMALL, Scalar, copies, override
from torch.profiler import ProfilerActivity
from torch.profiler import profile as prof

from aqlm_infer import ops
from aqlm_infer.bench.timing import REST_SECONDS, time_graph
from aqlm_infer.formats.rotation import Hadamard


def timed_graph(calls, repeats=15):
    """Microseconds a call: median, 20th and 80th percentile of graph replays, after a rest."""
    t = time_graph(calls, repeats, REST_SECONDS)
    return t.median_us, t.p20_us, t.p80_us


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
    dense = {}
    file = Path(out) / "rotated.jsonl"
    file.unlink(missing_ok=True)

    def record(name, scheme, N, K, M, timing, size, reference):
        t, lo, hi = timing
        row = {
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
        with file.open("a") as f:  # as they come: a run may be cut short
            f.write(json.dumps(row) + "\n")
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

    shapes = (BIG, SMALL, MEDIUM, (4096, 14336), (8192, 28672), (6144, 4096), (28672, 4096))
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
        run(partial(Scalar, bits, *BIG, 128), [1, 4, 8, 16, 32, 64])
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
