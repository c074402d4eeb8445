"""Running, copying, training and placing models that transformers loaded."""

import copy

import pytest
import torch
from cases import GOLDEN
from safetensors.torch import load_file
from tiny_models import IDS, logits, relative_error, write_checkpoint
from transformers_cases import CLOSE, GOLDEN_MODELS, assert_matches, assert_round_trip, load

from aqlm_infer import quantized_layers
from aqlm_infer.checkpoint import CheckpointError
from aqlm_infer.integrations.moe import QuantExperts


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_static_cache_generates_the_same(name):
    model = load(GOLDEN / name)
    prompt = torch.tensor([[1, 17, 99, 4], [7, 8, 120, 55]])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(prompt, **options)
    static = model.generate(prompt, cache_implementation="static", **options)
    assert dynamic.shape == (2, 12) and torch.equal(static, dynamic)


def test_forward_changes_nothing_that_is_saved(tmp_path):
    written = write_checkpoint(tmp_path / "in")
    model = load(written.folder, dtype="auto")
    model.save_pretrained(tmp_path / "before")
    logits(model)
    model.generate(IDS, max_new_tokens=2, pad_token_id=0)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("before", "after"))
    assert before.keys() == after.keys() == written.state.keys()
    for name, tensor in written.state.items():
        assert torch.equal(before[name], tensor) and torch.equal(after[name], tensor), name


@pytest.mark.parametrize("name", ["hf_llama_2x8g8", "hf_mixtral_1x8g8"])
def test_deepcopy(name):
    model = load(GOLDEN / name)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    layer = next(quantized_layers(twin))[1]
    with torch.no_grad():
        layer.scales.mul_(2)
    assert not torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("name", ["hf_llama_2x8g8", "hf_mixtral_1x8g8"])
def test_training_step_reaches_what_feeds_the_layers(name):
    model = load(GOLDEN / name).train()
    table = model.model.embed_tokens.weight
    model(IDS, labels=IDS).loss.backward()
    dense = model.hf_quantizer.dequantize(copy.deepcopy(model)).train()
    dense.zero_grad()
    dense(IDS, labels=IDS).loss.backward()
    assert relative_error(table.grad, dense.model.embed_tokens.weight.grad) <= CLOSE
    assert table.grad.abs().max() > 0
    assert all(p.grad is None for _, layer in quantized_layers(model) for p in layer.parameters())


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_dequantize_gives_a_dense_model_that_saves(name, tmp_path):
    model = load(GOLDEN / name)
    expected = logits(model)
    dense = model.dequantize()
    assert not list(quantized_layers(dense))
    assert not any(isinstance(m, QuantExperts) for m in dense.modules())
    assert relative_error(logits(dense), expected) <= CLOSE
    dense.save_pretrained(tmp_path / "dense")
    published = load_file(GOLDEN / name / "model.safetensors")
    named = {n.replace(".codes", ".weight") for n in published if n.endswith(("codes", "weight"))}
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == named
    again = load(tmp_path / "dense")
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again), logits(dense))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(device_map, tmp_path):
    written = write_checkpoint(tmp_path / "in")
    model = load(written.folder, device_map=device_map)
    assert_matches(model, written)
    assert_round_trip(model, tmp_path / "out")


def test_offloaded_layers_are_refused(tmp_path):
    written = write_checkpoint(tmp_path / "in")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj.* was offloaded"):
        load(written.folder, device_map=places, offload_folder=tmp_path / "offload")


def test_expert_graph_without_data_dependent_shapes():
    experts = load(GOLDEN / "hf_mixtral_1x8g8").model.layers[0].mlp.experts
    torch.manual_seed(0)
    x, weights = torch.randn(5, 128), torch.rand(5, 2)
    index = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0], [0, 3]])  # expert 2 is never chosen
    with torch.no_grad():
        experts[2].w2.scales.fill_(float("inf"))  # as an overflow of an expert not asked for
        eager = experts(x, index, weights)
        compiled = torch.compile(experts, backend="eager", fullgraph=True)(x, index, weights)
    assert relative_error(compiled, eager) <= CLOSE
