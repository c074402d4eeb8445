"""Loading and saving AQLM checkpoints through transformers."""

import json

import pytest
import torch
from cases import GOLDEN
from safetensors.torch import load_file
from tiny_models import IDS, relative_error, tiny_config, write_checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    Qwen2Config,
)
from transformers_cases import (
    CLOSE,
    GOLDEN_MODELS,
    UP,
    K,
    Q,
    assert_matches,
    assert_refused,
    assert_round_trip,
    load,
)

from aqlm_infer import QuantLinear, quantized_layers
from aqlm_infer.checkpoint import CheckpointError

# -- golden checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@pytest.mark.parametrize(
    "dtype, kernel, bound",
    [
        (torch.float32, "ref.dequant", 5e-6),
        (torch.float32, None, CLOSE),
        (torch.float16, None, 3e-3),
        (torch.bfloat16, None, 3e-2),
    ],
)
def test_golden_logits(name, dtype, kernel, bound, monkeypatch):
    if kernel:
        monkeypatch.setenv("AQLM_KERNEL", kernel)
    model = load(GOLDEN / name, dtype=dtype)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    with torch.no_grad():
        y = model(expected["input_ids"]).logits
    assert y.dtype == dtype and torch.isfinite(y).all()
    assert relative_error(y, expected["logits_float64"]) <= bound
    layers = dict(quantized_layers(model))
    assert len(layers) == (32 if "mixtral" in name else 14)
    assert all(layer.codebooks.dtype == dtype and layer.kernel for layer in layers.values())
    assert all(kernel in (None, layer.kernel_id) for layer in layers.values())


def test_renamed_tensors_get_the_models_dtype():
    """What transformers 5.17 leaves as it is stored; float32 that the model asks for stays."""
    from aqlm_infer.integrations.transformers import _convert

    model = torch.nn.ModuleDict({n: torch.nn.Linear(2, 2) for n in ("gate", "head", "norm")}).half()
    dtypes = {name: torch.bfloat16 for name, _ in model.named_parameters() if "head" not in name}
    model["norm"].float()
    model._keep_in_fp32_modules = ["norm"]
    _convert(model, dtypes)
    found = {name: value.dtype for name, value in model.named_parameters()}
    assert found == {"gate.weight": torch.bfloat16, "gate.bias": torch.bfloat16,
                     "head.weight": torch.float16, "head.bias": torch.float16,
                     "norm.weight": torch.float32, "norm.bias": torch.float32}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_golden_file_is_what_a_save_writes(name, tmp_path):
    model = load(GOLDEN / name, dtype="auto")
    assert_round_trip(model, tmp_path / "saved")
    folders = GOLDEN / name, tmp_path / "saved"
    original, saved = (load_file(f / "model.safetensors") for f in folders)
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[n], t) and saved[n].dtype == t.dtype for n, t in original.items())
    was, now = (json.loads((f / "config.json").read_text())["quantization_config"] for f in folders)
    lists = [set(block.pop("linear_weights_not_to_quantize")) for block in (was, now)]
    assert now == was and lists[0] == lists[1]


def test_tied_head_is_the_embedding(tmp_path):
    model = load(GOLDEN / "hf_llama_tied_1x8g8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = assert_round_trip(model, tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")


def test_quantized_parameters_are_frozen_and_capabilities_declared():
    model = load(GOLDEN / "hf_llama_2x8g8")
    for _, layer in quantized_layers(model):
        assert not any(p.requires_grad for p in layer.parameters())
    assert model.model.embed_tokens.weight.requires_grad
    quantizer = model.hf_quantizer
    assert quantizer.is_trainable and quantizer.is_compileable and quantizer.is_serializable()


# -- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin"])
def test_file_kinds(kind, tmp_path):
    written = write_checkpoint(tmp_path / "in", kind=kind)
    model = load(written.folder)
    assert_matches(model, written)
    assert_round_trip(model, tmp_path / "out")


SCHEMES = ("aqlm-1x16-g8", "aqlm-1x12-g4", "aqlm-2x8-g8-o2", "aqlm-8x8-g16")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme, tmp_path):
    written = write_checkpoint(tmp_path / "in", {"*mlp*": scheme, "*q_proj": scheme})
    model = load(written.folder)
    assert model.model.layers[0].mlp.up_proj.format.id == scheme
    assert_matches(model, written)


def test_layers_of_one_model_may_differ(tmp_path):
    plan = {"*.0.mlp.*": "aqlm-1x4-g8", "*.1.mlp.up_proj": "aqlm-1x9-g4", "*attn*": "aqlm-2x8-g8"}
    written = write_checkpoint(tmp_path / "in", plan)
    model = load(written.folder)
    ids = {name: layer.format.id for name, layer in quantized_layers(model)}
    assert ids[UP] == "aqlm-1x4-g8" and ids[Q] == "aqlm-2x8-g8"
    assert ids["model.layers.1.mlp.up_proj"] == "aqlm-1x9-g4"
    assert "model.layers.1.mlp.down_proj" not in ids
    assert_matches(model, written)
    assert_round_trip(model, tmp_path / "out")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert block["num_codebooks"] == 2 and block["nbits_per_codebook"] == 8
    assert set(block["layer_schemes"].values()) == {"aqlm-1x4-g8", "aqlm-1x9-g4"}
    assert block["layer_schemes"][UP] == "aqlm-1x4-g8"


def transpose(state, *names):
    for name in names or [n.removesuffix(".codes") for n in state if n.endswith(".codes")]:
        state[f"{name}.codes"] = state[f"{name}.codes"].transpose(0, 1)


def test_transposed_codes_with_square_layers(tmp_path):
    written = write_checkpoint(tmp_path / "in", edit=transpose)
    assert written.state[f"{Q}.codes"].shape == (4, 8, 2)
    assert written.state[f"{K}.codes"].shape == (4, 4, 2), "ambiguous"
    model = load(written.folder)
    assert_matches(model, written)
    assert_round_trip(model, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name in (Q, K):
        upright = written.state[f"{name}.codes"].transpose(0, 1)
        assert torch.equal(saved[f"{name}.codes"], upright), "not saved as [O, I, B]"


def test_lone_square_layer_is_upright(tmp_path):
    written = write_checkpoint(tmp_path / "in", {K: "aqlm-2x8-g8"})
    assert_matches(load(written.folder), written)


def test_sixteen_bit_square_layer_is_upright_among_transposed_ones(tmp_path):
    plan = {"*k_proj": "aqlm-1x16-g8", "*": "aqlm-2x8-g8"}

    def edit(state):
        transpose(state, *[n[:-6] for n in state if n.endswith("codes") and "k_proj" not in n])

    written = write_checkpoint(tmp_path / "in", plan, edit=edit)
    assert_matches(load(written.folder), written)


def test_undecidable_square_layer_is_refused(tmp_path):
    written = write_checkpoint(tmp_path / "in", edit=lambda state: transpose(state, Q))
    assert_refused(written.folder, "k_proj.codes has shape [4, 4, 2], which reads both ways")


def test_bias(tmp_path):
    written = write_checkpoint(tmp_path / "in", config=tiny_config(attention_bias=True))
    assert written.dense.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    model = load(written.folder)
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert model.model.layers[0].mlp.up_proj.bias is None
    assert_matches(model, written)
    assert_round_trip(model, tmp_path / "out")


def test_qwen2_has_bias_on_some_layers_only(tmp_path):
    fields = {k: v for k, v in tiny_config().to_dict().items() if k in Qwen2Config().to_dict()}
    fields = {**fields, "model_type": "qwen2", "layer_types": None, "head_dim": 4}
    written = write_checkpoint(tmp_path / "in", config=Qwen2Config(**fields))
    model = load(written.folder)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.bias is not None and attention.o_proj.bias is None
    assert_matches(model, written)


# -- names -----------------------------------------------------------------------------------------


def test_base_model_of_a_causal_checkpoint_and_back(tmp_path):
    written = write_checkpoint(tmp_path / "in", config=tiny_config(tie_word_embeddings=True))
    base = load(written.folder, AutoModel)
    assert isinstance(base.layers[0].mlp.up_proj, QuantLinear)
    with torch.no_grad():
        hidden = base(IDS).last_hidden_state
        expected = written.dense.model(IDS).last_hidden_state
    assert relative_error(hidden, expected) <= CLOSE
    base.save_pretrained(tmp_path / "base")
    assert_matches(load(tmp_path / "base"), written)


def test_new_head_is_initialised_as_transformers_does(tmp_path):
    written = write_checkpoint(tmp_path / "in")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        written.folder, output_loading_info=True, dtype=torch.float32
    )
    assert info["missing_keys"] == {"score.weight"}
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert isinstance(model.model.layers[1].mlp.down_proj, QuantLinear)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_exclusion_list_holds_full_names_and_biases_of_quantized_layers(kind, tmp_path):
    entries = ["model.embed_tokens.weight", "lm_head.weight", f"{Q}.bias", f"{K}.bias"]
    written = write_checkpoint(
        tmp_path / "in",
        config=tiny_config(attention_bias=True),
        block={"linear_weights_not_to_quantize": entries},
        kind=kind,
    )
    model = load(written.folder)
    assert isinstance(model.get_submodule(Q), QuantLinear)
    assert type(model.lm_head) is torch.nn.Linear
    assert_matches(model, written)


@pytest.mark.parametrize("suffix", [".weight", ""])
def test_exclusion_list_decides_for_a_state_dict_in_memory(suffix, tmp_path):
    plan = {"*down_proj": "aqlm-2x8-g8", "*self_attn*": "aqlm-2x8-g8"}
    written = write_checkpoint(tmp_path / "in", plan, config=tiny_config(attention_bias=True))
    config = AutoConfig.from_pretrained(written.folder)
    listed = config.quantization_config["linear_weights_not_to_quantize"]
    entries = [n.removesuffix(".weight") + suffix for n in listed] + [f"{Q}.bias"]
    config.quantization_config["linear_weights_not_to_quantize"] = entries
    model, info = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=written.state, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {n for n, _ in quantized_layers(model)} == {
        n[:-6] for n in written.state if n.endswith(".codes")
    }
    assert_matches(model, written)


def test_a_state_dict_in_memory_must_be_complete(tmp_path):
    written = write_checkpoint(tmp_path / "in")
    config = AutoConfig.from_pretrained(written.folder)
    state = {n: t for n, t in written.state.items() if n != f"{Q}.scales"}
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj.*scales"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
