"""Representations of every family: decoding, gradients and code search, against float64."""

import pytest
import torch
from tuning_cases import (
    SCHEMES,
    K,
    N,
    Single,
    random_windows,
    representation,
    tensors_of,
)

from aqlm_infer.formats import parse_scheme
from aqlm_infer.formats.e8p import grid_x4
from aqlm_infer.training import TuningError, represent
from aqlm_infer.training.additive import sweep
from aqlm_infer.training.surrogates import sigmoid_round, slope, softclamp_slope

pytestmark = pytest.mark.usefixtures("one_thread")


def random_like(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weight_and_tensors_are_those_of_the_format(scheme):
    format, tensors = parse_scheme(scheme), tensors_of(scheme)
    rep = representation(scheme)
    expected = format.dequantize(tensors, torch.float64)
    assert (rep.weight().detach().double() - expected).norm() < 1e-6 * expected.norm()
    made = rep.tensors()
    assert set(made) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(made[name], tensor), name
    assert rep.groups * rep.width == N * K and len(rep.codes) == rep.groups


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_follow_new_codes_and_values(scheme):
    rep, format = representation(scheme), parse_scheme(scheme)
    rep.codes = rep.search(rep.decode(rep.codes) + random_like((rep.groups, rep.width)))
    for value in rep.values.values():
        value.data.mul_(1.25)
    made = rep.tensors()
    format.check_tensors(made, N, K)
    expected = format.dequantize(made, torch.float64)
    assert (rep.weight().detach().double() - expected).norm() < 1e-6 * expected.norm()
    assert not torch.equal(made[format.code_names[0]], tensors_of(scheme)[format.code_names[0]])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_equal_autograd_through_the_format(scheme):
    rep, format, tensors = representation(scheme), parse_scheme(scheme), tensors_of(scheme)
    gradient = random_like((N, K))
    basis = rep.gradients(gradient)
    wide = {n: t.double().requires_grad_() for n, t in tensors.items() if n in rep.values}
    weight = format.dequantize({**tensors, **wide}, torch.float64)
    expected = torch.autograd.grad(weight, list(wide.values()), gradient.double())
    for name, true in zip(wide, expected, strict=True):
        error = (rep.values[name].grad.double() - true).norm() / true.norm()
        assert error < 2e-6, f"{name}: {error:.1e}"
    # A change of one group in the code basis changes <G, W> by its product with the basis gradient.
    index = torch.tensor([1, rep.groups // 2, rep.groups - 1])
    before, codes = rep.weight().detach().double(), rep.codes.clone()
    new = rep.search(random_like((3, rep.width), seed=5) * 3, index)
    step = (rep.decode(new, index) - rep.decode(codes[index], index)).double()
    assert step.abs().max() > 0
    rep.codes[index] = new
    moved = ((rep.weight().detach().double() - before) * gradient).sum()
    torch.testing.assert_close(moved, (basis[index].double() * step).sum(), rtol=1e-4, atol=1e-4)


def test_e8p_gradient_is_the_published_rotation():
    """G_r = U_N^T diag(SV) G diag(SU) U_K (scale folded into SV), in float64."""
    from aqlm_infer.formats.rotation import Hadamard

    rep, tensors = representation("quip-e8p-2bit"), tensors_of("quip-e8p-2bit")
    gradient = random_like((N, K), seed=9)
    inner = tensors["SV"].double()[:, None] * gradient.double() * tensors["SU"].double()
    columns = Hadamard.full(K).apply(inner, transpose=True)
    expected = Hadamard.full(N).apply(columns.T, transpose=True).T
    found = rep.gradients(gradient).view(N, K).double()
    assert (found - expected).norm() < 1e-6 * expected.norm()


NEAREST = ("aqlm-1x4-g4", "gptq-int2-g32", "rtn-int3-g64", "quip-int2", "quip-e8p-2bit")


def all_words(rep, index):
    """Every word of one group, [words, width] float64, by code."""
    if rep.width == 8:
        return grid_x4().double() / 4
    count = 1 << (rep.format.nbits if hasattr(rep.format, "nbits") else rep.format.bits)
    codes = torch.arange(count)[:, None]
    return rep.decode(codes, index.expand(count)).double()


@pytest.mark.parametrize("scheme", NEAREST)
def test_search_finds_the_nearest_word(scheme):
    rep = representation(scheme)
    index = torch.arange(0, rep.groups, rep.groups // 40)
    spread = rep.decode(rep.codes).std()
    targets = random_like((len(index), rep.width)) * 1.5 * spread
    found = rep.decode(rep.search(targets, index), index).double()
    for place in range(len(index)):
        words = all_words(rep, index[place : place + 1])
        best = (words - targets[place].double()).square().sum(1).min()
        mine = (found[place] - targets[place].double()).square().sum()
        assert mine <= best * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("scheme", ["aqlm-1x4-g4", "gptq-int2-g32", "quip-int2", "quip-e8p-2bit"])
def test_two_nearest(scheme):
    rep = representation(scheme)
    targets = random_like((rep.groups, rep.width)) * rep.decode(rep.codes).std()
    first, second = (rep.decode(c).double() for c in rep.two_nearest(targets, 4, None))
    for place in range(0, rep.groups, rep.groups // 40):
        words = all_words(rep, torch.tensor([place]))
        distances = (words - targets[place].double()).square().sum(1).sort().values[:2]
        mine = torch.stack([first[place], second[place]]) - targets[place].double()
        torch.testing.assert_close(mine.square().sum(1), distances, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("scheme", ["quip-e8p-3bit", "quip-e8p-4bit"])
def test_two_nearest_residual_codes(scheme):
    rep = representation(scheme)
    targets = random_like((rep.groups, rep.width)) * rep.decode(rep.codes).std()
    first, second = rep.two_nearest(targets, 1, None)
    assert torch.equal(first[:, 0], second[:, 0]) and (first[:, 1] != second[:, 1]).all()
    near, far = ((rep.decode(c) - targets).square().sum(1) for c in (first, second))
    assert (near <= far * (1 + 1e-5)).all()
    torch.testing.assert_close(rep.decode(first), rep.decode(rep.search(targets)))


@pytest.mark.parametrize("beam", [1, 4])
def test_sweep_never_loses_and_beam_finds_planted_codes(beam):
    books = random_like((3, 16, 6))
    start = random_windows(200, 3, seed=4) % 16
    targets = random_like((200, 6), seed=2) * 2
    before = targets - sum(books[m][start[:, m]] for m in range(3))
    order = torch.tensor([[2, 0, 1]])
    found = sweep(targets[None], start[None], books[None], beam, order)[0, :, 0].long()
    after = targets - sum(books[m][found[:, m]] for m in range(3))
    assert (after.square().sum(1) <= before.square().sum(1) * (1 + 1e-5)).all()
    assert after.square().sum() < 0.5 * before.square().sum()
    planted = sum(books[m][start[:, m]] for m in range(3))
    again = sweep(planted[None], start[None], books[None], beam)
    assert torch.equal(again[0, :, 0].long(), start)


def test_wider_beam_is_nearer():
    books, targets = random_like((3, 16, 6)), random_like((500, 6), seed=2) * 2
    start = torch.zeros(500, 3, dtype=torch.int64)
    errors = []
    for beam in (1, 4, 256):
        found = sweep(targets[None], start[None], books[None], beam)[0, :, 0].long()
        errors.append(float((targets - sum(books[m][found[:, m]] for m in range(3))).norm()))
    assert errors[0] > errors[1] > errors[2]
    every = torch.cartesian_prod(*[torch.arange(16)] * 3)
    words = sum(books[m][every[:, m]] for m in range(3))
    best = torch.cdist(targets.double(), words.double()).min(1).values
    assert errors[2] == pytest.approx(float(best.norm()), rel=1e-5)  # all pairs kept: exhaustive


def test_rows_of_scale_zero_stay():
    tensors = tensors_of("aqlm-2x4-g8")
    tensors["scales"][0] = 0
    rep = Single(represent(parse_scheme("aqlm-2x4-g8"), [tensors]))
    targets = random_like((rep.groups, rep.width))
    words = rep.decode(rep.search(targets, None, 4))
    assert torch.isfinite(words).all() and not words[: rep.columns].any()


def test_unknown_format_is_refused():
    class Other:
        id = "other-1"

    with pytest.raises(TuningError, match="other-1"):
        represent(Other(), [{}])


# -- gradients through rounding and clamping -------------------------------------------------------


def test_sigmoid_round_slope():
    x = torch.linspace(-2.9, 2.9, 117, dtype=torch.float64)
    for temperature in (1.0, 5.0, 20.0):
        low, high = (sigmoid_round(x + e, temperature)[0] for e in (-1e-6, 1e-6))
        _, rise = sigmoid_round(x, temperature)
        inside = (x - x.round()).abs() > 1e-5  # the function jumps at integers
        numeric = (high - low) / 2e-6
        torch.testing.assert_close(rise[inside], numeric[inside], rtol=1e-5, atol=1e-7)
    cell = torch.linspace(0, 1, 100001, dtype=torch.float64)[:-1]
    mean = sigmoid_round(cell, 5.0)[1].mean()
    assert float(mean) == pytest.approx(torch.tensor(1.25).tanh().item(), rel=1e-3)


def test_softclamp_slope():
    a, b = torch.tensor(-8.0).double(), torch.tensor(7.0).double()

    def soft(x):
        g = torch.sigmoid
        return x * g(x - a) * g(b - x) + a * g(a - x) + b * g(x - b)

    x = torch.linspace(-14, 14, 113, dtype=torch.float64).requires_grad_()
    expected = torch.autograd.grad(soft(x).sum(), x)[0]
    found = softclamp_slope(x.detach(), a, b)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    inner = softclamp_slope(torch.linspace(-8, 7, 61, dtype=torch.float64), a, b)
    assert inner.min() >= 0.5 and inner.max() < 1.10


def test_slopes_of_the_four_arms():
    x = torch.tensor([-2.2, -0.4, 0.3, 0.45, 3.1])
    zero = torch.tensor(1.0)  # grid -1, 0, 1, 2
    plain = slope(x, zero, 3, "identity", "none", 9.0)
    assert plain.tolist() == [1] * 5
    assert slope(x, zero, 3, "identity", "hard", 9.0).tolist() == [0, 1, 1, 1, 0]
    _, rise = sigmoid_round(x, 9.0)
    torch.testing.assert_close(
        slope(x, zero, 3, "sigmoid", "hard", 9.0), rise * torch.tensor([0.0, 1, 1, 1, 0])
    )
    both = slope(x, zero, 3, "sigmoid", "soft", 9.0)
    rounded, _ = sigmoid_round(x, 9.0)
    low, high = torch.tensor(-1.0), torch.tensor(2.0)
    torch.testing.assert_close(both, rise * softclamp_slope(rounded, low, high))
    half = slope(torch.tensor([0.4, 1.4]), torch.tensor(1.5), 3, "sigmoid", "none", 9.0)
    _, expected = sigmoid_round(torch.tensor([1.9, 2.9]), 9.0)  # QuIP's grid: -1.5 .. 1.5
    torch.testing.assert_close(half, expected)
