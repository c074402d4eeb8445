"""One call of every kernel between E8P's matmuls in a decode step, for compute-sanitizer.

    compute-sanitizer --tool racecheck python3 benchmarks/ladder/cuda/step_kernels.py

Of the installed package: joined norms and SwiGLU, second kernels of few tokens, attention.
"""

import torch

from aqlm_infer import ops
from aqlm_infer.formats import E8PFormat
from aqlm_infer.formats.rotation import Hadamard
from aqlm_infer.generation.rotated_ops import e8p_matmul_norm, e8p_matmul_swiglu

NORMS = ((1024, 128, 1), (4096, 320, 1), (1024, 8192, 1), (2048, 192, 3), (4096, 8192, 16))
GATED = ((14336, 192, 1), (14336, 128, 5), (28672, 64, 1))
ATTENDED = ((2, 16, 4, 513, 128, 512), (1, 8, 1, 1000, 64, 700))  # B, H, Hkv, L, D, filled
ROTATED = ((6144, 192, 1), (12288, 64, 3), (10240, 64, 1), (28672, 64, 1))


def weight(N: int, K: int) -> tuple:
    """(packed, sv, h, bits, residual, factor) of random codes."""
    codes = torch.randint(-(2**63), 2**63 - 1, (N, K // 32), device="cuda")
    rotation = Hadamard.full(N)
    sv = torch.rand(N, device="cuda") + 0.5
    numbers = 2, 1 / E8PFormat(2).residual, rotation.factor
    return ops.e8p_pack(codes, 2), sv, rotation.matrix("cuda"), *numbers


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").half()


@torch.no_grad()
def main() -> None:
    for N, K, M in NORMS:
        su = torch.rand(N, device="cuda")
        _, y = e8p_matmul_norm(rows(M, K), *weight(N, K), rows(M, N), rows(1, N)[0], 1e-5, su)
        assert torch.isfinite(y).all(), f"norm {N}x{K} M={M}"
    for n, K, M in GATED:
        next = Hadamard.full(n)
        last = torch.rand(n, device="cuda"), next.matrix("cuda"), next.factor
        y = e8p_matmul_swiglu(rows(M, K) / 8, *weight(2 * n, K), True, *last)
        assert torch.isfinite(y).all(), f"swiglu {n}x{K} M={M}"
    for N, K, M in ROTATED:
        packed, sv, h, bits, residual, factor = weight(N, K)
        y = ops.e8p_matmul(rows(M, K), packed, sv, None, h, bits, residual, N, factor, 0, "exact")
        assert torch.isfinite(y).all(), f"rotation {N}x{K} M={M}"
    for B, H, Hkv, L, D, filled in ATTENDED:
        new, cache = rows(B, H + 2 * Hkv, D), [rows(B, Hkv, L, D) for _ in range(2)]
        ids = torch.full((B, 1), filled, device="cuda")
        mask = torch.ones(B, L, dtype=torch.bool, device="cuda")
        y = torch.ops.aqlm_infer.step_attention(
            *new.split((H, Hkv, Hkv), 1), rows(L, D), rows(L, D), ids, ids[0], *cache, mask,
            0.1, 0
        )  # fmt: skip
        assert torch.isfinite(y).all(), f"attention {B}x{H}x{L}x{D}"
    torch.cuda.synchronize()
    print("step kernels OK", flush=True)


if __name__ == "__main__":
    main()
