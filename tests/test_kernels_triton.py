"""Triton kernels against the float64 oracle: compiled on a GPU, in Triton's interpreter without."""

import subprocess
import sys

import pytest
import torch
from cases import LAYERS, random_input, random_layer
from tolerances import assert_close

from aqlm_infer import KernelError, QuantLinear, select
from aqlm_infer.backends import Problem
from aqlm_infer.backends import triton as backend
from aqlm_infer.formats import parse_scheme
from aqlm_infer.ops import OperandError

pytest.importorskip("triton")

from aqlm_infer.triton_kernels import tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The whole file is GPU tests where there is a GPU; elsewhere Triton's interpreter runs it.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# The interpreter multiplies bfloat16 as if its bits were integers, so bfloat16 needs a GPU; it is
# also slow, so it runs the token counts that reach every body.
DTYPES = (torch.float16, torch.float32) if DEVICE == "cpu" else backend._DTYPES
TOKENS = (0, 1, 2, 3, 17, 65) if DEVICE == "cpu" else (0, 1, 2, 7, 8, 9, 17, 33, 64, 65, 129)
VARIANTS = {
    "unshared": {"COPIES": 0}, "summed": {"BOOKS": 0, "WIDTH": 2, "PROGRAMS": 5, "DEALT": 1},
    "wide": {"WIDTH": 4, "Q": 4, "PROGRAMS": 6, "FILL": 1},
    "first": {"FIRST": 1, "Q": 4, "num_stages": 4, "PROGRAMS": 6, "DEALT": 1},
}  # fmt: skip
if DEVICE == "cuda":  # other loads of codes, which the interpreter does not run
    VARIANTS["pair"] = {"WIDTH": 2, "Q": 2}
    VARIANTS["sides"] = {"BOOKS": 0, "WIDTH": 2, "Q": 2, "PROGRAMS": 6, "FILL": 1}
    VARIANTS["first sides"] = {"BOOKS": 0, "FIRST": 1, "Q": 1, "num_stages": 4, "PROGRAMS": 6}
LARGE = [("aqlm-2x8-g8", 1030, 2048), ("aqlm-1x16-g8", 1030, 2048)]
CASES = [c for c in LAYERS if c[1] < 100] if DEVICE == "cpu" else [*LAYERS, *LARGE]


def make(layer, kernel="triton.additive"):
    tensors = {name: tensor.to(DEVICE) for name, tensor in layer.tensors.items()}
    bias = layer.bias.to(DEVICE)
    return QuantLinear.from_tensors(layer.format, tensors, layer.K, bias, kernel=kernel)


@pytest.mark.parametrize(("scheme", "N", "K"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul(scheme, N, K, dtype):
    layer = random_layer(scheme, N, K, dtype)
    quant, weight = make(layer), layer.weight()
    for M in TOKENS:
        x = random_input(M, K, dtype)
        wide = torch.full((M, K + 5), float("nan"), dtype=dtype, device=DEVICE)
        wide[:, 3 : 3 + K] = x.to(DEVICE)
        y = quant(wide[:, 3 : 3 + K])
        assert torch.equal(y, quant(wide[:, 3 : 3 + K])), f"M={M}: two runs differ"
        expected = x.double() @ weight.T + layer.bias.double()
        assert_close(y.cpu(), expected, x, weight, dtype)


@pytest.mark.parametrize(
    ("scheme", "N", "K"),
    [("aqlm-1x8-g8", 63, 200), ("aqlm-2x6-g8", 64, 104), ("aqlm-2x8-g8", 130, 520),
     ("aqlm-2x8-g8", 132, 520), ("aqlm-2x8-g8", 528, 104), ("aqlm-4x4-g8", 129, 88),
     ("aqlm-1x16-g8", 66, 136), ("aqlm-1x12-g8", 67, 264), ("aqlm-2x10-g8", 64, 256)],
)  # fmt: skip
@pytest.mark.parametrize("body", ["words_dot", *VARIANTS, "dot"])
def test_both_bodies_of_few_tokens(scheme, N, K, body):
    """Words gathered into registers (a codebook a program or all, from shared memory where they
    fit), or into a tile."""
    config = {"body": "dot" if body == "dot" else "words_dot", **VARIANTS.get(body, {})}
    for dtype in DTYPES[: 1 if DEVICE == "cpu" else 2]:
        layer = random_layer(scheme, N, K, dtype)
        quant, weight = make(layer), layer.weight()
        for M in (1, 16, 50) if DEVICE == "cpu" else (1, 2, 16, 31, 50):
            x = random_input(M, K, dtype)
            with tuning.forced(config):
                y = quant(x.to(DEVICE))
            assert_close(y.cpu(), x.double() @ weight.T + layer.bias.double(), x, weight, dtype)


@pytest.mark.parametrize(
    ("scheme", "N", "K"),
    [("aqlm-1x16-g8", 66, 136), ("aqlm-1x16-g8", 1028, 520), ("aqlm-2x16-g8", 67, 264)],
)
@pytest.mark.parametrize("options", [{"WIDTH": 2, "Q": 4}, {"PROGRAMS": 40}], ids=str)
def test_planes_of_codebooks_of_16_bits(scheme, N, K, options):
    for dtype in DTYPES[: 1 if DEVICE == "cpu" else 2]:
        layer = random_layer(scheme, N, K, dtype)
        quant, weight = make(layer), layer.weight()
        for M in (1, 20) if DEVICE == "cpu" else (1, 2, 16, 31, 33):
            x = random_input(M, K, dtype)
            with tuning.forced({"body": "planes_dot", **options}):
                y = quant(x.to(DEVICE))
            assert_close(y.cpu(), x.double() @ weight.T + layer.bias.double(), x, weight, dtype)


@pytest.mark.parametrize(("scheme", "N", "K"), [c for c in LAYERS if "-o" in c[0]])
def test_rows_of_one_output_a_code_are_not_for_several(scheme, N, K, monkeypatch):
    """The H200's table has look-ups of 2x8 g8, whose body takes neighbouring rows for codes."""
    monkeypatch.setattr(tuning, "device_name", lambda: "nvidia-h200")
    layer = random_layer(scheme, N, K, torch.float16)
    x, weight = random_input(1, K, torch.float16), layer.weight()
    y = make(layer)(x.to(DEVICE)).cpu()
    assert_close(y, x.double() @ weight.T + layer.bias.double(), x, weight, torch.float16)


@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storage_and_dequantize(scheme, N, K, dtype):
    layer = random_layer(scheme, N, K, dtype)
    quant = make(layer)
    assert torch.equal(quant.state_dict()["codes"].cpu(), layer.tensors["codes"])
    assert torch.equal(quant.weight.cpu(), layer.format.dequantize(layer.tensors))


@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x12-g8", "aqlm-2x4-g8-o2"])
@pytest.mark.parametrize("M", [1, 5, 70])
def test_fused_parts(scheme, M):
    sizes, K = (66, 34, 130), 88
    parts = [random_layer(scheme, n, K, torch.float16, seed=n) for n in sizes]
    fused = {k: torch.cat([p.tensors[k] for p in parts]).to(DEVICE) for k in parts[0].tensors}
    bias = torch.cat([p.bias for p in parts])
    x = random_input(M, K, torch.float16)
    format = parts[0].format
    buffers = backend._repack(format, fused, sizes, "exact")
    y = backend._matmul(format, x.to(DEVICE), buffers, fused, bias.to(DEVICE), sizes, "exact")
    weight = torch.cat([p.weight() for p in parts])
    assert_close(y.cpu(), x.double() @ weight.T + bias.double(), x, weight, torch.float16)
    whole = backend._dequantize(format, buffers, fused, K, sizes).cpu()
    assert torch.equal(whole, torch.cat([format.dequantize(p.tensors) for p in parts]))


@pytest.mark.parametrize("M", [1, 20])
def test_gradients_of_input_and_bias(M):
    layer = random_layer("aqlm-2x8-g8", 66, 136, torch.float16)
    quant = make(layer)
    quant.bias.requires_grad_()
    x = random_input(M, layer.K, torch.float16)
    leaf = x.to(DEVICE).requires_grad_()
    dy = random_input(M, layer.N, torch.float16, seed=5)
    quant(leaf).backward(dy.to(DEVICE))
    weight = layer.weight()
    assert_close(leaf.grad.cpu(), dy.double() @ weight, dy, weight.T, torch.float16)
    assert torch.equal(quant.bias.grad.cpu(), dy.sum(0, dtype=torch.float32).to(torch.float16))


def test_activation_outliers_do_not_overflow_the_tables():
    layer = random_layer("aqlm-2x8-g8", 40, 64, torch.float16)
    quant, weight = make(layer), layer.weight()
    x = random_input(1, 64, torch.float16)
    x[0, 5] = 8000.0  # one product with a codebook word is beyond float16
    y = quant(x.to(DEVICE)).cpu()
    assert_close(y, x.double() @ weight.T + layer.bias.double(), x, weight, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
def test_agrees_with_the_cuda_kernels(scheme, N, K):
    layer = random_layer(scheme, N, K, torch.float16)
    if layer.format.in_group_size % 4:
        pytest.skip(f"{scheme}: the CUDA kernels need in_group_size % 4 == 0")
    ours, cuda = make(layer), make(layer, kernel=None)
    assert cuda.kernel_id.startswith("cuda.")
    for M in (1, 2, 7, 8, 9, 16, 17, 33, 128, 129):
        x = random_input(M, K, torch.float16)
        y = cuda(x.cuda()).double().cpu()
        assert_close(ours(x.cuda()).cpu(), y, x, layer.weight(), torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 9, 70])
@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x16-g8"])
def test_another_stream_and_another_device(scheme, M):
    layer = random_layer(scheme, 130, 264, torch.float16)
    x = random_input(M, layer.K, torch.float16).contiguous()
    expected = make(layer)(x.cuda())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = make(layer)(x.cuda())
    stream.synchronize()
    assert torch.equal(y, expected)
    if torch.cuda.device_count() == 1:
        pytest.skip("one device only: the stream is checked, another device is not")
    other = make(layer).to("cuda:1")(x.to("cuda:1"))  # while device 0 is the current one
    assert other.device.index == 1 and torch.equal(other.cpu(), expected.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 16, 100])
def test_compile_fullgraph_and_graph_replay(M):
    layer = random_layer("aqlm-2x8-g8", 130, 264, torch.float16)
    quant = make(layer)
    x = random_input(M, layer.K, torch.float16).contiguous().cuda()
    with torch.no_grad():
        expected = quant(x)
        compiled = torch.compile(quant, fullgraph=True)(x)
        # Past 64 tokens inductor's own GEMM may round otherwise.
        assert (
            torch.equal(compiled, expected)
            if M <= 64
            else torch.allclose(compiled, expected, rtol=2e-3, atol=2e-2)
        )
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = quant(x)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


def test_says_why_not():
    format = parse_scheme("aqlm-2x8-g8")
    reason = backend._why_not(Problem(format, 64, 64, torch.float64, DEVICE))
    assert "torch.float64" in reason
    reason = backend._why_not(Problem(format, 1 << 17, 1 << 14, torch.float16, DEVICE))
    assert "2^31" in reason
    with pytest.raises(KernelError, match="precision exact, not fast"):
        select(Problem(format, 64, 64, torch.float16, DEVICE, "fast"), "triton.additive")


def test_operands_that_disagree_are_refused():
    layer = random_layer("aqlm-2x8-g8", 40, 64, torch.float16)
    t = {name: tensor.to(DEVICE) for name, tensor in layer.tensors.items()}
    b = backend._repack(layer.format, t, (40,), "exact")
    x = random_input(2, 64, torch.float16).to(DEVICE)

    def matmul(x=x, packed=b["packed_codes"], values=t, bias=None):
        return backend._matmul(
            layer.format, x, {**b, "packed_codes": packed}, values, bias, (40,), ""
        )

    with pytest.raises(OperandError, match="packed has shape \\[640\\], expected \\[720\\]"):
        matmul(x=torch.cat([x, x[:, :8]], 1))
    with pytest.raises(OperandError, match="K=63 is not a multiple of 8"):
        matmul(x=x[:, :63])
    with pytest.raises(OperandError, match="bias has shape"):
        matmul(bias=t["scales"].view(-1)[:39])
    with pytest.raises(OperandError, match="differentiates x and bias only"):
        matmul(values={**t, "scales": t["scales"].clone().requires_grad_()})


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = backend._why_not(Problem(parse_scheme("aqlm-2x8-g8"), 64, 64, torch.float16, "cpu"))
    assert reason.startswith("runs on cuda or xpu, not cpu")


def test_import_of_the_package_stays_free_of_triton():
    code = "import sys, aqlm_infer; assert 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
