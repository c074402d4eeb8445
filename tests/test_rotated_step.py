"""An E8P matmul joined with the rotated norm after it, against float64."""

import pytest
import torch
from tolerances import RELATIVE

from aqlm_infer import ops
from aqlm_infer.formats import E8PFormat
from aqlm_infer.formats.rotation import Hadamard, hadamard_transform
from aqlm_infer.generation.rotated_ops import e8p_matmul_norm
from aqlm_infer.ops import OperandError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EPS = 1e-5


class Product:
    """sv * U (z Wq^T) of random codes; ``exact`` is that in float64."""

    def __init__(self, bits, N, K, device):
        self.N, self.K, self.device = N, K, device
        self.format, self.rotation = E8PFormat(bits), Hadamard.full(N)
        generator = torch.Generator().manual_seed(N + K)
        shape = (N, K * bits // 64)
        codes = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)
        self.weight = self.format.decode(codes, torch.float64).to(device)
        self.sv = (torch.rand(N, generator=generator) + 0.5).to(device)
        self.packed = ops.e8p_pack(codes.to(device), bits)
        self.h, self.factor = self.rotation.matrix(device), self.rotation.factor

    def exact(self, z):
        product = z.double() @ self.weight.T
        return hadamard_transform(product, self.factor, 0) * self.sv.double()

    def rows(self, M, size, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(M, size, generator=generator).to(self.device, dtype)

    def norm(self, z, x, weight, su):
        numbers = self.h, self.format.bits, 1 / self.format.residual, self.factor
        return e8p_matmul_norm(z, self.packed, self.sv, *numbers, x, weight, EPS, su)


def close(y, exact, dtype):
    error = (y.double() - exact).norm() / exact.norm()
    assert error <= RELATIVE["exact", dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("N", "K"), [(1024, 192), (2048, 4096), (4096, 448), (1024, 8192), (1536, 128)]
)
def test_matmul_with_the_rotated_norm_after_it(device, dtype, bits, N, K):
    """One token of 1024, 2048 and 4096, K <= 4096: one launch after the matmul; else two."""
    if device == "cpu" and K > 1000:
        pytest.skip("the CPU's operators are those that have tests of their own")
    product = Product(bits, N, K, device)
    weight, su = product.rows(1, N, dtype, 3)[0], product.rows(1, N, torch.float32, 4)[0]
    for M in (1, 3):
        z, x = product.rows(M, K, dtype, 1), product.rows(M, N, dtype, 2) * K**0.5
        total, y = product.norm(z, x, weight, su)
        close(total, x.double() + product.exact(z), dtype)
        wide = total.double()
        norm = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        close(y, hadamard_transform(su.double() * norm, product.factor, 0, True), dtype)
        again = product.norm(z, x, weight, su)
        assert torch.equal(again[0], total) and torch.equal(again[1], y)


def test_operands_are_checked():
    product = Product(2, 1024, 64, "cpu")
    z, x = torch.randn(2, 64), torch.randn(3, 1024)
    weight, su = torch.ones(1024), torch.ones(1024)
    with pytest.raises(OperandError, match=r"z torch.float32 \[2, 64\] beside x"):
        product.norm(z, x, weight, su)
    with pytest.raises(OperandError, match="su is torch.float16"):
        product.norm(z[:1], x[:1], weight, su.half())
