"""Loading, saving and running AQLM checkpoints through transformers."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from cases import GOLDEN, random_layer
from safetensors.torch import load_file, save_file
from tiny_models import IDS, logits, relative_error, tiny_config, write_checkpoint
from transformers import (
    AqlmConfig,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2MoeConfig,
)

from aqlm_infer import FormatError, QuantLinear, quantized_layers
from aqlm_infer.checkpoint import CheckpointError
from aqlm_infer.integrations.moe import QuantExperts

GOLDEN_MODELS = ("hf_llama_2x8g8", "hf_llama_tied_1x8g8", "hf_mixtral_1x8g8")
Q, K, UP = (f"model.layers.0.{n}_proj" for n in ("self_attn.q", "self_attn.k", "mlp.up"))

# A wrong layout, scheme or layer gives errors near one; kernels are held to their own bounds.
CLOSE = 5e-4


def load(folder, cls=AutoModelForCausalLM, **options):
    """The model in float32, after checking that every tensor found its place."""
    options = {"dtype": torch.float32, **options}
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def assert_matches(model, written):
    assert relative_error(logits(model), written.logits()) <= CLOSE


def assert_round_trip(model, folder):
    """Save, load, and find bit-equal logits and tensors."""
    before, state = logits(model), copy.deepcopy(model.state_dict())
    model.save_pretrained(folder)
    again = load(folder, type(model), dtype="auto")
    assert torch.equal(logits(again), before)
    loaded = again.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in state.items())
    return again


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


# -- running ---------------------------------------------------------------------------------------


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


# -- bad input -------------------------------------------------------------------------------------


def put(name, value):
    return lambda state: state.update({name: value(state[name]) if callable(value) else value})


def drop(*names):
    return lambda state: [state.pop(n) for n in names]


def code_3000(codes):
    codes = codes.clone()
    codes[1, 2, 0] = 3000
    return codes


def poison(value):
    def edit(scales):
        scales = scales.clone()
        scales[3] = value
        return scales

    return edit


BAD = {
    "codes-float": (put(f"{Q}.codes", lambda t: t.half()), f"{Q}.codes", "float16", "int8"),
    "codes-wide": (put(f"{Q}.codes", lambda t: t.short()), f"{Q}.codes", "int16", "int8"),
    "codes-rank": (put(f"{Q}.codes", lambda t: t[..., 0]), f"{Q}.codes", "[8, 4]", "[8, 4, 2]"),
    "codes-short": (put(f"{Q}.codes", lambda t: t[:7]), f"{Q}.codes", "[7, 4, 2]", "[8, 4, 2]"),
    "codes-B": (put(f"{Q}.codes", lambda t: t[..., :1]), f"{Q}.codes", "[8, 4, 1]", "aqlm-2x8-g8"),
    "codebooks-int": (put(f"{Q}.codebooks", lambda t: t.int()), f"{Q}.codebooks", "int32"),
    "codebooks-rank": (put(f"{Q}.codebooks", lambda t: t[:, :, 0]), Q, "codebooks", "[2, 256, 8]"),
    "codebooks-size": (put(f"{Q}.codebooks", lambda t: t[:, :255]), Q, "codebooks", "255"),
    "codebooks-nan": (put(f"{Q}.codebooks", lambda t: t / 0), f"{Q}.codebooks", "not finite"),
    "K-remainder": (put(f"{Q}.codebooks", lambda t: t[..., :7]), Q, "K=32", "multiple of 7"),
    "scales-rank": (
        put(f"{Q}.scales", lambda t: t[:, 0]),
        f"{Q}.scales",
        "[8, 1, 1]",
        "[8, 1, 1, 1]",
    ),
    "scales-int": (put(f"{Q}.scales", lambda t: t.int()), f"{Q}.scales", "int32"),
    "scales-grouped": (
        put(f"{Q}.scales", torch.ones(8, 4, 1, 1).half()),
        f"{Q}.scales",
        "[8, 4, 1, 1]",
        "grouped",
    ),
    "scales-inf": (put(f"{Q}.scales", poison(float("inf"))), f"{Q}.scales", "inf", "[3, 0, 0, 0]"),
    "no-codes": (drop(f"{Q}.codes"), f"{Q}.codes is missing"),
    "no-codebooks": (drop(f"{Q}.codebooks"), f"{Q}.codebooks is missing"),
    "no-scales": (drop(f"{Q}.scales"), f"{Q}.scales is missing", "N=8", "K=32"),
    "no-bias": (drop(f"{Q}.bias"), f"{Q}.bias is missing"),
    "bias-shape": (put(f"{Q}.bias", torch.ones(9).half()), f"{Q}.bias", "[9]", "[8]"),
    "no-layer": (drop(f"{UP}.codes", f"{UP}.codebooks", f"{UP}.scales"), UP, "neither codes"),
    "no-place": (
        put("model.embed_tokens.codes", torch.zeros(8, 4, 2).char()),
        "model.embed_tokens.codes",
        "Embedding",
    ),
}


def assert_refused(folder, *fragments, **options):
    files = {f: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises((CheckpointError, FormatError)) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message
    assert {f: f.read_bytes() for f in folder.iterdir()} == files, "a failed load wrote something"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused(case, kind, tmp_path):
    edit, *fragments = BAD[case]
    write_checkpoint(tmp_path / "in", config=tiny_config(attention_bias=True), edit=edit, kind=kind)
    assert_refused(tmp_path / "in", *fragments)


def test_code_out_of_range_is_refused(tmp_path):
    write_checkpoint(tmp_path / "in", "aqlm-1x12-g8", edit=put(f"{Q}.codes", code_3000))
    assert_refused(tmp_path / "in", f"{Q}.codes", "3000", "[1, 2, 0]", "-2048..2047")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-100], lambda b: b[:5], lambda b: b"x" * 64 + b[64:]],
    ids=["truncated", "stub", "garbled"],
)
def test_damaged_files_are_refused(kind, damage, tmp_path):
    folder = write_checkpoint(tmp_path / "in", kind=kind).folder
    file = folder / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    file.write_bytes(damage(file.read_bytes()))
    assert_refused(folder, str(file), "not a readable", dtype=torch.float16)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("the pickle was executed",)


def test_pickles_are_not_executed(tmp_path):
    folder = write_checkpoint(tmp_path / "in", kind="bin").folder
    torch.save({"x": Trap()}, folder / "pytorch_model.bin")
    assert_refused(folder, "pytorch_model.bin")


def test_checkpoint_without_quantized_tensors_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "in").folder
    head = {"lm_head.weight": torch.ones(64, 32)}
    save_file(head, folder / "model.safetensors", {"format": "pt"})
    assert_refused(folder, "no quantized tensor", "LlamaForCausalLM")


def test_quantized_head_that_the_config_ties_is_refused(tmp_path):
    def edit(state):
        layer = random_layer("aqlm-2x8-g8", 64, 32)
        state.update({f"lm_head.{n}": t for n, t in layer.tensors.items()})

    write_checkpoint(tmp_path / "in", config=tiny_config(tie_word_embeddings=True), edit=edit)
    assert_refused(tmp_path / "in", "ties lm_head.weight", "model.embed_tokens.weight")


def test_missing_expert_matrix_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    state = load_file(GOLDEN / "hf_mixtral_1x8g8" / "model.safetensors")
    state = {n: t for n, t in state.items() if "1.block_sparse_moe.experts.2.w3" not in n}
    save_file(state, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    config = (GOLDEN / "hf_mixtral_1x8g8" / "config.json").read_text()
    (tmp_path / "in" / "config.json").write_text(config)
    assert_refused(tmp_path / "in", "model.layers.1.mlp.experts.2.w3 is missing")


def test_experts_of_an_unknown_family_are_refused(tmp_path):
    fields = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    base = tiny_config().to_dict()
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    config = Qwen2MoeConfig(**fields, num_hidden_layers=1, **{k: base[k] for k in same})
    name = "model.layers.0.mlp.experts.1.gate_proj"

    def edit(state):
        layer = random_layer("aqlm-2x8-g8", 16, 32)
        state.update({f"{name}.{n}": t for n, t in layer.tensors.items()})

    write_checkpoint(tmp_path / "in", {"*q_proj": "aqlm-2x8-g8"}, config=config, edit=edit)
    assert_refused(tmp_path / "in", f"{name}.codes", "Qwen2MoeExperts", "no place")


def test_dense_checkpoint_with_our_config_is_refused(tmp_path):
    written = write_checkpoint(tmp_path / "in")
    written.dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=AqlmConfig())


def test_legacy_config_names_the_conversion(tmp_path):
    folder = write_checkpoint(tmp_path / "in").folder
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    config |= {"model_type": "llama_aqlm", "aqlm": {"in_group_size": 8}}
    config["auto_map"] = {"AutoConfig": "configuration_llama_aqlm.LlamaConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, "llama_aqlm", "aqlm_infer.checkpoint.convert_legacy(folder, out_dir)")


# -- registration ----------------------------------------------------------------------------------

HEAD = """
import sys, importlib
def light(): return not {"transformers", "accelerate", "aqlm"} & set(sys.modules)
def ours():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table
    return table["aqlm"].__module__ == "aqlm_infer.integrations.transformers"
def loads():
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    return type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"
def watchers(): return sum(type(f).__name__ == "_AfterTransformers" for f in sys.meta_path)
"""

ORDERS = {
    "ours first, reloads, unregister": """
import aqlm_infer; assert light()
import aqlm_infer.checkpoint; assert light()
importlib.reload(aqlm_infer.integrations); importlib.reload(aqlm_infer)
assert light() and watchers() == 1
import transformers; assert ours() and loads()
importlib.reload(sys.modules["transformers.quantizers.auto"]); assert ours()
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table
from aqlm_infer.integrations import transformers as module
stock = module.AqlmInferQuantizer.replaces
assert stock.__name__ == "AqlmHfQuantizer"
importlib.reload(module); importlib.reload(aqlm_infer.integrations); importlib.reload(aqlm_infer)
assert table["aqlm"] is module.AqlmInferQuantizer and table["aqlm"].replaces is stock
assert watchers() == 1
module.register(); assert module.AqlmInferQuantizer.replaces is stock
module.unregister(); assert table["aqlm"] is stock and watchers() == 0
module.unregister(); assert table["aqlm"] is stock
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "llama_aqlm" not in CONFIG_MAPPING
module.register(); assert ours() and "llama_aqlm" in CONFIG_MAPPING
""",
    "transformers first": """
from transformers import AutoModelForCausalLM
import transformers.quantizers.auto; assert not ours()
import aqlm_infer; assert ours()
""",
    "transformers first, its quantizers through us": """
import transformers; assert "transformers.quantizers.auto" not in sys.modules
import aqlm_infer; assert "transformers.quantizers.auto" not in sys.modules
import aqlm_infer.integrations.transformers; assert ours()
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_registration(order):
    folder = str(GOLDEN / "hf_llama_tied_1x8g8")
    command = [sys.executable, "-c", HEAD + ORDERS[order], folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_stock_config_class_stays():
    model = load(GOLDEN / "hf_llama_2x8g8")
    assert type(model.config.quantization_config) is AqlmConfig
    assert isinstance(model.config, LlamaConfig)
