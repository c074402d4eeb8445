"""Triton kernels of rotated and scalar weights against the float64 oracle.

Compiled on a GPU, in the interpreter without one (which takes no bfloat16 and has little patience).
"""

import pytest
import torch
from cases import ROTATED_LAYERS, SCALAR_LAYERS, random_input, random_layer
from tolerances import RELATIVE, assert_close

from aqlm_infer import KernelError, QuantLinear, select
from aqlm_infer.backends import KERNELS, Problem
from aqlm_infer.backends.triton_rotated import OPERATORS
from aqlm_infer.formats import E8PFormat, parse_scheme
from aqlm_infer.formats.rotation import Hadamard, hadamard_transform
from aqlm_infer.formats.scalar import pack_bits
from aqlm_infer.ops import OperandError

pytest.importorskip("triton")

from aqlm_infer.triton_kernels import hadamard_ops, tuning

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The whole file is GPU tests where there is a GPU; elsewhere Triton's interpreter runs it.
pytestmark = [pytest.mark.gpu] if GPU else []
DTYPES = (torch.float16, torch.bfloat16, torch.float32) if GPU else (torch.float16, torch.float32)
TOKENS = (0, 1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 129) if GPU else (0, 1, 3, 17, 65)
ODD_BLOCKS = ("gptq-int4-g32", 40, 128)  # whole blocks of inputs, but rows are padded to two
# Of the interpreter: every bit width, rotation and way to group, at the least size.
SMALL = (
    ("quip-e8p-2bit", 16, 64),
    ("quip-e8p-3bit-r2.1", 80, 64),
    ("quip-e8p-4bit-b128", 256, 128),
    ("quip-e8p-2bit-f32+16+16", 64, 128),
    ("quip-int4", 1, 24),
    ("quip-int2-b128", 128, 256),
    ("quip-int3-kron", 35, 96),
    *SCALAR_LAYERS[:7],
    SCALAR_LAYERS[8],
    ODD_BLOCKS,
)
# Several tiles of rows and splits of K, one row or vector beyond a tile, odd Hadamard factors.
LARGE = (
    ("quip-e8p-2bit", 3072, 1088),
    ("quip-e8p-2bit", 1056, 4096),
    ("quip-e8p-3bit", 528, 5120),
    ("quip-e8p-4bit", 1792, 2048),
    ("quip-int2", 1024, 2064),
    ("quip-int4-b128", 1152, 1408),
    ("gptq-int2-g128", 1025, 4096),
    ("gptq-int3-g128", 513, 1152),
    ("gptq-int4-g96", 300, 1056),
    ("gptq-int8-g128", 129, 1152),
)
ALL = (*ROTATED_LAYERS, *SCALAR_LAYERS, ODD_BLOCKS, *LARGE)
LAYERS = ALL if GPU else SMALL
IDS = {"E8PFormat": "e8p", "ScalarFormat": "scalar", "QuipFormat": "scalar.rotated"}


def triton_id(format):
    return f"triton.{IDS[type(format).__name__]}"


def make(layer, kernel=None):
    tensors = {name: tensor.to(DEVICE) for name, tensor in layer.tensors.items()}
    kernel = kernel or triton_id(layer.format)
    return QuantLinear.from_tensors(
        layer.format, tensors, layer.K, layer.bias.to(DEVICE), kernel=kernel
    )


@pytest.mark.parametrize(("scheme", "N", "K"), ALL)
def test_the_cases_of_a_gpu_are_layers(scheme, N, K):
    """Two of them once had sizes without a Hadamard rotation, which no CI could see."""
    parse_scheme(scheme).check_shape(N, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
def test_matmul(scheme, N, K, dtype):
    layer = random_layer(scheme, N, K, dtype)
    quant, weight = make(layer), layer.weight()
    for M in TOKENS:
        x = random_input(M, K, dtype)
        wide = torch.full((M, K + 5), float("nan"), dtype=dtype, device=DEVICE)
        wide[:, 3 : 3 + K] = x.to(DEVICE)
        y = quant(wide[:, 3 : 3 + K])
        assert y.dtype == dtype
        if GPU:
            assert torch.equal(y, quant(wide[:, 3 : 3 + K])), f"M={M}: two runs differ"
        expected = x.double() @ weight.T + layer.bias.double()
        assert_close(y.cpu(), expected, x, weight, dtype)


BYTES = (
    ("quip-e8p-2bit", 64, 192),
    ("quip-e8p-3bit", 16, 128),
    ("quip-e8p-4bit-b128", 128, 128),
    ("quip-int2", 20, 152),
    ("quip-int4-b128", 128, 384),
    ("rtn-int8-g72", 5, 72),
    ("gptq-int4-g128", 33, 384),
    ("gptq-int8-g64", 17, 192),
    ("gptq-int2-g128", 35, 640),
    ("gptq-int2-g128", 33, 768),
    ("gptq-int2-g64", 33, 320),
)


@pytest.mark.parametrize("body", ["integers", "shared", "gemv"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scheme", "N", "K"), BYTES)
def test_both_bodies_of_one_token(scheme, N, K, dtype, body):
    """The one for NVIDIA's byte products (emulated in the interpreter) with E8P's tables from
    either memory, and the one for all."""
    config = {"body": "integers", "SHARED": 0, "COPIES": 1} if body == "shared" else {"body": body}
    layer = random_layer(scheme, N, K, dtype)
    quant, weight = make(layer), layer.weight()
    for seed in range(3):
        x = random_input(1, K, dtype, seed)
        with tuning.forced(config):
            y = quant(x.to(DEVICE))
        expected = x.double() @ weight.T + layer.bias.double()
        assert_close(y.cpu(), expected, x, weight, dtype)
    with tuning.forced(config):
        y = quant(torch.zeros(1, K, dtype=dtype, device=DEVICE))
    assert torch.equal(y[0].cpu(), layer.bias)


@pytest.mark.parametrize("body", ["first_dot", "integer_dot", "shared", "dot"])
@pytest.mark.parametrize(("scheme", "N", "K"), [c for c in BYTES if "int8" not in c[0]])
def test_both_bodies_of_few_tokens(scheme, N, K, body):
    """Weights or integers that go into registers, or a tile in the inputs' type."""
    config = {"body": "integer_dot", "COPIES": 1} if body == "shared" else {"body": body}
    for dtype in DTYPES[: 1 if DEVICE == "cpu" else 2]:
        layer = random_layer(scheme, N, K, dtype)
        quant, weight = make(layer), layer.weight()
        for M in (2, 16, 31, 50):
            x = random_input(M, K, dtype)
            with tuning.forced(config):
                y = quant(x.to(DEVICE))
            expected = x.double() @ weight.T + layer.bias.double()
            assert_close(y.cpu(), expected, x, weight, dtype)


@pytest.mark.parametrize(
    ("M", "body"), [(1, "integers"), (1, "gemv"), (7, "integer_dot"), (7, "dot")]
)
def test_one_split_is_the_result(M, body):
    """Without a scale, a bias or a rotation that comes after it, it is written in x's type."""
    layer = random_layer("gptq-int4-g128", 35, 640, torch.float16)
    tensors = {name: tensor.to(DEVICE) for name, tensor in layer.tensors.items()}
    quant = QuantLinear.from_tensors(layer.format, tensors, layer.K, kernel="triton.scalar")
    x, weight = random_input(M, layer.K, torch.float16), layer.weight()
    for programs in (1, 1000):
        with tuning.forced({"body": body, "PROGRAMS": programs}):
            y = quant(x.to(DEVICE))
        assert_close(y.cpu(), x.double() @ weight.T, x, weight, torch.float16)


@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
def test_codes_come_back_bit_for_bit_and_the_weight_is_right(scheme, N, K):
    layer = random_layer(scheme, N, K)
    quant = make(layer)
    state = quant.state_dict()
    for name in layer.format.code_names:
        assert torch.equal(state[name].cpu(), layer.tensors[name]), name
        assert state[name].dtype == layer.tensors[name].dtype
    error = (quant.weight.cpu().double() - layer.weight()).norm() / layer.weight().norm()
    assert error <= 1e-6, f"{error:.1e}"


def test_every_e8p_code_and_residual_code():
    """All 65536 codes, and with them all residual codes, as weights of one layer."""
    codes = torch.arange(65536).view(256, 256)
    tables = {2: None, 3: codes & 255, 4: codes.flip(0, 1)}
    for bits, residual in tables.items():
        format = E8PFormat(bits)
        qidxs = format.pack_codes(codes, residual)["Qidxs"]
        packed = OPERATORS.e8p_pack(qidxs, bits).to(DEVICE)
        assert torch.equal(OPERATORS.e8p_unpack(packed, bits, 256, 2048).cpu(), qidxs)
        weight = OPERATORS.e8p_dequantize(packed, bits, 1 / format.residual, 256, 2048)
        expected = format.decode(qidxs, torch.float64)
        assert (weight.cpu().double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("K", [8, 1000, 1024, 1032])
def test_scalar_codes_survive_packing(bits, K):
    rng = torch.Generator().manual_seed(K)
    qweight = pack_bits(torch.randint(0, 1 << bits, (5, K), generator=rng), bits)
    packed = OPERATORS.scalar_pack(qweight, bits, K)
    assert torch.equal(OPERATORS.scalar_unpack(packed, bits, 5, K), qweight)


SIZES = ((4, 0), (24, 0), (128, 0), (512, 0), (160, 0), (56, 0), (128, 128), (384, 128))
GPU_SIZES = (
    (4096, 0), (8192, 0), (11008, 0), (14336, 0), (28672, 0), (29568, 0), (57344, 0), (924, 0),
    (5376, 0), (28672, 128),
)  # fmt: skip


@pytest.mark.parametrize("many", [None, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "block"), (*SIZES, *GPU_SIZES) if GPU else SIZES)
def test_hadamard(K, block, dtype, many, monkeypatch):
    if many is not None:  # programs of several steps and tokens, as of thousands of tokens
        monkeypatch.setattr(hadamard_ops, "MANY", many)
    rotation = Hadamard.blocks(K) if block else Hadamard.full(K)
    h, rng = rotation.matrix(DEVICE), torch.Generator().manual_seed(K)
    pre, post = torch.randn(2, K, generator=rng)
    for M in (1, 3, 70) if GPU else (1, 3):
        x = torch.randn(M, K + 2, generator=rng).to(dtype)[:, 2:]
        for transpose in (False, True):
            y = OPERATORS.hadamard(
                x.to(DEVICE), pre.to(DEVICE), post.to(DEVICE), h, rotation.factor, block, transpose
            )
            turned = hadamard_transform(x.double() * pre, rotation.factor, block, transpose)
            expected = turned * post
            error = (y.cpu().double() - expected).norm() / expected.norm()
            bound = 1e-6 if dtype == torch.float32 else RELATIVE["exact", dtype]
            assert y.dtype == dtype and error <= bound, f"M={M} {transpose}: {error:.1e}"


@pytest.mark.parametrize("M", [2, 70])
@pytest.mark.parametrize("scheme", ["quip-e8p-3bit", "quip-int2-b128", "gptq-int4-g32"])
def test_gradients_of_input_bias_and_sign_vectors(scheme, M):
    layer = random_layer(scheme, 128, 128)
    grads = []
    for kernel in (None, "ref.dequant"):
        quant = make(layer, kernel)
        quant.bias.requires_grad_()
        leaf = random_input(M, 128).to(DEVICE).requires_grad_()
        wanted = [leaf, quant.bias]
        if hasattr(quant, "SU"):
            wanted += [quant.SU.requires_grad_(), quant.SV.requires_grad_()]
        quant(leaf).square().sum().backward()
        grads.append([w.grad.double() for w in wanted])
    for ours, reference in zip(*grads, strict=True):
        assert (ours - reference).norm() <= 1e-5 * reference.norm()


def test_activations_beyond_float16_products():
    """Unscaled sums of many tokens would leave float16's range without their power of two."""
    layer = random_layer("quip-e8p-2bit", 64, 256, torch.float16)
    x = random_input(70, 256, torch.float16) * 400
    weight = layer.weight()
    assert_close(make(layer)(x.to(DEVICE)).cpu(), x.double() @ weight.T + layer.bias.double(), x,
                 weight, torch.float16)  # fmt: skip


def test_operands_that_disagree_are_refused():
    e8p = random_layer("quip-e8p-2bit", 64, 128, torch.float16)
    packed = OPERATORS.e8p_pack(e8p.tensors["Qidxs"], 2).to(DEVICE)
    x = random_input(2, 320, torch.float16).to(DEVICE)
    h = torch.empty(0, dtype=torch.int8, device=DEVICE)
    with pytest.raises(OperandError, match="expected uint8 \\[10240\\] for N=64, K=320 at 2 bits"):
        OPERATORS.e8p_matmul(x, packed, None, None, h, 2, 1.0, 64, 0, 0, "exact")
    with pytest.raises(OperandError, match="N=64, K=100: E8P needs multiples of 16 and 64"):
        OPERATORS.e8p_matmul(x[:, :100], packed, None, None, h, 2, 1.0, 64, 0, 0, "exact")
    scales = torch.ones(7, 2, device=DEVICE)
    with pytest.raises(OperandError, match="expected uint8 \\[896\\] for N=7, K=96 at 4 bits"):
        OPERATORS.scalar_dequantize(packed[:96], scales, None, 4, 48, 96)


def test_says_why_not():
    problem = Problem(parse_scheme("quip-e8p-2bit"), 64, 64, torch.float64, DEVICE)
    assert "torch.float64" in KERNELS["triton.e8p"].why_not(problem)
    problem = Problem(parse_scheme("gptq-int4-g32"), 64, 64, torch.float16, DEVICE)
    assert KERNELS["triton.e8p"].why_not(problem) == "takes E8P weights, not gptq-int4-g32"
    if not GPU:
        problem = Problem(parse_scheme("gptq-int4-g32"), 64, 64, torch.bfloat16, "cpu")
        with pytest.raises(KernelError, match="multiplies bfloat16 as if its bits were integers"):
            select(problem, "triton.scalar")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
def test_agrees_with_the_cuda_kernels(scheme, N, K, dtype):
    layer = random_layer(scheme, N, K, dtype)
    ours, cuda = make(layer), make(layer, triton_id(layer.format).replace("triton", "cuda"))
    for M in (1, 2, 7, 8, 9, 16, 17, 33, 128, 129):
        x = random_input(M, K, dtype)
        y = cuda(x.cuda()).double().cpu()
        assert_close(ours(x.cuda()).cpu(), y, x, layer.weight(), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 16, 100])
@pytest.mark.parametrize("scheme", ["quip-e8p-2bit", "quip-int3", "gptq-int2-g64"])
def test_compile_fullgraph_and_graph_replay(scheme, M):
    layer = random_layer(scheme, 192, 320, torch.float16)
    quant = make(layer)
    x = random_input(M, layer.K, torch.float16).contiguous().cuda()
    with torch.no_grad():
        expected = quant(x)
        compiled = torch.compile(quant, fullgraph=True)(x)
        # Inductor may join an elementwise step to a GEMM, or round it otherwise.
        assert (compiled - expected).norm() <= 1e-3 * expected.norm()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = quant(x)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
