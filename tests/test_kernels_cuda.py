"""Every CUDA kernel against the float64 oracle, on a CUDA device (skipped without one)."""

import pytest
import torch
from cases import GOLDEN_LAYERS, LAYERS, TOKENS, golden_layer, random_input, random_layer
from tolerances import RELATIVE, assert_close

from aqlm_infer import KernelError, QuantLinear, ops, select
from aqlm_infer.backends import Problem, native
from aqlm_infer.backends import additive as calls

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16)
CASES = [case for case in LAYERS if random_layer(*case).format.in_group_size % 4 == 0] + [
    ("aqlm-2x8-g8", 321, 1096),
    ("aqlm-1x16-g8", 321, 1096),
    ("aqlm-4x8-g8", 130, 520),
    # The table body: several phases of codebooks, an odd number of them, long vectors, many steps.
    ("aqlm-8x8-g8", 130, 520),
    ("aqlm-6x8-g8", 1030, 264),
    ("aqlm-3x8-g8", 130, 520),
    ("aqlm-4x8-g16", 600, 528),
    ("aqlm-8x8-g32", 1030, 2080),
]
# int8 rounds codebooks and activations: measured errors are at most 1.5e-2 (docs/notes/cuda.md).
INT8 = 2e-2


def int8_error(y, x, weight, bias=0):
    """Relative to the terms' root sum of squares, which is |y| but where few terms cancel: of one
    row and eight columns y was 0.28 of it, its error 0.84 % of it and 3 % of y."""
    x, weight = x.double(), weight.double()
    error = y.cpu().double() - x @ weight.T - bias
    return error.norm() / (x.square() @ weight.square().T).sum().sqrt()


def to_cuda(layer):
    return {name: tensor.cuda() for name, tensor in layer.tensors.items()}


def make(layer, precision="exact", bias=True):
    bias = layer.bias.cuda() if bias else None
    return QuantLinear.from_tensors(
        layer.format, to_cuda(layer), layer.K, bias, precision=precision
    )


def test_the_native_module_is_built():
    assert native.cuda_problem is None


@pytest.mark.parametrize(("scheme", "N", "K"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul(scheme, N, K, dtype):
    layer = random_layer(scheme, N, K, dtype)
    quant, weight = make(layer), layer.weight()
    assert quant.kernel.id.startswith("cuda.")
    for M in TOKENS:
        x = random_input(M, K, dtype)
        wide = torch.full((M, K + 5), float("nan"), dtype=dtype, device="cuda")
        wide[:, 3 : 3 + K] = x.cuda()
        y = quant(wide[:, 3 : 3 + K])
        assert torch.equal(y, quant(wide[:, 3 : 3 + K])), f"M={M}: two runs differ"
        expected = x.double() @ weight.T + layer.bias.double()
        assert_close(y.cpu(), expected, x, weight, dtype)


@pytest.mark.parametrize(("scheme", "N", "K"), [c for c in CASES if "-g8" in c[0]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_matmul(scheme, N, K, dtype):
    layer = random_layer(scheme, N, K, dtype)
    quant, weight = make(layer, "int8", bias=False), layer.weight()
    for M in (1, 3, 8, 17, 64, 129):
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
        assert int8_error(quant(x.cuda()), x, weight) <= INT8, f"M={M}"


# Few tokens in int8: a block or a cluster has its rows and all of K. Rows of one and of several
# blocks, K of every form of the kernel, odd numbers of 32-column steps, more K than it takes.
@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x8-g8", "aqlm-2x6-g8"])
@pytest.mark.parametrize(
    ("N", "K"), [(70, 264), (4100, 328), (9001, 136), (130, 4096), (66, 4136), (40, 16392)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_of_few_tokens(scheme, N, K, dtype):
    layer = random_layer(scheme, N, K, dtype)
    quant, weight = make(layer, "int8"), layer.weight()
    for M in (1, 2, 3, 4):
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
        x[0, K // 2] = 30
        wide = torch.full((M, K + 8), float("nan"), dtype=dtype, device="cuda")
        wide[:, :K] = x.cuda()
        y = quant(wide[:, :K])
        assert torch.equal(y, quant(wide[:, :K])), f"M={M}: two runs differ"
        error = int8_error(y, x, weight, layer.bias.double())
        assert error <= INT8, f"M={M}: {error}"


@pytest.mark.parametrize("name", GOLDEN_LAYERS)
def test_golden_forward(name):
    format, spec, tensors = golden_layer(name)
    values = {k: tensors[k].cuda() for k in ("codes", "codebooks", "scales")}
    bias = tensors.get("bias")
    layer = QuantLinear.from_tensors(
        format, values, spec["in_features"], None if bias is None else bias.cuda()
    )
    dtype = tensors["codebooks"].dtype
    y = layer(tensors["x"].to(dtype).cuda()).cpu().double()
    assert (y - tensors["y"]).norm() <= RELATIVE["exact", dtype] * tensors["y"].norm()


@pytest.mark.parametrize(("scheme", "N", "K"), CASES)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float32), ids=str)
def test_storage_and_dequantize(scheme, N, K, dtype):
    layer = random_layer(scheme, N, K, dtype)
    quant = make(layer)
    assert torch.equal(quant.state_dict()["codes"].cpu(), layer.tensors["codes"])
    assert torch.equal(quant.weight.cpu(), layer.format.dequantize(layer.tensors))


def fused_parts(scheme, sizes, K, M, precision):
    """One call of several parts: y, what it should be, x and the weight."""
    parts = [random_layer(scheme, n, K, torch.float16, seed=n) for n in sizes]
    fused = {k: torch.cat([p.tensors[k] for p in parts]).cuda() for k in parts[0].tensors}
    bias = torch.cat([p.bias for p in parts])
    x = random_input(M, K, torch.float16)
    format = parts[0].format
    packed = calls.repack(format, fused, sizes, precision)
    y = calls.matmul(format, x.cuda(), packed, fused, bias.cuda(), sizes, precision).cpu()
    weight = torch.cat([p.weight() for p in parts])
    return y, x.double() @ weight.T + bias.double(), x, weight


@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x16-g8", "aqlm-2x4-g8-o2"])
@pytest.mark.parametrize("M", [1, 4, 40, 200])
def test_fused_parts(scheme, M):
    y, expected, x, weight = fused_parts(scheme, (66, 34, 130), 88, M, "exact")
    assert_close(y, expected, x, weight, torch.float16)


@pytest.mark.parametrize("sizes", [(66, 34, 130), (4096, 40, 1000)])
@pytest.mark.parametrize("M", [1, 2, 3, 4, 9])
def test_int8_fused_parts(sizes, M):
    y, expected, _, _ = fused_parts("aqlm-2x8-g8", sizes, 264, M, "int8")
    assert (y.double() - expected).norm() <= INT8 * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 20])
def test_gradient_of_the_input(dtype, M):
    layer = random_layer("aqlm-2x8-g8", 66, 136, dtype)
    quant = make(layer)
    x = random_input(M, layer.K, dtype)
    leaf = x.cuda().requires_grad_()
    dy = random_input(M, layer.N, dtype, seed=5)
    quant(leaf).backward(dy.cuda())
    weight = layer.weight()
    assert_close(leaf.grad.cpu(), dy.double() @ weight, dy, weight.T, dtype)


@pytest.mark.parametrize("M", [1, 16, 100])
def test_graph_replay_after_values_and_inputs_change(M):
    layer = random_layer("aqlm-2x8-g8", 130, 264, torch.float16)
    quant = make(layer)
    x = random_input(M, layer.K, torch.float16).contiguous().cuda()
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        quant(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = quant(x)
        for seed in (11, 12):
            x.copy_(random_input(M, layer.K, torch.float16, seed=seed))
            quant.scales.mul_(1.5)
            y.fill_(float("nan"))
            graph.replay()
            stream.synchronize()
            assert torch.equal(y, quant(x))


def test_compile_fullgraph():
    layer = random_layer("aqlm-2x8-g8", 130, 264, torch.float16)
    quant = make(layer)
    x = random_input(3, layer.K, torch.float16).contiguous().cuda()
    compiled = torch.compile(quant, fullgraph=True)
    assert torch.equal(compiled(x), quant(x))


def test_opcheck():
    layer = random_layer("aqlm-2x8-g8", 34, 64, torch.float16)
    tensors = to_cuda(layer)
    packed = calls.repack(layer.format, tensors, (34,), "exact")
    x = random_input(3, 64, torch.float16).contiguous().cuda()
    books, scales = tensors["codebooks"], tensors["scales"]
    arguments = (x, packed["packed_codes"], books, scales, None, packed["aux"], [34], "exact")
    torch.library.opcheck(ops.additive_matmul, arguments)


def test_moves_between_devices():
    layer = random_layer("aqlm-1x16-g8", 65, 136, torch.float16)
    quant = make(layer)
    x = random_input(2, 136, torch.float16)
    y = quant(x.cuda()).cpu()
    quant.cpu()
    assert quant.kernel.id.startswith(("cpu.", "ref."))
    assert_close(y, quant(x), x, layer.weight(), torch.float16)
    assert torch.equal(quant.cuda()(x.cuda()).cpu(), y)


def test_refusals_print_values():
    layer = random_layer("aqlm-2x8-g8", 16, 64, torch.float16)
    quant = make(layer)
    with pytest.raises(ValueError, match="K=60 is not a multiple of 8"), torch.no_grad():
        ops.check_matmul(torch.empty(2, 60), quant.codebooks, quant.scales, quant.bias, [16])
    with pytest.raises(ValueError, match=r"x is \[2, 60\], expected \[\.\.\., 64\]"):
        quant(torch.randn(2, 60, device="cuda").half())
    with pytest.raises(RuntimeError, match="differ in dtype"):
        quant(torch.randn(2, 64, device="cuda"))
    with pytest.raises(KernelError, match="'fast'"):
        make(layer, "fast")
    problem = Problem(layer.format, 16, 64, torch.float16, "cuda")
    assert select(problem).id == "cuda.additive.bytes"
