"""An E8P matmul joined with the rotated norm or SwiGLU after it, against float64."""

import pytest
import torch
from tolerances import RELATIVE

from aqlm_infer import ops
from aqlm_infer.formats import E8PFormat
from aqlm_infer.formats.rotation import Hadamard, hadamard_transform
from aqlm_infer.generation.rotated_ops import e8p_matmul_norm, e8p_matmul_swiglu
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
        codes = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator).to(device)
        self.weight = self.format.decode(codes, torch.float64)
        self.sv = (torch.rand(N, generator=generator) + 0.5).to(device)
        self.packed = ops.e8p_pack(codes, bits)
        self.h, self.factor = self.rotation.matrix(device), self.rotation.factor

    def exact(self, z):
        product = z.double() @ self.weight.T
        return hadamard_transform(product, self.factor, 0) * self.sv.double()

    def rows(self, M, size, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(M, size, generator=generator).to(self.device, dtype)

    def plain(self, z):
        last = self.format.bits, 1 / self.format.residual, self.N, self.factor, 0, "exact"
        return ops.e8p_matmul(z, self.packed, self.sv, None, self.h, *last)

    def norm(self, z, x, weight, su):
        numbers = self.h, self.format.bits, 1 / self.format.residual, self.factor
        return e8p_matmul_norm(z, self.packed, self.sv, *numbers, x, weight, EPS, su)

    def swiglu(self, z, up_first, su, next_h, next_factor):
        numbers = self.h, self.format.bits, 1 / self.format.residual, self.factor
        last = up_first, su, next_h, next_factor
        return e8p_matmul_swiglu(z, self.packed, self.sv, *numbers, *last)


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
    """One launch after the matmul: 1024, 2048 and 4096 outputs, 16-bit values, few tokens."""
    if device == "cpu" and K > 1000:
        pytest.skip("the CPU's operators are those that have tests of their own")
    product = Product(bits, N, K, device)
    weight, su = product.rows(1, N, dtype, 3)[0], product.rows(1, N, torch.float32, 4)[0]
    for M in (1, 3, 16, 17):
        z, x = product.rows(M, K, dtype, 1), product.rows(M, N, dtype, 2) * K**0.5
        total, y = product.norm(z, x, weight, su)
        close(total, x.double() + product.exact(z), dtype)
        wide = total.double()
        norm = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        close(y, hadamard_transform(su.double() * norm, product.factor, 0, True), dtype)
        again = product.norm(z, x, weight, su)
        assert torch.equal(again[0], total) and torch.equal(again[1], y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize(
    ("bits", "n", "K"),
    [(2, 14336, 192), (2, 14336, 4096), (3, 14336, 320), (2, 28672, 448), (4, 28672, 128),
     (2, 512, 192), (2, 768, 64), (2, 8192, 2048)],
)  # fmt: skip
def test_matmul_of_gate_and_up_with_swiglu_and_the_next_rotation(device, dtype, bits, n, K):
    """16-bit, 14336 and 28672 numbers: two launches after the matmul, one from 5 tokens on."""
    if device == "cpu" and n > 1000:
        pytest.skip("the CPU's operators are those that have tests of their own")
    product, rotation = Product(bits, 2 * n, K, device), Hadamard.full(n)
    su = product.rows(1, n, torch.float32, 4)[0]
    next = rotation.matrix(device), rotation.factor
    for M, up_first in ((1, False), (1, True), (4, True), (5, False), (16, True), (17, False)):
        z = product.rows(M, K, dtype, 1) * 2 / K**0.5
        low, high = product.exact(z).chunk(2, 1)
        gate, up = (high, low) if up_first else (low, high)
        exact = torch.nn.functional.silu(gate) * up
        y = product.swiglu(z, up_first, su, *next)
        close(y, hadamard_transform(su.double() * exact, rotation.factor, 0, True), dtype)
        assert torch.equal(product.swiglu(z, up_first, su, *next), y)


def test_operands_are_checked():
    product = Product(2, 1024, 64, "cpu")
    with pytest.raises(OperandError, match=r"su is torch.float16 \[512\], expected float32"):
        product.swiglu(torch.randn(1, 64), False, torch.ones(512).half(), product.h, 1)
    with pytest.raises(OperandError, match="h is torch.int8"):
        product.swiglu(torch.randn(1, 64), False, torch.ones(512), product.h, 4)
    z, x = torch.randn(2, 64), torch.randn(3, 1024)
    weight, su = torch.ones(1024), torch.ones(1024)
    with pytest.raises(OperandError, match=r"z torch.float32 \[2, 64\] beside x"):
        product.norm(z, x, weight, su)
    with pytest.raises(OperandError, match="su is torch.float16"):
        product.norm(z[:1], x[:1], weight, su.half())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("N", [6144, 12288, 10240, 20480, 14336, 28672])
def test_rotation_after_a_matmul_of_few_tokens(dtype, N):
    """Factors 12, 20 and 28: the kernel that holds their signs, and with 17 tokens another."""
    product = Product(2, N, 1024, "cuda")
    for M in (1, 5, 16, 17):
        z = product.rows(M, 1024, dtype, 1)
        y = product.plain(z)
        close(y, product.exact(z), dtype)
        assert torch.equal(product.plain(z), y)
