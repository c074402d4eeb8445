"""1x16 on a CUDA device: which copy of its entry a packed code reads, and one token's bodies."""

import pytest
import torch
from cases import random_input, random_layer
from tolerances import assert_close

from aqlm_infer import QuantLinear
from aqlm_infer.backends import additive as calls

pytestmark = pytest.mark.gpu

SECOND_ENTRIES = 40960  # kSecondEntries of csrc/common/additive_layout.h


def second_copy(code):
    return code ^ (code >> 5 & 0x3E)


def unpacked(packed, N, K):
    """Fields and choices [tile, unit, lane, code of the lane] of one part, by the layout's text."""
    tiles, units = -(-N // 16), -(-K // 128)
    groups = -(-units // 4)
    split = units * tiles * 512
    fields = packed[:split].view(torch.int16).to(torch.int64) & 0xFFFF
    fields = fields.view(units, tiles, 32, 8).transpose(0, 1)
    words = packed[split:].view(torch.int32).view(groups, tiles, 32)
    unit, code = torch.meshgrid(torch.arange(units), torch.arange(8), indexing="ij")
    bit = code % 4 * 8 + unit % 4 * 2 + code // 4
    chosen = words.transpose(0, 1)[:, unit // 4] >> bit[..., None] & 1
    return fields, chosen.transpose(2, 3).to(torch.int64)


def wavefronts(entries):
    """Shared-memory wavefronts of a lookup: most entries in a bank, over the 32 lanes."""
    banks = torch.nn.functional.one_hot(entries >> 1 & 31, 32)  # tile, unit, lane, code, bank
    return banks.sum(2).amax(-1).double().mean().item()


@pytest.mark.parametrize(("N", "K"), [(512, 1024), (70, 1160)])
def test_packed_codes_say_which_copy_they_read(N, K):
    layer = random_layer("aqlm-1x16-g8", N, K, torch.float16)
    tensors = {name: tensor.cuda() for name, tensor in layer.tensors.items()}
    packed = calls.repack(layer.format, tensors, (N,), "exact")["packed_codes"].cpu()
    fields, chosen = unpacked(packed, N, K)
    entries = torch.where(chosen == 1, second_copy(fields), fields)
    assert (chosen == 0)[entries >= SECOND_ENTRIES].all()
    row, vector = torch.meshgrid(torch.arange(N), torch.arange(K // 8), indexing="ij")
    lane = row % 8 * 4 + vector // 4 % 4
    here = entries[row // 16, vector // 16, lane, row // 8 % 2 * 4 + vector % 4]
    assert torch.equal(here, layer.tensors["codes"].to(torch.int64)[:, :, 0] & 0xFFFF)
    if N == 512:  # no padding: random codes
        assert wavefronts(entries) > 3.4
        assert wavefronts(fields) < 2.4


@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("scheme", ["aqlm-1x16-g8", "aqlm-1x16-g16", "aqlm-1x12-g8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_token_equals_one_of_two(scheme, precision, dtype):
    """The body rounds one token's activations itself; with two they come from another kernel."""
    N, K = 545, 1360
    layer = random_layer(scheme, N, K, dtype)
    tensors = {name: tensor.cuda() for name, tensor in layer.tensors.items()}
    quant = QuantLinear.from_tensors(layer.format, tensors, K, precision=precision)
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(0)).to(dtype).cuda()
    x[0, 7] = 60.0  # most others become small numbers
    x[1] = 0
    y = quant(x)
    assert torch.equal(quant(x[:1]), y[:1])
    assert torch.equal(quant(x[1:]), y[1:]) and not y[1].any()


@pytest.mark.parametrize(("precision", "K"), [("int8", 36864), ("int8", 37000), ("exact", 37000)])
def test_one_token_of_a_long_row(precision, K):
    """Up to 36864 columns of int8 fit beside the tables; longer rows take the other way."""
    layer = random_layer("aqlm-1x16-g8", 33, K, torch.float16)
    tensors = {name: tensor.cuda() for name, tensor in layer.tensors.items()}
    quant = QuantLinear.from_tensors(layer.format, tensors, K, precision=precision)
    x = random_input(1, K, torch.float16)
    y, weight = quant(x.cuda()).cpu(), layer.weight()
    expected = x.double() @ weight.T
    if precision == "exact":
        assert_close(y, expected, x, weight, torch.float16)
    else:
        assert (y.double() - expected).norm() <= 2e-2 * expected.norm()
