"""Additive matmuls joined with what follows them in a step, and a step of them, against float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import random_layer
from tiny_models import tiny_config
from tolerances import RELATIVE

from aqlm_infer.backends import additive as calls
from aqlm_infer.generation import additive_ops as joined
from aqlm_infer.generation import ops
from aqlm_infer.ops import OperandError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float16, torch.bfloat16]
EPS = 1e-5
LIMITS = {"exact": {d: RELATIVE["exact", d] for d in DTYPES}, "int8": dict.fromkeys(DTYPES, 1.4e-2)}


class Product:
    """x W^T of random parts, stacked; ``exact`` is that in float64."""

    def __init__(self, scheme, partitions, K, dtype, device, precision="exact"):
        layers = [random_layer(scheme, n, K, dtype, seed=i) for i, n in enumerate(partitions)]
        self.partitions, self.K, self.device, self.dtype = list(partitions), K, device, dtype
        self.precision = precision
        found = [{n: t.to(device) for n, t in layer.tensors.items()} for layer in layers]
        self.weight = torch.cat([layers[0].format.dequantize(
            {n: t if t.dtype in (torch.int8, torch.int16) else t.double() for n, t in f.items()}
        ) for f in found])  # fmt: skip
        tensors = {name: torch.cat([f[name] for f in found]) for name in found[0]}
        buffers = calls.repack(layers[0].format, tensors, partitions, precision)
        self.weights = buffers["packed_codes"], tensors["codebooks"], tensors["scales"]
        self.last = buffers["aux"], self.partitions, precision
        self.bias = torch.cat([layer.bias for layer in layers]).to(device)

    def rows(self, M, n, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(M, n, generator=generator).to(self.device, self.dtype)

    def exact(self, z):
        return z.double() @ self.weight.double().T

    def joins(self, M, then):
        """-1 or the image that z may be; M tokens whose sums no kernel of _cuda adds: skipped."""
        image = joined.additive_joins(*self.weights, self.K, *self.last[1:], M, then)
        if self.device == "cpu":
            assert image == -1
        return image

    def close(self, y, exact):
        error = (y.double() - exact).norm() / exact.norm()
        assert error <= LIMITS[self.precision][self.dtype], f"relative error {error:.2e}"

    def inputs(self, z, image):
        """z as rows, and as the image that the matmul takes."""
        if image & joined.INT8 and image > 0:
            return [z, int8_image_of(z, image & ~joined.INT8)]
        return [z, *([ops.image_of(z, image)] if image > 0 else [])]

    def targets(self, M, image):
        """Images that an operator may make; int8 ones where its matmul takes one."""
        if not (image > 0 and image & joined.INT8):
            return [32, 32]
        return [32, joined.INT8 + (16 if M <= 16 else 32)] * 2


def is_image_of(image, rows):
    M, n = rows.shape
    if image.dim() == 4:
        assert list(image.shape) == [n // 32, 4, 32, 8]
        return torch.equal(joined.rows_of(image, M), rows)
    peak = rows.float().abs().amax(1, keepdim=True)
    return bool(((joined.rows_of(image, M) - rows.float()).abs() <= peak * 2e-5).all())


def int8_image_of(x, tokens):
    M, K = x.shape
    padded = F.pad(x.float(), (0, 0, 0, tokens - M), value=1.0)
    scales = padded.abs().amax(1) / 32639
    q = (padded / scales[:, None]).round().to(torch.int32)
    high = (q + 128) >> 8
    both = torch.stack([high, q - 256 * high]).to(torch.int8).view(2, tokens, K // 32, 4, 2, 4)
    image = torch.zeros(K // 32 + 1, 2, tokens, 2, 16, dtype=torch.uint8, device=x.device)
    image[:-1] = both.permute(2, 4, 1, 0, 3, 5).reshape(K // 32, 2, tokens, 2, 16).view(torch.uint8)
    image[-1].flatten()[: 4 * tokens] = scales.view(torch.uint8)
    return image


TOKENS = (1, 2, 5, 9, 16, 17, 32)
SCHEMES = [("aqlm-2x8-g8", "exact"), ("aqlm-1x8-g8", "exact"), ("aqlm-4x8-g8", "exact"),
           ("aqlm-1x16-g8", "exact"), ("aqlm-2x8-g8", "int8"),
           ("aqlm-1x16-g8", "int8")]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scheme", "precision"), SCHEMES)
@pytest.mark.parametrize(
    ("N", "K"), [(512, 256), (1536, 512), (4096, 4096), (4096, 1024), (8192, 1024)]
)
def test_matmul_with_the_norm_after_it(device, dtype, scheme, precision, N, K):
    if device == "cpu" and (N > 2000 or scheme != "aqlm-2x8-g8" or precision == "int8"):
        pytest.skip("the CPU's operators are those that have tests of their own")
    product = Product(scheme, [N], K, dtype, device, precision)
    weight, taken = product.rows(1, N, 3)[0], 0
    for M in TOKENS:
        image = product.joins(M, "norm")
        if device == "cuda" and image < 0:
            continue
        taken += 1
        z, x = product.rows(M, K, 1), product.rows(M, N, 2) * K**0.5
        for given in product.inputs(z, image):
            run = partial(joined.additive_matmul_norm, given, *product.weights, *product.last, x)
            total, y = run(weight, EPS, 0)
            product.close(total, x.double() + product.exact(z))
            wide = total.double()
            exact = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
            error = (y.double() - exact).norm() / exact.norm()
            assert error <= (2e-3 if dtype == torch.float16 else 1.6e-2), f"{error:.1e}"
            for target in product.targets(M, image):
                again, made = run(weight, EPS, target)
                assert torch.equal(again, total) and is_image_of(made, y)
    assert taken or "16" in scheme or N > K, "no number of tokens is joined"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scheme", "precision"), SCHEMES)
@pytest.mark.parametrize(("n", "K"), [(512, 256), (2048, 512), (14336, 1024)])
def test_matmul_of_gate_and_up_with_swiglu(device, dtype, scheme, precision, n, K):
    if device == "cpu" and (n > 1000 or scheme != "aqlm-2x8-g8" or precision == "int8"):
        pytest.skip("the CPU's operators are those that have tests of their own")
    product = Product(scheme, [n, n], K, dtype, device, precision)
    for M in TOKENS:
        image = product.joins(M, "swiglu")
        if device == "cuda" and image < 0:
            continue
        z = product.rows(M, K, 1) * 2 / K**0.5
        for up_first in (False, True):
            low, high = product.exact(z).chunk(2, 1)
            gate, up = (high, low) if up_first else (low, high)
            exact = F.silu(gate) * up
            for given in product.inputs(z, image):
                run = partial(joined.additive_matmul_swiglu, given, *product.weights, *product.last)
                y = run(M, up_first, 0)
                error = (y.double() - exact).norm() / exact.norm()
                assert error <= 2 * LIMITS[precision][dtype], f"{error:.1e}"
                for target in product.targets(M, image):
                    assert is_image_of(run(M, up_first, target), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scheme", "precision"), SCHEMES)
@pytest.mark.parametrize(("partitions", "K"), [((512, 512, 512), 256), ((4096, 1024, 1024), 4096)])
def test_matmul_of_q_k_and_v(device, dtype, scheme, precision, partitions, K):
    if device == "cpu" and (K > 1000 or scheme != "aqlm-2x8-g8" or precision == "int8"):
        pytest.skip("the CPU's operators are those that have tests of their own")
    product = Product(scheme, partitions, K, dtype, device, precision)
    for M in TOKENS:
        image = product.joins(M, "rows")
        if device == "cuda" and image < 0:
            continue
        z = product.rows(M, K, 1)
        for given in product.inputs(z, image):
            for bias in (None, product.bias):
                exact = product.exact(z) + (0 if bias is None else bias.double())
                run = (given, *product.weights, bias, *product.last, M)
                y = joined.additive_matmul_rows(*run)
                product.close(y, exact)
                assert torch.equal(joined.additive_matmul_rows(*run), y)


def test_images_are_what_their_text_says():
    x = torch.arange(3 * 64.0).view(3, 64)
    bytes = int8_image_of(x, 16)
    s, h, m, t, e = 1, 1, 2, 3, 1
    low, high = (bytes[s, h, m, b, 4 * t + e].view(torch.int8).item() for b in (1, 0))
    scale = bytes[-1].flatten().view(torch.float32)[m].item()
    assert abs((256 * high + low) * scale - x[m, 32 * s + 8 * t + 4 * h + e].item()) < 0.003
    assert (joined.rows_of(bytes, 3) - x).abs().max() < 0.003
    image = ops.image_of(x, 8)
    s, c, m, t, e = 1, 2, 2, 3, 1
    assert image[s, c, m, 2 * t + e] == x[m, 32 * s + 8 * t + 2 * c + e]
    assert not image[:, :, 3:].any() and torch.equal(joined.rows_of(image, 3), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("B", "L", "filled"), [(9, 256, 200), (16, 64, 9), (32, 300, 299)])
def test_attention_makes_an_image(device, B, L, filled):
    H, heads, D = 8, 2, 64
    make = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=make).half().to(device)

    q, key, value, keys, values = (
        rand(B, n, *rest, D) for n, rest in ((H, ()), (heads, ()), (heads, ()), (heads, (L,)),
                                             (heads, (L,)))
    )  # fmt: skip
    cos, sin = rand(L, D), rand(L, D)
    ids, at = (torch.full(s, filled, device=device) for s in ((B, 1), (1,)))
    mask = torch.ones(B, L, dtype=torch.bool, device=device)
    counts = torch.zeros(B * heads, dtype=torch.int32, device=device)
    given = q, key, value, cos, sin, ids, at, keys, values, mask, counts, 0.3
    y = ops.rope_attention(*given).flatten(1)
    image = ops.rope_attention_image(*given, 32)
    assert torch.equal(joined.rows_of(image, B), y) and not counts.any()
    with pytest.raises(OperandError, match=f"image=8 is no image of {B} tokens of 512"):
        ops.rope_attention_image(*given, 8)


def test_operands_are_checked():
    product = Product("aqlm-2x8-g8", [512], 256, torch.float32, "cpu")
    weights, last = product.weights, product.last
    z, x, w = torch.randn(2, 256), torch.randn(3, 512), torch.ones(512)
    with pytest.raises(OperandError, match=r"z is \[2, 256\], with 2 tokens instead of 3"):
        joined.additive_matmul_norm(z, *weights, *last, x, w, EPS, 0)
    with pytest.raises(OperandError, match=r"beside x torch.float32 \[2, 64\]"):
        joined.additive_matmul_norm(z, *weights, *last, x[:2, :64], w[:64], EPS, 0)
    with pytest.raises(OperandError, match="image=1 is no image of 2 tokens of 512"):
        joined.additive_matmul_norm(z, *weights, *last, x[:2], w, EPS, 1)
    with pytest.raises(OperandError, match=r"partitions \[512\] are no halves"):
        joined.additive_matmul_swiglu(z, *weights, *last, 2, False, 0)
    with pytest.raises(OperandError, match=r"z is \[2, 2, 256\], expected"):
        joined.additive_matmul_rows(torch.stack([z, z]), *weights, None, *last, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x8-g8", "aqlm-4x8-g8", "aqlm-1x16-g8"])
@pytest.mark.parametrize("batch", [8, 16, 20])
def test_a_step_of_joined_matmuls(scheme, precision, batch, monkeypatch):
    """Its logits are those of the step that is not joined, on the same tokens."""
    from aqlm_infer.bench.shapes import random_model
    from aqlm_infer.generation import llama, prepare_for_generation

    config = tiny_config(
        hidden_size=1024, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=4,
        head_dim=128, eos_token_id=None, max_position_embeddings=1024, vocab_size=512,
        num_hidden_layers=3,
    )  # fmt: skip
    model = random_model(config, scheme, torch.float16, "cuda", precision=precision)
    ids = torch.randint(1, 512, (batch, 40), generator=torch.Generator().manual_seed(1)).cuda()
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True,
               "output_logits": True, "max_new_tokens": 8}  # fmt: skip
    prepare_for_generation(model)
    runner = model.forward.runner
    out = model.generate(ids, **options)
    again = model.generate(ids, **options)
    assert all(map(torch.equal, out.logits, again.logits))
    made = {slot.step.body.joined is not None for slot in runner._slots}
    takes_int8 = precision == "int8" and scheme in ("aqlm-2x8-g8", "aqlm-1x8-g8")
    assert made == {scheme != "aqlm-1x16-g8" and (batch > 8 or takes_int8)}
    kept = list(runner._slots)  # a pool whose graphs are all gone cannot be captured into
    with monkeypatch.context() as changed:
        changed.setattr(llama, "joined_blocks", lambda blocks, tokens: None)
        runner._slots.clear()
        plain = model.generate(ids, **options)
        assert all(slot.step.body.joined is None for slot in runner._slots)
    del kept
    for step, (a, b) in enumerate(zip(out.logits, plain.logits, strict=True)):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < 2e-2, f"step {step}: {error:.1e}"
        same = out.sequences[:, 40 + step] == plain.sequences[:, 40 + step]
        if not same.all():
            break  # a tie was decided the other way: what follows has other tokens
