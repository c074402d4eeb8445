"""Checkpoints that transformers must not load: each is refused with its values, nothing written."""

import json
import subprocess
import sys

import pytest
import torch
from cases import GOLDEN, random_layer
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, write_checkpoint
from transformers import AqlmConfig, AutoModelForCausalLM, Qwen2MoeConfig
from transformers_cases import UP, Q, assert_refused


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


def test_an_old_transformers_is_refused(tmp_path):
    """Versions that were seen to load a checkpoint wrongly, or that lack what a step needs."""
    write_checkpoint(tmp_path / "q")
    code = (
        "import sys, transformers, aqlm_infer\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "transformers.__version__ = '5.16.2'\n"
        "try: aqlm_infer.prepare_for_generation(model)\n"
        "except aqlm_infer.generation.GenerationSetupError as error: print(error)\n"
        "transformers.__version__ = '5.3.0'\n"
        "try: AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except ImportError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "q")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "prepare_for_generation needs transformers>=5.17, found 5.16.2",
        "loading a quantized checkpoint with aqlm_infer needs transformers>=5.4, found 5.3.0",
    ]
