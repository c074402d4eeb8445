"""Calibrated AQLM: planted codes, exact steps, a loss that never rises, hostile Hessians."""

from __future__ import annotations

import warnings

import pytest
import torch

from aqlm_infer.formats import parse_scheme
from aqlm_infer.quantizers import HessianWarning, quantizer_for
from aqlm_infer.quantizers.calibrated import CalibratedRefit
from aqlm_infer.quantizers.hessian import (
    ATTEMPTS,
    block_ldl,
    regularise,
    relative_loss,
    row_losses,
)
from aqlm_infer.quantizers.sums import CodeSums

pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def moment(K, tokens=None, seed=9):
    """Second moment of correlated inputs with a few large columns, float64 [K, K]."""
    tokens = tokens or 8 * K
    x = gaussian(tokens, K, seed).double() @ gaussian(K, K, seed + 1).double() / K**0.5
    x += gaussian(tokens, K, seed + 2).double()
    x[:, :: K // 4] *= 5
    return x.T @ x / tokens


def fitted(scheme, weight, hessian, **options):
    """(tensors, dequantized weight in float64)."""
    format = parse_scheme(scheme)
    tensors = quantizer_for(format, **options).fit(weight, hessian)
    format.check_tensors(tensors, *weight.shape)
    return tensors, format.dequantize(tensors, torch.float64)


def refit_of(N=24, K=32, og=1, g=4, B=2, C=8, beam=64, seed=0):
    """A refit in a random state: codes, codebooks and scales have nothing to do with the weight."""
    generator = torch.Generator().manual_seed(seed)
    weight, curvature = gaussian(N, K, seed), regularise(moment(K), K, 1e-3)
    books = torch.randn(B, C, og * g, generator=generator)
    codes = torch.randint(C - 1, (N // og, K // g, B), generator=generator)
    scales = torch.rand(N // og, generator=generator) + 0.5
    return CalibratedRefit(weight, curvature, og, books, scales, codes, beam, generator)


# -- pieces ----------------------------------------------------------------------------------------


def test_block_ldl_rebuilds_the_matrix():
    curvature = regularise(moment(48), 48, 1e-3)
    for size in (1, 4, 8):
        lower, roots = block_ldl(curvature, size)
        diagonal = torch.block_diag(*(roots @ roots.mT))
        unit = lower + torch.eye(48, dtype=torch.float64)
        torch.testing.assert_close(unit @ diagonal @ unit.T, curvature.matrix)
        blocks = lower.view(48 // size, size, 48 // size, size).transpose(1, 2)
        assert not blocks[torch.triu_indices(48 // size, 48 // size).unbind()].any()


def test_code_sums_are_one_hot_products():
    codes = torch.randint(5, (300, 3), generator=torch.Generator().manual_seed(0))
    rows = gaussian(300, 4)
    hot = torch.nn.functional.one_hot(codes, 6).float()
    expected = torch.einsum("nbc,nd->bcd", hot, rows)
    torch.testing.assert_close(CodeSums(codes, 6)(rows), expected)


@pytest.mark.parametrize("og", [1, 2])
def test_the_codebook_step_reaches_the_least_squares_solution(og):
    """Against lstsq on explicit features, in float64, in the norm of H."""
    refit = refit_of(og=og)
    (B, C, d), (rows, groups, _) = refit.codebooks.shape, refit.codes.shape
    root = torch.linalg.cholesky(refit.matrix)
    features = torch.zeros(rows * og, groups * refit.g, B * C * d, dtype=torch.float64)
    for o in range(rows):
        for i in range(groups):
            for b in range(B):
                first = (b * C + int(refit.codes[o, i, b])) * d
                for k in range(d):
                    row, column = o * og + k // refit.g, i * refit.g + k % refit.g
                    features[row, column, first + k] += float(refit.scales[o])
    rotated = (features.transpose(1, 2) @ root).transpose(1, 2).flatten(0, 1)
    target = (refit.weight.double() @ root).flatten()[:, None]
    solution = torch.linalg.lstsq(rotated, target, driver="gelsd").solution
    least = float((rotated @ solution - target).square().sum())
    for _ in range(4):
        refit.step_codebooks(60)
    assert refit.error == pytest.approx(least, rel=1e-4)


def test_the_scale_step_is_least_squares():
    refit = refit_of()
    refit.step_scales()
    rows = refit._rows(refit.codebooks, torch.ones_like(refit.scales), refit.codes).double()
    warped = rows @ refit.matrix
    expected = (warped * refit.weight).sum(1) / (warped * rows).sum(1)
    torch.testing.assert_close(refit.scales.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("og", [1, 2])
def test_one_group_is_searched_exhaustively(og):
    """With K = g a sweep at full beam must find the best pair of codes of every out group."""
    refit = refit_of(N=20, K=4, og=og)
    refit.step_codes()
    every = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    words = refit.codebooks[0][every[:, 0]] + refit.codebooks[1][every[:, 1]]  # [64, d]
    for o, (loss, scale) in enumerate(zip(refit._losses, refit.scales, strict=True)):
        target = refit.weight[o * og : (o + 1) * og].double()
        wrong = words.double().view(64, og, 4) * float(scale) - target
        best = ((wrong @ refit.matrix) * wrong).sum((1, 2)).min()
        assert float(loss) == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("og, beam", [(1, 1), (1, 8), (2, 4)])
def test_steps_never_raise_the_loss_and_keep_it_exact(og, beam):
    refit = refit_of(N=40, K=64, og=og, beam=beam)
    before = refit.error
    for step in (refit.step_codes, refit.step_codebooks, refit.step_scales) * 4:
        step()
        assert refit.error <= before
        rows = refit._rows(refit.codebooks, refit.scales, refit.codes)
        direct = float(row_losses(rows - refit.weight, refit.matrix).sum())
        assert refit.error == pytest.approx(direct, rel=1e-6)
        before = refit.error


# -- whole quantizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["aqlm-1x5-g4", "aqlm-1x6-g4-o2", "aqlm-2x5-g8"])
def test_planted_codes_are_recovered(scheme):
    format, generator = parse_scheme(scheme.replace("2x", "1x")), torch.Generator().manual_seed(3)
    specs = format.tensor_specs(64, 64)
    words = torch.randint(2, specs["codebooks"].shape, generator=generator) * 2.0 - 1
    tensors = {
        "codes": format.pack_codes(
            torch.randint(format.entries, specs["codes"].shape, generator=generator)
        ),
        "codebooks": words,
        "scales": 2.0 ** torch.randint(-3, 4, specs["scales"].shape, generator=generator),
    }
    weight, hessian = format.dequantize(tensors), moment(64)
    _, found = fitted(scheme, weight, hessian)
    assert relative_loss(weight, found, hessian) < 1e-10


@pytest.mark.parametrize("scheme", ["aqlm-1x6-g4", "aqlm-2x5-g8", "aqlm-3x4-g4-o2"])
def test_the_objective_never_rises_and_is_what_it_says(scheme):
    weight, hessian, steps = gaussian(96, 64), moment(64), []
    _, found = fitted(scheme, weight, hessian, progress=steps.append, tolerance=0.0)
    errors = [step.error for step in steps]
    assert len(errors) == 31 and errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    damped = regularise(hessian, 64, 1e-3).matrix
    assert relative_loss(weight, found, damped) == pytest.approx(errors[-1], rel=1e-4)


def test_calibration_beam_and_metric_start_each_help():
    weight, hessian = gaussian(256, 128), moment(128)
    losses = {}
    for name, options in (
        ("full", {}),
        ("greedy", {"beam": 1}),
        ("start", {"refit_rounds": 0}),
        ("plain start", {"refit_rounds": 0, "metric_rounds": 0}),
    ):
        _, found = fitted("aqlm-2x5-g8", weight, hessian, **options)
        losses[name] = relative_loss(weight, found, hessian)
    _, free = fitted("aqlm-2x5-g8", weight, None)
    assert losses["full"] < 0.7 * relative_loss(weight, free, hessian)
    assert losses["full"] < 0.97 * losses["greedy"]
    assert losses["full"] < 0.9 * losses["start"] < 0.9 * losses["plain start"]


@pytest.mark.parametrize("scheme, anchor", [("aqlm-1x8-g4", 0.0939), ("aqlm-2x4-g4", 0.1065)])
def test_gaussian_anchors_with_white_inputs(scheme, anchor):
    """In-sample error of iid N(0, 1), 60k vectors, against an independent simulation: at most 2 %
    worse, and not better than this refit can be."""
    weight = gaussian(600, 400)
    _, found = fitted(scheme, weight, torch.eye(400))
    error = relative_loss(weight, found, torch.eye(400, dtype=torch.float64))
    assert 0.88 * anchor < error < 1.02 * anchor


def test_same_seed_same_bits():
    weight, hessian = gaussian(32, 32), moment(32)
    first, _ = fitted("aqlm-2x4-g8", weight, hessian, seed=5)
    torch.manual_seed(77)
    second, _ = fitted("aqlm-2x4-g8", weight, hessian, seed=5)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other, _ = fitted("aqlm-2x4-g8", weight, hessian, seed=6)
    assert not torch.equal(first["codes"], other["codes"])


def test_a_zero_row_stays_zero():
    weight = gaussian(16, 64)
    weight[3] = 0
    _, found = fitted("aqlm-2x4-g8", weight, moment(64))
    assert torch.equal(found[3], torch.zeros(64).double()) and found[4].abs().sum() > 0
    _, found = fitted("aqlm-2x4-g8", torch.zeros(16, 64), moment(64))
    assert torch.equal(found, torch.zeros(16, 64).double())


# -- hostile Hessians ------------------------------------------------------------------------------

SCHEMES = ["aqlm-2x4-g8", "gptq-int2-g32", "quip-int3", "quip-int2-kron", "quip-e8p-2bit"]


def hostile(kind):
    if kind == "rank-deficient":
        x = gaussian(10, 64).double()
        return x.T @ x / 10
    hessian = moment(64)
    if kind == "zero column":
        hessian[7] = hessian[:, 7] = 0
    elif kind == "1e6 column":
        hessian[7] *= 1e6
        hessian[:, 7] *= 1e6
    elif kind == "zero":
        hessian.zero_()
    return hessian


@pytest.mark.parametrize("kind", ["rank-deficient", "zero column", "1e6 column", "zero"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_hostile_hessians_end_finite(scheme, kind):
    weight = gaussian(32, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HessianWarning)
        _, found = fitted(scheme, weight, hostile(kind), damping=1e-2)
        norm = regularise(hostile(kind), 64, 1e-2).matrix
    assert torch.isfinite(found).all()
    assert relative_loss(weight, found, norm) < 0.3


def test_damping_escalates_and_says_so():
    hessian = torch.eye(8, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 1.05
    with pytest.warns(HessianWarning, match="damping raised to 0.08"):
        curvature = regularise(hessian, 8, 0.01)
    assert curvature.damping == 0.08
    torch.testing.assert_close(curvature.factor @ curvature.factor.T, curvature.matrix)


def test_the_diagonal_is_the_last_resort():
    hessian = torch.full((4, 4), 100.0) - 99 * torch.eye(4)
    with pytest.warns(HessianWarning, match=f"damping {1e-2 * 2 ** (ATTEMPTS - 1):g}.*diagonal"):
        curvature = regularise(hessian, 4, 1e-2)
    assert torch.equal(curvature.matrix, torch.eye(4, dtype=torch.float64) * 1.01)


def test_a_dead_column_is_rounded_plainly():
    with pytest.warns(HessianWarning, match="1 of 64 inputs never fire"):
        curvature = regularise(hostile("zero column"), 64, 1e-2)
    alone = torch.zeros(64, dtype=torch.bool)
    alone[7] = True
    assert not curvature.matrix[7][~alone].any()
    assert curvature.matrix[7, 7] > 0
