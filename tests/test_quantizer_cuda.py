"""Quantizers on a GPU: replayed steps are the eager ones, two runs give the same bits, and the
result is as good as the CPU's."""

from __future__ import annotations

import pytest
import torch

from aqlm_infer.formats import parse_scheme
from aqlm_infer.quantizers import ldlq, quantizer_for
from aqlm_infer.quantizers.hessian import relative_loss
from aqlm_infer.quantizers.sums import CodeSums
from aqlm_infer.quantizers.walk import Walk

pytestmark = pytest.mark.gpu

SCHEMES = ["aqlm-2x6-g8", "aqlm-1x8-g4-o2", "gptq-int2-g64", "quip-int3"]
SCHEMES += ["quip-e8p-2bit", "quip-e8p-3bit", "quip-e8p-4bit"]


def problem(N=96, K=192):
    """A weight [N, K] and the second moment of correlated inputs; K is no multiple of 128."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(4 * K, K, generator=generator)
    inputs[:, 1:] += 0.7 * inputs[:, :-1]
    inputs[:, :: K // 4] *= 5
    return torch.randn(N, K, generator=generator), (inputs.T @ inputs).double() / len(inputs)


def fitted(scheme, device):
    weight, hessian = problem()
    tensors = quantizer_for(scheme).fit(weight.to(device), hessian.to(device))
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def loss(scheme, tensors):
    weight, hessian = problem()
    return relative_loss(weight, parse_scheme(scheme).dequantize(tensors, torch.float64), hessian)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_replayed_steps_are_the_eager_ones(scheme, monkeypatch):
    replayed, again = fitted(scheme, "cuda"), fitted(scheme, "cuda")

    def eagerly(walk, blocks):
        for block in torch.tensor(blocks, device=walk.device).split(1):
            walk.step(block)

    for name, tensor in replayed.items():
        assert torch.equal(tensor, again[name]), name
    monkeypatch.setattr(ldlq, "one_kernel", lambda *_: False)
    by_columns = fitted(scheme, "cuda")
    monkeypatch.setattr(Walk, "__call__", eagerly)
    eager = fitted(scheme, "cuda")
    for name, tensor in by_columns.items():
        assert torch.equal(tensor, eager[name]), name
    assert loss(scheme, replayed) == pytest.approx(loss(scheme, eager), rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("scheme", ["aqlm-2x6-g8", "gptq-int2-g64", "quip-e8p-3bit"])
def test_a_device_that_is_not_the_current_one(scheme):
    second, first = fitted(scheme, "cuda:1"), fitted(scheme, "cuda:0")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_as_good_as_the_cpu(scheme):
    ours, theirs = loss(scheme, fitted(scheme, "cuda")), loss(scheme, fitted(scheme, "cpu"))
    assert 0 < ours < 1.05 * theirs + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_code_sums_have_no_order(dtype):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(9, (5000, 2), generator=generator)
    rows = torch.randn(5000, 8, generator=generator, dtype=torch.float64).to(dtype)
    hot = torch.nn.functional.one_hot(codes, 11).double()
    exact = torch.einsum("nbc,nd->bcd", hot, rows.double())
    found = CodeSums(codes.cuda(), 11)(rows.cuda())
    limit = 1e-6 if dtype == torch.float32 else 1e-13
    assert found.dtype == dtype and (found.cpu() - exact).abs().max() < limit * exact.abs().max()
    order = torch.randperm(5000, generator=generator)
    assert torch.equal(CodeSums(codes[order].cuda(), 11)(rows[order].cuda()), found)
    rows[7, 3] = torch.nan
    assert CodeSums(codes.cuda(), 11)(rows.cuda()).isnan().any()
    assert not CodeSums(codes.cuda(), 11)(torch.zeros_like(rows).cuda()).any()
