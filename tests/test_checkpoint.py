"""Checkpoint folders: models swapped in this process, whole saves, legacy conversion."""

import json
import os
import stat

import pytest
import torch
from cases import GOLDEN, random_layer
from safetensors.torch import load_file
from tiny_models import logits, tiny_config, tiny_model, write_checkpoint
from torch import nn
from transformers import AqlmConfig, MixtralConfig
from transformers_cases import assert_round_trip, load

from aqlm_infer import FormatError, QuantLinear, quantized_layers, replace_linears
from aqlm_infer.checkpoint import (
    CheckpointError,
    attach_config,
    convert_legacy,
    describe,
    read_headers,
    save_quantized,
)
from aqlm_infer.quantizers import Quantizer

MIXED = {"*.0.mlp.up_proj": "aqlm-1x3-g4", "*.1.*": "aqlm-2x2-g8", "*mlp*": "aqlm-1x4-g8-o2"}
CONFIG = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True, "mlp_bias": True},
}


class Tokenizer:
    """Stands in for a tokenizer: a file of its own, or a failure in the middle of a save."""

    def __init__(self, error=None):
        self.error = error

    def save_pretrained(self, folder):
        assert (folder / "model.safetensors").exists()
        (folder / "tokenizer.json").write_text("{}")
        if self.error:
            raise self.error


class RandomCodes(Quantizer):
    """Ignores the weight: what is saved matters here, not how good it is."""

    def __init__(self, scheme):
        self.scheme = scheme

    def fit(self, weight, hessian=None):
        return random_layer(self.scheme, *weight.shape).tensors


def swapped(plan="aqlm-2x8-g8", config=None, dtype=torch.float32, **options):
    """A dense model whose layers were quantized in this process."""
    model = tiny_model(config, dtype)
    quantizer = RandomCodes(plan) if isinstance(plan, str) else None
    replace_linears(model, plan, progress=False, quantizer=quantizer, **options)
    return model


def block_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# -- models swapped in this process ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIG)
def test_swapped_model_round_trip(kind, dtype, tmp_path):
    model = swapped(config=tiny_config(**CONFIG[kind]), dtype=dtype)
    attach_config(model)
    again = assert_round_trip(model, tmp_path / "out")
    assert {n for n, _ in quantized_layers(again)} == {n for n, _ in quantized_layers(model)}
    head = again.lm_head.weight is again.model.embed_tokens.weight
    assert head == (kind == "tied")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved["model.layers.0.mlp.up_proj.codebooks"].dtype == dtype
    assert saved["model.layers.0.mlp.up_proj.codes"].shape == (48, 4, 2)


def test_swapped_config_has_the_published_fields(tmp_path):
    model = swapped(config=tiny_config(attention_bias=True), skip=("*k_proj", "lm_head"))
    save_quantized(model, tmp_path / "out")
    block = block_of(tmp_path / "out")
    listed = block.pop("linear_weights_not_to_quantize")
    assert block == {
        "quant_method": "aqlm",
        "num_codebooks": 2,
        "nbits_per_codebook": 8,
        "in_group_size": 8,
        "out_group_size": 1,
    }
    layers = [f"model.layers.{i}." for i in (0, 1)]
    dense = ["self_attn.k_proj.weight", "self_attn.k_proj.bias"]
    dense += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    outside = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert sorted(listed) == sorted(outside + [layer + name for layer in layers for name in dense])


def test_mixed_schemes_are_listed_and_reload(tmp_path):
    model = swapped(MIXED)
    save_quantized(model, tmp_path / "out")
    block = block_of(tmp_path / "out")
    assert (block["num_codebooks"], block["nbits_per_codebook"]) == (2, 2), "most common scheme"
    assert block["layer_schemes"] == {
        "model.layers.0.mlp.gate_proj": "aqlm-1x4-g8-o2",
        "model.layers.0.mlp.up_proj": "aqlm-1x3-g4",
        "model.layers.0.mlp.down_proj": "aqlm-1x4-g8-o2",
    }
    again = assert_round_trip(load(tmp_path / "out"), tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert block_of(tmp_path / "again") == block


@pytest.mark.parametrize("tied", [False, True])
def test_quantized_head(tied, tmp_path):
    model = swapped(config=tiny_config(tie_word_embeddings=tied), skip=())
    assert isinstance(model.lm_head, QuantLinear)
    attach_config(model)
    again = assert_round_trip(model, tmp_path / "out")
    assert isinstance(again.lm_head, QuantLinear)
    assert "lm_head.weight" not in block_of(tmp_path / "out")["linear_weights_not_to_quantize"]


def test_mixtral_with_dense_experts(tmp_path):
    fields = json.loads((GOLDEN / "hf_mixtral_1x8g8" / "config.json").read_text())
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    kept = ("num_attention_heads", "num_key_value_heads", "num_local_experts")
    config = MixtralConfig(**small, **{k: fields[k] for k in kept})
    model = swapped(config=config)
    save_quantized(model, tmp_path / "out")
    listed = block_of(tmp_path / "out")["linear_weights_not_to_quantize"]
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in listed
    assert set(listed) <= set(load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_attach_config_follows_later_swaps():
    model = swapped({"*mlp*": "aqlm-1x4-g8"})
    attach_config(model)
    first = model.config.quantization_config
    replace_linears(model, {"*q_proj": "aqlm-1x3-g8"}, progress=False)
    attach_config(model)
    second = model.config.quantization_config
    assert type(second) is AqlmConfig and second.nbits_per_codebook == 4
    name = "model.layers.1.self_attn.q_proj"
    assert f"{name}.weight" in first.linear_weights_not_to_quantize
    assert f"{name}.weight" not in second.linear_weights_not_to_quantize
    assert second.layer_schemes[name] == "aqlm-1x3-g8" and not hasattr(first, "layer_schemes")
    assert model.hf_quantizer.is_serializable() and model.is_quantized


@pytest.mark.parametrize(
    "model, reason",
    [(nn.Linear(8, 8), "not a transformers model"), (tiny_model(), "no quantized layer")],
)
def test_models_that_cannot_be_saved(model, reason, tmp_path):
    with pytest.raises(CheckpointError, match=reason):
        attach_config(model)
    with pytest.raises(CheckpointError, match=reason):
        save_quantized(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- saving whole ----------------------------------------------------------------------------------


def test_save_quantized_writes_one_whole_folder(tmp_path):
    model = swapped()
    out = save_quantized(model, tmp_path / "a" / "out", Tokenizer())
    assert out == tmp_path / "a" / "out" and list(out.parent.iterdir()) == [out]
    names = {f.name for f in out.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask
    assert torch.equal(logits(load(out)), logits(model))


def test_earlier_save_is_replaced(tmp_path):
    save_quantized(swapped("aqlm-1x2-g8"), tmp_path / "out", Tokenizer())
    model = swapped("aqlm-1x3-g8")
    save_quantized(model, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists(), "left over from the earlier save"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_a_model_may_be_saved_over_the_folder_it_came_from(tmp_path):
    out = save_quantized(swapped(), tmp_path / "out")
    model = load(out)
    before = logits(model)
    save_quantized(model, out)
    assert torch.equal(logits(model), before) and torch.equal(logits(load(out)), before)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("earlier", [False, True])
def test_failed_save_leaves_what_was_there(earlier, error, tmp_path):
    out = tmp_path / "out"
    if earlier:
        save_quantized(swapped("aqlm-1x2-g8"), out)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(type(error)):
        save_quantized(swapped("aqlm-1x3-g8"), out, Tokenizer(error))
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    assert out.exists() == earlier and len(list(tmp_path.iterdir())) == earlier


def someone_elses(kind, out):
    if kind == "file":
        out.write_text("mine")
        return
    out.mkdir()
    if kind == "notes":
        (out / "config.json").write_text('{"quantization_config": {"quant_method": "aqlm"}}')
        (out / "notes.md").write_text("mine")
    else:
        text = {"dense": '{"model_type": "llama"}', "broken": "{", "other": '{"a": 1}'}[kind]
        (out / "config.json").write_text(text)


@pytest.mark.parametrize("kind", ["file", "notes", "dense", "broken", "other"])
def test_folder_of_somebody_else_is_refused(kind, tmp_path):
    out = tmp_path / "out"
    someone_elses(kind, out)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(CheckpointError, match="out exists and") as caught:
        save_quantized(swapped(), out)
    assert "\n" not in str(caught.value)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    save_quantized(swapped(), tmp_path / "out")
    assert block_of(tmp_path / "out")["quant_method"] == "aqlm"


def test_layer_that_went_wrong_is_not_saved(tmp_path):
    model = swapped()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.scales[5] = float("nan")
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj\.scales is not finite: nan"):
        save_quantized(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- headers and config ----------------------------------------------------------------------------


def test_headers_are_shapes_and_dtypes_of_all_files(tmp_path):
    written = write_checkpoint(tmp_path / "in", kind="sharded")
    headers = read_headers(sorted(written.folder.glob("*.safetensors")))
    assert headers.keys() == written.state.keys()
    for name, tensor in written.state.items():
        assert headers[name].is_meta
        assert (headers[name].shape, headers[name].dtype) == (tensor.shape, tensor.dtype)


def test_describe_is_what_the_golden_configs_say():
    for folder in sorted(GOLDEN.glob("hf_*")):
        fields = describe(read_headers([folder / "model.safetensors"]))
        published = block_of(folder)
        listed = set(published.pop("linear_weights_not_to_quantize"))
        # Always listed, also where the file has none.
        assert {*fields.pop("linear_weights_not_to_quantize"), "lm_head.weight"} == listed
        assert {"quant_method": "aqlm", **fields} == published


def test_describe_needs_a_quantized_layer():
    with pytest.raises(CheckpointError, match="no quantized layer"):
        describe({"lm_head.weight": torch.zeros(4, 4)})


# -- legacy ----------------------------------------------------------------------------------------


def legacy_folder(folder, **changes):
    written = write_checkpoint(folder, "aqlm-1x8-g8")
    config = json.loads((folder / "config.json").read_text())
    block = config.pop("quantization_config")
    del block["quant_method"], block["linear_weights_not_to_quantize"]
    config |= {"model_type": "llama_aqlm", "aqlm": {**block, **changes}}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_llama_aqlm.LlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_llama_aqlm.py").write_text("raise RuntimeError('remote code was run')")
    (folder / "tokenizer.json").write_text("{}")
    return written


def test_legacy_checkpoint_converts_and_loads(tmp_path):
    written = legacy_folder(tmp_path / "old")
    out = convert_legacy(tmp_path / "old", tmp_path / "new")
    assert {f.name for f in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    error = (logits(load(out)) - written.logits()).norm() / written.logits().norm()
    assert error <= 5e-4


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"in_group_size": 1}, "in_group_size=1, the tensors say 8"),
        ({"num_codebooks": None}, "num_codebooks=None, the tensors say 1"),
    ],
)
def test_legacy_numbers_must_agree(changes, reason, tmp_path):
    legacy_folder(tmp_path / "old", **changes)
    with pytest.raises(CheckpointError, match=reason):
        convert_legacy(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_only_legacy_checkpoints_convert(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is not a readable config"):
        convert_legacy(tmp_path / "none", tmp_path / "new")
    with pytest.raises(CheckpointError, match='has no "aqlm" block'):
        convert_legacy(GOLDEN / "hf_llama_2x8g8", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_random_layer_survives_a_save_bit_for_bit(tmp_path):
    model = tiny_model()
    layer = random_layer("aqlm-2x12-g8", 48, 32)
    quant = QuantLinear.from_tensors(layer.format, layer.tensors, layer.K)
    model.model.layers[0].mlp.up_proj = quant
    save_quantized(model, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in layer.tensors.items():
        assert torch.equal(saved[f"model.layers.0.mlp.up_proj.{name}"], tensor), name
