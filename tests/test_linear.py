"""QuantLinear as a drop-in nn.Linear: state, dtype and device moves, copies, gradients, repr."""

import copy
import io

import pytest
import torch
from cases import random_input, random_layer
from safetensors.torch import load, save
from torch import nn

from aqlm_infer import FormatError, KernelError, QuantLinear
from aqlm_infer.backends import KERNELS
from aqlm_infer.ops.library import OperandError

SCHEMES = ("aqlm-2x8-g8", "aqlm-1x12-g8", "aqlm-2x6-g8-o2")


def make(scheme="aqlm-2x8-g8", N=34, K=64, dtype=torch.float32, bias=True, **options):
    layer = random_layer(scheme, N, K, dtype)
    bias = layer.bias if bias else None
    return layer, QuantLinear.from_tensors(scheme, layer.tensors, K, bias, **options)


def assert_canonical(state, layer):
    for name, tensor in layer.tensors.items():
        assert torch.equal(state[name], tensor), name
    assert torch.equal(state["bias"], layer.bias)
    assert set(state) == {*layer.tensors, "bias"}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", [None, "ref.dequant"])
def test_state_dict_is_canonical_whatever_happens(scheme, kernel):
    layer, quant = make(scheme, kernel=kernel)
    x = random_input(3, layer.K)
    assert_canonical(quant.state_dict(), layer)
    y = quant(x)
    assert_canonical(quant.state_dict(), layer)
    quant.to("cpu").eval().share_memory()
    assert_canonical(quant.state_dict(), layer)
    assert torch.equal(quant(x), y)


def test_save_and_load_without_pickle():
    layer, quant = make()
    fresh = QuantLinear(layer.K, layer.N, layer.format)
    fresh.load_state_dict(load(save(dict(quant.state_dict()))))
    x = random_input(4, layer.K)
    assert torch.equal(fresh(x), quant(x))
    stream = io.BytesIO()
    torch.save(quant.state_dict(), stream)
    stream.seek(0)
    assert_canonical(torch.load(stream, weights_only=True), layer)


@pytest.mark.parametrize("assign", [False, True])
def test_load_replaces_a_prepared_layer(assign):
    _, quant = make()
    other = random_layer("aqlm-2x8-g8", 34, 64, seed=9)
    quant.load_state_dict({**other.tensors, "bias": other.bias}, assign=assign)
    assert_canonical(quant.state_dict(), other)
    expected = random_input(2, 64).double() @ other.weight().T + other.bias.double()
    assert (quant(random_input(2, 64)).double() - expected).norm() < 2e-4 * expected.norm()


def test_a_failed_load_leaves_a_working_layer():
    layer, quant = make()
    bad = {**layer.tensors, "bias": layer.bias, "codes": layer.tensors["codes"][:-1]}
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        quant.load_state_dict(bad)
    assert_canonical(quant.state_dict(), layer)
    missing = {k: v for k, v in layer.tensors.items() if k != "codes"}
    with pytest.raises(RuntimeError, match="codes"):
        quant.load_state_dict({**missing, "bias": layer.bias})
    assert quant.kernel is not None
    assert_canonical(quant.state_dict(), layer)


def test_bad_values_are_refused_at_load():
    layer, _ = make("aqlm-2x6-g8")
    codes = layer.tensors["codes"].clone()
    codes[0, 0, 1] = 33
    fresh = nn.Sequential(QuantLinear(64, 34, layer.format))
    state = {f"0.{k}": v for k, v in {**layer.tensors, "codes": codes, "bias": layer.bias}.items()}
    with pytest.raises(FormatError, match=r"0.codes holds 33 at index \[0, 0, 1\]"):
        fresh.load_state_dict(state)
    with pytest.raises(RuntimeError, match="is not prepared"):
        fresh(torch.randn(1, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_moves_values_not_codes(dtype):
    layer, quant = make()
    quant.to(dtype)
    state = quant.state_dict()
    assert torch.equal(state["codes"], layer.tensors["codes"])
    for name in ("codebooks", "scales"):
        assert torch.equal(state[name], layer.tensors[name].to(dtype))
    assert quant.bias.dtype == dtype and quant(random_input(2, 64, dtype)).dtype == dtype
    assert torch.equal(quant.weight, layer.format.dequantize(quant.tensors()))


def test_double_takes_the_reference_and_comes_back():
    layer, quant = make()
    quant.double()
    assert quant.kernel.id == "ref.dequant"
    x = random_input(2, 64, torch.float64)
    assert torch.allclose(quant(x), x @ layer.weight().T + layer.bias.double(), rtol=1e-12)
    assert quant.float().kernel.id.startswith("cpu.")
    assert_canonical(quant.state_dict(), layer)


def test_meta_and_back():
    layer, quant = make()
    state = quant.state_dict()
    quant.to("meta")
    assert quant.codes.is_meta and quant.kernel is None
    quant.load_state_dict(state, assign=True)
    assert_canonical(quant.state_dict(), layer)


def test_deepcopy_is_independent():
    layer, quant = make()
    other = copy.deepcopy(quant)
    with torch.no_grad():
        other.scales.mul_(3)
    x = random_input(2, 64)
    assert_canonical(quant.state_dict(), layer)
    expected = 3 * (quant(x) - quant.bias) + quant.bias
    assert torch.allclose(other(x), expected, rtol=1e-3, atol=1e-3)


def test_requires_grad_rules():
    _, quant = make()
    assert not any(p.requires_grad for n, p in quant.named_parameters() if n != "bias")
    quant.requires_grad_(True)
    assert not quant.state_dict()["codes"].requires_grad
    assert quant.codebooks.requires_grad and quant.scales.requires_grad


def test_values_train_through_the_dequantized_weight():
    layer, quant = make("aqlm-2x4-g4", 12, 16)
    quant.codebooks.requires_grad_()
    quant.scales.requires_grad_()
    x, target = random_input(64, 16), torch.randn(64, 12)
    optimizer = torch.optim.Adam([quant.codebooks, quant.scales], lr=2e-2)
    losses = []
    for _ in range(40):
        loss = (quant(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(quant.state_dict()["codes"], layer.tensors["codes"])
    with torch.no_grad():  # the kernel sees the trained values
        expected = x @ quant.weight.T + quant.bias
        assert (quant(x) - expected).norm() <= 2e-4 * expected.norm()


@pytest.mark.parametrize("kernel", [None, "ref.dequant"])
def test_weight_is_the_dequantized_weight(kernel):
    layer, quant = make(kernel=kernel)
    assert torch.equal(quant.weight, layer.format.dequantize(layer.tensors))
    assert torch.equal(quant.restore().weight, layer.format.dequantize(layer.tensors))
    assert not quant.weight.requires_grad


def test_from_linear():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).half()
    linear.bias.requires_grad_(False)
    quant = QuantLinear.from_linear(linear.eval(), "aqlm-2x4-g4")
    assert quant.codebooks.dtype == torch.float16 and not quant.training
    assert torch.equal(quant.bias, linear.bias) and not quant.bias.requires_grad
    error = (quant.weight.float() - linear.weight.float()).norm() / linear.weight.float().norm()
    assert 0 < error < 0.35
    with pytest.raises(FormatError, match=r"K=64 is not a multiple of 24"):
        QuantLinear.from_linear(linear, "aqlm-2x4-g24")


def test_repr_names_what_matters():
    _, quant = make()
    text = repr(quant)
    for part in (
        "in_features=64",
        "out_features=34",
        "bias=True",
        "aqlm-2x8-g8",
        "cpu.additive.lut",
    ):
        assert part in text
    assert "not prepared" in repr(QuantLinear(64, 34, "aqlm-2x8-g8"))


def test_forced_kernel(monkeypatch):
    _, quant = make(kernel="ref.dequant")
    assert quant.kernel is KERNELS["ref.dequant"]
    with pytest.raises(KernelError, match=r"takes 9..16 bits, not 8"):
        make(kernel="cpu.additive.direct")
    with pytest.raises(KernelError, match="unknown kernel 'cpu.nothing'"):
        make(kernel="cpu.nothing")
    monkeypatch.setenv("AQLM_KERNEL", "ref.dequant")
    assert make()[1].kernel.id == "ref.dequant"


def test_precision_is_checked():
    assert make(precision="fast")[1].precision == "fast"
    with pytest.raises(KernelError, match="precision 'int4'"):
        make(precision="int4")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_x_of_another_width_is_refused(device):
    """Packed codes of 248 columns fill as many bytes as those of 256."""
    quant = make(K=256, dtype=torch.float16)[1].to(device)
    for shape in ((2, 248), (1, 1, 128)):
        with pytest.raises(OperandError, match=rf"x is \[.*{shape[-1]}\], expected \[..., 256\]"):
            quant(torch.randn(shape, dtype=torch.float16, device=device))


def test_no_gradient_is_kept_for_inference_and_output_is_fresh():
    _, quant = make()
    x = random_input(2, 64)
    with torch.inference_mode():
        y = quant(x)
    assert not y.requires_grad
    z = quant(x)
    z += 1  # PEFT's wrappers add in place
    assert not torch.equal(z, quant(x))
