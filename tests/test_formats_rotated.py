"""Rotations, E8P and scalar grids against golden data, and their round trips and refusals."""

import pytest
import torch
from cases import (
    ROTATED_LAYERS,
    SCALAR_LAYERS,
    golden,
    golden_e8p,
    random_layer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from aqlm_infer.formats import E8PFormat, FormatError, QuipFormat, ScalarFormat, parse_scheme
from aqlm_infer.formats.e8p import (
    CODEBOOK_IDS,
    grid_x4,
    pack_e8p,
    packed_table,
    residual_x2,
    source_set,
    unpack_e8p,
)
from aqlm_infer.formats.hadamard import PUBLISHED, construction, factor_matrix, factor_of, sylvester
from aqlm_infer.formats.rotation import (
    Hadamard,
    hadamard_transform,
    kronecker_sizes,
    kronecker_transform,
)
from aqlm_infer.formats.scalar import pack_bits, unpack_bits

HADAMARD = golden("quip_hadamard")
CODEBOOK = golden("quip_e8p_codebook")
SCALAR = golden("quip_scalar")

OURS = (4, 44, 68, 76, 84, 100, 132, 148, 180, 284, 368, 924)
"""Orders that the published format lacks: Paley I and II, over primes and over GF(49)."""


def relative(y, expected):
    y, expected = y.double(), expected.double()
    return float((y - expected).norm() / expected.norm())


# -- rotations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("F", PUBLISHED)
def test_published_factors_bit_for_bit(F):
    assert torch.equal(factor_matrix(F), HADAMARD[f"had{F}"])


@pytest.mark.parametrize("F", (*PUBLISHED, *OURS))
def test_factors_are_hadamard_matrices(F):
    H = factor_matrix(F).double()
    assert (H.abs() == 1).all()
    assert torch.equal(H @ H.T, F * torch.eye(F, dtype=torch.float64))


def test_the_factor_over_gf49_and_constructions():
    assert construction(100) == "paley-2 q=49" and construction(84) == "paley-1 q=83"
    assert construction(172) == "williamson" and construction(428) is None


@pytest.mark.parametrize(
    ("K", "F"),
    [
        (4096, 1), (8192, 1), (5120, 20), (11008, 172), (14336, 28), (28672, 28), (3072, 12),
        (13824, 108), (6656, 52), (17920, 140), (18432, 36), (9728, 76), (17408, 68), (18944, 148),
        (25600, 100), (29568, 924), (5376, 84), (21504, 84), (2880, 180), (4544, 284), (4864, 76),
    ],
)  # fmt: skip
def test_factors_of_model_sizes(K, F):
    assert factor_of(K) == F and Hadamard.full(K).matrix().numel() == (F * F if F > 1 else 0)


@pytest.mark.parametrize("K", [13696, 10920, 7, 0, 9, 214])
def test_sizes_without_a_factor_say_what_is_known(K):
    with pytest.raises(FormatError, match=f"size {K}"):
        factor_of(K)


@pytest.mark.parametrize("n", sorted({int(k[2:]) for k in HADAMARD if k[:2] == "x_"}))
def test_golden_transforms(n):
    x = HADAMARD[f"x_{n}"].double()
    rotation = Hadamard.full(n)
    if f"K_{n}" in HADAMARD:
        assert rotation.factor == int(HADAMARD[f"K_{n}"])
    for name, transpose in (("U", False), ("Ut", True)):
        y = rotation.apply(x, transpose)
        assert relative(rotation.apply(x.float(), transpose), y) < 1e-6
        if f"{name}_{n}" in HADAMARD:
            assert relative(HADAMARD[f"{name}_{n}"], y) < 2e-6
        else:
            assert relative(HADAMARD[f"{name}_{n}_head"], y[..., :512]) < 2e-6
            assert relative(HADAMARD[f"{name}_{n}_tail"], y[..., -512:]) < 2e-6


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from((1, 4, 12, 20, 28, 52, 76, 100)),
    st.integers(0, 4),
    st.integers(0, 2**31),
)
def test_transforms_undo_each_other_and_match_the_definition(F, power, seed):
    K = F << power
    x = torch.randn(2, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = hadamard_transform(x, F, 0)
    assert torch.allclose(hadamard_transform(y, F, 0, transpose=True), x, atol=1e-12)
    U = torch.kron(factor_matrix(F), sylvester(1 << power)).double() / K**0.5
    assert torch.allclose(y, x @ U.T, atol=1e-12)


def test_block_transform():
    x = torch.randn(3, 384, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = Hadamard.blocks(384).apply(x)
    assert torch.allclose(Hadamard.blocks(384).apply(y), x, atol=1e-12)
    S = sylvester(128).double() / 128**0.5
    assert torch.allclose(y[:, 128:256], x[:, 128:256] @ S, atol=1e-12)
    with pytest.raises(FormatError, match="size 200: not a multiple of 128"):
        Hadamard.blocks(200)


@pytest.mark.parametrize("n", [24, 64, 96, 160])
def test_golden_kronecker(n):
    parts = {k: SCALAR[f"kron{n}.{k}"] for k in ("B0", "B1", "p_in", "p_out")}
    assert (len(parts["B0"]), len(parts["B1"])) == kronecker_sizes(n)
    x = SCALAR[f"kron{n}.x"].double()
    y = kronecker_transform(x, parts)
    assert relative(y, SCALAR[f"kron{n}.y"]) < 1e-6
    assert relative(SCALAR[f"kron{n}.dense"] @ x.float(), y) < 1e-6
    assert relative(kronecker_transform(y, parts, transpose=True), x) < 1e-6


@pytest.mark.parametrize(
    ("n", "sizes"),
    [(768, (48, 16)), (4096, (64, 64)), (5120, (160, 32)), (11008, (688, 16)),
     (13824, (96, 144)), (14336, (64, 224)), (28672, (448, 64))],
)  # fmt: skip
def test_kronecker_sizes(n, sizes):
    assert kronecker_sizes(n) == sizes


# -- E8P -------------------------------------------------------------------------------------------


def test_golden_codebooks():
    assert torch.equal(source_set(), CODEBOOK["abs_grid_x2"])
    assert torch.equal(packed_table(), CODEBOOK["grid_packed_abs"].long() & 0xFFFFFFFF)
    assert torch.equal(grid_x4(), CODEBOOK["grid_x4"])
    assert torch.equal(residual_x2(), CODEBOOK["e81b_grid_x2"])
    assert len(grid_x4().unique(dim=0)) == 65536


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_golden_packing_both_ways(bits):
    format = E8PFormat(bits)
    high = CODEBOOK["pack2_idx" if bits == 2 else f"pack{bits}_idx_hi"]
    low = None if bits == 2 else CODEBOOK[f"pack{bits}_idx_lo"]
    packed = CODEBOOK[f"pack{bits}_Qidxs"]
    assert torch.equal(format.pack_codes(high, low)["Qidxs"], packed)
    codes, residual = format.unpack_codes(packed)
    assert torch.equal(codes, high)
    assert residual is None if bits == 2 else torch.equal(residual, low)
    weight = format.decode(packed, torch.float32)
    expected = CODEBOOK["pack2_W_x4"].float() / 4 if bits == 2 else CODEBOOK[f"pack{bits}_W"]
    assert torch.equal(weight, expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_e8p_packing_round_trip(rows, columns, seed):
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**63), 2**63 - 1, (16 * rows, 2 * columns), generator=rng)
    codes = unpack_e8p(words)
    assert int(codes.min()) >= 0 and int(codes.max()) < 65536
    assert torch.equal(pack_e8p(codes), words)


def e8p_cases():
    for bits in (2, 3, 4):
        for name in golden_e8p(bits):
            yield bits, name


@pytest.mark.parametrize(("bits", "name"), list(e8p_cases()))
def test_golden_e8p_layers(bits, name):
    tensors = golden_e8p(bits)[name]
    format = E8PFormat(bits, parts=(128, 64, 64) if name == "fused" else ())
    N, K = len(tensors["SV"]), len(tensors["SU"])
    specs = format.tensor_specs(N, K)
    canonical = {n: tensors[n] for n in specs}
    format.check_tensors(canonical, N, K)
    assert format.out_features(canonical) == N
    weight = format.dequantize(canonical, torch.float64)
    if "W_orig" in tensors:
        assert relative(tensors["W_orig"], weight) < 1e-7
    if name == "fused":
        y = tensors["x"].double() @ weight.T
        for part, expected in zip("qkv", y.split([128, 64, 64], 1), strict=True):
            assert relative(tensors[part], expected) < 1e-3
    for M in (1, 2, 5):
        if f"x{M}" in tensors:
            y = tensors[f"x{M}"].double() @ weight.T
            assert relative(tensors[f"y{M}_ref"], y) < 5e-4
            if f"y{M}_f64" in tensors:
                assert relative(tensors[f"y{M}_f64"], y) < 1e-7


def test_old_checkpoints_multiply_by_wscale():
    """New files hold the scale in SV and 1 in Wscale, old ones hold both apart."""
    format, tensors = E8PFormat(2), golden_e8p(2)["192x320"]
    new = format.dequantize(tensors, torch.float64)
    scale = torch.tensor(0.0125)
    old = {**tensors, "Wscale": scale, "SV": tensors["SV"].double() / scale.double()}
    assert relative(format.dequantize(old, torch.float64), new) < 1e-15


def test_another_residual_scale():
    tensors = golden_e8p(4)["128x192"]
    plain = E8PFormat(4).decode(tensors["Qidxs"], torch.float64)
    other = E8PFormat(4, residual=3.6).decode(tensors["Qidxs"], torch.float64)
    codes, residual = E8PFormat(4).unpack_codes(tensors["Qidxs"])
    step = grid_x4()[residual].double().flatten(1) / 4 * (1 / 3.6 - 1 / 3.45)
    assert torch.allclose(other - plain, step, atol=1e-14)


# -- scalar grids ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from((2, 3, 4, 8)), st.integers(1, 5), st.integers(1, 50), st.integers(0, 2**31))
def test_bit_streams_round_trip_and_match_the_definition(bits, rows, n, seed):
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, n), generator=rng)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-n * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, n).long(), codes)
    stream = int.from_bytes(bytes(packed[-1].tolist()), "little")
    assert [(stream >> (bits * k)) & ((1 << bits) - 1) for k in range(n)] == codes[-1].tolist()


def test_codes_out_of_range_are_not_packed():
    with pytest.raises(FormatError, match=r"codes span -1..4, outside 0..3"):
        pack_bits(torch.tensor([[0, 4, -1]]), 2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_golden_quip_grid(bits):
    """QuIP's nearest rounding, as codes of our packing, dequantizes to its own values."""
    scale, grid = SCALAR[f"b{bits}.scale"], SCALAR[f"b{bits}.grid_in"]
    top = (1 << bits) - 1
    codes = grid.round().clamp(0, top).long()
    format = QuipFormat(bits)
    N, K = codes.shape
    tensors = {
        **format.pack_codes(codes),
        "SU": torch.ones(K),
        "SV": torch.ones(N),
        "Wscale": scale.reshape(()),
    }
    format.check_tensors(tensors, N, K)
    assert relative(SCALAR[f"b{bits}.nearest_deq"], format.decode(tensors, torch.float64)) < 1e-6


def test_golden_quip_kronecker_layer():
    """W = diag(SV) U^T Wq V diag(1/s) with QuIP's own U, V and s undoes its preprocessing."""
    format = QuipFormat(4, "kronecker")
    U, V = ({n: SCALAR[f"kron{size}.{n}"] for n in ("B0", "B1", "p_in", "p_out")}
            for size in (24, 64))  # fmt: skip
    tensors = {"SU": 1 / SCALAR["pre.scaleWH"], "SV": torch.ones(24), "Wscale": torch.tensor(1.0)}
    for side, parts in (("U", U), ("V", V)):
        for name, tensor in parts.items():
            tensors[f"{side}_{name}"] = tensor.int() if name[0] == "p" else tensor
    dense = [SCALAR[f"kron{size}.dense"].double() for size in (24, 64)]
    weight = SCALAR["pre.W"].double()
    expected = dense[0].T @ weight @ dense[1] * tensors["SU"].double()
    assert relative(format.rotate_back(weight, tensors), expected) < 1e-6


@pytest.mark.parametrize(("scheme", "N", "K"), SCALAR_LAYERS)
def test_scalar_dequantization_by_its_definition(scheme, N, K):
    layer = random_layer(scheme, N, K)
    format, tensors = layer.format, layer.tensors
    G = format.group_size
    codes = unpack_bits(tensors["qweight"], format.bits, K).double()
    zeros = unpack_bits(tensors["zeros"], format.bits, K // G).double()
    scales = tensors["scales"].double()
    group = torch.arange(K) // G
    assert torch.equal(layer.weight(), scales[:, group] * (codes - zeros[:, group]))


# -- every format ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "N", "K"), (*ROTATED_LAYERS, *SCALAR_LAYERS))
def test_every_layer(scheme, N, K):
    """Tensors pass their own check, ids parse back, bits are those of the tensors, dtypes hold."""
    layer = random_layer(scheme, N, K, torch.float16)
    format, tensors = layer.format, layer.tensors
    format.check_tensors(tensors, N, K)
    assert parse_scheme(format.id) == format and format.id == scheme
    assert format.out_features(tensors) == N
    assert set(tensors) == set(format.tensor_specs(N, K))
    stored = 8 * sum(t.nbytes for t in tensors.values())
    assert format.bits_per_weight(N, K) == pytest.approx(stored / (N * K), rel=1e-9)
    weight = layer.weight()
    assert weight.shape == (N, K) and weight.dtype == torch.float64
    low = format.dequantize(tensors)
    assert low.dtype == torch.float16 and relative(low, weight) < 5e-4
    assert relative(format.dequantize(tensors, torch.float32), weight) < 1e-6


@pytest.mark.parametrize(("scheme", "N", "K"), [c for c in ROTATED_LAYERS if c[2] < 200])
def test_rotated_dequantization_is_differentiable(scheme, N, K):
    layer = random_layer(scheme, N, K, torch.float64)
    format, tensors = layer.format, layer.tensors
    names = [n for n, t in tensors.items() if t.is_floating_point() and t.dim()]
    row = torch.randn(N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [tensors[n].double().requires_grad_() for n in names]

    def scalar(*values):
        replaced = dict(zip(names, values, strict=True))
        return (format.dequantize({**tensors, **replaced}, torch.float64) * row).sum()

    assert torch.autograd.gradcheck(scalar, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("scheme", "N", "K", "message"),
    [
        ("quip-e8p-2bit", 24, 64, "N=24, K=64: quip-e8p-2bit needs multiples of 16 and 64"),
        ("quip-e8p-2bit", 64, 13696, "K=13696: no Hadamard rotation of size 13696"),
        ("quip-int2", 214, 64, r"N=214: no Hadamard .* up to 1024 \(published: 12, 20, 28"),
        ("quip-e8p-3bit-b128", 192, 256, "N=192: a block rotation of size 192"),
        ("quip-e8p-2bit-f32+16", 64, 64, r"N=64 is not the sum of the parts \[32, 16\]"),
        ("quip-int3", 64, 68, "K=68: a row of 3-bit codes does not fill whole bytes"),
        ("gptq-int4-g48", 64, 64, "K=64 is not a multiple of 48"),
        ("rtn-int3-g4", 8, 12, "K=12: a row of 3-bit codes"),
    ],
)
def test_shapes_are_refused_with_their_values(scheme, N, K, message):
    with pytest.raises(FormatError, match=message):
        parse_scheme(scheme).check_shape(N, K)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("quip-e8p-5bit", "2, 3 or 4 bits a weight, not 5"),
        ("quip-e8p-2bit-r3", "residual scale 3.0: 2-bit E8P has no residual"),
        ("quip-int8", "2, 3 or 4 bits here, not 8"),
        ("gptq-int5-g64", "2, 3, 4 or 8 bits, not 5"),
        ("rtn-int4-g0", "group_size=0"),
        ("quip-e8p", "unknown scheme 'quip-e8p'; known: .*quip-e8p-{bits}bit"),
    ],
)
def test_scheme_ids_are_refused(scheme, message):
    with pytest.raises(FormatError, match=message):
        parse_scheme(scheme)


def test_bad_tensors_are_named_with_their_values():
    layer = random_layer("quip-e8p-2bit", 16, 64)

    def check(**changes):
        layer.format.check_tensors({**layer.tensors, **changes}, 16, 64, "mlp.up")

    with pytest.raises(FormatError, match=r"mlp.up.SU has shape \[63\], expected \[64\]"):
        check(SU=torch.ones(63))
    with pytest.raises(FormatError, match=r"mlp.up.Wscale is not finite: inf at index \[\]"):
        check(Wscale=torch.tensor(float("inf")))
    with pytest.raises(FormatError, match=r"mlp.up.SV is not finite: nan at index \[3\]"):
        check(SV=torch.full((16,), 1.0).index_fill(0, torch.tensor(3), float("nan")))
    with pytest.raises(FormatError, match="codebook_id is 6, expected 7 .* supported: 7 .2 bit."):
        check(codebook_id=torch.tensor(6))
    with pytest.raises(FormatError, match=r"Qidxs has dtype torch.int32"):
        check(Qidxs=layer.tensors["Qidxs"].int())
    kron = random_layer("quip-int2-kron", 8, 16)
    p_in = kron.tensors["V_p_in"].clone()
    p_in[p_in == 5] = 6
    with pytest.raises(FormatError, match="V_p_in is no permutation: 5 is missing or twice"):
        kron.format.check_tensors({**kron.tensors, "V_p_in": p_in}, 8, 16)
    assert set(CODEBOOK_IDS.values()) == {7, 17, 18}


def test_missing_tensors_are_named():
    for scheme, key in (
        ("quip-e8p-2bit", "SV"),
        ("quip-int2", "qweight"),
        ("rtn-int4-g8", "zeros"),
    ):
        layer = random_layer(scheme, 16, 64)
        tensors = {n: t for n, t in layer.tensors.items() if n != key}
        with pytest.raises(FormatError, match=rf"layer.{key} is missing"):
            layer.format.check_tensors(tensors, 16, 64)
    assert isinstance(parse_scheme("rtn-int4-g8"), ScalarFormat)
