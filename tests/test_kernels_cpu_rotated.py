"""CPU kernels of rotated and scalar formats against float64 oracles of the same packed tensors."""

import math

import pytest
import torch
from cases import ISAS
from tolerances import assert_close

from aqlm_infer import ops
from aqlm_infer.backends import native
from aqlm_infer.formats import parse_scheme
from aqlm_infer.formats.e8p import grid_x4, pack_e8p, residual_x2
from aqlm_infer.formats.rotation import Hadamard, hadamard_transform
from aqlm_infer.formats.scalar import pack_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (0, 1, 2, 3, 4, 7, 16, 17, 64, 65, 130, 260)
NO_H = torch.empty(0, dtype=torch.int8)

# (bits, N, K): part of a unit of 64 rows, part of a tile of 128 columns, several of both.
E8P = ((2, 16, 64), (2, 80, 320), (3, 144, 192), (4, 64, 128), (4, 112, 448))

# (bits, group, N, K): groups within a tile, across tiles, odd sizes that cut quads in two.
SCALAR = (
    (2, 32, 70, 96),
    (2, 64, 12, 64),
    (3, 16, 65, 64),
    (3, 40, 5, 40),
    (3, 136, 63, 136),
    (4, 128, 130, 384),
    (4, 6, 33, 36),
    (8, 64, 66, 128),
    (8, 7, 3, 7),
    (8, 300, 20, 300),
)


class E8PCase:
    """A random E8P weight with every extreme of the codes."""

    def __init__(self, bits, N, K, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.format, self.bits, self.N, self.K = parse_scheme(f"quip-e8p-{bits}bit"), bits, N, K
        codes = torch.randint(0, 65536, (N, K // 8), generator=rng)
        codes.view(-1)[:4] = torch.tensor([0, 65535, 255, 0xFF00])
        rest = torch.randint(0, 65536 if bits == 4 else 256, (N, K // 8), generator=rng)
        self.qidxs = self.format.pack_codes(codes, None if bits == 2 else rest)["Qidxs"]
        self.residual = 1 / self.format.residual
        self.packed = ops.e8p_pack(self.qidxs, bits)
        self.weight = self.format.decode(self.qidxs, torch.float64)
        self.sv = torch.randn(N, generator=rng)
        self.bias = torch.randn(N, generator=rng)

    def matmul(self, x, rotation, sv, bias, precision="exact"):
        return ops.e8p_matmul(
            x, self.packed, sv, bias, rotation.matrix(), self.bits, self.residual, self.N,
            rotation.factor, rotation.block, precision,
        )  # fmt: skip

    def dx(self, dy, rotation, sv):
        return ops.e8p_matmul_dx(
            dy, self.packed, sv, rotation.matrix(), self.bits, self.residual, self.K,
            rotation.factor, rotation.block,
        )  # fmt: skip


class ScalarCase:
    """A random scalar weight; ``zeros`` False: the middle of the grid."""

    def __init__(self, bits, group, N, K, zeros=True, dtype=torch.float32, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.bits, self.group, self.N, self.K = bits, group, N, K
        codes = torch.randint(0, 1 << bits, (N, K), generator=rng)
        codes.view(-1)[:2] = torch.tensor([0, (1 << bits) - 1])
        self.qweight = pack_bits(codes, bits)
        self.scales = (torch.rand(N, K // group, generator=rng) + 0.5).to(dtype)
        self.zeros = None
        middle = torch.full((N, K // group), ((1 << bits) - 1) / 2)
        if zeros:
            middle = torch.randint(0, 1 << bits, (N, K // group), generator=rng).float()
            self.zeros = middle.to(dtype)
        grid = codes.double().unflatten(1, (-1, group)) - middle.double()[..., None]
        self.weight = (grid * self.scales.double()[..., None]).flatten(1)
        self.packed = ops.scalar_pack(self.qweight, bits, K)
        self.sv = torch.randn(N, generator=rng)
        self.bias = torch.randn(N, generator=rng)

    def matmul(self, x, rotation, sv, bias, precision="exact"):
        return ops.scalar_matmul(
            x, self.packed, self.scales, self.zeros, sv, bias, rotation.matrix(), self.bits,
            self.group, self.N, rotation.factor, rotation.block, precision,
        )  # fmt: skip

    def dx(self, dy, rotation, sv):
        return ops.scalar_matmul_dx(
            dy, self.packed, self.scales, self.zeros, sv, rotation.matrix(), self.bits, self.group,
            self.K, rotation.factor, rotation.block,
        )  # fmt: skip


def no_rotation(N):
    return Hadamard(N, 0)


def rotations(N):
    """Every kind of rotation that N allows."""
    found = [no_rotation(N), Hadamard.full(N)]
    return [*found, Hadamard.blocks(N)] if N % 128 == 0 else found


def tokens(M, K, dtype=torch.float32, seed=1):
    """Misaligned, strided rows."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(M, K + 5, generator=rng).to(dtype)[:, 3 : 3 + K]


def check(case, x, rotation, precision="exact", sv=True, bias=True):
    """y against float64, and each row against what its own terms allow."""
    scale, shift = case.sv if sv else None, case.bias if bias else None
    y = case.matmul(x, rotation, scale, shift, precision)
    assert y.dtype == x.dtype
    rows = hadamard_transform(case.weight.T, rotation.factor, rotation.block).T
    weight = rows * case.sv.double()[:, None] if sv else rows
    expected = x.double() @ weight.T
    if bias:
        expected = expected + case.bias.double()
    assert_close(y, expected, x, weight, x.dtype, precision)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("bits", "N", "K"), E8P)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_e8p_matmul(isa, name, bits, N, K, dtype):
    isa(name)
    case = E8PCase(bits, N, K)
    for M in TOKENS:
        check(case, tokens(M, K, dtype), no_rotation(N))
    for rotation in rotations(N):
        check(case, tokens(3, K, dtype), rotation)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
def test_one_token_takes_eight_units_of_rows_at_a_time(isa, name, threads):
    """More than eight, the last of them not whole, tiles of 128 and of 64 columns."""
    isa(name)
    case = E8PCase(2, 1136, 448)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(case, tokens(1, 448), no_rotation(1136))
        check(case, tokens(1, 448), no_rotation(1136), "fast")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("bits", "group", "N", "K"), SCALAR)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalar_matmul(isa, name, bits, group, N, K, dtype):
    isa(name)
    for zeros in (False, True):
        case = ScalarCase(bits, group, N, K, zeros, dtype)
        for M in TOKENS:
            check(case, tokens(M, K, dtype), no_rotation(N), sv=False)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("N", [128, 24, 28 * 4])
def test_scalar_output_rotation(isa, name, N):
    isa(name)
    case = ScalarCase(2, 96, N, 96, zeros=False)
    for rotation in rotations(N):
        for M in (1, 5, 70):
            check(case, tokens(M, 96), rotation)
            check(case, tokens(M, 96), rotation, sv=False, bias=False)


@pytest.mark.parametrize("name", ISAS)
def test_fast(isa, name):
    """8-bit activations: 6e-3 measured on Gaussian tokens."""
    isa(name)
    for case in (E8PCase(2, 128, 256), E8PCase(4, 64, 256), ScalarCase(3, 64, 100, 256)):
        for M in (1, 3, 20):
            check(case, tokens(M, 256), no_rotation(case.N), "fast")


@pytest.mark.parametrize("name", ISAS)
def test_outlier_channels(isa, name):
    """One column a thousand times the rest, in a tile of its own and among the others."""
    isa(name)
    for case in (E8PCase(2, 64, 512), ScalarCase(4, 128, 64, 512)):
        x = torch.randn(3, 512, generator=torch.Generator().manual_seed(3))
        x[:, 317] *= 1000
        x[1, :256] *= 1e-3
        check(case, x, no_rotation(64), bias=False)


@pytest.mark.parametrize("name", ISAS)
def test_special_inputs(isa, name):
    """Zeros give the bias exactly, tiny and huge tokens keep their accuracy, NaN and Inf stay."""
    isa(name)
    for case in (E8PCase(2, 48, 192), ScalarCase(3, 64, 30, 192)):
        N, K = case.N, case.K
        for M in (1, 5):
            zero = case.matmul(torch.zeros(M, K), no_rotation(N), case.sv, case.bias)
            assert torch.equal(zero, case.bias.expand(M, -1))
            x = torch.randn(M, K, generator=torch.Generator().manual_seed(M))
            for scale in (1e-30, 1e30):
                check(case, x * scale, no_rotation(N), bias=False)
            for bad in (float("nan"), float("inf"), float("-inf")):
                y = x.clone()
                y[0, 11] = bad
                assert not torch.isfinite(case.matmul(y, no_rotation(N), None, None)[0]).any()
                assert torch.isfinite(case.matmul(y, no_rotation(N), None, None)[1:]).all()


@pytest.mark.parametrize("name", ISAS)
def test_threads_do_not_change_a_bit(threads, isa, name):
    isa(name)
    cases = (E8PCase(3, 1024, 320), ScalarCase(4, 32, 1030, 320))
    for case in cases:
        rotation = rotations(case.N)[-1] if case.N == 1024 else no_rotation(case.N)
        dy = tokens(3, case.N, seed=2).contiguous()
        for M, dtype in ((1, torch.float32), (17, torch.float32), (70, torch.float32),
                         (300, torch.bfloat16)):  # fmt: skip
            x, results = tokens(M, case.K, dtype), []
            for count in (1, 2, 8, 2, 8):
                threads(count)
                results.append(case.matmul(x, rotation, case.sv, case.bias))
            assert all(torch.equal(results[0], r) for r in results[1:]), f"M={M}"
        gradients = []
        for count in (1, 2, 8):
            threads(count)
            gradients.append(case.dx(dy, rotation, case.sv))
        assert (gradients[1] - gradients[0]).norm() <= 1e-6 * gradients[0].norm()
        assert (gradients[2] - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


@pytest.mark.parametrize(("bits", "N", "K"), E8P)
def test_e8p_pack_round_trip(threads, bits, N, K):
    case = E8PCase(bits, N, K, seed=7)
    for count in (1, 3):
        threads(count)
        packed = ops.e8p_pack(case.qidxs, bits)
        assert torch.equal(packed, case.packed)
        assert torch.equal(ops.e8p_unpack(packed, bits, N, K), case.qidxs)


@pytest.mark.parametrize(("bits", "group", "N", "K"), SCALAR)
def test_scalar_pack_round_trip(threads, bits, group, N, K):
    case = ScalarCase(bits, group, N, K, seed=7)
    for count in (1, 3):
        threads(count)
        packed = ops.scalar_pack(case.qweight, bits, K)
        assert torch.equal(packed, case.packed)
        assert torch.equal(ops.scalar_unpack(packed, bits, N, K), case.qweight)


@pytest.mark.parametrize("name", ISAS)
def test_every_e8p_code(isa, name):
    """All 65536 codes and all 256 residual codes, bit for bit the closed form of the format."""
    isa(name)
    codes = torch.arange(65536).view(1024, 64)
    weight = ops.e8p_dequantize(ops.e8p_pack(pack_e8p(codes), 2), 2, 1.0, 1024, 512)
    assert torch.equal(weight, grid_x4()[codes].float().flatten(1) / 4)
    format = parse_scheme("quip-e8p-3bit")
    rest = torch.arange(256).view(16, 16)
    qidxs = format.pack_codes(codes[:16, :16].contiguous(), rest)["Qidxs"]
    base = grid_x4()[codes[:16, :16]].float().flatten(1) / 4
    weight = ops.e8p_dequantize(ops.e8p_pack(qidxs, 3), 3, 1.0, 16, 128)
    assert torch.equal(weight - base, residual_x2()[rest].float().flatten(1) / 2)


@pytest.mark.parametrize("name", ISAS)
def test_dequantize(isa, name):
    isa(name)
    for bits, N, K in E8P:
        case = E8PCase(bits, N, K)
        weight = ops.e8p_dequantize(case.packed, bits, case.residual, N, K)
        assert torch.allclose(weight.double(), case.weight, rtol=0, atol=1e-6)
    for bits, group, N, K in SCALAR:
        for zeros in (False, True):
            case = ScalarCase(bits, group, N, K, zeros)
            weight = ops.scalar_dequantize(case.packed, case.scales, case.zeros, bits, group, K)
            assert torch.allclose(weight.double(), case.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [0, 1, 3, 40])
def test_gradient_of_the_input(dtype, M):
    for case in (E8PCase(3, 128, 192), ScalarCase(4, 24, 128, 72, dtype=dtype)):
        for rotation in rotations(128):
            dy = tokens(M, 128, dtype, seed=4)
            rows = hadamard_transform(case.weight.T, rotation.factor, rotation.block).T
            weight = rows * case.sv.double()[:, None]
            dx = case.dx(dy, rotation, case.sv)
            assert_close(dx, dy.double() @ weight, dy, weight.T, dtype)


# Sizes of one vector and less, every published kind of factor, an odd one, and blocks.
SIZES = (1, 2, 8, 16, 64, 512, 4096, 12, 24, 96, 20 * 16, 28 * 4, 36 * 2, 52, 172 * 4, 76 * 64)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hadamard(isa, name, dtype):
    isa(name)
    rng = torch.Generator().manual_seed(5)
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    for rotation in [*map(Hadamard.full, SIZES), Hadamard.blocks(128), Hadamard.blocks(640)]:
        n = rotation.size
        pre, post = torch.randn(n, generator=rng), torch.randn(n, generator=rng)
        for M in (0, 1, 3):
            x = tokens(M, n, dtype)
            for transpose in (False, True):
                args = rotation.factor, rotation.block, transpose
                y = ops.hadamard(x, pre, post, rotation.matrix(), *args)
                expected = hadamard_transform(x.double() * pre, *args) * post
                assert y.dtype == dtype and y.shape == x.shape
                assert (y.double() - expected).norm() <= bound * max(expected.norm(), 1e-9)
                plain = ops.hadamard(x, None, None, rotation.matrix(), *args)
                assert math.isclose(plain.double().norm(), x.double().norm(), rel_tol=8e-3)


def test_leading_dimensions_and_strides():
    case = E8PCase(2, 48, 64)
    base = torch.randn(6, 5, 64, generator=torch.Generator().manual_seed(0))
    for x in (
        base,
        base.transpose(0, 1),
        base[::2, 1:4],
        base[0],
        base[0, 0],
        base.expand(6, 5, 64),
    ):
        y = case.matmul(x, no_rotation(48), None, None)
        assert y.shape == (*x.shape[:-1], 48)
        flat = x.reshape(-1, 64)
        expected = flat.double() @ case.weight.T
        assert_close(y.reshape(-1, 48), expected, flat, case.weight, torch.float32)


def test_operands_that_disagree_are_refused():
    case, x = E8PCase(2, 48, 64), torch.randn(2, 64)
    with pytest.raises(ValueError, match="packed holds"):
        ops.e8p_matmul(x, case.packed[1:], None, None, NO_H, 2, 1.0, 48, 0, 0, "exact")
    with pytest.raises(ValueError, match="'int8'"):
        ops.e8p_matmul(x, case.packed, None, None, NO_H, 2, 1.0, 48, 0, 0, "int8")
    with pytest.raises(ValueError, match="N=48 is not factor=1 times a power of two"):
        ops.e8p_matmul(x, case.packed, None, None, NO_H, 2, 1.0, 48, 1, 0, "exact")
    with pytest.raises(ValueError, match="float64"):
        ops.e8p_matmul(x.double(), case.packed, None, None, NO_H, 2, 1.0, 48, 0, 0, "exact")
    with pytest.raises(ValueError, match=r"Qidxs is torch.int32"):
        ops.e8p_pack(case.qidxs.int(), 2)
    with pytest.raises(ValueError, match=r"qweight is torch.uint8 \[3, 4\]"):
        ops.scalar_pack(torch.ones(3, 4, dtype=torch.uint8), 4, 16)
    with pytest.raises(ValueError, match="rows 8..16 of 48"):
        weight = native.cpu.TiledWeight.e8p(2, 1.0, 48, 64)
        weight.decode(1, 0, 0, "float32", 1, 64, "float32", 8, 16, 1)
