"""Formats: bit-exact golden dequantization, code storage, bits, and refusals that print values."""

import pytest
import torch
from cases import GOLDEN_LAYERS, LAYERS, golden_layer, random_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from aqlm_infer.formats import AdditiveFormat, FormatError, parse_scheme


@pytest.mark.parametrize("name", GOLDEN_LAYERS)
def test_golden_dequantization_is_bit_exact(name):
    format, spec, tensors = golden_layer(name)
    format.check_tensors(tensors, spec["out_features"], spec["in_features"])
    assert torch.equal(format.dequantize(tensors, torch.float64), tensors["W"])
    low = format.dequantize(tensors)
    assert torch.equal(low, tensors.get("W_lowp", tensors["W"].to(low.dtype)))


@pytest.mark.parametrize("name", [n for n in GOLDEN_LAYERS if "1x16" in n or "1x15" in n])
def test_golden_bfloat16_load(name):
    format, _, tensors = golden_layer(name)
    for key in ("codebooks", "scales"):
        tensors[key] = tensors[key].to(torch.bfloat16)
    weight = format.dequantize(tensors, torch.float64)
    assert torch.equal(weight[:16].float(), tensors["W_bf16cast_head"])


@pytest.mark.parametrize("name", [n for n in GOLDEN_LAYERS if n.endswith("fp16") or "_fp16_" in n])
def test_reference_rounding_differs_only_by_rounding(name):
    """The reference rounds the sum first; one rounding of ours stays within one ulp of it."""
    format, _, tensors = golden_layer(name)
    if "W_ref_lowp" not in tensors:
        assert format.num_codebooks == 1
        return
    ours, theirs = format.dequantize(tensors).float(), tensors["W_ref_lowp"].float()
    assert ((ours - theirs).abs() <= 2**-9 * theirs.abs() + 2**-24).all()


@settings(max_examples=60, deadline=None)
@given(nbits=st.integers(1, 16), seed=st.integers(0, 2**31))
def test_code_storage_round_trip(nbits, seed):
    format = AdditiveFormat(2, nbits, 8)
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, format.entries, (3, 5, 2), generator=rng)
    stored = format.pack_codes(codes)
    assert stored.dtype == (torch.int8 if nbits <= 8 else torch.int16)
    assert torch.equal(format.unpack_codes(stored), codes)
    assert -(1 << (nbits - 1)) <= int(stored.min()) and int(stored.max()) < 1 << (nbits - 1)
    format.check_codes(stored, "codes")


def test_code_storage_examples():
    assert AdditiveFormat(1, 12, 8).pack_codes(torch.tensor([3000])).item() == -1096
    assert AdditiveFormat(1, 8, 8).pack_codes(torch.tensor([200])).item() == -56
    assert AdditiveFormat(1, 16, 8).unpack_codes(torch.tensor([-1], dtype=torch.int16)) == 65535


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 64), st.integers(1, 4))
def test_scheme_ids_round_trip(books, nbits, group, out_group):
    format = AdditiveFormat(books, nbits, group, out_group)
    assert parse_scheme(format.id) == format
    shape = (books, 1 << nbits, out_group, group)
    assert AdditiveFormat.of_codebooks(torch.Size(shape)) == format


@pytest.mark.parametrize(
    ("scheme", "N", "K", "bits"),
    [
        ("aqlm-2x8-g8", 4096, 4096, 2 + 2 * 16 * 2048 / 4096**2 + 16 / 4096),
        ("aqlm-1x16-g8", 1024, 4096, 2 + 16 * 65536 * 8 / (1024 * 4096) + 16 / 4096),
        ("aqlm-2x6-g8", 512, 512, 1.5 + 16 * 2 * 64 * 8 / 512**2 + 16 / 512),
    ],
)
def test_bits_per_weight(scheme, N, K, bits):
    assert parse_scheme(scheme).bits_per_weight(N, K) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize(("scheme", "N", "K"), LAYERS)
def test_bits_per_weight_counts_the_stored_bytes(scheme, N, K):
    """16-bit values plus codes: the stored bytes, less what containers add to narrow codes."""
    layer = random_layer(scheme, N, K, torch.float16)
    containers = torch.iinfo(layer.format.code_dtype).bits
    stored = sum(t.numel() * t.element_size() * 8 for t in layer.tensors.values())
    slack = layer.tensors["codes"].numel() * (containers - layer.format.nbits)
    assert layer.format.bits_per_weight(N, K) * N * K == pytest.approx(stored - slack)


def test_dequantize_is_differentiable_in_the_values():
    layer = random_layer("aqlm-2x3-g4", 6, 8, torch.float64)
    values = [layer.tensors[k].requires_grad_() for k in ("codebooks", "scales")]

    def weight(codebooks, scales):
        tensors = {**layer.tensors, "codebooks": codebooks, "scales": scales}
        return layer.format.dequantize(tensors)

    assert torch.autograd.gradcheck(weight, values)


@pytest.mark.parametrize(
    "scheme", ["aqlm", "aqlm-2x8", "aqlm-2x8-g", "gguf-q4", "", "aqlm-2x8-g8 "]
)
def test_unknown_scheme(scheme):
    with pytest.raises(FormatError, match="unknown scheme"):
        parse_scheme(scheme)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("aqlm-0x8-g8", "num_codebooks=0 is outside 1..64"),
        ("aqlm-1x17-g8", "nbits=17 is outside 1..16"),
        ("aqlm-1x8-g0", "in_group_size=0 is outside"),
    ],
)
def test_scheme_out_of_range(scheme, message):
    with pytest.raises(FormatError, match=message):
        parse_scheme(scheme)


def test_shape_refusals_print_values():
    format = parse_scheme("aqlm-2x8-g8")
    message = r"K=4100 is not a multiple of 8 \(in_group_size of aqlm-2x8-g8\)"
    with pytest.raises(FormatError, match=message):
        format.check_shape(64, 4100)
    with pytest.raises(FormatError, match=r"N=5 is not a multiple of 2 \(out_group_size"):
        parse_scheme("aqlm-2x8-g8-o2").check_shape(5, 64)


def _broken(kind):
    layer = random_layer("aqlm-2x6-g8", 4, 16, torch.float16)
    tensors = dict(layer.tensors)
    if kind == "missing":
        del tensors["codebooks"]
    elif kind == "rank":
        tensors["scales"] = tensors["scales"].flatten()
    elif kind == "dtype":
        tensors["codes"] = tensors["codes"].to(torch.int32)
    elif kind == "float codes":
        tensors["codes"] = tensors["codes"].half()
    elif kind == "int scales":
        tensors["scales"] = tensors["scales"].to(torch.int32)
    elif kind == "disagree":
        tensors["codebooks"] = tensors["codebooks"][:1]
    elif kind == "range":
        tensors["codes"] = tensors["codes"].clone()
        tensors["codes"][2, 1, 0] = 77
    elif kind == "nan":
        tensors["scales"] = tensors["scales"].clone()
        tensors["scales"][3] = float("nan")
    elif kind == "inf":
        tensors["codebooks"] = tensors["codebooks"].clone()
        tensors["codebooks"][1, 5, 0, 2] = float("inf")
    return layer.format, tensors


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "layer.codebooks is missing"),
        ("rank", r"layer.scales has shape \[4\], expected \[4, 1, 1, 1\]"),
        ("dtype", "layer.codes has dtype torch.int32, expected torch.int8"),
        ("float codes", "layer.codes has dtype torch.float16, expected torch.int8"),
        ("int scales", "layer.scales has dtype torch.int32, expected a floating dtype"),
        ("disagree", r"layer.codebooks has shape \[1, 64, 1, 8\], expected \[2, 64, 1, 8\]"),
        ("range", r"layer.codes holds 77 at index \[2, 1, 0\], outside -32..31"),
        ("nan", r"layer.scales is not finite: nan at index \[3, 0, 0, 0\]"),
        ("inf", r"layer.codebooks is not finite: inf at index \[1, 5, 0, 2\]"),
    ],
)
def test_bad_tensors_are_named(kind, message):
    format, tensors = _broken(kind)
    with pytest.raises(FormatError, match=message):
        format.check_tensors(tensors, 4, 16)


def test_codebooks_must_be_a_power_of_two():
    with pytest.raises(FormatError, match="has 100 entries a codebook, not a power of two"):
        AdditiveFormat.of_codebooks(torch.Size((1, 100, 1, 8)))


def test_unsigned_code_out_of_range():
    with pytest.raises(FormatError, match=r"codes span 5..64, outside 0..63"):
        parse_scheme("aqlm-2x6-g8").pack_codes(torch.tensor([5, 64]))
