"""Rounding with feedback: LDLQ is OPTQ, greedy passes, E8P points, golden proxies of QuIP#."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aqlm_infer import QuantLinear
from aqlm_infer.formats import parse_scheme
from aqlm_infer.formats.e8p import E8PFormat, grid_x4
from aqlm_infer.quantizers import QuantizerError, ldlq, quantizer_for
from aqlm_infer.quantizers.e8p import SPREADS
from aqlm_infer.quantizers.grid import GroupRounder, group_grid
from aqlm_infer.quantizers.hessian import Curvature, regularise, relative_loss
from aqlm_infer.quantizers.lattice import E8PRounder, nearest_e8p
from aqlm_infer.quantizers.ldlq import feedback_round, greedy_passes
from aqlm_infer.quantizers.quip import UniformRounder

GOLDEN = Path(__file__).parent / "golden"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scalar():
    return load_file(GOLDEN / "quip_scalar.safetensors")


@pytest.fixture(scope="module")
def toy():
    return load_file(GOLDEN / "quip_ldlq_e8p.safetensors")


def gaussian(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def moment(K, seed=9):
    x = gaussian(8 * K, K, seed).double() @ gaussian(K, K, seed + 1).double() / K**0.5
    return x.T @ x / (8 * K)


def exactly(matrix):
    return Curvature(matrix, torch.linalg.cholesky(matrix), 0.0)


def optq(weight, hessian, scale, zero, top):
    """OPTQ as its paper writes it: left to right, the upper Cholesky factor of H^-1."""
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    weight, rounded = weight.clone(), torch.zeros_like(weight)
    for k in range(weight.shape[1]):
        code = ((weight[:, k : k + 1] / scale).round() + zero).clamp(0, top)
        rounded[:, k : k + 1] = (code - zero) * scale
        error = (weight[:, k : k + 1] - rounded[:, k : k + 1]) / factor[k, k]
        weight[:, k + 1 :] -= error * factor[k, k + 1 :]
    return rounded


def one_group(N, K, bits, scale, zero):
    return GroupRounder(N, K, bits, torch.zeros(K, dtype=torch.int64), scale.clone(), zero.clone())


@pytest.mark.parametrize("buffer", [64, 16, 1])
def test_ldlq_is_optq_bit_for_bit_golden(scalar, buffer):
    weight, hessian, scale, zero = (scalar[f"equiv.{k}"] for k in ("W", "H", "scale", "zero"))
    rounder = one_group(*weight.shape, 3, scale, zero)
    found = feedback_round(weight.flip(1), exactly(hessian.flip(0, 1)), rounder, buffer)
    assert torch.equal(found.flip(1), scalar["equiv.optq_deq"])
    assert torch.equal(optq(weight, hessian, scale, zero, 7), scalar["equiv.optq_deq"])


@pytest.mark.parametrize("bits", [2, 4])
def test_ldlq_is_optq_bit_for_bit(bits):
    weight, hessian = gaussian(50, 96, 4).double(), regularise(moment(96), 96).matrix
    scale, zero = group_grid(weight[:, None].float(), bits, clip=False)
    scale, zero = scale.double(), zero.double()
    rounder = one_group(50, 96, bits, scale, zero)
    found = feedback_round(weight.flip(1), exactly(hessian.flip(0, 1)), rounder)
    assert torch.equal(found.flip(1), optq(weight, hessian, scale, zero, 2**bits - 1))
    assert torch.equal((rounder.codes.double() - zero) * scale, found)
    nearest = ((weight / scale).round() + zero).clamp(0, 2**bits - 1)
    nearest = (nearest - zero) * scale
    losses = [relative_loss(weight, w, hessian) for w in (found.flip(1), nearest)]
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scalar_golden_proxies_are_reached(scalar, bits):
    weight, hessian = scalar["pre.W"].double(), scalar["pre.H"].double()
    scale, top = float(scalar[f"b{bits}.scale"]), 2**bits - 1

    def golden(name):
        codes = scalar[f"b{bits}.{name}.codes"].double()
        return relative_loss(weight, (codes * 2 / top - 1) * scale, hessian)

    rounder = UniformRounder(24, 64, bits, scale, "cpu")
    rounded = feedback_round(weight, exactly(hessian), rounder)
    assert relative_loss(weight, rounded, hessian) <= golden("ldlq")
    better = greedy_passes(weight, rounded, exactly(hessian), rounder, 5)
    assert relative_loss(weight, better, hessian) <= golden("ldlq_greedy5")
    torch.testing.assert_close((rounder.codes.double() * 2 / top - 1) * scale, better)


@pytest.mark.parametrize("bits, name", [(2, "E8P12"), (3, "E8P12RVQ3B"), (4, "E8P12RVQ4B")])
def test_e8p_golden_proxies_are_reached(toy, bits, name):
    weight, curvature = toy["plain.Wr"].double(), exactly(toy["plain.Hr"].double())
    scale = float(weight.square().mean().sqrt()) / SPREADS[bits]
    rounder = E8PRounder(*weight.shape, E8PFormat(bits), "cpu")
    rounded = feedback_round(weight / scale, curvature, rounder)
    golden = toy[f"{name}_tune0.proxy_rel"].item()
    assert relative_loss(weight, rounded * scale, curvature.matrix) == pytest.approx(golden, 1e-3)
    if bits == 2:
        same = rounder.codes[..., 0] == toy[f"{name}_tune0.codes"].long() % 65536
        assert same.double().mean() >= 0.999
    passed = greedy_passes(weight / scale, rounded, curvature, rounder, 10)
    golden = toy[f"{name}_tune10.proxy_rel"].item()
    assert relative_loss(weight, passed * scale, curvature.matrix) <= golden


@pytest.mark.parametrize("scheme", ["gptq-int2-g32", "quip-int3"])
def test_a_window_in_one_kernel_rounds_as_its_columns_do(scheme, monkeypatch):
    """In Triton's interpreter here; tests/test_quantizer_cuda.py compares on a GPU."""
    pytest.importorskip("triton")
    weight, hessian = gaussian(12, 160), moment(160)
    one_by_one = quantizer_for(scheme, passes=1).fit(weight, hessian)
    windows = []
    whole = ldlq._round_window
    monkeypatch.setattr(ldlq, "fused", lambda rounder, *_: rounder.grid(slice(0, 1)) is not None)
    monkeypatch.setattr(ldlq, "_round_window", lambda *a: (windows.append(a[-1]), whole(*a)))
    at_once = quantizer_for(scheme, passes=1).fit(weight, hessian)
    assert len(windows) > 2
    found = [parse_scheme(scheme).dequantize(t, torch.float64) for t in (one_by_one, at_once)]
    assert (found[0] != found[1]).double().mean() < 1e-3
    losses = [relative_loss(weight, w, hessian) for w in found]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_greedy_passes_never_raise_the_loss():
    weight, curvature = gaussian(32, 128).double(), regularise(moment(128), 128)
    rounder = E8PRounder(32, 128, E8PFormat(2), "cpu")
    rounded = feedback_round(weight, curvature, rounder)
    losses = [relative_loss(weight, rounded, curvature.matrix)]
    for _ in range(6):
        rounded = greedy_passes(weight, rounded, curvature, rounder, 1, buffer=64)
        losses.append(relative_loss(weight, rounded, curvature.matrix))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.97 * losses[0]
    values = grid_x4()[rounder.codes[..., 0]].double() / 4
    assert torch.equal(values.flatten(1), rounded)


def test_nearest_e8p_is_exhaustive():
    x = torch.cat([gaussian(300, 8, 1), 3 * gaussian(60, 8, 2)])
    grid = grid_x4().float() / 4
    exact = torch.cdist(x.double(), grid.double()).amin(1)
    found = (x.double() - grid.double()[nearest_e8p(x)]).norm(dim=1)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("scale, error", [(1.03, 0.0912), (0.9, 0.0989)])
def test_e8p_gaussian_anchor(scale, error):
    x = gaussian(20000, 8)
    wrong = grid_x4()[nearest_e8p(x * scale)].float() / 4 / scale - x
    assert float(wrong.square().mean()) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("bits", [2, 4])
def test_clipping_lowers_the_error_of_a_grid(bits):
    groups = gaussian(64, 256).view(64, 4, 64)

    def error(clip):
        scale, zero = group_grid(groups, bits, clip)
        codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 2**bits - 1)
        assert torch.equal(zero, zero.round()) and zero.min() >= 0 and zero.max() < 2**bits
        return float(((codes - zero[..., None]) * scale[..., None] - groups).square().mean())

    assert error(True) < (0.75 if bits == 2 else 0.97) * error(False)


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("scheme", ["gptq-int2-g32", "gptq-int3-g64", "gptq-int4-g32"])
def test_gptq_beats_rtn(scheme, order):
    weight, hessian = gaussian(48, 128), moment(128)
    losses = []
    for one, options in ((scheme, {"order": order}), (scheme.replace("gptq", "rtn"), {})):
        format = parse_scheme(one)
        tensors = quantizer_for(format, **options).fit(weight, hessian)
        format.check_tensors(tensors, 48, 128)
        losses.append(relative_loss(weight, format.dequantize(tensors, torch.float64), hessian))
    assert losses[0] < 0.65 * losses[1]


@pytest.mark.parametrize(
    "scheme, limit",
    [
        ("quip-int2", 0.13), ("quip-int3", 0.04), ("quip-int4", 0.012), ("quip-int2-b128", 0.13),
        ("quip-int2-kron", 0.13), ("quip-e8p-2bit", 0.1), ("quip-e8p-3bit", 0.03),
        ("quip-e8p-4bit", 0.01), ("quip-e8p-2bit-b128", 0.1),
    ],
)  # fmt: skip
def test_rotated_schemes_end_to_end(scheme, limit):
    """Below the Gaussian error of each grid without feedback, on a weight with outliers."""
    weight, hessian = gaussian(128, 256), moment(256)
    weight[:, 5] *= 20
    format = parse_scheme(scheme)
    tensors = quantizer_for(format, seed=1).fit(weight, hessian)
    format.check_tensors(tensors, 128, 256)
    found = format.dequantize(tensors, torch.float64)
    assert relative_loss(weight, found, hessian) < limit
    again = quantizer_for(format, seed=1).fit(weight, hessian)
    assert all(torch.equal(tensors[k], again[k]) for k in tensors)
    other = quantizer_for(format, seed=2).fit(weight, hessian)
    assert not all(torch.equal(tensors[k], other[k]) for k in tensors)


def test_calibration_is_asked_for():
    with pytest.raises(QuantizerError, match="gptq-int4-g32 needs calibration"):
        quantizer_for("gptq-int4-g32").fit(gaussian(64, 64))


@pytest.mark.parametrize(
    ("scheme", "limit"), [("quip-int2", 0.14), ("quip-int2-kron", 0.14), ("quip-e8p-2bit", 0.1)]
)
def test_without_calibration_the_rotated_weight_is_rounded(scheme, limit):
    """Gaussian mean square errors: about 0.12 for four uniform levels, 0.0912 for E8P."""
    weight = gaussian(128, 256)
    quantizer = quantizer_for(scheme)
    found = quantizer.format.dequantize(quantizer.fit(weight), torch.float64)
    identity = torch.eye(256, dtype=torch.float64)
    assert relative_loss(weight, found, identity) < limit
    layer = QuantLinear.from_linear(torch.nn.Linear(256, 128), scheme)
    assert layer.format.id == scheme


@pytest.mark.parametrize(
    "scheme, options, message",
    [
        ("gptq-int2-g32", {"order": "random"}, "order='random'; known: natural, activation"),
        ("gptq-int2-g32", {"damping": 0.0}, "damping=0.0"),
        ("quip-int2", {"spread": -1.0}, "spread=-1.0"),
        ("quip-e8p-2bit", {"passes": -1}, "passes=-1"),
        ("quip-e8p-2bit", {"beam": 3}, "no option 'beam'"),
    ],
)
def test_options_out_of_range_are_refused(scheme, options, message):
    with pytest.raises(QuantizerError, match=message):
        quantizer_for(scheme, **options)
