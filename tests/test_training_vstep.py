"""The V step's selection and limits, the two steps on a quadratic, and LAMB."""

import math
from itertools import pairwise

import pytest
import torch
from tuning_cases import SCHEMES, random_hessian, representation, v_step_of

from aqlm_infer.training import Lamb, represent
from aqlm_infer.training.vstep import Choice, largest, v_step, within

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = {
    "all": Choice(),
    "capped": Choice(0.01, 0.01, beam=4),
    "change": Choice(0.1, ranking="change", beam=2),
    "gain": Choice(0.1, 0.5, ranking="gain"),
    "sampled": Choice(0.2, 0.01, temperature=0.5),
}


def noisy(rep, size=0.7, seed=0):
    """A buffer far enough from the codes for many to change, and a gradient that points there."""
    rng = torch.Generator().manual_seed(seed)
    words = rep.decode(rep.codes)
    step = size * words.std() * torch.randn(words.shape, generator=rng)
    return words + step, -step


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_buffer_on_the_codes_changes_nothing(scheme, rule):
    rep = representation(scheme)
    before = rep.codes.clone()
    words = rep.decode(rep.codes)
    moved = v_step_of(rep, words.clone(), RULES[rule], (1, 2), torch.ones_like(words))
    assert torch.equal(rep.codes, before) and moved.flips == 0
    assert moved.moved == 0 and moved.residual == 0 and moved.size > 0


@pytest.mark.parametrize("scheme", ["aqlm-2x4-g8", "gptq-int2-g32", "quip-int2", "quip-e8p-2bit"])
def test_stochastic_rounding_of_a_word_is_the_word(scheme):
    rep = representation(scheme)
    before = rep.codes.clone()
    v_step_of(rep, rep.decode(rep.codes), Choice(stochastic=True, beam=2))
    assert torch.equal(rep.codes, before)


@pytest.mark.parametrize("ranking", ["residual", "change", "gain"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_cap(scheme, ranking):
    for fraction in (1e-9, 0.013, 0.2):
        rep = representation(scheme)
        before = rep.codes.clone()
        buffer, gradient = noisy(rep)
        moved = v_step_of(rep, buffer, Choice(fraction, 0, 0, ranking, 4), (0,), gradient)
        changed = int((rep.codes != before).any(1).sum())
        assert changed == int(moved.flips)
        assert changed <= math.ceil(fraction * rep.groups)
        if ranking != "residual":
            assert changed == max(1, math.ceil(fraction * rep.groups))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trust_ratio_and_one_more(scheme):
    for ratio in (1e-12, 0.05):
        rep = representation(scheme)
        before = rep.decode(rep.codes)
        buffer, _ = noisy(rep)
        moved = v_step_of(rep, buffer, Choice(0.5, ratio, ranking="change", beam=4))
        steps = (rep.decode(rep.codes) - before).double().square().sum(1)
        changed = steps[steps > 0]
        total, limit = changed.sum(), (ratio * before.double().norm()) ** 2
        torch.testing.assert_close(moved.moved, total, rtol=1e-6, atol=0)
        assert len(changed) >= 1
        # Ranked by the change, so the last one accepted is the smallest.
        assert total - changed.min() <= limit * (1 + 1e-5)
        assert total > limit or len(changed) == math.ceil(0.5 * rep.groups)
        if ratio < 1e-9:
            assert len(changed) == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_stack_is_its_layers_one_by_one(scheme, rule):
    first, second = representation(scheme), representation(scheme)
    second.codes = second.search(torch.randn(second.groups, second.width))
    for value in second.values.values():
        value.data.mul_(1.5)
    stack = represent(first.format, [first.tensors(), second.tensors()])
    buffers, gradients, moved = [], [], []
    for place, rep in enumerate((first, second)):
        buffer, gradient = noisy(rep, seed=place)
        outer = torch.randn(rep.weight().shape, generator=torch.Generator().manual_seed(place))
        rep.basis = rep.gradients(outer)
        buffers.append(buffer), gradients.append(gradient)
        moved.append((rep, outer, v_step_of(rep, buffer, RULES[rule], (3, place), gradient)))
    basis = stack.gradients(torch.stack([outer for _, outer, _ in moved]))
    found = v_step(
        stack, torch.stack(buffers), RULES[rule], [(3, 0), (3, 1)], torch.stack(gradients)
    )
    for place, (rep, _, alone) in enumerate(moved):
        torch.testing.assert_close(basis[place], rep.basis)
        for name, value in rep.values.items():
            torch.testing.assert_close(stack.values[name].grad[place], value.grad)
        same = (stack.codes[place] == rep.codes).double().mean()  # near ties round otherwise
        assert same > 0.999
        for name in ("flips", "moved", "residual", "size"):
            one, both = getattr(alone, name), getattr(found, name)[place]
            torch.testing.assert_close(both.double(), one.double(), rtol=2e-3, atol=3)


def test_full_and_ordered_steps_agree():
    first, second = representation("aqlm-2x4-g8"), representation("aqlm-2x4-g8")
    buffer, _ = noisy(first)
    v_step_of(first, buffer, Choice(1.0, 0.0, beam=4), (7,))
    v_step_of(second, buffer, Choice(1.0, 1e6, beam=4), (7,))
    assert torch.equal(first.codes, second.codes)
    assert not torch.equal(first.codes, representation("aqlm-2x4-g8").codes)


def test_residual_ranking_takes_the_furthest():
    rep = representation("gptq-int2-g32")
    buffer, _ = noisy(rep)
    before = rep.codes.clone()
    far = (buffer - rep.decode(rep.codes)).abs()[:, 0].topk(20).indices
    v_step_of(rep, buffer, Choice(20 / rep.groups))
    changed = (rep.codes != before)[:, 0].nonzero()[:, 0]
    assert len(changed) > 3 and set(changed.tolist()) <= set(far.tolist())


def test_gain_ranking_takes_what_the_gradient_promises():
    rep = representation("gptq-int2-g32")
    buffer, _ = noisy(rep)
    gradient = torch.randn(buffer.shape, generator=torch.Generator().manual_seed(8))
    before, words = rep.codes.clone(), rep.decode(rep.codes)
    change = rep.decode(rep.search(buffer)) - words
    best = (-gradient * change)[:, 0].topk(15).indices
    v_step_of(rep, buffer, Choice(15 / rep.groups, ranking="gain"), (0,), gradient)
    changed = (rep.codes != before)[:, 0].nonzero()[:, 0]
    assert set(changed.tolist()) == set(best.tolist())


def test_largest_is_stable():
    score = torch.tensor([0.0, 3.0, -2.0, 3.0, -torch.inf, 0.5, 3.0, -2.0])
    expected = score.sort(descending=True, stable=True).indices
    for count in range(1, 9):
        assert largest(score[None], count)[0].tolist() == expected[:count].tolist()


def test_largest_samples_by_temperature():
    score = torch.tensor([1.0, 4.0, 16.0, 0.0])  # distances 1, 2, 4, 0
    counts = torch.zeros(4)
    for draw in range(4000):
        counts[largest(score[None], 1, 1.0, [(draw,)])[0]] += 1
    torch.testing.assert_close(counts / 4000, torch.tensor([1, 2, 4, 0]) / 7, atol=0.03, rtol=0)
    order = largest(score[None], 4, 1e-3, [(0,)])[0].tolist()
    assert order == [2, 1, 0, 3]  # cold: the largest first
    pair = largest(score.expand(2, -1), 2, 1.0, [(5,), (5,)]).tolist()
    assert pair[0] == pair[1]


def test_within():
    moved = torch.tensor([3.0, 0.0, 2.0, 4.0, 0.0, 1.0]).double()
    for budget, kept in ((5.0, 4), (4.99, 3), (2.0, 1), (100.0, 6)):
        mask = within(moved[None], torch.tensor([budget]).double())
        assert mask[0].tolist() == [i < kept for i in range(6)], budget
    assert within(torch.zeros(1, 3).double(), torch.zeros(1).double()).all()


def test_stochastic_rounding_is_unbiased_on_a_grid():
    rep = representation("gptq-int4-g32")
    step, _ = rep.grid()
    words = rep.decode(rep.codes)
    inner = ((rep.codes > 0) & (rep.codes < rep.top))[:, 0]
    buffer = words + 0.3 * step
    mean = torch.zeros_like(words)
    start = rep.codes.clone()
    for draw in range(60):
        rep.codes = start.clone()
        v_step_of(rep, buffer, Choice(stochastic=True), (draw,))
        mean += rep.decode(rep.codes) / 60
    share = ((mean - words) / step)[inner]
    assert float(share.mean()) == pytest.approx(0.3, abs=0.005)


# -- exact steps on a quadratic --------------------------------------------------------------------


class Quadratic:
    """phi(W) = tr((W - T) H (W - T)^T), float64, with its smoothness constant."""

    def __init__(self, rep):
        rows, columns = rep.weight().shape
        # A step of 1 / smoothness flips codes only where H is near a multiple of the identity.
        H = random_hessian(columns, seed=5)
        self.H = torch.eye(columns).double() + 0.3 * H / torch.linalg.eigvalsh(H).max()
        rng = torch.Generator().manual_seed(6)
        noise = torch.randn(rows, columns, generator=rng, dtype=torch.float64)
        weight = rep.weight().detach().double()
        self.target = weight + 0.8 * weight.std() * noise
        self.smooth = 2 * float(torch.linalg.eigvalsh(self.H).max())

    def __call__(self, rep) -> float:
        error = rep.weight().detach().double() - self.target
        return float(((error @ self.H) * error).sum())

    def gradient(self, rep) -> torch.Tensor:
        return (2 * (rep.weight().detach().double() - self.target) @ self.H).float()


def p_step(rep, phi) -> None:
    """The exact minimum along the gradient of each value: the weight is linear in each."""
    for name in rep.values:
        rep.gradients(phi.gradient(rep))
        value = rep.values[name].data
        step = rep.values[name].grad.clone()
        before = rep.weight().detach().double()
        value.add_(step)
        along = rep.weight().detach().double() - before
        value.sub_(step)
        slope = float(((before - phi.target) @ phi.H * along).sum())
        value.sub_(step, alpha=slope / float((along @ phi.H * along).sum()))


@pytest.mark.parametrize("cap", [1.0, 0.05])
@pytest.mark.parametrize("scheme", ["aqlm-2x4-g8", "gptq-int2-g32", "quip-int2", "quip-e8p-2bit"])
def test_exact_steps_never_raise_a_quadratic(scheme, cap):
    rep = representation(scheme)
    phi = Quadratic(rep)
    scale = 1.0
    losses = [phi(rep)]
    flips = 0
    for round in range(6):
        p_step(rep, phi)
        losses.append(phi(rep))
        basis = rep.gradients(phi.gradient(rep))
        if scheme.startswith("quip"):
            scale = basis_scale(rep)
        buffer = rep.decode(rep.codes) - basis / (phi.smooth * scale)
        flips += int(v_step_of(rep, buffer, Choice(cap, beam=4, ranking="change"), (round,)).flips)
        losses.append(phi(rep))
    for before, after in pairwise(losses):
        assert after <= before * (1 + 1e-6), losses
    assert losses[-1] < 0.95 * losses[0] and flips > 0


def basis_scale(rep) -> float:
    """Squared norm of the linear map from the code basis to the weight: max |SV|^2 max |SU|^2."""
    sides = [float(rep.values[name].detach().abs().max()) for name in ("SV", "SU")]
    return (sides[0] * sides[1]) ** 2


# -- LAMB ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.95)])
@pytest.mark.parametrize("debias", [True, False])
def test_lamb_equals_its_formula(betas, debias):
    rng = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, 7, generator=rng, dtype=torch.float64))
    zero = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    expected, m, v = p.detach().clone(), 0.0, 0.0
    optimizer = Lamb([{"params": [p, zero], "lr": 0.01, "betas": betas, "debias": debias}])
    for t in range(1, 6):
        gradient = torch.randn(5, 7, generator=rng, dtype=torch.float64)
        p.grad, zero.grad = gradient.clone(), torch.ones(3, dtype=torch.float64)
        before = p.detach().clone()
        optimizer.step()
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        u = m / (v.sqrt() + 1e-6)
        bias = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) if debias else 1.0
        expected = expected - 0.01 * bias * expected.norm() / u.norm() * u
        torch.testing.assert_close(p.detach(), expected)
        moved = float((p.detach() - before).norm() / before.norm())
        assert moved == pytest.approx(0.01 * bias, rel=1e-9)
    assert zero.detach().abs().max() > 0  # ratio 1 where the tensor is zero
    assert ("m" in optimizer.state[p]) == (betas[0] > 0)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.95)])
def test_lamb_of_a_stack_is_that_of_its_slices(betas):
    rng = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 9.0, 0.0]).view(3, 1, 1)
    stack = torch.nn.Parameter(sizes * torch.randn(3, 4, 5, generator=rng))
    slices = [torch.nn.Parameter(s.clone()) for s in stack.detach()]
    together = Lamb([{"params": [stack], "stacked": True}], lr=0.1, betas=betas)
    apart = Lamb(slices, lr=0.1, betas=betas)
    for _ in range(3):
        stack.grad = torch.randn(stack.shape, generator=rng)
        for one, gradient in zip(slices, stack.grad, strict=True):
            one.grad = gradient.clone()
        together.step(), apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([s.detach() for s in slices]))


def test_lamb_without_a_gradient_does_nothing():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = Lamb([{"params": [p], "lr": 0.5}])
    optimizer.step()
    p.grad = torch.zeros(4)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(4))
