"""Operators of rotated and scalar formats: opcheck, gradients, full graphs, operand errors."""

import subprocess
import sys
import textwrap

import pytest
import torch
from cases import random_input, random_layer

from aqlm_infer import QuantLinear, ops
from aqlm_infer.backends import rotated, scalar
from aqlm_infer.formats.rotation import Hadamard

EMPTY = torch.empty(0, dtype=torch.int8)


def hadamard_operands(K, block=0, M=3):
    rotation = Hadamard.blocks(K) if block else Hadamard.full(K)
    rng = torch.Generator().manual_seed(0)
    pre, post = torch.rand(2, K, generator=rng) + 0.5
    x = random_input(M, K).contiguous()
    return x, pre, post, rotation.matrix(), rotation.factor, block


@pytest.mark.parametrize(("K", "block"), [(64, 0), (48, 0), (128, 128)])
def test_opcheck_hadamard(K, block):
    x, pre, post, h, factor, block = hadamard_operands(K, block)
    for grad in (False, True):
        args = [t.clone().requires_grad_(grad) for t in (x, pre, post)]
        torch.library.opcheck(ops.hadamard, (*args, h, factor, block, True))
    torch.library.opcheck(ops.hadamard, (x, None, None, h, factor, block, False))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("K", [16, 24])
def test_hadamard_gradients(K, transpose):
    """Of x, pre and post, against those of the plain transform in float64."""
    x, pre, post, h, factor, block = hadamard_operands(K)
    leaves = [t.clone().requires_grad_() for t in (x, pre, post)]
    wide = [t.double().requires_grad_() for t in (x, pre, post)]
    weight = torch.randn(3, K, generator=torch.Generator().manual_seed(1))
    (ops.hadamard(*leaves, h, factor, block, transpose) * weight).sum().backward()
    y = Hadamard.full(K).apply(wide[0] * wide[1], transpose) * wide[2]
    (y * weight).sum().backward()
    for leaf, exact in zip(leaves, wide, strict=True):
        assert (leaf.grad - exact.grad).norm() <= 1e-6 * exact.grad.norm()


def e8p_operands(bits=2, N=48, K=64):
    layer = random_layer(f"quip-e8p-{bits}bit", N, K)
    buffers = rotated.repack(layer.format, layer.tensors, (N,), "exact")
    buffers |= rotated.fold(layer.format, layer.tensors)
    return layer, buffers


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_e8p(bits, grad):
    layer, buffers = e8p_operands(bits)
    N, K, residual = layer.N, layer.K, 1 / layer.format.residual
    packed, h, sv = buffers["packed_Qidxs"], buffers["h_out"], buffers["sv"]
    x = random_input(3, K).contiguous().requires_grad_(grad)
    bias = layer.bias.clone().requires_grad_(grad)
    factor = h.shape[0]
    for args in ((sv, bias, h, factor), (None, None, EMPTY, 0)):
        sv_, bias_, h_, factor_ = args
        torch.library.opcheck(
            ops.e8p_matmul,
            (x, packed, sv_, bias_, h_, bits, residual, N, factor_, 0, "exact"),
        )
    dy = random_input(3, N).contiguous()
    torch.library.opcheck(ops.e8p_matmul_dx, (dy, packed, sv, h, bits, residual, K, factor, 0))
    torch.library.opcheck(ops.e8p_dequantize, (packed, bits, residual, N, K))
    torch.library.opcheck(ops.e8p_pack, (layer.tensors["Qidxs"], bits))
    torch.library.opcheck(ops.e8p_unpack, (packed, bits, N, K))


@pytest.mark.parametrize("scheme", ["gptq-int4-g16", "rtn-int3-g8", "quip-int2"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_scalar(scheme, grad):
    N, K = 20, 48
    layer = random_layer(scheme, N, K)
    bits = layer.format.bits
    if scheme == "quip-int2":
        buffers = scalar.quip_repack(layer.format, layer.tensors, (N,), "exact")
        scales, zeros, G = buffers["grid_step"], None, K
        sv, h = layer.tensors["SV"], buffers["h_out"]
    else:
        buffers = scalar.repack(layer.format, layer.tensors, (N,), "exact")
        scales, zeros, G = layer.tensors["scales"], buffers["packed_zeros"], layer.format.group_size
        sv, h = None, EMPTY
    factor, packed = (h.shape[0] if h.dim() == 2 else 0), buffers["packed_qweight"]
    x = random_input(3, K).contiguous().requires_grad_(grad)
    bias = layer.bias.clone().requires_grad_(grad)
    weight = packed, scales, zeros, sv
    torch.library.opcheck(ops.scalar_matmul, (x, *weight, bias, h, bits, G, N, factor, 0, "exact"))
    dy = random_input(3, N).contiguous()
    torch.library.opcheck(ops.scalar_matmul_dx, (dy, *weight, h, bits, G, K, factor, 0))
    torch.library.opcheck(ops.scalar_dequantize, (packed, scales, zeros, bits, G, K))
    torch.library.opcheck(ops.scalar_pack, (layer.tensors["qweight"], bits, K))
    torch.library.opcheck(ops.scalar_unpack, (packed, bits, N, K))


def test_gradients_of_values_are_refused_by_the_operators():
    layer, buffers = e8p_operands()
    x, sv = random_input(2, 64), buffers["sv"].requires_grad_()
    with pytest.raises(ops.OperandError, match="sv requires grad"):
        ops.e8p_matmul(x, buffers["packed_Qidxs"], sv, None, EMPTY, 2, 1.0, layer.N, 0, 0, "exact")
    grid = random_layer("rtn-int4-g8", 8, 16)
    packed = scalar.repack(grid.format, grid.tensors, (8,), "exact")
    with pytest.raises(ops.OperandError, match="scales, zeros or sv require grad"):
        ops.scalar_matmul(
            random_input(2, 16), packed["packed_qweight"], grid.tensors["scales"].requires_grad_(),
            packed["packed_zeros"], None, None, EMPTY, 4, 8, 8, 0, 0, "exact",
        )  # fmt: skip


def test_operand_errors_print_their_values():
    layer, buffers = e8p_operands()
    packed, sv, h = buffers["packed_Qidxs"], buffers["sv"], buffers["h_out"]
    x = random_input(2, 64)

    def e8p(x=x, sv=sv, bias=None, h=h, bits=2, N=48, factor=12, block=0):
        return ops.e8p_matmul(x, packed, sv, bias, h, bits, 1.0, N, factor, block, "exact")

    for arguments, message in (
        ({"bits": 5}, "bits=5, expected 2, 3 or 4"),
        ({"N": 40}, "N=40, K=64: E8P needs multiples of 16 and 64"),
        ({"h": EMPTY}, r"h is torch.int8 \[0\], expected int8 \[12, 12\] for factor=12"),
        ({"factor": 0, "h": EMPTY, "sv": sv[1:]}, r"sv has shape \[47\], expected \[48\]"),
        ({"bias": torch.ones(47)}, r"bias has shape \[47\], expected \[48\]"),
        ({"factor": 1, "h": EMPTY}, "N=48 is not factor=1 times a power of two"),
        ({"factor": 1, "h": EMPTY, "block": 128}, "N=48 is not a multiple of 128"),
        ({"factor": 12, "block": 128}, "factor=12, block=128 is no rotation"),
        ({"x": x.long()}, "x has dtype torch.int64"),
    ):
        with pytest.raises(ops.OperandError, match=message):
            e8p(**arguments)
    with pytest.raises(ops.OperandError, match="factor=0: a transform needs at least 1"):
        ops.hadamard(x, None, None, EMPTY, 0, 0, False)
    with pytest.raises(ops.OperandError, match=r"pre has shape \[63\], expected \[64\]"):
        ops.hadamard(x, torch.ones(63), None, EMPTY, 1, 0, False)
    grid = random_layer("rtn-int4-g8", 8, 16)
    made = scalar.repack(grid.format, grid.tensors, (8,), "exact")

    def product(scales=grid.tensors["scales"], zeros=made["packed_zeros"], bits=4, G=8, K=16):
        return ops.scalar_matmul(
            random_input(1, K), made["packed_qweight"], scales, zeros, None, None, EMPTY, bits, G,
            8, 0, 0, "exact",
        )  # fmt: skip

    for arguments, message in (
        ({"bits": 5}, "bits=5, expected 2, 3, 4 or 8"),
        ({"G": 7}, r"K=16 is not a multiple of 7 \(group_size\)"),
        ({"scales": torch.ones(8, 3)}, r"scales has shape \[8, 3\], expected \[8, 2\]"),
        ({"zeros": torch.ones(8, 2).half()}, "scales are torch.float32 but zeros are torch.float1"),
    ):
        with pytest.raises(ops.OperandError, match=message):
            product(**arguments)


COMPILE = """
import sys
sys.path.insert(0, "TESTS")
import torch
from cases import random_layer
from aqlm_infer import QuantLinear

layers = []
for scheme, N, K in (("quip-e8p-3bit", 48, 64), ("quip-int2", 24, 48), ("gptq-int4-g8", 16, 24)):
    layer = random_layer(scheme, N, K)
    layers.append(QuantLinear.from_tensors(scheme, layer.tensors, K, layer.bias, kernel=KERNEL))
model = torch.nn.Sequential(*layers)
x = torch.randn(3, 64, requires_grad=True)
compiled = torch.compile(model, fullgraph=True, backend="BACKEND")
y = compiled(x)
y.square().sum().backward()
dx, x.grad = x.grad, None
eager = model(x)
eager.square().sum().backward()
for compiled, expected in ((y, eager), (dx, x.grad)):
    # The reference multiplies with a weight of another layout there.
    bound = 0 if KERNEL is None else 1e-5 * expected.norm()
    assert (compiled - expected).norm() <= bound
print("compiled")
"""


@pytest.mark.parametrize(("kernel", "backend"), [(None, "inductor"), ("ref.dequant", "aot_eager")])
def test_compile_from_a_cold_start(kernel, backend, request):
    """In a fresh process, first call compiled: one graph, forward and backward equal to eager."""
    code = textwrap.dedent(COMPILE).replace("BACKEND", backend).replace("KERNEL", repr(kernel))
    code = code.replace("TESTS", str(request.path.parent))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "compiled", run.stderr[-2000:]


@pytest.mark.parametrize("scheme", ["quip-e8p-2bit", "quip-int3-kron", "rtn-int2-g16"])
def test_compile_with_dynamic_tokens(scheme):
    torch._dynamo.reset()
    layer = random_layer(scheme, 48, 64)
    quant = QuantLinear.from_tensors(scheme, layer.tensors, 64, layer.bias)
    compiled = torch.compile(quant, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (2, 3, 7, 40):
        x = random_input(M, 64)
        assert torch.equal(compiled(x), quant(x))


def test_compiled_training_of_sign_vectors():
    torch._dynamo.reset()
    layer = random_layer("quip-e8p-2bit", 48, 64)
    quant = QuantLinear.from_tensors(layer.format, layer.tensors, 64, layer.bias)
    x = random_input(4, 64).contiguous()
    grads = []
    for function in (quant, torch.compile(quant, fullgraph=True, backend="aot_eager")):
        quant.SU.requires_grad_().grad = None
        quant.SV.requires_grad_().grad = None
        function(x).square().sum().backward()
        grads.append((quant.SU.grad, quant.SV.grad))
    for eager, compiled in zip(*grads, strict=True):
        assert (eager - compiled).norm() <= 1e-5 * eager.norm() and eager.norm() > 0
