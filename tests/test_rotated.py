"""Rotated and scalar layers as drop-in linears; shared rotations and fused parts in a block."""

import copy
import gc
import io
import weakref

import pytest
import torch
from cases import golden_e8p, random_input, random_layer
from safetensors.torch import load, save
from torch import nn

from aqlm_infer import FormatError, QuantLinear, RotatedLinear, share_rotations
from aqlm_infer.backends import native
from aqlm_infer.layers import FusedPart, place_fused

LAYERS = (
    ("quip-e8p-2bit", 48, 192),
    ("quip-e8p-3bit-b128", 128, 128),
    ("quip-e8p-4bit", 80, 64),
    ("quip-int2", 20, 56),
    ("quip-int3-kron", 24, 96),
    ("gptq-int4-g32", 33, 96),
    ("rtn-int3-g8", 5, 40),
)
ROTATED = [case for case in LAYERS if case[0].startswith("quip")]
KERNELS = (None, "ref.dequant")


def make(scheme="quip-e8p-2bit", N=48, K=192, dtype=torch.float32, bias=True, seed=0, **options):
    layer = random_layer(scheme, N, K, dtype, seed)
    bias = layer.bias if bias else None
    return layer, QuantLinear.from_tensors(scheme, layer.tensors, K, bias, **options)


def error_of(y, expected):
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def assert_canonical(state, layer):
    for name, tensor in layer.tensors.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name
    assert torch.equal(state["bias"], layer.bias)
    assert set(state) == {*layer.tensors, "bias"}


# -- one layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_state_dict_is_canonical_whatever_happens(scheme, N, K, kernel):
    layer, quant = make(scheme, N, K, kernel=kernel)
    assert isinstance(quant, RotatedLinear) == scheme.startswith("quip")
    assert quant.kernel_id.startswith("cpu." if kernel is None else "ref.")
    x = random_input(3, K)
    y = quant(x)
    assert_canonical(quant.state_dict(), layer)
    quant.to("cpu").eval().share_memory()
    assert_canonical(quant.state_dict(), layer)
    assert torch.equal(quant(x), y)
    assert_canonical(quant.restore().state_dict(), layer)
    with pytest.raises(RuntimeError, match=f"{type(quant).__name__} {scheme} is not prepared"):
        quant(x)
    assert torch.equal(quant.prepare()(x), y)


@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
def test_save_and_load_without_pickle(scheme, N, K):
    layer, quant = make(scheme, N, K)
    fresh = QuantLinear.class_for(layer.format)(K, N, layer.format)
    fresh.load_state_dict(load(save(dict(quant.state_dict()))))
    x = random_input(4, K)
    assert torch.equal(fresh(x), quant(x))
    stream = io.BytesIO()
    torch.save(quant, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), quant(x))


@pytest.mark.parametrize("assign", [False, True])
def test_load_replaces_a_prepared_layer(assign):
    _, quant = make()
    other = random_layer("quip-e8p-2bit", 48, 192, seed=9)
    quant.load_state_dict({**other.tensors, "bias": other.bias}, assign=assign)
    assert_canonical(quant.state_dict(), other)
    x = random_input(2, 192)
    expected = x.double() @ other.weight().T + other.bias.double()
    assert error_of(quant(x), expected) < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
def test_dtype_moves_the_values_that_follow_it(scheme, N, K, dtype):
    layer, quant = make(scheme, N, K)
    quant.to(dtype)
    state = quant.state_dict()
    for name, spec in layer.format.tensor_specs(N, K).items():
        expected = layer.tensors[name] if spec.dtype else layer.tensors[name].to(dtype)
        assert torch.equal(state[name], expected), name
    assert quant.bias.dtype == dtype and quant(random_input(2, K, dtype)).dtype == dtype
    assert quant.weight.dtype == dtype


def test_double_takes_the_reference_and_comes_back():
    layer, quant = make()
    quant.double()
    assert quant.kernel_id == "ref.dequant"
    x = random_input(2, 192, torch.float64)
    assert torch.allclose(quant(x), x @ layer.weight().T + layer.bias.double(), rtol=1e-12)
    assert quant.float().kernel_id.startswith("cpu.")
    assert_canonical(quant.state_dict(), layer)


def test_meta_and_back():
    layer, quant = make()
    state = quant.state_dict()
    quant.to("meta")
    assert quant.Qidxs.is_meta and quant.kernel is None
    quant.load_state_dict(state, assign=True)
    assert_canonical(quant.state_dict(), layer)


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_changed_in_place_are_seen(kernel):
    _, quant = make(kernel=kernel)
    x = random_input(3, 192)
    before = quant(x) - quant.bias
    other = copy.deepcopy(quant)
    with torch.no_grad():
        quant.SV.mul_(3)
        assert error_of(quant(x) - quant.bias, 3 * before) < 1e-6
        quant.Wscale.mul_(0.5)
        assert error_of(quant(x) - quant.bias, 1.5 * before) < 1e-6
        quant.SU.neg_()
        assert error_of(quant(x) - quant.bias, -1.5 * before) < 1e-6
    assert torch.equal(other(x) - other.bias, before)


@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_of_values_equal_those_of_the_oracle(scheme, N, K, kernel):
    layer, quant = make(scheme, N, K, kernel=kernel)
    names = quant._value_names
    for name in names:
        quant.get_parameter(name).requires_grad_()
    x = random_input(5, K).requires_grad_()
    quant(x).square().sum().backward()
    exact = {n: t.double() if t.is_floating_point() else t for n, t in layer.tensors.items()}
    for name in names:
        exact[name].requires_grad_()
    wide = x.detach().double().requires_grad_()
    y = wide @ layer.format.dequantize(exact, torch.float64).T + layer.bias.double()
    y.square().sum().backward()
    assert error_of(x.grad, wide.grad) < 2e-4
    for name in names:
        assert error_of(quant.get_parameter(name).grad, exact[name].grad) < 4e-4, name


def test_sign_vectors_train():
    layer, quant = make()
    quant.SU.requires_grad_()
    quant.SV.requires_grad_()
    x, target = random_input(64, 192), torch.randn(64, 48)
    optimizer = torch.optim.Adam([quant.SU, quant.SV], lr=2e-2)
    losses = []
    for _ in range(30):
        loss = (quant(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(quant.state_dict()["Qidxs"], layer.tensors["Qidxs"])
    with torch.no_grad():  # the kernel sees the trained values, frozen or not
        expected = x.double() @ quant.weight.double().T + quant.bias
        assert error_of(quant(x), expected) < 2e-4
        assert error_of(quant.freeze()(x), expected) < 2e-4


def test_gradcheck_through_the_reference():
    layer, quant = make("quip-int2", 4, 8, torch.float64)
    names = ("SU", "SV", "bias")
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    for name in names:
        quant.get_parameter(name).requires_grad_()

    def forward(x, *values):
        return torch.func.functional_call(quant, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *(quant.get_parameter(n) for n in names)))


def test_bad_values_are_refused_at_load():
    layer, _ = make()
    fresh = nn.Sequential(RotatedLinear(192, 48, layer.format))
    su = layer.tensors["SU"].clone()
    su[5] = float("inf")
    tensors = {**layer.tensors, "SU": su, "bias": layer.bias}
    with pytest.raises(FormatError, match=r"0.SU is not finite: inf at index \[5\]"):
        fresh.load_state_dict({f"0.{k}": v for k, v in tensors.items()})
    with pytest.raises(FormatError, match=r"attn.q.SU has shape \[191\], expected \[192\]"):
        QuantLinear.from_tensors(layer.format, {**layer.tensors, "SU": su[1:]}, 192, name="attn.q")


def test_repr_names_what_matters():
    text = repr(make()[1])
    for part in ("RotatedLinear(", "in_features=192", "scheme=quip-e8p-2bit", "bits=2.", "cpu.e8p"):
        assert part in text


# -- shared rotations ------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three layers of one input with equal sign vectors, and one of another input."""

    def __init__(self, seed=0):
        super().__init__()
        for name, scheme, N in (
            ("q", "quip-e8p-2bit", 64), ("k", "quip-int3", 32), ("v", "quip-e8p-4bit", 32),
            ("o", "quip-e8p-2bit", 64),
        ):  # fmt: skip
            seed += 1
            layer = random_layer(scheme, N, 64, seed=seed)
            if name in "qkv":
                layer.tensors["SU"] = random_layer("quip-int2", 8, 64, seed=99).tensors["SU"]
            setattr(self, name, QuantLinear.from_tensors(scheme, layer.tensors, 64, layer.bias))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + 0.01 * self.o(torch.cat([k, v], -1) * q)


@pytest.fixture
def rotations(monkeypatch):
    """Counts the transforms that run, in eager and in compiled code."""
    calls, transform = [], native.cpu.hadamard

    def counted(*args):
        calls.append(args)
        return transform(*args)

    monkeypatch.setattr(native.cpu, "hadamard", counted)

    def count(function, *args):
        calls.clear()
        result = function(*args)
        return len(calls), result

    return count


def shared_model():
    model = nn.Sequential(Attention(), Attention(10))
    assert share_rotations(model) == [("0.q", "0.k", "0.v"), ("1.q", "1.k", "1.v")]
    return model


@torch.no_grad()
def test_siblings_rotate_their_input_once(rotations):
    model, x = nn.Sequential(Attention(), Attention(10)), random_input(3, 64)
    apart, expected = rotations(model, x)
    assert len(share_rotations(model)) == 2
    together, y = rotations(model, x)
    assert (apart, together) == (8, 4) and torch.equal(y, expected)
    share_rotations(model)  # again changes nothing
    assert rotations(model, x)[0] == 4
    for moved in (copy.deepcopy(model), copy.deepcopy(model).half().float()):
        assert rotations(moved, x)[0] == 4
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    count, y = rotations(torch.load(stream, weights_only=False), x)
    assert count == 4 and torch.equal(y, expected)


@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        ("inductor", torch.no_grad),
        ("aot_eager", torch.inference_mode),
        ("aot_eager", torch.enable_grad),
    ],
)
def test_sharing_in_a_compiled_graph(backend, mode, rotations):
    torch._dynamo.reset()
    model, x = shared_model(), random_input(3, 64).contiguous()
    with mode():
        x = x.clone().requires_grad_(mode is torch.enable_grad)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert torch.equal(compiled(x), model(x))
        count, y = rotations(compiled, x)
        assert count == 4 and torch.equal(y, model(x))
        other = random_input(3, 64, seed=7).contiguous().requires_grad_(x.requires_grad)
        assert torch.equal(compiled(other), model(other))
        if mode is torch.enable_grad:
            grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, model)]
            assert torch.equal(*grads)


@torch.no_grad()
def test_sharing_is_never_stale(rotations):
    model = shared_model()
    layers = model[0].q, model[0].k, model[0].v
    x, other = random_input(3, 64), random_input(3, 64, seed=2)
    alone = [layer(x) for layer in layers]

    class Uses(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.inner = attention

        def forward(self, function):
            return function()

    block = Uses(nn.Identity())
    for name, layer in zip("qkv", layers, strict=True):
        layer._sharing = None
        setattr(block, name, layer)
    assert share_rotations(block) == [("q", "k", "v")]

    def in_place():
        y = x.clone()
        first = block.q(y)
        y.copy_(other)
        return first, block.k(y), block.v(x), block.v(other)

    first, second, third, fourth = block(in_place)
    assert torch.equal(first, alone[0]) and torch.equal(third, alone[2])
    assert error_of(second, block.k(other)) == 0 and error_of(fourth, block.v(other)) == 0
    # Outside of the block's forward nothing is kept.
    assert rotations(lambda: [layer(x) for layer in layers])[0] == 3
    # A sign vector that was changed in place is the layer's own from then on.
    layers[1].SU.neg_()
    count, (a, b, c) = rotations(block, lambda: [layer(x) for layer in layers])
    assert count == 2 and torch.equal(a, alone[0]) and torch.equal(c, alone[2])
    assert error_of(b - layers[1].bias, layers[1].bias - alone[1]) < 1e-6


def test_separate_backward_passes_through_shared_layers():
    model = shared_model()
    q, k = model[0].q, model[0].k
    x = random_input(3, 64).requires_grad_()
    q(x).sum().backward()
    k(x).sum().backward()
    weight = q.weight.sum(0) + k.weight.sum(0)
    assert error_of(x.grad, weight.expand(3, -1)) < 2e-4


def test_nothing_is_kept_after_a_forward():
    model = shared_model()
    x = random_input(3, 64).clone()
    gone = weakref.ref(x)
    with torch.no_grad():
        model(x)
    del x
    gc.collect()
    assert gone() is None
    assert all(block.q._sharing.shared._kept is None for block in model)


def test_training_sign_vectors_of_siblings_that_share():
    model, x = shared_model(), random_input(3, 64)
    twin = nn.Sequential(Attention(), Attention(10))
    grads = []
    for each in (model, twin):
        for name in "qkv":
            each[0].get_submodule(name).SU.requires_grad_()
        each(x).square().sum().backward()
        grads.append([each[0].get_submodule(name).SU.grad for name in "qkv"])
    assert all(error_of(a, b) < 1e-5 for a, b in zip(*grads, strict=True))
    assert error_of(grads[0][0], grads[0][1]) > 0.1


def test_layers_with_other_sign_vectors_do_not_join():
    model = Attention()
    with torch.no_grad():
        model.k.SU.neg_()
    model.v.to(torch.float64).to(torch.float32)
    assert share_rotations(model) == [("q", "v")]
    kron = nn.Module()
    for name in "ab":
        setattr(kron, name, make("quip-int2-kron", 24, 64)[1])
    assert share_rotations(kron) == []


# -- fused layers ----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, n) for n in (64, 32, 32))
        self.o = nn.Linear(64, 64)

    def forward(self, x):
        return self.o(torch.cat([self.k(x), self.v(x)], -1) * self.q(x))


def fused_block(bias=True):
    """(block with a fused layer, the same with dense layers, the fused layer's tensors)."""
    torch.manual_seed(0)
    dense = Block()
    layer = random_layer("quip-e8p-2bit-f64+32+32", 128, 64)
    block = copy.deepcopy(dense)
    fused = QuantLinear.from_tensors(layer.format, layer.tensors, 64, layer.bias if bias else None)
    parts = place_fused(block, "qkv", fused, ("q", "k", "v"))
    for part, linear in zip(parts, (dense.q, dense.k, dense.v), strict=True):
        linear.weight = nn.Parameter(part.weight)
        linear.bias = nn.Parameter(part.bias) if bias else None
    return block, dense, layer


@pytest.mark.parametrize("bias", [True, False])
def test_fused_parts_are_one_layer(bias):
    block, dense, layer = fused_block(bias)
    x = random_input(5, 64)
    calls = []
    block.qkv.register_forward_hook(lambda *args: calls.append(args))
    with torch.no_grad():
        assert error_of(block(x), dense(x)) < 2e-4 and len(calls) == 1
        assert error_of(block.k(x), dense.k(x)) < 2e-4  # outside of the block as well
        names = {n for n, _ in block.named_parameters() if not n.startswith("o.")}
        assert names == {f"qkv.{n}" for n in ("SU", "SV", "Wscale", "fuse_scales")} | (
            {"qkv.bias"} if bias else set()
        )
        copied = copy.deepcopy(block)
        copied.qkv.SV.zero_()
        assert copied.q.fused is copied.qkv and error_of(block(x), dense(x)) < 2e-4
        expected = copied.qkv.bias[:64] if bias else torch.zeros(64)
        assert torch.equal(copied.q(x), expected.expand(5, -1))
    assert torch.equal(block.state_dict()["qkv.Qidxs"], layer.tensors["Qidxs"])
    assert isinstance(block.q, FusedPart) and "rows=64:96" in repr(block.k)


def test_fused_parts_compile_to_one_product():
    torch._dynamo.reset()
    block, _, _ = fused_block()
    x = random_input(5, 64).contiguous()
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend=backend)
        assert torch.equal(compiled(x), block(x))
    assert len(graphs) == 1 and graphs[0].count("aqlm_infer.e8p_matmul") == 1


def test_fused_parts_pass_gradients():
    block, dense, _ = fused_block()
    x, y = (random_input(5, 64).requires_grad_() for _ in range(2))
    block(x).square().sum().backward()
    dense(y).square().sum().backward()
    assert error_of(x.grad, y.grad) < 4e-4


def test_golden_fused_layer_in_parts():
    tensors = golden_e8p(2)["fused"]
    block = nn.Module()
    format = "quip-e8p-2bit-f128+64+64"
    names = ("Qidxs", "SU", "SV", "Wscale", "codebook_id", "fuse_scales")
    fused = QuantLinear.from_tensors(format, {n: tensors[n] for n in names}, 256)
    for part, name in zip(place_fused(block, "qkv", fused, "qkv"), "qkv", strict=True):
        y = part.to(torch.float32)(tensors["x"].float())
        assert error_of(y, tensors[name]) < 1e-3, name
