"""The CUDA bodies for 9 tokens and more, several passes included, on a CUDA device."""

import pytest
import torch
from cases import random_input, random_layer
from tolerances import assert_close

from aqlm_infer import QuantLinear
from aqlm_infer.backends import additive as calls

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16)
# Around the token tiles 32, 64 and 128, and two to three passes.
TOKENS = (8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 257)
SHAPES = [
    ("aqlm-2x8-g8", 645, 1096),
    ("aqlm-2x8-g8", 1030, 2080),
    ("aqlm-1x8-g8", 645, 1096),
    ("aqlm-4x8-g8", 645, 1096),
    ("aqlm-1x16-g8", 645, 1096),
    ("aqlm-1x12-g8", 271, 520),
]


def make(layer, precision):
    tensors = {name: tensor.cuda() for name, tensor in layer.tensors.items()}
    return QuantLinear.from_tensors(
        layer.format, tensors, layer.K, layer.bias.cuda(), precision=precision
    )


@pytest.mark.parametrize(("scheme", "N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_batches(scheme, N, K, dtype, precision):
    layer = random_layer(scheme, N, K, dtype)
    quant, weight = make(layer, precision), layer.weight()
    bias = layer.bias.double()
    for M in TOKENS:
        x = random_input(M, K, dtype)
        wide = torch.full((M, K + 8), float("nan"), dtype=dtype, device="cuda")
        wide[:, :K] = x.cuda()
        y = quant(wide[:, :K])
        assert torch.equal(y, quant(wide[:, :K])), f"M={M}: two runs differ"
        expected = x.double() @ weight.T + bias
        if precision == "exact":
            assert_close(y.cpu(), expected, x, weight, dtype)
        else:
            error = (y.cpu().double() - expected).norm() / expected.norm()
            assert error <= 2e-2, f"M={M}: {error:.2e}"


def test_whole_waves():
    """Passes enough for whole waves of CTAs: their items are stored without partial sums."""
    N, K, M = 34001, 6080, 900
    layer = random_layer("aqlm-1x8-g8", N, K, torch.float16)
    quant = make(layer, "exact")
    x = random_input(M, K, torch.float16).contiguous().cuda()
    y, weight = quant(x), quant.weight.double()
    expected = x.double() @ weight.T + layer.bias.double().cuda()
    assert_close(y, expected, x, weight, torch.float16)
    assert torch.equal(y, quant(x)), "two runs differ"


@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x8-g8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_passes(scheme, dtype):
    """Passes of 256 tokens, which only larger matrices take; at 512 some items fill a wave."""
    N, K = 14401, 6160
    layer = random_layer(scheme, N, K, dtype)
    quant = make(layer, "exact")
    weight, bias = quant.weight.double(), layer.bias.double().cuda()
    for M in (176, 300, 512):
        x = random_input(M, K, dtype).contiguous().cuda()
        y = quant(x)
        assert torch.equal(y, quant(x)), f"M={M}: two runs differ"
        assert_close(y, x.double() @ weight.T + bias, x, weight, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_passes(dtype):
    """8x8 g32 with up to 128 tokens a pass, which only larger matrices take."""
    N, K = 12801, 8192
    layer = random_layer("aqlm-8x8-g32", N, K, dtype)
    quant = make(layer, "exact")
    weight, bias = quant.weight.double(), layer.bias.double().cuda()
    for M in (6, 33, 65, 100, 128):
        x = random_input(M, K, dtype).contiguous().cuda()
        y = quant(x)
        assert torch.equal(y, quant(x)), f"M={M}: two runs differ"
        assert_close(y, x.double() @ weight.T + bias, x, weight, dtype)


@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x16-g8"])
@pytest.mark.parametrize("M", [9, 64, 130])
def test_fused_parts(scheme, M):
    """Each part has codebooks of its own: blocks that cross parts load them anew."""
    sizes, K = (600, 34, 1130), 520
    parts = [random_layer(scheme, n, K, torch.float16, seed=n) for n in sizes]
    fused = {k: torch.cat([p.tensors[k] for p in parts]).cuda() for k in parts[0].tensors}
    x = random_input(M, K, torch.float16)
    format = parts[0].format
    packed = calls.repack(format, fused, sizes, "exact")
    y = calls.matmul(format, x.cuda(), packed, fused, None, sizes, "exact").cpu()
    weight = torch.cat([p.weight() for p in parts])
    assert_close(y, x.double() @ weight.T, x, weight, torch.float16)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x16-g8"])
@pytest.mark.parametrize("M", [1, 8, 64, 600])
def test_second_device(scheme, M):
    """The current device stays the first: kernels follow their tensors."""
    layer = random_layer(scheme, 321, 1096, torch.float16)
    x = random_input(M, layer.K, torch.float16)
    here = make(layer, "exact")
    expected = here(x.cuda())
    assert torch.cuda.current_device() == 0
    there = here.to("cuda:1")
    y = there(x.to("cuda:1"))
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.cpu(), expected.cpu())
    with pytest.raises(RuntimeError, match=r"x is on cuda:0, packed on cuda:1"):
        there(x.cuda())
