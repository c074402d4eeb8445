"""An E8P matmul joined with the rotated norm after it: float64 checks, and times of the chain.

    python3 benchmarks/ladder/cuda/rotated_step.py check|times|sanitize

Uses the ladder build (rotated.mk), as rotated.py does.
"""

import sys
from functools import partial

import torch
from rotated_checks import LIMITS, Report, poison, rel, rotate64
from rotated_times import timed_graph
from rotated_weights import DEV, E8P, FULL, copies

from aqlm_infer.generation import ops as step_ops
from aqlm_infer.generation.rotated_ops import e8p_matmul_norm

EPS = 1e-5
NORMS = ((1024, 512), (2048, 8192), (4096, 4096), (4096, 14336), (3072, 1024), (8192, 1024))


def norm_operands(N, M, dtype):
    x = torch.randn(M, N, device=DEV).to(dtype)
    weight, su = (torch.rand(N, device=DEV) + 0.5 for _ in range(2))
    return x, weight.to(dtype), su


def norm_call(layer, z, x, weight, su):
    numbers = (layer.h, layer.bits, layer.residual, layer.rotation.factor)
    return e8p_matmul_norm(z, layer.packed, layer.sv, *numbers, x, weight, EPS, su)


def check_norm(report, layer, M, dtype):
    z = torch.randn(M, layer.K, device=DEV).to(dtype)
    x, weight, su = norm_operands(layer.N, M, dtype)
    x *= layer.K**0.5
    product = rotate64(z.double() @ layer.weight64().T, layer.rotation) * layer.sv.double()
    poison(4 << 20, dtype=torch.float32)
    total, y = norm_call(layer, z, x, weight, su)
    what = f"{layer.bits} bit {layer.N}x{layer.K} M={M}"
    report.error(f"sum {str(dtype)[6:]}", what, rel(total, x.double() + product), LIMITS[dtype])
    wide = total.double()
    norm = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    expected = rotate64(su.double() * norm, layer.rotation, True)
    report.error(f"norm {str(dtype)[6:]}", what, rel(y, expected), LIMITS[dtype])
    again = norm_call(layer, z, x, weight, su)
    report.expect(torch.equal(again[0], total) and torch.equal(again[1], y), f"{what} repeat")


def check():
    torch.manual_seed(7)
    report = Report()
    for bits in (2, 3, 4):
        for N, K in NORMS:
            layer = E8P(bits, N, K, FULL, True)
            for dtype in (torch.float16, torch.bfloat16):
                for M in (1, 2, 17):
                    check_norm(report, layer, M, dtype)
    report.finish("step")


def times():
    torch.manual_seed(8)
    for N, K in ((4096, 4096), (4096, 14336)):
        layers = copies(partial(E8P, 2, N, K, FULL, True))
        plain = copies(partial(E8P, 2, N, K))
        z = torch.randn(1, K, device=DEV).half()
        x, weight, su = norm_operands(N, 1, torch.float16)

        def apart(layer, z=z, x=x, weight=weight, su=su):
            y = layer.call(z)
            return y, step_ops.rotated_norm(x, y, weight, EPS, su, layer.h, 1)

        row = {}
        row["alone"] = timed_graph([partial(p.call, z) for p in plain])[0]
        row["with output rotation"] = timed_graph([partial(p.call, z) for p in layers])[0]
        row["norm apart"] = timed_graph([partial(apart, p) for p in layers])[0]
        joined = [partial(norm_call, p, z, x, weight, su) for p in layers]
        row["norm joined"] = timed_graph(joined)[0]
        print(f"{N}x{K} M=1", {k: round(v, 2) for k, v in row.items()}, flush=True)


def sanitize():
    """One call of every body, for compute-sanitizer."""
    for N, K in ((1024, 128), (2048, 192), (4096, 320), (1536, 192)):
        layer = E8P(2, N, K, FULL, True)
        z = torch.randn(1, K, device=DEV).half()
        assert torch.isfinite(norm_call(layer, z, *norm_operands(N, 1, torch.float16))[1]).all()
    torch.cuda.synchronize()
    print("-- sanitize OK", flush=True)


if __name__ == "__main__":
    actions = {"check": check, "times": times, "sanitize": sanitize}
    for what in sys.argv[1:]:
        actions[what]()
