"""Operator hygiene: opcheck on every operator, full-graph compilation from cold, gradients."""

import subprocess
import sys
import textwrap

import pytest
import torch
from cases import random_input, random_layer

from aqlm_infer import QuantLinear, ops
from aqlm_infer.backends import additive as calls


def operands(scheme="aqlm-2x8-g8", N=34, K=64, dtype=torch.float32):
    layer = random_layer(scheme, N, K, dtype)
    packed = calls.repack(layer.format, layer.tensors, (N,), "exact")
    return layer, packed["packed_codes"], packed["aux"]


@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x16-g8"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("M", [1, 5])
def test_opcheck_matmul(scheme, grad, M):
    layer, packed, aux = operands(scheme)
    books, scales = layer.tensors["codebooks"], layer.tensors["scales"]
    x = random_input(M, layer.K).contiguous().requires_grad_(grad)
    bias = layer.bias.clone().requires_grad_(grad)
    for b in (bias, None):
        torch.library.opcheck(
            ops.additive_matmul, (x, packed, books, scales, b, aux, [layer.N], "exact")
        )


def test_opcheck_the_others():
    layer, packed, _ = operands()
    format, N, K = layer.format, layer.N, layer.K
    books, scales = layer.tensors["codebooks"], layer.tensors["scales"]
    dy = random_input(3, N).contiguous()
    torch.library.opcheck(ops.additive_matmul_dx, (dy, packed, books, scales, K, [N]))
    torch.library.opcheck(ops.additive_dequantize, (packed, books, scales, K, [N]))
    torch.library.opcheck(ops.additive_pack, (layer.tensors["codes"], format.nbits, 1, 8, [N]))
    torch.library.opcheck(ops.additive_unpack, (packed, N, K // 8, 2, 8, 1, 8, [N]))
    torch.library.opcheck(ops.additive_prepare, (books, "exact", [N]))


def test_gradients_of_values_are_refused_by_the_operator():
    layer, packed, aux = operands()
    books = layer.tensors["codebooks"].clone().requires_grad_()
    x = random_input(2, layer.K)
    with pytest.raises(ValueError, match="require grad"):
        ops.additive_matmul(
            x, packed, books, layer.tensors["scales"], None, aux, [layer.N], "exact"
        )


def test_gradcheck_through_the_reference():
    """float64 has no fast kernel: the layer takes the reference, whose gradients are torch's."""
    layer = random_layer("aqlm-2x4-g4", 6, 8, torch.float64)
    quant = QuantLinear.from_tensors(layer.format, layer.tensors, 8, layer.bias)
    assert quant.kernel.id == "ref.dequant"
    quant.codebooks.requires_grad_()
    quant.scales.requires_grad_()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def forward(x, codebooks, scales, bias):
        return torch.func.functional_call(
            quant, {"codebooks": codebooks, "scales": scales, "bias": bias}, (x,)
        )

    assert torch.autograd.gradcheck(forward, (x, quant.codebooks, quant.scales, quant.bias))


def test_kernel_gradient_equals_the_reference_gradient():
    layer = random_layer("aqlm-2x8-g8", 24, 40)
    x = random_input(7, 40)
    grads = []
    for kernel in (None, "ref.dequant"):
        quant = QuantLinear.from_tensors(layer.format, layer.tensors, 40, layer.bias, kernel=kernel)
        leaf = x.clone().requires_grad_()
        quant(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).norm() <= 2e-4 * grads[1].norm()


COMPILE = """
import torch
from aqlm_infer import QuantLinear
from aqlm_infer.formats import parse_scheme

format = parse_scheme("aqlm-2x8-g8")
rng = torch.Generator().manual_seed(0)
tensors = {
    "codes": format.pack_codes(torch.randint(0, 256, (24, 8, 2), generator=rng)),
    "codebooks": torch.randn(2, 256, 1, 8, generator=rng),
    "scales": torch.rand(24, 1, 1, 1, generator=rng),
}
layer = QuantLinear.from_tensors(format, tensors, 64, torch.randn(24, generator=rng))
model = torch.nn.Sequential(layer, torch.nn.ReLU())
x = torch.randn(3, 64, generator=rng, requires_grad=True)
compiled = torch.compile(model, fullgraph=True, backend="BACKEND")
y = compiled(x)
y.square().sum().backward()
dx, x.grad = x.grad, None
eager = model(x)
eager.square().sum().backward()
assert torch.equal(y, eager) and torch.equal(dx, x.grad)
explanation = torch._dynamo.explain(model)(x)
assert explanation.graph_break_count == 0 and explanation.graph_count == 1
layer.scales.mul_(2)
assert torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), y)
print("compiled")
"""


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_from_a_cold_start(backend):
    """In a fresh process, first call compiled: one graph, forward and backward equal to eager."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE).replace("BACKEND", backend)],
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "compiled", run.stderr[-2000:]


def test_compile_with_dynamic_tokens():
    layer, packed, aux = operands()
    quant = QuantLinear.from_tensors(layer.format, layer.tensors, layer.K, layer.bias)
    compiled = torch.compile(quant, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (2, 3, 7, 40):
        x = random_input(M, layer.K)
        assert torch.equal(compiled(x), quant(x))
