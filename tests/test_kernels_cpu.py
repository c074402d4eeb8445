"""Every CPU kernel against the float64 oracle: schemes x ISA x dtype x shapes, threads, hygiene."""

import subprocess
import sys

import pytest
import torch
from cases import GOLDEN_LAYERS, ISAS, LAYERS, TOKENS, golden_layer, random_input, random_layer
from tolerances import RELATIVE, assert_close

from aqlm_infer import QuantLinear, ops
from aqlm_infer.backends import KERNELS, native
from aqlm_infer.backends import additive as calls

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def matmul(layer, x, precision="exact", bias=True, partitions=None, packed=None):
    partitions = partitions or (layer.N,)
    if packed is None:
        packed = calls.repack(layer.format, layer.tensors, partitions, precision)
    bias = layer.bias if bias else None
    return calls.matmul(layer.format, x, packed, layer.tensors, bias, partitions, precision)


def check(layer, x, precision="exact", y=None):
    weight = layer.weight()
    y = matmul(layer, x, precision) if y is None else y
    assert y.dtype == x.dtype
    assert_close(y, x.double() @ weight.T + layer.bias.double(), x, weight, x.dtype, precision)


def test_the_native_module_is_built():
    """The suite tests the compiled kernels: a missing module is a failure, not a skip."""
    assert native.cpu_problem is None
    assert "portable" in ISAS


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul(isa, name, scheme, N, K, dtype):
    isa(name)
    assert native.cpu.isa() == name
    layer = random_layer(scheme, N, K, dtype)
    for M in TOKENS:
        check(layer, random_input(M, K, dtype))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("scheme", "N", "K"), [c for c in LAYERS if "8-g" in c[0]])
def test_fast_matmul(isa, name, scheme, N, K):
    isa(name)
    for dtype in DTYPES:
        layer = random_layer(scheme, N, K, dtype)
        for M in (1, 3, 9):
            # Gaussian tokens: 8-bit tables have one scale, so that is what the bound is for.
            x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
            check(layer, x, "fast")


@pytest.mark.parametrize("name", GOLDEN_LAYERS)
def test_golden_forward(name):
    format, spec, tensors = golden_layer(name)
    values = {k: tensors[k] for k in ("codes", "codebooks", "scales")}
    layer = QuantLinear.from_tensors(format, values, spec["in_features"], tensors.get("bias"))
    assert layer.kernel.id.startswith("cpu.")
    for dtype in DTYPES:
        bound = RELATIVE["exact", dtype]
        error = (layer(tensors["x"].to(dtype)).double() - tensors["y"]).norm() / tensors["y"].norm()
        assert error <= bound, f"{dtype}: {error:.2e}"


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x16-g8", "aqlm-2x6-g8"])
def test_outlier_channels(isa, name, scheme):
    """One channel a thousand times the rest must not drown the others' contribution."""
    isa(name)
    layer = random_layer(scheme, 192, 1024)
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(3))
    x[:, 517] *= 1000
    x[1, :512] *= 1e-3
    check(layer, x)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x16-g8"])
def test_tokens_of_very_different_size_in_one_call(isa, name, scheme):
    isa(name)
    layer = random_layer(scheme, 130, 256)
    x = torch.randn(21, 256, generator=torch.Generator().manual_seed(4))
    x *= torch.logspace(-12, 12, 21)[:, None]
    y, weight = matmul(layer, x, bias=False), layer.weight()
    for m in range(len(x)):
        row = x[m : m + 1]
        assert_close(y[m : m + 1], row.double() @ weight.T, row, weight, torch.float32)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x16-g8"])
def test_special_inputs(isa, name, precision, scheme):
    """Zeros give the bias exactly, tiny and huge inputs keep their accuracy, NaN and Inf stay."""
    isa(name)
    layer = random_layer(scheme, 70, 64)
    for M in (1, 5):
        zero = matmul(layer, torch.zeros(M, 64), precision)
        assert torch.equal(zero, layer.bias.expand(M, -1))
        x = torch.randn(M, 64, generator=torch.Generator().manual_seed(M))
        for scale in (1e-30, 1e30):
            y = matmul(layer, x * scale, precision, bias=False)
            exact = (x * scale).double() @ layer.weight().T
            assert_close(y, exact, x * scale, layer.weight(), torch.float32, precision)
        for bad in (float("nan"), float("inf"), float("-inf")):
            y = x.clone()
            y[0, 11] = bad
            assert not torch.isfinite(matmul(layer, y, precision)[0]).any()


@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-4x4-g8", "aqlm-1x16-g8", "aqlm-2x8-g8-o2"])
@pytest.mark.parametrize("name", ISAS)
def test_threads_do_not_change_a_bit(threads, isa, name, scheme):
    isa(name)
    layer = random_layer(scheme, 1030, 264)
    for precision in ("exact", "fast"):
        packed = calls.repack(layer.format, layer.tensors, (layer.N,), precision)
        for M in (1, 2, 5, 16, 33, 200):
            x = random_input(M, layer.K)
            results = []
            for count in (1, 2, 8, 2, 8):
                threads(count)
                results.append(matmul(layer, x, precision, packed=packed))
            assert all(torch.equal(results[0], r) for r in results[1:]), f"M={M} {precision}"


@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
def test_pack_round_trip(threads, scheme, N, K):
    layer = random_layer(scheme, N, K)
    for count in (1, 3):
        threads(count)
        packed = calls.repack(layer.format, layer.tensors, (N,), "exact")
        codes = calls.unpack(layer.format, packed, N, K, (N,))["codes"]
        assert codes.dtype == layer.tensors["codes"].dtype
        assert torch.equal(codes, layer.tensors["codes"])


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
def test_dequantize_is_the_oracle(isa, name, scheme, N, K):
    """Same order of sums, one rounding: equal to the format's own dequantize, bit for bit."""
    isa(name)
    for dtype in DTYPES:
        layer = random_layer(scheme, N, K, dtype)
        packed = calls.repack(layer.format, layer.tensors, (N,), "exact")
        weight = calls.dequantize(layer.format, packed, layer.tensors, K, (N,))
        assert torch.equal(weight, layer.format.dequantize(layer.tensors))


@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x12-g8", "aqlm-2x4-g8-o2"])
@pytest.mark.parametrize("M", [1, 4, 40, 200])
def test_fused_parts(scheme, M):
    """Three layers that share x, with their own codebooks, as one call equal three calls."""
    sizes, K = (66, 34, 130), 88
    parts = [random_layer(scheme, n, K, seed=n) for n in sizes]
    format = parts[0].format
    fused = {k: torch.cat([p.tensors[k] for p in parts]) for k in parts[0].tensors}
    bias = torch.cat([p.bias for p in parts])
    x = random_input(M, K)
    packed = calls.repack(format, fused, sizes, "exact")
    y = calls.matmul(format, x, packed, fused, bias, sizes, "exact")
    assert torch.equal(y, torch.cat([matmul(p, x) for p in parts], dim=1))
    assert torch.equal(calls.unpack(format, packed, sum(sizes), K, sizes)["codes"], fused["codes"])
    weight = calls.dequantize(format, packed, fused, K, sizes)
    canonical = {"packed_codes": fused["codes"]}
    oracle = KERNELS["ref.dequant"].dequantize(format, canonical, fused, K, sizes)
    assert torch.equal(weight, oracle)
    dy = random_input(M, sum(sizes))
    dx = ops.additive_matmul_dx(
        dy, packed["packed_codes"], fused["codebooks"], fused["scales"], K, list(sizes)
    )
    assert_close(dx, dy.double() @ weight.double(), dy, weight.T, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 3, 20])
def test_gradient_of_the_input(dtype, M):
    layer = random_layer("aqlm-2x8-g8", 66, 136, dtype)
    quant = QuantLinear.from_tensors(layer.format, layer.tensors, layer.K, layer.bias)
    x = random_input(M, layer.K, dtype).detach().requires_grad_()
    dy = random_input(M, layer.N, dtype, seed=5)
    quant.bias.requires_grad_()
    quant(x).backward(dy)
    weight = layer.weight()
    assert_close(x.grad, dy.double() @ weight, dy, weight.T, dtype)
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    expected = dy.double().sum(0)
    assert (quant.bias.grad.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("M", [1, 2, 17])
def test_mixed_dtypes(M):
    """float16 parameters with float32 or bfloat16 tokens: computed in float32, returned as x."""
    layer = random_layer("aqlm-2x8-g8", 65, 72, torch.float16)
    for dtype in (torch.float32, torch.bfloat16):
        check(layer, random_input(M, 72, dtype))


def test_leading_dimensions_and_strides():
    layer = random_layer("aqlm-2x8-g8", 40, 64)
    packed = calls.repack(layer.format, layer.tensors, (40,), "exact")
    base = torch.randn(6, 5, 64, generator=torch.Generator().manual_seed(0))
    for x in (
        base,
        base.transpose(0, 1),
        base[::2, 1:4],
        base[0],
        base[0, 0],
        base.expand(6, 5, 64),
    ):
        y = matmul(layer, x, packed=packed)
        expected = x.double() @ layer.weight().T + layer.bias.double()
        assert y.shape == (*x.shape[:-1], 40)
        assert_close(y.reshape(-1, 40), expected.reshape(-1, 40), x.reshape(-1, 64),
                     layer.weight(), torch.float32)  # fmt: skip
    column = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).t()
    check(layer, column)


@pytest.mark.parametrize("name", ISAS)
def test_no_write_outside_the_output(isa, name):
    """Rows before and after, and the columns between strided rows, keep their bytes."""
    isa(name)
    for scheme, N, K in LAYERS:
        layer = random_layer(scheme, N, K)
        format = layer.format
        packed = calls.repack(format, layer.tensors, (N,), "exact")["packed_codes"]
        for M in (1, 2, 5, 16):
            x, guard = random_input(M, K), torch.full((M + 2, N + 3), 7.5)
            plan = native.cpu.AdditivePlan(
                [N], K, format.num_codebooks, format.nbits, format.in_group_size,
                format.out_group_size, "float32", "float32", "exact",
            )  # fmt: skip
            done = plan.matmul(
                x=x.data_ptr(), x_row_stride=x.stride(0), packed=packed.data_ptr(),
                codebooks=layer.tensors["codebooks"].data_ptr(),
                scales=layer.tensors["scales"].data_ptr(), bias=0, prepared=0,
                y=guard[1:, 1:].data_ptr(), y_row_stride=N + 3, M=M, num_threads=2,
            )  # fmt: skip
            assert done
            written = guard != 7.5
            written[1 : M + 1, 1 : N + 1] = False
            assert not written.any()


@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-4x4-g8", "aqlm-2x8-g8-o2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codebooks_that_change_in_place(scheme, dtype):
    """What was prepared for the old values is not used for the new ones, nor ever needed."""
    layer = random_layer(scheme, 130, 136, dtype)
    buffers = calls.repack(layer.format, layer.tensors, (130,), "exact")
    assert buffers["aux"].numel() > 0
    for M in (1, 2, 16):
        x = random_input(M, 136, dtype)
        assert torch.equal(
            matmul(layer, x, packed=buffers),
            matmul(layer, x, packed={**buffers, "aux": torch.empty(0, dtype=torch.uint8)}),
        )
    layer.tensors["codebooks"].data[-1, -1] += 3
    for M in (1, 2, 16):
        x = random_input(M, 136, dtype)
        check(layer, x, y=matmul(layer, x, packed=buffers))


def test_out_of_range_code_is_refused_when_packing():
    layer = random_layer("aqlm-2x6-g8", 4, 16)
    codes = layer.tensors["codes"].clone()
    codes[1, 1, 1] = 40
    with pytest.raises(ValueError, match="40"):
        ops.additive_pack(codes, 6, 1, 8, [4])


def test_operands_that_disagree_are_refused():
    layer = random_layer("aqlm-2x8-g8", 16, 64)
    packed = calls.repack(layer.format, layer.tensors, (16,), "exact")
    books, scales = layer.tensors["codebooks"], layer.tensors["scales"]
    call = ops.additive_matmul
    codes, aux = packed["packed_codes"], packed["aux"]
    with pytest.raises(ValueError, match="K=60 is not a multiple of 8"):
        call(torch.randn(2, 60), codes, books, scales, None, aux, [16], "exact")
    with pytest.raises(ValueError, match="packed holds"):
        call(torch.randn(2, 128), codes, books, scales, None, aux, [16], "exact")
    with pytest.raises(ValueError, match=r"bias has shape \[15\], expected \[16\]"):
        call(torch.randn(2, 64), codes, books, scales, torch.ones(15), aux, [16], "exact")
    with pytest.raises(ValueError, match="x has dtype torch.int64"):
        call(torch.ones(2, 64, dtype=torch.int64), codes, books, scales, None, aux, [16], "exact")
    with pytest.raises(ValueError, match="'int8'"):
        call(torch.randn(2, 64), codes, books, scales, None, aux, [16], "int8")
    with pytest.raises(ValueError, match="float64"):
        call(
            torch.randn(2, 64, dtype=torch.float64), codes, books, scales, None, aux, [16], "exact"
        )
    with pytest.raises(ValueError, match="aux holds 3 bytes"):
        call(torch.randn(2, 64), codes, books, scales, None, aux[:3], [16], "exact")
    with pytest.raises(ValueError, match="scales has 15 rows"):
        call(torch.randn(2, 64), codes, books, scales[1:], None, aux, [16], "exact")


@pytest.mark.parametrize("value", ["avx1024", "AVX2"])
def test_isa_override_is_checked(value):
    code = "import aqlm_infer; from aqlm_infer.backends import native; native.cpu.isa()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"AQLM_CPU_ISA": value, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert value in run.stderr and "portable" in run.stderr


def test_isa_override_by_environment():
    code = "from aqlm_infer.backends import native; import aqlm_infer; print(native.cpu.isa())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"AQLM_CPU_ISA": "portable", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "portable"


def test_kernel_table_matches_the_registry():
    """The registry knows families; the module lists their bodies (lut-bytes, lut-tokens, ...)."""
    compiled = [row["id"] for row in native.cpu.kernel_table()]
    for family in (k.removesuffix(".rotated") for k in KERNELS if k.startswith("cpu.")):
        assert any(body.startswith(family) for body in compiled), family


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 40), (64, 64), (130, 200), (257, 1031)])
def test_dense_matvec(threads, isa, name, dtype, N, K):
    """Rows of a wider matrix, any number of threads, with and without a bias."""
    isa(name)
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K + 8, generator=rng).to(dtype)[:, :K]
    x, bias = (torch.randn(*s, generator=rng).to(dtype) for s in ((1, 1, K), (N,)))
    for given in (None, bias):
        threads(1)
        y = ops.dense_matvec(x, weight, given)
        assert y.shape == (1, 1, N) and y.dtype == dtype
        exact = x[0].double() @ weight.double().T + (0 if given is None else given.double())
        assert_close(y[0], exact, x[0], weight, dtype)
        for count in (2, 3, 7):
            threads(count)
            assert torch.equal(ops.dense_matvec(x, weight, given), y)


def test_dense_matvec_bad_operands():
    weight, x = torch.randn(8, 16), torch.randn(16)
    for bad, match in (
        ((torch.randn(2, 16), weight, None), "expected one row"),
        ((x[:8], weight, None), "expected one row"),
        ((x.bfloat16(), weight, None), "weight has dtype torch.float32, x torch.bfloat16"),
        ((x, weight[0], None), r"weight is \[16\]"),
        ((x, weight, torch.randn(7)), r"bias has shape \[7\]"),
    ):
        with pytest.raises(ops.OperandError, match=match):
            ops.dense_matvec(*bad)
    assert ops.dense_matvec(x.to("meta"), weight.to("meta"), None).shape == (8,)
