"""Every kernel of rotated and scalar formats, on every device here, against the float64 oracle."""

import pytest
import torch
from cases import (
    ROTATED_LAYERS,
    SCALAR_LAYERS,
    golden_e8p,
    random_input,
    random_layer,
)
from tolerances import RELATIVE, assert_close

from aqlm_infer import QuantLinear, ops
from aqlm_infer.backends import KERNELS, Problem
from aqlm_infer.formats import E8PFormat, parse_scheme
from aqlm_infer.formats.rotation import Hadamard

LAYERS = (*ROTATED_LAYERS, *SCALAR_LAYERS)
TOKENS = (0, 1, 2, 7, 8, 9, 17, 33, 129)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
FAMILIES = ("quip-e8p-2bit", "quip-int2", "quip-int2-kron", "gptq-int4-g32")


def kernels(format, N, K, dtype, device, precision="exact"):
    """Ids of the kernels that take a layer, the reference among them.

    Without a GPU Triton's run in its interpreter, which has its own, smaller tests.
    """
    problem = Problem(format, N, K, dtype, device, precision)
    own = (k for k in KERNELS.values() if device != "cpu" or not k.id.startswith("triton."))
    return [k.id for k in own if k.why_not(problem) is None]


def check(layer, quant, x, precision="exact"):
    y, weight = quant(x), layer.weight().to(x.device)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], layer.N)
    expected = x.double() @ weight.T + layer.bias.to(x.device).double()
    flat = x.reshape(-1, layer.K), y.reshape(-1, layer.N), expected.reshape(-1, layer.N)
    assert_close(flat[1], flat[2], flat[0], weight, x.dtype, precision)


def place(layer, kernel, device, precision="exact"):
    tensors = {n: t.to(device) for n, t in layer.tensors.items()}
    bias = layer.bias.to(device)
    return QuantLinear.from_tensors(
        layer.format, tensors, layer.K, bias, kernel=kernel, precision=precision
    )


@pytest.mark.parametrize("device", DEVICES)
def test_every_family_has_a_kernel_of_its_own(device):
    """A missing native kernel is a failure, not a run of the reference."""
    for scheme in FAMILIES:
        found = kernels(parse_scheme(scheme), 128, 128, torch.float32, device)
        assert any(id.startswith(f"{device}.") for id in found), f"{scheme}: {found}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
def test_matmul(scheme, N, K, dtype, device):
    layer = random_layer(scheme, N, K, dtype)
    for kernel in kernels(layer.format, N, K, dtype, device):
        quant = place(layer, kernel, device)
        for M in TOKENS:
            check(layer, quant, random_input(M, K, dtype).to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fast", "int8"])
@pytest.mark.parametrize(("scheme", "N", "K"), [c for c in LAYERS if c[1] > 60])
def test_lower_precisions(scheme, N, K, precision, device):
    for dtype in DTYPES:
        layer = random_layer(scheme, N, K, dtype)
        for kernel in kernels(layer.format, N, K, dtype, device, precision):
            quant = place(layer, kernel, device, precision)
            for M in (1, 9):
                rng = torch.Generator().manual_seed(M)
                x = torch.randn(M, K, generator=rng).to(device, dtype)
                check(layer, quant, x, precision)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
def test_codes_come_back_bit_for_bit_and_the_weight_is_right(scheme, N, K, device):
    layer = random_layer(scheme, N, K)
    for kernel in kernels(layer.format, N, K, torch.float32, device):
        quant = place(layer, kernel, device)
        state = quant.state_dict()
        for name, tensor in layer.tensors.items():
            assert torch.equal(state[name].cpu(), tensor), (kernel, name)
            assert state[name].dtype == tensor.dtype
        error = (quant.weight.cpu().double() - layer.weight()).norm() / layer.weight().norm()
        assert error <= 1e-6, f"{kernel}: {error:.1e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", FAMILIES)
def test_inputs_of_any_shape_and_layout(scheme, device):
    layer = random_layer(scheme, 48, 192)
    for kernel in kernels(layer.format, 48, 192, torch.float32, device):
        quant = place(layer, kernel, device)
        x = random_input(24, 192).to(device)
        check(layer, quant, x.reshape(2, 3, 4, 192))
        check(layer, quant, x[0])
        check(layer, quant, x[::3])
        check(layer, quant, x.reshape(4, 6, 192).transpose(0, 1))
        check(layer, quant, x.T.contiguous().T)
        check(layer, quant, x[:1].expand(5, 192))
        assert quant(x[:0].reshape(0, 2, 192)).shape == (0, 2, 48)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bits", "name"), [
    (bits, name) for bits in (2, 3, 4) for name in golden_e8p(bits) if name != "fused"
])  # fmt: skip
def test_golden_layers(bits, name, device):
    tensors = golden_e8p(bits)[name]
    N, K = len(tensors["SV"]), len(tensors["SU"])
    format = E8PFormat(bits)
    values = {n: tensors[n].to(device) for n in format.tensor_specs(N, K)}
    tokens = [M for M in (1, 2, 5) if f"x{M}" in tensors]
    cases = [(k, d) for d in DTYPES for k in kernels(format, N, K, d, device)]
    for kernel, dtype in cases:
        quant = QuantLinear.from_tensors(format, values, K, kernel=kernel).to(dtype)
        for M in tokens:
            expected = tensors.get(f"y{M}_f64", tensors[f"y{M}_ref"]).double()
            y = quant(tensors[f"x{M}"].to(device, dtype)).cpu().double()
            error = (y - expected).norm() / expected.norm()
            # The published outputs without a float64 twin are themselves off by 4e-4.
            slack = 0 if f"y{M}_f64" in tensors else 5e-4
            assert error <= RELATIVE["exact", dtype] + slack, f"{kernel} {dtype}: {error:.1e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", FAMILIES)
def test_runs_are_bitwise_equal(scheme, device):
    layer = random_layer(scheme, 208, 320)
    for kernel in kernels(layer.format, 208, 320, torch.float32, device):
        quant = place(layer, kernel, device)
        for M in (1, 5, 70):
            x = random_input(M, 320).to(device)
            first = quant(x)
            assert all(torch.equal(quant(x), first) for _ in range(3)), kernel


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", FAMILIES)
def test_kernel_gradients_equal_those_of_the_reference(scheme, device):
    layer = random_layer(scheme, 48, 192)
    for kernel in kernels(layer.format, 48, 192, torch.float32, device):
        grads = []
        for id in (kernel, "ref.dequant"):
            quant = place(layer, id, device)
            leaf = random_input(7, 192).to(device).requires_grad_()
            quant(leaf).square().sum().backward()
            grads.append(torch.cat([leaf.grad.flatten(), quant.bias.grad]))
        assert (grads[0] - grads[1]).norm() <= 2e-4 * grads[1].norm(), kernel


# -- the transform by itself -----------------------------------------------------------------------

SIZES = (
    *((1 << p, 0) for p in range(1, 14)),
    (12, 0), (24, 0), (160, 0), (56, 0), (36 * 4, 0), (52 * 8, 0), (172 * 16, 0), (148 * 8, 0),
    (924, 0), (100 * 2, 0), (128, 128), (384, 128), (1152, 128),
)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "block"), SIZES)
def test_hadamard(K, block, dtype, device):
    rotation = Hadamard.blocks(K) if block else Hadamard.full(K)
    rng = torch.Generator().manual_seed(K)
    pre, post = (torch.rand(2, K, generator=rng) + 0.5).to(device)
    h = rotation.matrix(device)
    for M in (0, 1, 3, 8):
        x = random_input(M, K, dtype).to(device)
        for before, after, transpose in (
            (None, None, False),
            (pre, None, True),
            (None, post, False),
            (pre, post, True),
        ):
            y = ops.hadamard(x, before, after, h, rotation.factor, block, transpose)
            wide = x.double() if before is None else x.double() * before.double()
            expected = rotation.apply(wide.cpu(), transpose).to(device)
            expected = expected if after is None else expected * after.double()
            assert y.dtype == dtype and y.shape == x.shape
            if M:
                error = (y.double() - expected).norm(dim=1) / expected.norm(dim=1)
                bound = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
                assert error.max() <= bound, f"M={M}: {error.max():.1e}"
