"""Quantizers: planted codes, Gaussian anchors, monotone refit, determinism, hostile weights."""

from __future__ import annotations

import pytest
import torch

from aqlm_infer.formats import AdditiveFormat, FormatError, parse_scheme
from aqlm_infer.layers import QuantLinear
from aqlm_infer.quantizers import QUANTIZERS, AdditiveQuantizer, QuantizerError, quantizer_for
from aqlm_infer.quantizers.kmeans import kmeans, nearest
from aqlm_infer.quantizers.refit import fit_codebooks, fit_scales, vector_errors
from aqlm_infer.quantizers.search import best_columns, decode, encode

pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def dequantized(scheme, weight, dtype=None, **options):
    """The weight after quantization, with values stored in ``dtype`` (None: float32)."""
    format = parse_scheme(scheme)
    tensors = dict(quantizer_for(format, **options).fit(weight))
    for name in ("codebooks", "scales"):
        tensors[name] = tensors[name].to(dtype or torch.float32)
    format.check_tensors(tensors, *weight.shape)
    return format.dequantize(tensors, torch.float64)


def relative_error(weight, approximation):
    wrong = (approximation - weight.double()).square().sum()
    return float(wrong / weight.double().square().sum())


def planted(scheme, N, K, seed=0):
    """A weight on one codebook of +-1 words, with power-of-two scales: exactly representable."""
    format, generator = parse_scheme(scheme), torch.Generator().manual_seed(seed)
    specs = format.tensor_specs(N, K)
    codes = torch.randint(format.entries, specs["codes"].shape, generator=generator)
    words = torch.randint(2, specs["codebooks"].shape, generator=generator) * 2.0 - 1
    scales = 2.0 ** torch.randint(-3, 4, specs["scales"].shape, generator=generator)
    tensors = {"codes": format.pack_codes(codes), "codebooks": words, "scales": scales}
    return format.dequantize(tensors)


# -- steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_best_columns_are_those_of_topk(keep):
    scores = gaussian(50, 33)
    assert torch.equal(best_columns(scores.clone(), keep), scores.topk(keep, 1).indices)


def test_nearest_is_the_brute_force_answer():
    vectors, centres = gaussian(500, 4), gaussian(32, 4, seed=1)
    assert torch.equal(nearest(vectors, centres), torch.cdist(vectors, centres).argmin(1))


def test_kmeans_revives_an_empty_cluster():
    # Two far points and one tight cloud: whatever the start, three centres must cover all three.
    vectors = torch.cat([gaussian(200, 2) * 1e-3, torch.tensor([[100.0, 0.0], [0.0, 100.0]])])
    weights = torch.ones(len(vectors), dtype=torch.float64)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        centres, codes = kmeans(vectors, weights, 8, 50, generator)
        assert (vectors - centres[codes]).square().sum() < 0.01


def test_encode_beats_greedy_and_is_exhaustive_with_a_full_beam():
    vectors, codebooks = gaussian(200, 4), gaussian(3 * 8, 4, seed=1).view(3, 8, 4)
    every = torch.cartesian_prod(*[torch.arange(8)] * 3)
    exact = torch.cdist(vectors, decode(codebooks, every)).square().amin(1)
    errors = [
        (vectors - decode(codebooks, encode(vectors, codebooks, beam))).square().sum(1)
        for beam in (1, 4, 64)
    ]
    assert errors[0].sum() > errors[1].sum() > exact.sum()
    torch.testing.assert_close(errors[2], exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("books", [1, 2, 3])
def test_least_squares_steps_agree_with_a_dense_solver(books):
    """Codebooks against lstsq on explicit one-hot features, with an entry that nothing uses."""
    rows, groups, d, C = 12, 30, 4, 8
    vectors = gaussian(rows * groups, d).view(rows, groups, d)
    scales = torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.5
    codes = torch.randint(C - 1, (rows, groups, books), generator=torch.Generator().manual_seed(2))
    before = gaussian(books * C, d, seed=3).view(books, C, d)
    after = fit_codebooks(vectors, before, scales, codes)
    assert torch.equal(after[:, C - 1], before[:, C - 1])

    features = torch.nn.functional.one_hot(codes, C).double().view(rows * groups, books * C)
    features *= scales.double().repeat_interleave(groups)[:, None]
    target = vectors.double().view(rows * groups, d)
    solution = torch.linalg.lstsq(features, target, driver="gelsd").solution
    least = float((features @ solution - target).square().sum())
    found = float(vector_errors(vectors, after, scales, codes).sum())
    assert found == pytest.approx(least, rel=1e-6)

    refitted = fit_scales(vectors, after, scales, codes)
    words = decode(after, codes)
    expected = (words * vectors).sum((1, 2)) / words.square().sum((1, 2))
    torch.testing.assert_close(refitted, expected)


def test_sweep_replaces_the_joint_solve_beyond_its_limit(monkeypatch):
    vectors, codebooks = gaussian(600, 4).view(20, 30, 4), gaussian(16, 4, seed=1).view(2, 8, 4)
    scales = torch.ones(20)
    codes = encode(vectors.flatten(0, 1), codebooks, 4).view(20, 30, 2)

    def error(books):
        return float(vector_errors(vectors, books, scales, codes).sum())

    joint = fit_codebooks(vectors, codebooks, scales, codes)
    monkeypatch.setattr("aqlm_infer.quantizers.refit.JOINT_LIMIT", 8)
    sweep = fit_codebooks(vectors, codebooks, scales, codes)
    assert error(joint) < error(sweep) < error(codebooks)


def test_perturbed_codebooks_are_recovered():
    """Planted codes, two codebooks: the search finds the codes, the solve the codebooks."""
    truth = gaussian(32, 8).view(2, 16, 8)
    codes = torch.randint(16, (50, 40, 2), generator=torch.Generator().manual_seed(1))
    scales = torch.rand(50, generator=torch.Generator().manual_seed(2)) + 0.5
    vectors = decode(truth, codes) * scales[:, None, None]
    start = truth + 0.02 * gaussian(32, 8, seed=3).view(2, 16, 8)
    targets = (vectors / scales[:, None, None]).flatten(0, 1)
    assert torch.equal(encode(targets, start, 16), codes.flatten(0, 1))
    found = fit_codebooks(vectors, start, scales, codes)
    assert vector_errors(vectors, found, scales, codes).sum() < 1e-10 * vectors.square().sum()


# -- whole quantizer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme, N, K",
    [
        ("aqlm-1x4-g4", 64, 64),
        ("aqlm-1x8-g8", 128, 256),
        ("aqlm-1x6-g4-o2", 64, 64),
        ("aqlm-2x4-g4", 64, 64),
        ("aqlm-1x12-g8", 64, 256),
    ],
)
def test_planted_codes_are_recovered(scheme, N, K):
    weight = planted(scheme.replace("2x", "1x"), N, K)
    assert relative_error(weight, dequantized(scheme, weight)) < 1e-12


@pytest.mark.parametrize(
    "scheme, anchor",
    [
        ("aqlm-1x8-g4", 0.0939),
        ("aqlm-2x4-g4", 0.1065),
        ("aqlm-4x4-g8", 0.1059),
        pytest.param("aqlm-2x8-g8", 0.0906, marks=pytest.mark.slow),
    ],
)
def test_gaussian_anchors(scheme, anchor):
    """In-sample error of iid N(0, 1), 60k vectors, against an independent simulation: at most 3 %
    worse, and not better than this refit can be."""
    weight = gaussian(600, 100 * parse_scheme(scheme).in_group_size)
    error = relative_error(weight, dequantized(scheme, weight))
    assert 0.88 * anchor < error < 1.03 * anchor


@pytest.mark.parametrize("scheme", ["aqlm-1x6-g4", "aqlm-2x5-g8", "aqlm-3x4-g4-o2", "aqlm-2x12-g8"])
def test_the_objective_never_rises(scheme):
    steps = []
    weight = gaussian(96, 128) * torch.logspace(-2, 2, 96)[:, None]
    options = {"progress": steps.append, "kmeans_rounds": 3, "tolerance": 0.0, "refit_rounds": 6}
    error = relative_error(weight, dequantized(scheme, weight, **options))
    errors = [step.error for step in steps]
    assert [s.stage for s in steps[:4]] == ["start", "codebooks", "scales", "codes"]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] or errors[0] < 1e-12
    assert error == pytest.approx(errors[-1], rel=1e-4, abs=1e-12)


def test_beam_search_lowers_the_error():
    weight = gaussian(64, 256)
    greedy, wide = (
        relative_error(weight, dequantized("aqlm-4x4-g8", weight, beam=b)) for b in (1, 8)
    )
    assert wide < 0.93 * greedy


def test_same_seed_same_bits_whatever_the_global_state_and_threads():
    weight = gaussian(128, 256)
    quantizer = quantizer_for("aqlm-2x6-g8", seed=7, kmeans_vectors=2000)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = quantizer.fit(weight)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    torch.set_num_threads(2)
    second = quantizer.fit(weight)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = quantizer_for("aqlm-2x6-g8", seed=8, kmeans_vectors=2000).fit(weight)
    assert not torch.equal(first["codes"], other["codes"])


def test_kmeans_on_a_sample_costs_little():
    weight = gaussian(256, 256)
    full = relative_error(weight, dequantized("aqlm-2x6-g8", weight))
    sampled = relative_error(weight, dequantized("aqlm-2x6-g8", weight, kmeans_vectors=2048))
    assert sampled < 1.05 * full


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 100.0, 1.4e4])
@pytest.mark.parametrize("scheme", ["aqlm-1x8-g4", "aqlm-2x4-g8"])
def test_values_survive_float16(scheme, magnitude):
    weight = gaussian(64, 256) * magnitude
    error = relative_error(weight, dequantized(scheme, weight))
    rounded = relative_error(weight, dequantized(scheme, weight, torch.float16))
    assert rounded == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_float32_range(magnitude):
    weight = gaussian(16, 64).double() * magnitude
    assert relative_error(weight, dequantized("aqlm-2x4-g8", weight)) < 0.2


def test_rows_of_very_different_size():
    weight = gaussian(64, 256) * torch.logspace(-3, 0, 64)[:, None]
    approximation = dequantized("aqlm-2x4-g4", weight, torch.float16)
    for row, found in zip(weight[::21], approximation[::21], strict=True):
        assert relative_error(row, found) < 0.35


@pytest.mark.parametrize("scheme", ["aqlm-1x8-g8", "aqlm-2x4-g8", "aqlm-4x4-g8", "aqlm-2x4-g4-o2"])
def test_degenerate_rows_are_exact(scheme):
    """Zero rows stay zero bit for bit; rows of one value, alone in the layer, come back."""
    zero = torch.zeros(16, 64)
    assert torch.equal(dequantized(scheme, zero), zero.double())
    constant = torch.linspace(-2, 3, 8).repeat_interleave(2)[:, None].expand(16, 64).clone()
    constant[4:6] = 0
    approximation = dequantized(scheme, constant)
    assert torch.equal(approximation[4:6], torch.zeros(2, 64).double())
    assert relative_error(constant, approximation) < 1e-12
    mixed = gaussian(16, 64)
    mixed[2:4] = 0
    assert torch.equal(dequantized(scheme, mixed)[2:4], torch.zeros(2, 64).double())


@pytest.mark.parametrize("scheme", ["aqlm-1x8-g8", "aqlm-2x8-g8", "aqlm-1x16-g8", "aqlm-2x12-g4"])
def test_fewer_vectors_than_entries_are_exact(scheme):
    weight = gaussian(8, 64)
    assert relative_error(weight, dequantized(scheme, weight)) < 1e-12


def test_from_linear_uses_it_and_casts():
    linear = torch.nn.Linear(128, 64, dtype=torch.float16)
    layer = QuantLinear.from_linear(linear, "aqlm-2x6-g8", quantizer=None)
    assert layer.codebooks.dtype == torch.float16
    assert relative_error(linear.weight.detach(), layer.weight.double()) < 0.25


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    weight = gaussian(8, 64)
    weight[3, 5] = value
    with pytest.raises(
        QuantizerError, match=rf"float32: {value} at \[3, 5\], 1 such values of 512"
    ):
        quantizer_for("aqlm-1x4-g8").fit(weight)


def test_a_weight_beyond_float32_is_refused():
    weight = gaussian(8, 64).double()
    weight[0, 1] = 1e300
    with pytest.raises(QuantizerError, match=r"not finite in float32: 1e\+300 at \[0, 1\]"):
        quantizer_for("aqlm-1x4-g8").fit(weight)


@pytest.mark.parametrize("weight", [torch.zeros(8), torch.zeros(2, 8, 8)])
def test_a_weight_of_another_rank_is_refused(weight):
    with pytest.raises(QuantizerError, match=r"shape \[.*expected floating \[N, K\]"):
        quantizer_for("aqlm-1x4-g8").fit(weight)


def test_an_integer_weight_is_refused():
    with pytest.raises(QuantizerError, match=r"weight is torch.int8"):
        quantizer_for("aqlm-1x4-g8").fit(torch.zeros(8, 8, dtype=torch.int8))


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(FormatError, match="K=60 is not a multiple of 8"):
        quantizer_for("aqlm-1x4-g8").fit(torch.zeros(8, 60))


def test_a_hessian_of_another_shape_or_not_finite_is_refused():
    with pytest.raises(QuantizerError, match=r"hessian has shape \[32, 32\], expected \[64, 64\]"):
        quantizer_for("aqlm-1x4-g8").fit(gaussian(8, 64), torch.eye(32))
    hessian = torch.eye(64)
    hessian[2, 3] = hessian[3, 2] = float("nan")
    with pytest.raises(QuantizerError, match=r"hessian is not finite: nan at \[2, 3\]"):
        quantizer_for("aqlm-1x4-g8").fit(gaussian(8, 64), hessian)


@pytest.mark.parametrize("option", [{"beam": 0}, {"refit_rounds": -1}, {"tolerance": -1.0}])
def test_options_out_of_range_are_refused(option):
    (name,) = option
    with pytest.raises(QuantizerError, match=f"{name}=-?[01]"):
        quantizer_for("aqlm-1x4-g8", **option)


def test_unknown_options_and_formats_without_a_quantizer_are_refused(monkeypatch):
    with pytest.raises(QuantizerError, match="no option 'rounds'; known: .*kmeans_rounds"):
        quantizer_for("aqlm-1x4-g8", rounds=3)
    with pytest.raises(FormatError, match="unknown scheme"):
        quantizer_for("int3")
    monkeypatch.delitem(QUANTIZERS, AdditiveFormat)
    with pytest.raises(QuantizerError, match="no quantizer for aqlm-1x4-g8"):
        quantizer_for("aqlm-1x4-g8")


def test_a_quantizer_is_a_value():
    assert quantizer_for("aqlm-1x4-g8", beam=2) == AdditiveQuantizer(
        AdditiveFormat(1, 4, 8), beam=2
    )
