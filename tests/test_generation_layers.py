"""What ``prepare_for_generation`` does to a model's layers: stacks, the output head, saving."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, wide_config
from transformers import AutoModelForCausalLM

from aqlm_infer import prepare_for_generation, undo_prepare_for_generation
from aqlm_infer.bench.generate import quantized_copy
from aqlm_infer.bench.shapes import random_model
from aqlm_infer.checkpoint import CheckpointError, save_quantized
from aqlm_infer.generation import GenerationSetupError, prepare
from aqlm_infer.generation.stack import StackedPart, stack_siblings, stacks, unstack
from aqlm_infer.layers import QuantLinear

GOLDEN = Path(__file__).parent / "golden"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


# -- stacked layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "aqlm-1x9-g8-o2", "rtn-int4-g32"])
@pytest.mark.parametrize("bias", [False, True])
def test_stacked_siblings_compute_and_save_what_the_layers_did(scheme, bias, device):
    config = wide_config(attention_bias=bias)
    model = random_model(config, scheme, torch.float32, device)
    ids = torch.arange(20, device=device).view(2, 10)
    with torch.inference_mode():
        expected = model(ids).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths = stack_siblings(model)
    assert [len(names) for names in paths] == [3, 2] * config.num_hidden_layers
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 2 * config.num_hidden_layers
    with torch.inference_mode():
        error = (model(ids).logits - expected).norm() / expected.norm()
    assert error < (1e-4 if device == "cpu" else 2e-3)  # on a GPU x is rounded to 16 bits
    assert_same(model.state_dict(), state)
    part = model.get_submodule("model.layers.0.self_attn.k_proj")
    assert part.weight.shape == (64, 128)
    unstack(model)
    assert not any(True for _ in stacks(model))
    assert_same(model.state_dict(), state)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected)


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_only_alike_siblings_are_stacked():
    model = random_model(wide_config(num_hidden_layers=1), "aqlm-1x8-g8", torch.float32)
    attention = model.model.layers[0].self_attn
    other = random_model(wide_config(num_hidden_layers=1), "aqlm-2x8-g8", torch.float32, seed=1)
    attention.k_proj = other.model.layers[0].self_attn.k_proj
    model.model.layers[0].mlp.up_proj.scales.requires_grad_()
    assert stack_siblings(model) == []
    model = random_model(wide_config(num_hidden_layers=1), "quip-int4", torch.float32)
    assert stack_siblings(model) == []


def test_experts_are_stacked_one_by_one():
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "hf_mixtral_1x8g8")
    ids = torch.arange(1, 13).view(2, 6)
    with torch.inference_mode():
        expected = model(ids).logits
        prepare_for_generation(model)
        assert any(name.endswith("experts.3.w3") for name in sum(stacked(model), ()))
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-2, atol=1e-2)
    cuda = {torch.device("cuda", 0)}
    assert prepare._why_not_captured(model, cuda) == "experts are chosen on the host"


def stacked(model):
    return model.aqlm_generation.stacked


def test_moved_and_loaded_stacks():
    model = random_model(wide_config(), "aqlm-2x8-g8", torch.float32)
    with torch.inference_mode():
        ids = torch.arange(8).view(1, 8)
        expected = model(ids).logits
        state = model.state_dict()
        stack_siblings(model)
        model.bfloat16()
        assert next(stacks(model)).codebooks.dtype == torch.bfloat16
        torch.testing.assert_close(model(ids).logits.float(), expected, rtol=0.1, atol=0.2)
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.q_proj is stacked .*undo_prep"):
        model.load_state_dict(state)


# -- head and saving -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_quantized_head(tied):
    model = random_model(wide_config(tie_word_embeddings=tied), "aqlm-1x8-g8", torch.float32)
    ids = torch.arange(12).view(2, 6)
    embedding = model.get_input_embeddings().weight.clone()
    with torch.inference_mode():
        expected = model(ids).logits
        prepare_for_generation(model, lm_head="rtn-int8-g128")
        assert model.lm_head.format.id == "rtn-int8-g128"
        error = (model(ids).logits - expected).norm() / expected.norm()
        assert 1e-4 < error < 2e-2
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        undo_prepare_for_generation(model)
        assert torch.equal(model(ids).logits, expected)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_a_dense_head_on_the_cpu_reads_plain_rows(monkeypatch):
    """A slice of a prompt has the prompt's strides, with which F.linear copies the whole weight."""
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    linear, strides = torch.nn.functional.linear, []
    monkeypatch.setattr(
        torch.nn.functional, "linear",
        lambda x, *rest: strides.append(x.stride()) or linear(x, *rest),
    )  # fmt: skip
    ids = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        expected = model(ids, logits_to_keep=1).logits
        prepare_for_generation(model)
        logits = copy.deepcopy(model)(ids, logits_to_keep=1).logits
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        undo_prepare_for_generation(model)
        model(ids, logits_to_keep=1)
    assert [s[0] for s in strides] == [12 * 128, 128, 12 * 128]


def test_a_dense_head_on_the_cpu_multiplies_one_token_natively(monkeypatch):
    """Not where a gradient is recorded: the product has none."""
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    prepare_for_generation(model)
    head = model.lm_head
    x = torch.randn(1, 1, 128)
    exact = x.double() @ head.weight.double().T
    monkeypatch.setattr(torch.nn.functional, "linear", None)
    with torch.no_grad():
        torch.testing.assert_close(head(x).double(), exact, rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    given = x.clone().requires_grad_()
    head(given).sum().backward()
    torch.testing.assert_close(given.grad[0], head.weight.detach().sum(0, keepdim=True))
    undo_prepare_for_generation(model)
    assert model.lm_head is head and type(head) is torch.nn.Linear


def test_a_head_that_cannot_be_quantized_changes_nothing():
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    with pytest.raises(GenerationSetupError, match="without calibration"):
        prepare_for_generation(model, lm_head="gptq-int4-g128")
    with pytest.raises(ValueError, match="not a multiple of 96"):
        prepare_for_generation(model, lm_head="rtn-int8-g96")
    assert not any(isinstance(m, StackedPart) for m in model.modules())
    prepare_for_generation(model, lm_head="rtn-int4-g32")
    undo_prepare_for_generation(model)


def test_saving_a_prepared_model_saves_the_model(tmp_path):
    model = quantized_copy(tiny_model(), "aqlm-1x4-g8", "exact", progress=False)
    save_quantized(model, tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    prepare_for_generation(loaded)
    assert loaded.aqlm_generation.stacked
    loaded.save_pretrained(tmp_path / "b")
    assert loaded.aqlm_generation.stacked
    for name in ("model.safetensors",):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(CheckpointError, match="undo_prepare_for_generation"):
        save_quantized(loaded, tmp_path / "c")
    undo_prepare_for_generation(loaded)
    save_quantized(loaded, tmp_path / "c")
