"""Checks of rotated and scalar operators on a GPU against float64 of the same inputs."""

from functools import partial
from pathlib import Path

import torch
from rotated_weights import BLOCK, DEV, E8P, FULL, NONE, Scalar, many, rotation
from safetensors.torch import load_file

from aqlm_infer import ops
from aqlm_infer.formats import E8PFormat
from aqlm_infer.formats.rotation import Hadamard, hadamard_transform

# Relative 2-norm against float64.
LIMITS = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-4}


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


def check_many(report, sizes, dtypes, tokens):
    """The kernel for many tokens, forced for few as well; aligned rows, as it wants them."""
    many(1)
    for n in sizes:
        r = Hadamard.full(n)
        h, vector = r.matrix(DEV), torch.rand(n, device=DEV) + 0.5
        for dtype in dtypes:
            for M in tokens:
                x = torch.randn(M, n + 8, device=DEV).to(dtype)[:, :n]
                for transpose in (False, True):
                    turned = rotate64(x, r, transpose)
                    for a, b in ((None, None), (vector, None), (None, vector)):
                        ref = turned * (1 if b is None else b)
                        if a is not None:
                            ref = rotate64(x.double() * a, r, transpose)
                        poison(M, n, dtype=dtype)
                        y = ops.hadamard(x, a, b, h, r.factor, 0, transpose)
                        what = f"{n} M={M} T={transpose} {a is not None} {b is not None}"
                        report.error(f"many {str(dtype)[6:]}", what, rel(y, ref), LIMITS[dtype])
                        again = ops.hadamard(x, a, b, h, r.factor, 0, transpose)
                        report.expect(torch.equal(y, again), f"many {what} repeat")
    many()


def many_tokens():
    torch.manual_seed(4)
    report = Report()
    sizes = (1024, 2048, 3072, 4096, 5120, 6144, 8192, 14336, 16384, 28672, 32768)
    check_many(report, sizes, (torch.float16, torch.bfloat16), (1, 3, 40, 300, 2100))
    torch.cuda.synchronize()
    report.finish("many")


def halves():
    """Scale groups of 5 and more tokens."""
    torch.manual_seed(5)
    report, tokens = Report(), (5, 8, 16, 17, 32, 33, 64, 65, 130, 200)
    shapes = ((1001, 1024, 128), (200, 1280, 128), (130, 512, 64), (999, 2304, 192))
    shapes += ((1500, 1536, 512), (9000, 2048, 128), (4096, 4096, 128))
    for bits in (2, 3, 4, 8):
        for N, K, G in shapes:
            check_matmul(report, Scalar(bits, N, K, G), (torch.float16,), tokens)
        layer = Scalar(bits, 3072, 1024, 128, FULL, True)
        check_matmul(report, layer, (torch.float16,), tokens)
    report.finish("halves")


def check(tiny=False):
    torch.manual_seed(1)
    report = Report()
    half, both = (torch.float16,), (torch.float16, torch.bfloat16)
    tokens = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65, 129, 200]
    powers = (4, 64, 512, 4096, 8192, 16384)
    factors = (12, 24, 2880, 3072, 4544, 5120, 9728, 11008, 14336, 18944, 28672, 29568, 57344)
    sizes = [(FULL, n) for n in powers + factors]
    sizes += [(BLOCK, n) for n in (128, 384, 8192, 13696)]
    if tiny:
        tokens, sizes = [1, 3, 9, 33, 70, 200], [(FULL, 3072), (FULL, 8192), (BLOCK, 384)]
    check_hadamard(report, sizes, half if tiny else (*both, torch.float32))
    check_many(report, (3072, 8192), half, (3, 70))
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
