"""Layers whose operands the backend keeps: bit for bit what they compute without, and never stale.

On the CPU, whose kernels keep nothing, ``HeldHere`` stands in for what CUDA does: the layers'
book-keeping is the same.
"""

import copy
import dataclasses
import gc
import io
import weakref

import pytest
import torch
from cases import random_input, random_layer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from aqlm_infer import QuantLinear, share_rotations
from aqlm_infer.backends import KERNELS
from aqlm_infer.layers import linear, place_fused
from aqlm_infer.layers.linear import _version_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYERS = (
    ("aqlm-2x8-g8", 64, 256),
    ("aqlm-1x16-g8", 64, 256),
    ("aqlm-2x6-g8-o2", 34, 64),
    ("quip-e8p-2bit", 48, 192),
    ("quip-e8p-3bit-b128", 128, 128),
    ("quip-int2", 20, 152),
    ("gptq-int4-g32", 33, 96),
    ("rtn-int3-g8", 17, 40),
)
BOTH = [("aqlm-2x8-g8", 64, 256), ("quip-e8p-2bit", 48, 192)]


_GIVEN = {}  # operands by number, until they are taken


class HeldHere:
    """What ``backends.held.Held`` does by ``_cuda``, in Python."""

    def __init__(self, number, parameters, buffers, values):
        self.operands, self.device = _GIVEN.pop(number), next(iter(buffers.values())).device
        self.parameters, self.buffers = list(parameters.values()), list(buffers.values())
        self.values, self.versions = list(values), [*map(_version_of, values)]

    def serves(self, x, parameters, buffers):
        return (
            x.device == self.device
            and all(a is b for a, b in zip(self.parameters, parameters.values(), strict=True))
            and all(a is b for a, b in zip(self.buffers, buffers.values(), strict=True))
            and self.versions == [*map(_version_of, self.values)]
        )

    def linear(self, x, parameters, buffers):
        return self.product(self.rotation(x)) if self.serves(x, parameters, buffers) else None

    def parts(self, x, parameters, buffers, sizes):
        y = self.linear(x, parameters, buffers)
        return None if y is None else y.split(sizes, -1)

    def rotation(self, x):
        kernel, format, buffers, values, *_ = self.operands
        return x if kernel.rotate is None else kernel.rotate(format, x, buffers, values)

    def product(self, z):
        kernel, format, *operands = self.operands
        return kernel.matmul(format, z, *operands)

    def __reduce__(self):
        return type(None), ()


def holder(kernel):
    def hold(format, buffers, values, *rest):
        _GIVEN[1] = kernel, format, {**buffers}, {**values}, *rest
        return 1

    return hold


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        for id, kernel in list(KERNELS.items()):
            if id.startswith("cpu."):
                held = dataclasses.replace(kernel, hold=holder(kernel))
                monkeypatch.setitem(KERNELS, id, held)
        monkeypatch.setattr(linear, "Held", HeldHere)
    return request.param


def make(device, scheme="quip-e8p-2bit", N=48, K=192, dtype=torch.float16, seed=0):
    layer = random_layer(scheme, N, K, dtype, seed)
    tensors = {name: tensor.to(device) for name, tensor in layer.tensors.items()}
    return QuantLinear.from_tensors(scheme, tensors, K, layer.bias.to(device))


def tokens(device, M, K, dtype=torch.float16):
    return random_input(M, K, dtype).to(device)


def again(quant):
    """The same layer made anew, which holds nothing."""
    state = {name: tensor.clone() for name, tensor in quant.state_dict().items()}
    bias = state.pop("bias")
    return QuantLinear.from_tensors(quant.format, state, quant.in_features, bias)


def hold(quant, x):
    """Call the layer until it holds its operands."""
    for _ in range(3):
        quant(x)
    assert isinstance(quant._held, linear.Held)
    return quant._held


def assert_fresh(quant, x):
    """Now and in the next calls, the layer computes what its tensors say."""
    expected = again(quant)._compute(x)
    for _ in range(4):
        assert torch.equal(quant(x), expected)


@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_equal_to_what_is_not_held(device, scheme, N, K, dtype, mode):
    quant = make(device, scheme, N, K, dtype)
    with mode():
        hold(quant, tokens(device, 1, K, dtype))
        for shape in ((1, K), (1, 1, K), (K,), (3, K), (2, 9, K), (130, K), (0, K)):
            x = tokens(device, torch.Size(shape).numel() // K, K, dtype).reshape(shape)
            assert torch.equal(quant(x), quant._compute(x)), shape
        x = tokens(device, 5, K, dtype)[::2]
        assert torch.equal(quant(x), quant._compute(x))
        assert quant._held is not None


def in_place(quant):
    for parameter in quant.parameters():
        parameter.mul_(1.5)


def data(quant):
    for parameter in quant.parameters():
        parameter.data = parameter.data * 1.25


def new_parameters(quant):
    for name, parameter in list(quant.named_parameters()):
        setattr(quant, name, nn.Parameter(parameter * 0.75, requires_grad=False))


def in_the_dict(quant):
    for name, parameter in list(quant.named_parameters()):
        quant._parameters[name] = nn.Parameter(parameter * 0.5, requires_grad=False)


def other_state(quant, assign=False):
    other = random_layer(quant.format.id, quant.out_features, quant.in_features, torch.float16, 5)
    quant.load_state_dict({**other.tensors, "bias": other.bias}, assign=assign)
    quant.to(quant.bias.device)


def assigned_state(quant):
    device = quant.bias.device
    other_state(quant, assign=True)
    quant.to(device)


def no_bias(quant):
    quant.bias = nn.Parameter(torch.zeros_like(quant.bias))


def there_and_back(quant):
    device = quant.bias.device
    quant.double().half().to("cpu").to(device)


def restored(quant):
    quant.restore().prepare()


CHANGES = (in_place, data, new_parameters, in_the_dict, other_state, assigned_state, no_bias,
           there_and_back, restored)  # fmt: skip


@pytest.mark.parametrize(("scheme", "N", "K"), BOTH)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_are_seen(device, scheme, N, K, change):
    quant, x = make(device, scheme, N, K), tokens(device, 2, K)
    hold(quant, x)
    before = quant(x)
    change(quant)
    assert_fresh(quant, x)
    assert torch.equal(quant(x), before) == (change in (there_and_back, restored))
    hold(quant, x)  # and it is held again
    in_place(quant)
    assert_fresh(quant, x)


@torch.no_grad()
def test_dtypes_and_precisions_are_seen(device):
    quant = make(device, "aqlm-2x8-g8", 64, 256)
    hold(quant, tokens(device, 2, 256))
    quant.bfloat16()
    assert_fresh(quant, tokens(device, 2, 256, torch.bfloat16))
    quant.float()
    assert_fresh(quant, tokens(device, 2, 256, torch.float32))
    hold(quant, tokens(device, 2, 256, torch.float32))
    quant.precision = "half"
    with pytest.raises((ValueError, RuntimeError), match="half"):
        quant(tokens(device, 2, 256, torch.float32))


@torch.no_grad()
def test_functional_call_for_one_call(device):
    quant, x = make(device), tokens(device, 2, 192)
    hold(quant, x)
    before, other = quant(x), {"SV": quant.SV * 2}
    doubled = torch.func.functional_call(quant, other, (x,))
    expected = again(quant)
    expected.SV.mul_(2)
    assert torch.equal(doubled, expected._compute(x))
    assert torch.equal(quant(x), before) and torch.equal(quant(x), before)


@torch.no_grad()
def test_operands_are_given_back(device):
    quant, x = make(device), tokens(device, 2, 192)
    packed = weakref.ref(hold(quant, x) and quant.packed_Qidxs)
    quant.restore()
    gc.collect()
    assert packed() is None and "_held" not in quant.__dict__
    hold(quant.prepare(), x)
    values, packed = weakref.ref(quant.SU), weakref.ref(quant.packed_Qidxs)
    del quant
    gc.collect()
    assert values() is None and packed() is None


@pytest.mark.gpu
@torch.no_grad()
def test_memory_is_given_back():
    x, before = tokens("cuda", 2, 4096), None
    for _ in range(3):
        quant = make("cuda", "aqlm-2x8-g8", 4096, 4096)
        hold(quant, x)
        for _ in range(100):
            y = quant(x.clone())
        del quant, y
        gc.collect()
        allocated = torch.cuda.memory_allocated()
        assert before in (None, allocated)
        before = allocated


@pytest.mark.parametrize(("scheme", "N", "K"), BOTH)
@torch.no_grad()
def test_copies_and_pickles_hold_nothing(device, scheme, N, K):
    quant, x = make(device, scheme, N, K), tokens(device, 2, K)
    hold(quant, x)
    expected, stream = quant(x), io.BytesIO()
    torch.save(quant, stream)
    stream.seek(0)
    for other in (copy.deepcopy(quant), torch.load(stream, weights_only=False)):
        assert other._held is None
        assert torch.equal(other(x), expected)
        hold(other, x)
        in_place(other)
        assert_fresh(other, x)
    assert torch.equal(quant(x), expected)


def test_gradients_and_graphs_do_without(device):
    quant, x = make(device, "aqlm-2x8-g8", 64, 256), tokens(device, 2, 256)
    with torch.no_grad():
        hold(quant, x)
        expected = quant(x)
    asked = x.clone().requires_grad_()
    y = quant(asked)
    y.float().sum().backward()
    assert torch.equal(y, expected)
    gradient = (torch.ones(2, 64, device=x.device) @ quant.weight.float()).to(x.dtype)
    assert torch.allclose(asked.grad, gradient, rtol=2e-2, atol=2e-1)
    compiled = torch.compile(quant, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)


@torch.no_grad()
def test_what_looks_at_operators_sees_those_with_tensors(device):
    quant, x = make(device, "aqlm-2x8-g8", 64, 256), tokens(device, 2, 256)
    hold(quant, x)

    class Names(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += (str(function),)
            return function(*args, **(kwargs or {}))

    with Names() as names:
        quant(x)
    assert any("additive_matmul" in name for name in names.seen), names.seen
    assert not any("held" in name for name in names.seen)
    fresh, seen = again(quant), Names()
    with seen:
        for _ in range(4):
            assert torch.equal(fresh(x), quant(x))
    assert fresh._held is None and not any("hold" in name for name in seen.seen)
    rows = torch.cat([quant(x[:1]), quant(x[1:])])
    assert torch.equal(torch.vmap(quant)(x[:, None])[:, 0], rows)
    traced = torch.jit.trace(quant, (x,))
    assert "held" not in str(traced.inlined_graph)
    assert torch.equal(traced(x), quant(x))


def test_autocast_and_subclasses(device):
    quant, x = make(device, "quip-e8p-2bit"), tokens(device, 2, 192)
    with torch.no_grad():
        hold(quant, x)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(quant(x), quant._compute(x))
        assert torch.equal(quant(nn.Parameter(x)), quant(x))


class Block(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.a, self.b, self.c = layers

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x * 2)


@torch.no_grad()
def test_siblings_share_their_rotation(device, monkeypatch):
    layers = [make(device, seed=0) for _ in range(3)]
    layers[1].SV.mul_(3)
    block, x = Block(layers), tokens(device, 2, 192)
    expected = block(x)
    assert len(share_rotations(block)) == 1
    calls, rotation = [], linear.Held.rotation
    monkeypatch.setattr(linear.Held, "rotation", lambda *a: calls.append(a) or rotation(*a))
    for _ in range(4):
        assert all(map(torch.equal, block(x), expected))
    calls.clear()
    assert all(map(torch.equal, block(x), expected))
    assert len(calls) == 2  # of x once, of x * 2
    assert all(layer._held is not None for layer in layers)
    layers[0].SU.mul_(2)  # no sibling's any more
    inputs = x, x, x * 2
    expected = [again(layer)._compute(z) for layer, z in zip(layers, inputs, strict=True)]
    for _ in range(4):
        assert all(map(torch.equal, block(x), expected))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fused_parts(device, mode):
    whole = make(device, "quip-e8p-2bit-f32+16+16", 64, 128)
    block = Block([nn.Linear(128, 32), nn.Linear(128, 16), nn.Linear(128, 16)])
    parts = place_fused(block, "abc", whole, ("a", "b", "c"))
    block.forward = lambda x: tuple(part(x) for part in parts)
    with mode():
        for M in (1, 3):
            x = tokens(device, M, 128)
            expected = whole._compute(x).split((32, 16, 16), -1)
            for _ in range(4):
                assert all(map(torch.equal, block(x), expected))
                assert all(map(torch.equal, (part(x) for part in parts), expected))
        assert whole._held is not None
        calls = []
        hook = whole.register_forward_hook(lambda *a: calls.append(a))
        assert all(map(torch.equal, block(x), expected)) and len(calls) == 1
        hook.remove()
        assert all(map(torch.equal, block(x), expected)) and len(calls) == 1
        whole.SV.mul_(2)
        expected = again(whole)._compute(x).split((32, 16, 16), -1)
        assert all(map(torch.equal, block(x), expected))


@pytest.mark.gpu
@torch.no_grad()
def test_captured_and_on_other_streams():
    quant, x = make("cuda"), tokens("cuda", 1, 192)
    hold(quant, x)
    expected, side = quant(x), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(quant(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = quant(x)
    graph.replay()
    assert torch.equal(y, expected)
    quant.SV.mul_(2)  # read by the next eager forward, as without
    changed = quant(x)
    assert not torch.equal(changed, expected)
    graph.replay()
    assert torch.equal(y, changed)


@pytest.mark.gpu
@torch.no_grad()
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    quant = make("cuda:0")
    x = tokens("cuda:0", 2, 192)
    hold(quant, x)
    expected = quant(x)
    with pytest.raises(RuntimeError, match="cuda:1"):
        quant(x.to("cuda:1"))
    quant.to("cuda:1")
    hold(quant, x.to("cuda:1"))
    assert torch.equal(quant(x.to("cuda:1")).cpu(), expected.cpu())


@pytest.mark.gpu
@torch.no_grad()
def test_bad_input_says_the_same():
    quant = make("cuda", "aqlm-2x8-g8", 64, 256)
    hold(quant, tokens("cuda", 1, 256))
    for x in (tokens("cuda", 1, 256, torch.bfloat16), tokens("cuda", 1, 256).long()):
        with pytest.raises(RuntimeError) as plain:
            quant._compute(x)
        with pytest.raises(RuntimeError) as held:
            quant(x)
        assert str(held.value).splitlines()[0] == str(plain.value).splitlines()[0]
    with pytest.raises(RuntimeError):
        quant(tokens("cpu", 1, 256))
