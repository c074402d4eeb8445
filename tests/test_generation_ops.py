"""Operators of a decode step against float64, on the CPU and (marked gpu) in Triton."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import ISAS

from aqlm_infer.formats.rotation import Hadamard, hadamard_transform
from aqlm_infer.generation import ops
from aqlm_infer.ops import OperandError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KERNELS = ["cpu", *(pytest.param(kind, marks=pytest.mark.gpu) for kind in ("cuda", "triton"))]
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def rand(*shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def run(kernel: str, name: str, *given):
    """An operator; "cuda": the kernel that is launched where there is no graph."""
    return getattr(ops.EAGER if kernel == "cuda" else ops, name)(*given)


def device_of(kernel: str) -> str:
    return "cpu" if kernel == "cpu" else "cuda"


def close(y, exact, dtype):
    error = (y.double().cpu() - exact.double().cpu()).norm() / exact.double().norm().cpu()
    assert error <= LIMITS[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("M", "N"), [(1, 96), (3, 4096), (5, 8192), (300, 100), (2, 20480)])
def test_norms(kernel, dtype, M, N):
    device = device_of(kernel)
    x = rand(M, 2 * N, device=device, dtype=dtype)[:, :N]  # rows apart
    delta, weight = (rand(*s, device=device, dtype=dtype, seed=1) for s in ((M, N), (N,)))

    def exact(total):
        wide = total.double()
        return weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    if kernel != "cuda":
        close(ops.rms_norm(x, weight, 1e-5), exact(x), dtype)
    total, y = run(kernel, "add_rms_norm", x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    close(y, exact(total), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("filled", [0, 1, 300])
def test_a_norm_that_fetches_is_the_norm(device, filled):
    x, weight = (rand(*s, device=device, dtype=torch.float16) for s in ((3, 384), (384,)))
    delta = x.flip(0)
    keys = rand(3, 2, 300, 80, device=device, dtype=torch.float16)
    at = torch.tensor([filled], device=device)
    y = ops.add_rms_norm_fetch(x, delta, weight, 1e-5, keys, keys + 1, at)
    assert all(map(torch.equal, y, ops.add_rms_norm(x, delta, weight, 1e-5)))
    with pytest.raises(OperandError, match=r"expected \[B, Hkv, L, D\] with contiguous heads"):
        ops.add_rms_norm_fetch(x, delta, weight, 1e-5, keys[..., :64], keys[..., :64], at)
    with pytest.raises(OperandError, match=r"filled torch.int32 \[1\] is not one int64"):
        ops.add_rms_norm_fetch(x, delta, weight, 1e-5, keys, keys, at.int())


@pytest.mark.parametrize("name", ISAS)
def test_native_operators(isa, threads, name):
    """Every instruction set: sizes that are no multiple of its vectors, any number of threads."""
    isa(name)
    for dtype in LIMITS:
        test_norms("cpu", dtype, 33, 2055)
        test_swiglu_takes_halves_of_one_product("cpu", dtype, 3, 751)
        test_rope_attention("cpu", dtype, (3, 6, 2, 700, 90, 690))
        test_choose_takes_the_first_of_equals_and_counts("cpu", 5001, 5)
        x = rand(97, 2055, device="cpu", dtype=dtype)
        case = attention_case("cpu", dtype, 3, 6, 2, 700, 90, 690)
        results = []
        for count in (1, 2, 5):
            threads(count)
            q, key, value, keys, values, mask, cos, sin, ids = (t.clone() for t in case)
            at, counts = torch.tensor([690]), torch.zeros(6, dtype=torch.int32)
            y = ops.rope_attention(
                q, key, value, cos, sin, ids, at, keys, values, mask, counts, 0.3
            )
            results.append((ops.add_rms_norm(x, x, x[0], 1e-5)[1], ops.swiglu(x, x), y))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_native_swiglu_of_every_magnitude(isa):
    """Where the exponential is bounded, and infinities: what torch says; NaN stays."""
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 3e38, -3e38])])[None]
    exact = F.silu(x.double())
    for name in ISAS:
        isa(name)
        y = ops.swiglu(x, torch.ones_like(x)).double()
        assert ((y - exact).abs() <= 4e-7 * exact.abs() + 1e-36).all()
        edges = torch.tensor([[float("inf"), float("-inf"), float("nan")]])
        big, small, nan = ops.swiglu(edges, torch.ones(1, 3))[0]
        assert big == float("inf") and small == 0 and nan.isnan()


def test_native_attention_to_nothing_is_zero_and_positions_are_checked():
    case = attention_case("cpu", torch.float32, 1, 4, 2, 40, 64, 7)
    q, key, value, keys, values, mask, cos, sin, ids = case
    counts, at = torch.zeros(2, dtype=torch.int32), torch.tensor([7])
    fixed = q, key, value, cos, sin
    nothing = torch.zeros_like(mask)
    assert not ops.rope_attention(*fixed, ids, at, keys, values, nothing, counts, 0.3).any()
    with pytest.raises(ValueError, match="position 40 is outside a cache of 40"):
        ops.rope_attention(*fixed, ids, at + 33, keys, values, mask, counts, 0.3)
    with pytest.raises(ValueError, match="rotary position 40 is outside"):
        ops.rope_attention(*fixed, ids * 0 + 40, at, keys, values, mask, counts, 0.3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("M", "N"), [(3, 750), (200, 750), (33, 1024)])
def test_swiglu_takes_halves_of_one_product(kernel, dtype, M, N):
    both = rand(M, 2 * N, device=device_of(kernel), dtype=dtype)
    gate, up = both[:, :N], both[:, N:]
    close(run(kernel, "swiglu", gate, up), F.silu(gate.double()) * up.double(), dtype)


def attention_case(device, dtype, B, H, heads, L, D, filled):
    q, key, value = (rand(B, n, D, device=device, dtype=dtype, seed=s)
                     for s, n in enumerate((H, heads, heads)))  # fmt: skip
    keys, values = (rand(B, heads, L, D, device=device, dtype=dtype, seed=s) for s in (3, 4))
    keys[:, :, filled:], values[:, :, filled:] = float("nan"), float("nan")  # never read
    mask = torch.rand(B, L, generator=torch.Generator().manual_seed(5)) < 0.8
    mask[:, filled] = True
    angle = torch.arange(L)[:, None] * 0.3 ** torch.arange(D // 2)[None]
    cos, sin = (torch.cat((f, f), 1).to(dtype).to(device) for f in (angle.cos(), angle.sin()))
    ids = torch.arange(B)[:, None] + filled - B
    return q, key, value, keys, values, mask.to(device), cos, sin, ids.clamp(min=0).to(device)


def rotated64(x, cos, sin):
    x, cos, sin = x.double(), cos.double(), sin.double()
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def attention64(q, keys, values, mask, cos, sin, ids, filled):
    """Attention to positions up to ``filled``, whose key and value are stored; what is seen."""
    seen = mask & (torch.arange(mask.shape[1], device=mask.device) <= filled)
    rows = rotated64(q, cos[ids], sin[ids]).unflatten(1, (keys.shape[1], -1))
    stored_k, stored_v = (t[:, :, : filled + 1].double() for t in (keys, values))
    exact = F.scaled_dot_product_attention(
        rows, stored_k, stored_v, seen[:, None, None, : filled + 1], scale=0.3
    )
    return exact.flatten(1, 2), seen


CASES = [
    (1, 32, 8, 512, 128, 256), (1, 32, 8, 512, 128, 0), (2, 4, 4, 100, 64, 99),
    (16, 8, 2, 320, 128, 200), (1, 8, 1, 4096, 128, 3000), (3, 6, 2, 70, 80, 69),
    (64, 4, 4, 256, 64, 131), (16, 32, 8, 256, 128, 255), (1, 8, 1, 4096, 64, 4095),
    (7, 14, 2, 512, 128, 130),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rope_attention(device, dtype, case):
    B, H, heads, L, D, filled = case
    q, key, value, keys, values, mask, cos, sin, ids = attention_case(device, dtype, *case)
    if device == "cpu":  # torch's attention multiplies by a weight of zero what is not seen
        keys[:, :, filled:], values[:, :, filled:] = 1.0, 1.0
    counts = torch.zeros(B * heads, dtype=torch.int32, device=device)
    old_keys, at = keys.clone(), torch.tensor([filled], device=device)
    arguments = (q, key, value, cos, sin, ids, at, keys, values, mask, counts, 0.3)
    y = ops.rope_attention(*arguments)
    new_key = rotated64(key, cos[ids], sin[ids])
    close(keys[:, :, filled], new_key, dtype)
    assert torch.equal(values[:, :, filled], value)
    assert torch.equal(keys[:, :, :filled], old_keys[:, :, :filled])
    assert not counts.any()
    exact, seen = attention64(q, keys, values, mask, cos, sin, ids, filled)
    close(y, exact, dtype)
    assert torch.equal(ops.rope_attention(*arguments), y)
    keys[:, :, filled:], values[:, :, filled:] = 0.0, 0.0
    keys[:, :, filled] = new_key.to(dtype)
    values[:, :, filled] = value
    turned = rotated64(q, cos[ids], sin[ids]).to(dtype)
    close(ops.decode_attention(turned[:, :, None], keys, values, seen, 0.3)[:, 0], y, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "case",
    [(2, 16, 4, 513, 128, 512), (1, 8, 1, 1000, 64, 700), (3, 4, 4, 2048, 128, 2047),
     (2, 6, 2, 700, 128, 63), (1, 4, 2, 60, 64, 59)], ids=str,
)  # fmt: skip
def test_attention_by_clusters(dtype, case):
    """Of any length, also where ``rope_attention`` takes the kernel of chunks."""
    q, key, value, keys, values, mask, cos, sin, ids = attention_case("cuda", dtype, *case)
    filled = torch.tensor([case[-1]], device="cuda")
    arguments = (q, key, value, cos, sin, ids, filled, keys, values, mask, 0.3, 0)
    y = torch.ops.aqlm_infer.step_attention(*arguments)
    close(keys[:, :, case[-1]], rotated64(key, cos[ids], sin[ids]), dtype)
    assert torch.equal(values[:, :, case[-1]], value)
    close(y, attention64(q, keys, values, mask, cos, sin, ids, case[-1])[0], dtype)
    assert torch.equal(torch.ops.aqlm_infer.step_attention(*arguments), y)
    many, cache = (torch.zeros(1, n, 64, 64, device="cuda", dtype=dtype) for n in (9, 1))
    q, table, mask = many[:, :, 0], cache[0, 0], torch.ones(1, 64, device="cuda", dtype=torch.bool)
    others = table, table, ids[:1], filled, cache, cache, mask
    with pytest.raises(RuntimeError, match=r"no clusters for q \[1, 9, 64\] and 1 heads"):
        torch.ops.aqlm_infer.step_attention(q, q[:, :1], q[:, :1], *others, 0.3, 0)


PROMPTS = [(1, 32, 8, 300, 512, 128), (3, 6, 2, 17, 40, 80), (2, 4, 4, 1, 1, 64),
           (2, 3, 1, 9, 12, 20)]  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", PROMPTS, ids=str)
def test_rope_store(kernel, dtype, case):
    """q, key and value are slices of one product; positions are the sequences' own."""
    device = device_of(kernel)
    B, H, heads, T, L, D = case
    product = rand(B * T, (H + 2 * heads) * D, device=device, dtype=dtype)
    q, key, value = (
        part.view(B, T, -1, D) for part in product.split((H * D, heads * D, heads * D), 1)
    )
    angle = torch.arange(L)[:, None] * 0.3 ** torch.arange(D // 2)[None]
    cos, sin = (torch.cat((f, f), 1).to(dtype).to(device) for f in (angle.cos(), angle.sin()))
    ids = (torch.arange(T)[None] - torch.arange(B)[:, None]).clamp(min=0).to(device)
    keys, values = (rand(B, heads, L, D, device=device, dtype=dtype, seed=s) for s in (3, 4))
    rest = keys[:, :, T:].clone(), values[:, :, T:].clone()
    y = run(kernel, "rope_store", q, key, value, cos, sin, ids, keys, values)
    at = cos[ids][:, :, None], sin[ids][:, :, None]
    close(y, rotated64(q, *at), dtype)
    close(keys[:, :, :T], rotated64(key, *at).transpose(1, 2), dtype)
    assert torch.equal(values[:, :, :T], value.transpose(1, 2))
    assert torch.equal(keys[:, :, T:], rest[0]) and torch.equal(values[:, :, T:], rest[1])
    again = run(kernel, "rope_store", q, key, value, cos, sin, ids, keys, values)
    assert torch.equal(again, y)


def test_rope_store_refuses_what_does_not_fit():
    q, keys = torch.ones(1, 5, 4, 8), torch.ones(1, 2, 4, 8)
    table, ids = torch.ones(4, 8), torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(OperandError, match="5 tokens of 4 heads do not fit a cache of 4 positions"):
        ops.rope_store(q, q[:, :, :2], q[:, :, :2], table, table, ids, keys, keys.clone())
    with pytest.raises(OperandError, match=r"key is \[1, 5, 1, 8\], expected \[1, 5, 2, 8\]"):
        ops.rope_store(q, q[:, :, :1], q[:, :, :2], table, table, ids, keys, keys.clone())


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [16, 32, 64, 128, 512])
def test_every_chunk_size(chunk):
    from aqlm_infer.triton_kernels import decode

    q, _, _, keys, values, mask, *_ = attention_case("cuda", torch.float16, 2, 8, 2, 500, 128, 499)
    keys[:, :, 499], values[:, :, 499] = 1.0, 1.0
    y = decode.attention(q, keys, values, mask, 0.1, chunk=chunk)
    close(y, ops._attend(q.double(), keys.double(), values.double(), mask, 0.1), torch.float16)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_embedding_with_its_norm(kernel, dtype):
    device = device_of(kernel)
    table, weight = (rand(*s, device=device, dtype=dtype, seed=1) for s in ((50, 384), (384,)))
    tokens = torch.tensor([7, 0, 49], device=device)
    x, y = run(kernel, "embed_norm", tokens, table, weight, 1e-5)
    assert torch.equal(x, table[tokens])
    close(y, ops.rms_norm(x, weight, 1e-5), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("M", "K"), [(1, 4096), (3, 14336), (2, 128), (16, 8192), (5, 5120)])
def test_norm_with_the_rotation_after_it(device, dtype, M, K):
    rotation = Hadamard.full(K)
    h, factor = rotation.matrix(device), rotation.factor
    x = rand(M, 2 * K, device=device, dtype=dtype)[:, :K]  # rows apart
    delta, weight = (rand(*s, device=device, dtype=dtype, seed=1) for s in ((M, K), (K,)))
    su = rand(K, device=device, seed=2)
    total, y = ops.rotated_norm(x, delta, weight, 1e-5, su, h, factor)
    assert torch.equal(total, x + delta)
    wide = total.double()
    norm = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    close(y, hadamard_transform(su.double() * norm, factor, 0, True), dtype)
    assert torch.equal(ops.rotated_norm(x, delta, weight, 1e-5, su, h, factor)[1], y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [97, 512, 128256, 32000])
@pytest.mark.parametrize("rows", [5, 64])
def test_choose_takes_the_first_of_equals_and_counts(device, size, rows):
    scores = rand(rows, size, device=device, dtype=torch.float16)
    scores[1] = 0.0
    scores[2, size // 2 :] = 60.0
    scores[3, -1] = 60.0
    scores[4] = float("-inf")
    exact = torch.stack([(row == row.max()).nonzero()[0, 0] for row in scores])
    best, tokens = (torch.zeros(s, dtype=torch.long, device=device) for s in (rows, (rows, 1)))
    positions, lengths = tokens + 5, torch.arange(7, device=device)
    counts = torch.zeros(rows, dtype=torch.int32, device=device)
    for step in (1, 2):
        ops.choose(scores, best, tokens, positions, lengths, counts)
        assert torch.equal(best, exact) and torch.equal(tokens[:, 0], exact)
        assert (positions == 5 + step).all() and not counts.any()
        assert lengths.tolist() == [n + step for n in range(7)]


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from aqlm_infer.triton_kernels import decode

A = {"GROUP": 4, "ROWS": 16, "D": 128, "DP": 128, "TILE": 64, "GP": 4, "PRECISION": "tf32",
     "IMAGE": 0}

def sizes(chunks, slots, segment):
    return {"CHUNKS": chunks, "SLOTS": slots, "SEGMENT": segment}

CASES = [
    (decode._attend, {**A, **sizes(8, 8, 8), "NEW": True, "EARLY": True}),
    (decode._attend, {**A, **sizes(33, 64, 16), "NEW": False, "EARLY": False}),
    (decode._attend, {**A, **sizes(1, 1, 1), "NEW": True, "EARLY": False}),
    (decode._attend, {**A, **sizes(4, 4, 4), "NEW": True, "EARLY": True, "IMAGE": 32}),
    (decode._rope_store, {"H": 14, "HEADS": 2, "D": 80, "HP": 16, "KP": 2, "DP": 128}),
    (decode._add_rms_norm, {"BLOCK": 4096, "ADD": True, "EMBED": False}),
    (decode._add_rms_norm, {"BLOCK": 4096, "ADD": False, "EMBED": True}),
    (decode._add_rms_norm_fetch, {"BLOCK": 4096, "LINE": 64, "STEP": 512}),
    (decode._swiglu, {"BLOCK": 512}),
    (decode._choose, {"BLOCK": 1024, "PARTS": 128, "LAYER_BLOCK": 32}),
]
TYPES = {"tops_ptr": "*fp32", "places_ptr": "*i32",
         **dict.fromkeys(("token_ptr", "tokens_ptr", "best_ptr", "positions_ptr", "lengths_ptr"),
                         "*i64"),
         "partial_ptr": "*fp32", "stats_ptr": "*fp32", "count_ptr": "*i32", "ids_ptr": "*i64",
         "at_ptr": "*i64", "mask_ptr": "*i1", "scale": "fp32", "eps": "fp32"}
for body, constants in CASES:
    for arch, pdl in ((80, False), (90, True)):
        values = {**constants, "PDL": pdl}
        default = {n: "*fp16" if n.endswith("_ptr") else "i32" for n in body.arg_names}
        types = {n: "constexpr" if n in values else TYPES.get(n, t) for n, t in default.items()}
        at = {(body.arg_names.index(name),): value for name, value in values.items()}
        source = ASTSource(fn=body, signature=types, constexprs=at)
        assert triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]
print("compiled", len(CASES))
"""


def test_kernels_compile_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.stdout.strip() == "compiled 10", run.stderr[-2000:]


def test_operands_are_checked():
    q, key, value, keys, values, mask, cos, sin, ids = attention_case(
        "cpu", torch.float32, 2, 4, 2, 16, 8, 3
    )
    with pytest.raises(OperandError, match=r"with H a multiple of Hkv"):
        ops.decode_attention(q[:, :3, None], keys, values, mask, 1.0)
    with pytest.raises(OperandError, match=r"expected bool \[B, L\]"):
        ops.decode_attention(q[:, :, None], keys, values, mask.float(), 1.0)
    with pytest.raises(OperandError, match=r"counts is \[1\], expected contiguous \[4\]"):
        ops.rope_attention(
            q, key, value, cos, sin, ids, torch.tensor([3]), keys, values, mask,
            torch.zeros(1, dtype=torch.int32), 1.0,
        )  # fmt: skip
    with pytest.raises(OperandError, match=r"\[2, 8\] beside torch.float32 \[2, 16\]"):
        ops.swiglu(torch.randn(2, 16), torch.randn(2, 8))
    h, wide = torch.empty(0, dtype=torch.int8), torch.randn(2, 64)
    with pytest.raises(OperandError, match="K=64, factor=1: K/factor must be at least 128"):
        ops.rotated_norm(wide, wide, wide[0], 1e-5, torch.ones(64), h, 1)
    with pytest.raises(OperandError, match=r"tokens torch.int32 \[2\], table \[5, 8\]"):
        ops.embed_norm(torch.zeros(2).int(), torch.randn(5, 8), torch.ones(8), 1e-5)
    one = torch.zeros(1, dtype=torch.long)
    with pytest.raises(OperandError, match=r"best is \[1\], expected 2 contiguous numbers"):
        ops.choose(torch.randn(2, 9), one, one, one, one, one.int())
