"""CUDA kernels of rotated and scalar weights beyond ``test_kernels_rotated.py``: every body.

Shapes here reach what small layers do not: several row groups and pieces a block, both MMA bodies
and their passes, dequantized slices, and clusters of the rotation.
"""

import pytest
import torch
from tolerances import RELATIVE

from aqlm_infer import ops
from aqlm_infer.formats import E8PFormat
from aqlm_infer.formats.rotation import Hadamard, hadamard_transform
from aqlm_infer.formats.scalar import pack_bits, unpack_bits

pytestmark = pytest.mark.gpu

TOKENS = (1, 2, 4, 5, 8, 16, 17, 33, 64, 65, 129, 400)
HALVES = (torch.float16, torch.bfloat16)
NONE = torch.empty(0, dtype=torch.int8)


def seeded(seed):
    return torch.Generator("cuda").manual_seed(seed)


def rows(M, K, dtype, seed=0):
    """Random rows inside a wider tensor of NaN: strided, and misaligned where M is odd."""
    wide = torch.full((M, K + 9), float("nan"), dtype=dtype, device="cuda")
    x = wide[:, M % 2 : M % 2 + K]
    x.copy_(torch.randn(M, K, generator=seeded(seed), device="cuda"))
    return x


def close(y, expected, dtype):
    assert torch.isfinite(y).all()
    error = (y.double() - expected).norm() / expected.norm()
    assert error <= RELATIVE["exact", dtype], f"relative error {error:.2e}"


class E8P:
    def __init__(self, bits, N, K, factor=None, seed=0):
        self.format, self.N, self.K = E8PFormat(bits), N, K
        low, high = -(2**63), 2**63 - 1
        shape, rng = (N, K * bits // 64), seeded(seed)
        self.codes = torch.randint(low, high, shape, generator=rng, device="cuda")
        self.rotation = Hadamard.full(N) if factor is None else Hadamard(N, factor)
        self.sv = torch.rand(N, generator=rng, device="cuda") + 0.5
        self.packed = ops.e8p_pack(self.codes, bits)
        self.weight = self.format.decode(self.codes, torch.float64)

    def numbers(self):
        return self.rotation.matrix("cuda"), self.format.bits, 1 / self.format.residual

    def __call__(self, x, bias=None):
        h, bits, residual = self.numbers()
        factor = self.rotation.factor
        return ops.e8p_matmul(
            x, self.packed, self.sv, bias, h, bits, residual, self.N, factor, 0, "exact"
        )

    def expected(self, x):
        z = x.double() @ self.weight.T
        return hadamard_transform(z, self.rotation.factor, 0) * self.sv.double()


class Scalar:
    def __init__(self, bits, N, K, G, zeros=True, dtype=torch.float16):
        rng = seeded(bits)
        self.bits, self.N, self.K, self.G = bits, N, K, G
        self.codes = pack_bits(
            torch.randint(0, 2**bits, (N, K), generator=rng, device="cuda"), bits
        )
        self.scales = torch.rand(N, K // G, generator=rng, device="cuda").to(dtype) + 0.5
        z = torch.randint(0, 2**bits, (N, K // G), generator=rng, device="cuda")
        self.zeros = z.to(dtype) if zeros else None
        self.packed = ops.scalar_pack(self.codes, bits, K)
        q = unpack_bits(self.codes, bits, K).double().unflatten(1, (-1, G))
        middle = (2**bits - 1) / 2
        offset = middle if self.zeros is None else self.zeros.double()[..., None]
        self.weight = (self.scales.double()[..., None] * (q - offset)).flatten(1)

    def __call__(self, x):
        h = NONE.cuda()
        return ops.scalar_matmul(
            x, self.packed, self.scales, self.zeros, None, None, h, self.bits, self.G, self.N, 0, 0,
            "exact",
        )  # fmt: skip

    def expected(self, x):
        return x.double() @ self.weight.T


def check(layer, dtype, tokens=TOKENS):
    for M in tokens:
        x = rows(M, layer.K, dtype, seed=M)
        y = layer(x)
        close(y, layer.expected(x), dtype)
        assert torch.equal(y, layer(x)), f"M={M}: two runs differ"


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("N", "K"), [(3072, 1024), (528, 4096), (4096, 1088)])
def test_e8p_bodies(bits, N, K, dtype):
    """With a rotation; without: few rows, and a block of rows for nearly every SM (odd cells)."""
    check(E8P(bits, N, K, None if N == 3072 else 0), dtype)


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
@pytest.mark.parametrize(("N", "K"), [(14336, 4096), (14352, 4160), (69632, 832), (28688, 4736)])
def test_e8p_of_many_cells(N, K, dtype):
    """9 .. 16 tokens, a block's x in shared memory. With a rotation; one cell more than whole steps
    and a row block of 16 rows; more row groups than blocks; more cells than a block quantizes."""
    check(E8P(2, N, K, None if N == 14336 else 0), dtype, (1, 9, 11, 13, 16, 40, 64))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("N", "K"), [(96, 64), (528, 320), (4096, 4096), (8448, 1088), (4096, 14336), (14336, 4096)]
)
def test_e8p_of_some_tokens(N, K, dtype):
    """5 .. 16 tokens of up to 28 cells a block, which quantizes them: one cell; a last step of one
    cell; a range that goes on in the next row group. x aligned and not, zeros, a large value."""
    layer = E8P(2, N, K, None if K >= 4096 else 0)
    for M in (5, 7, 8, 9, 13, 16):
        for x in (rows(M, K, dtype, seed=M), rows(M, K, dtype, seed=1).clone()):
            x[0] = 0.0
            x[1, K // 2] = 32.0
            y = layer(x)
            close(y, layer.expected(x), dtype)
            assert torch.equal(y, layer(x)), f"M={M}: two runs differ"


@pytest.mark.parametrize("coding", ["e8p", "scalar"])
@pytest.mark.parametrize("K", [64, 192, 320, 1088, 2176])
def test_pairs_of_warps(K, coding):
    """33 .. 64 tokens: rows of one to three cells more than whole steps of four."""
    for bits in (2,) if coding == "e8p" else (2, 4):
        layer = E8P(bits, 6160, K, 0) if coding == "e8p" else Scalar(bits, 6160, K, K)
        check(layer, torch.float16, (33, 47, 64))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(96, 64), (4096, 4096), (6144, 1088), (4096, 6208)])
@pytest.mark.parametrize("coding", ["e8p", "scalar"])
def test_one_token_of_few_rows(coding, N, K, dtype):
    """A block of 32 rows has all of K: fewer cells than warps; all looked up before x comes;
    more blocks than SMs; more cells than are looked up. x aligned and not, and with one large
    value, which costs only the columns of its warp their precision."""
    for bits in (2, 3, 4) if coding == "e8p" else (2, 3, 4, 8):
        layer = E8P(bits, N, K, 0) if coding == "e8p" else Scalar(bits, N, K, K, bits > 4)
        for M in (1, 2):
            for x in (rows(M, K, dtype), rows(M, K, dtype, seed=1).clone()):
                close(layer(x), layer.expected(x), dtype)
                x[0, K // 2] = 64.0
                y = layer(x)
                close(y, layer.expected(x), dtype)
                assert torch.equal(y, layer(x)), f"{bits} bits, M={M}: two runs differ"


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("N", [4096, 14336, 11008, 29568, 1280, 768, 192])
def test_output_rotations(bits, N):
    """The matmul does the Sylvester bits of its own rows, all to none of them; its second kernel
    mixes the rest: P = 4096, 512, 64, 32, 64, 64 and 16 (the rotation alone)."""
    check(E8P(bits, N, 320), torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("N", "K", "G", "zeros"),
    [
        (1001, 1024, 128, True),
        (517, 1088, 64, False),
        (200, 1280, 128, True),  # 10 and 11 scale groups: not whole chunks, not whole pairs
        (200, 1408, 128, True),
        (1500, 1536, 512, True),
        (999, 2304, 192, True),  # three cells a group: one a step of the warpgroup body
        (9000, 2048, 128, True),  # several row groups and chunks of scales a block
        (770, 4096, 1024, True),
        (333, 1984, 1984, False),
        (77, 104, 104, True),
        (130, 192, 32, True),
    ],
)
def test_scalar_bodies(bits, N, K, G, zeros, dtype):
    check(Scalar(bits, N, K, G, zeros, dtype), dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scale_groups_before_a_rotation(bits):
    """No format has both; the operator takes them."""
    layer, r = Scalar(bits, 3072, 1024, 128), Hadamard.full(3072)
    h, sv = r.matrix("cuda"), torch.rand(3072, generator=seeded(1), device="cuda") + 0.5
    for M in TOKENS:
        x = rows(M, 1024, torch.float16, seed=M)
        y = ops.scalar_matmul(
            x, layer.packed, layer.scales, layer.zeros, sv, None, h, bits, 128, 3072, r.factor, 0,
            "exact",
        )  # fmt: skip
        close(y, hadamard_transform(layer.expected(x), r.factor, 0) * sv.double(), x.dtype)


@pytest.mark.parametrize("M", [1, 9])
def test_outlier_columns_cost_only_their_own_group_precision(M):
    """Activations have one scale a group: 3000 in one column leaves the others' sums exact."""
    layer = Scalar(4, 256, 2048, 128)
    layer.scales[:, 0] = 0  # of the outlier's group, so that only the others' errors are seen
    layer.weight[:, :128] = 0
    x = torch.randn(M, 2048, generator=seeded(1), device="cuda").half()
    x[:, 7] = 3000.0
    close(layer(x), layer.expected(x), torch.float16)


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32), ids=str)
@pytest.mark.parametrize(
    "n", [4, 24, 2880, 4096, 8192, 11008, 14336, 16384, 18944, 28672, 29568, 57344]
)
def test_hadamard_sizes(n, dtype):
    r = Hadamard.full(n)
    h, rng = r.matrix("cuda"), seeded(n)
    pre, post = (torch.randn(n, generator=rng, device="cuda") for _ in range(2))
    for M in (1, 3, 70):
        x = rows(M, n, dtype, seed=M)
        for transpose in (False, True):
            y = ops.hadamard(x, pre, post, h, r.factor, 0, transpose)
            expected = hadamard_transform(x.double() * pre, r.factor, 0, transpose) * post
            close(y, expected, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n", [4096, 8192, 16384])
def test_rotation_of_a_layers_input(n, dtype):
    """Aligned rows of few tokens and nothing after the rotation: a body of its own."""
    pre = torch.randn(n, generator=seeded(n), device="cuda")
    for M in (1, 3):
        x = rows(M, n, dtype, seed=M).clone()
        y = ops.hadamard(x, pre, None, NONE.cuda(), 1, 0, True)
        close(y, hadamard_transform(x.double() * pre, 1, 0, True), dtype)
        assert torch.equal(y, ops.hadamard(x, pre, None, NONE.cuda(), 1, 0, True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n", [1024, 2048, 3072, 4096, 5120, 8192, 14336, 28672, 32768])
def test_rotation_of_many_tokens(n, dtype):
    """Aligned rows and one vector: 1 to 16 warps a token, and more tokens than a wave of blocks."""
    r = Hadamard.full(n)
    h, vector = r.matrix("cuda"), torch.rand(n, generator=seeded(n), device="cuda") + 0.5
    for M in (33, 300, 2100):
        x = torch.randn(M, n + 8, generator=seeded(M), device="cuda").to(dtype)[:, :n]
        for transpose in (False, True):
            for pre, post in ((None, None), (vector, None), (None, vector)):
                y = ops.hadamard(x, pre, post, h, r.factor, 0, transpose)
                wide = x.double() if pre is None else x.double() * pre
                expected = hadamard_transform(wide, r.factor, 0, transpose)
                close(y, expected if post is None else expected * post, dtype)
                assert torch.equal(ops.hadamard(x, pre, post, h, r.factor, 0, transpose), y)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_bias_of_many_tokens(dtype):
    """More tokens than the MMA bodies take: dequantized, then rotated with a bias."""
    layer = E8P(2, 3072, 1024)
    x = torch.randn(2000, 1024, generator=seeded(1), device="cuda").to(dtype)
    bias = torch.randn(3072, generator=seeded(2), device="cuda").to(dtype) * 32
    close(layer(x, bias), layer.expected(x) + bias.double(), dtype)


@pytest.mark.parametrize("M", [1, 12, 100, 500])
def test_graph_replay_and_side_stream(M):
    layer, other = E8P(2, 512, 1024, seed=1), E8P(2, 512, 1024, seed=2)
    x = torch.randn(M, 1024, generator=seeded(M), device="cuda").half()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = layer(x)
        for weight in (layer, other):
            layer.packed.copy_(weight.packed)
            x.copy_(torch.randn(M, 1024, generator=seeded(M + 1), device="cuda"))
            y.fill_(float("nan"))
            graph.replay()
            stream.synchronize()
            close(y, hadamard_transform(x.double() @ weight.weight.T, 1, 0) * layer.sv, x.dtype)


def test_opcheck():
    layer = E8P(2, 64, 128)
    x = torch.randn(3, 128, generator=seeded(0), device="cuda").half()
    h, bits, residual = layer.numbers()
    arguments = (x, layer.packed, layer.sv, None, h, bits, residual, 64, 1, 0, "exact")
    torch.library.opcheck(ops.e8p_matmul, arguments)
    grid = Scalar(4, 66, 128, 64)
    arguments = (x, grid.packed, grid.scales, grid.zeros, None, None, NONE.cuda(), 4, 64, 66, 0, 0)
    torch.library.opcheck(ops.scalar_matmul, (*arguments, "exact"))


def test_refusals_print_values():
    layer = E8P(2, 64, 128)
    x = torch.randn(2, 192, device="cuda").half()
    with pytest.raises(RuntimeError, match="packed must be 3072 contiguous uint8; got 2048"):
        layer(x)
    h, bits, residual = layer.numbers()
    with pytest.raises(RuntimeError, match="precision='int8'"):
        ops.e8p_matmul(x[:, :128], layer.packed, None, None, h, bits, residual, 64, 1, 0, "int8")
    with pytest.raises(RuntimeError, match="size 192 is not factor=1 times a power of two"):
        ops.hadamard(x, None, None, h, 1, 0, False)
