"""Checkpoints of rotated and scalar formats: our own config block, and QuIP#'s published layout."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from cases import golden_e8p, random_layer
from safetensors.torch import load_file, save_file
from tiny_models import logits, relative_error, tiny_config, tiny_model
from torch import nn
from transformers_cases import CLOSE, assert_refused, assert_round_trip, load

from aqlm_infer import (
    QuantLinear,
    plan_layers,
    quantized_cost,
    quantized_layers,
    save_quantized,
    share_rotations,
)
from aqlm_infer.checkpoint import (
    CheckpointError,
    attach_config,
    convert,
    convert_quip,
    describe_layers,
    read_headers,
)
from aqlm_infer.evaluation import load_model
from aqlm_infer.formats import FormatError, parse_scheme
from aqlm_infer.layers import FusedPart, RotatedLinear

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
"""Sizes that every format takes: q and o 128x128, k and v 64x128, up and gate 256x128."""

MIXED = {
    "*q_proj": "quip-e8p-2bit",
    "*k_proj": "quip-int2-kron",
    "*v_proj": "gptq-int3-g32",
    "*o_proj": "quip-e8p-4bit-b128",
    "*0.mlp.gate_proj": "rtn-int4-g64",
    "*up_proj": "aqlm-2x4-g8",
    "*down_proj": "quip-int4-b128",
}

SCHEMES = ("quip-e8p-2bit", "quip-e8p-3bit", "quip-int3", "gptq-int4-g128", "rtn-int8-g32")


def swapped(plan, config=None, dtype=torch.float32, **options):
    """(a model with random layers by ``plan``, its dense twin)."""
    model = tiny_model(config or tiny_config(**WIDE), dtype)
    dense = copy.deepcopy(model)
    for seed, (name, format) in enumerate(plan_layers(model, plan, **options).items()):
        linear = model.get_submodule(name)
        N, K = linear.weight.shape
        layer = random_layer(format.id, N, K, dtype, seed)
        bias = linear.bias
        quant = QuantLinear.from_tensors(format, layer.tensors, K, bias, name=name)
        model.set_submodule(name, quant)
        twin = nn.Linear(K, N, bias is not None, dtype=dtype)
        twin.weight = nn.Parameter(layer.format.dequantize(layer.tensors))
        twin.bias = bias
        dense.set_submodule(name, twin)
    return model, dense


def block_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# -- our own block ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_round_trip(scheme, dtype, tmp_path):
    model, dense = swapped(scheme, dtype=dtype)
    assert relative_error(logits(model), logits(dense)) <= (CLOSE if dtype.itemsize == 4 else 5e-3)
    attach_config(model)
    again = assert_round_trip(model, tmp_path / "out")
    assert {n for n, _ in quantized_layers(again)} == {n for n, _ in quantized_layers(model)}
    block = block_of(tmp_path / "out")
    assert block["quant_method"] == "aqlm_infer" and set(block["layers"].values()) == {scheme}
    assert quantized_cost(again) == quantized_cost(model)


def test_mixed_schemes(tmp_path):
    """AQLM, E8P, QuIP, GPTQ and dense layers in one model, saved twice and read bit for bit."""
    model, dense = swapped(MIXED, tiny_config(**WIDE, attention_bias=True))
    assert relative_error(logits(model), logits(dense)) <= CLOSE
    folder = save_quantized(model, tmp_path / "out")
    block = block_of(folder)
    assert block["version"] == 1 and len(block["layers"]) == 13
    assert block["layers"]["model.layers.1.self_attn.v_proj"] == "gptq-int3-g32"
    assert block["rotations"] == {
        "hadamard": {"128": {"family": "hadamard", "factor": 1, "construction": "sylvester"}},
        "block": {str(n): {"family": "block-hadamard", "block": 128} for n in (128, 256)},
        "kronecker": {"tensors": "U_*, V_*"},
    }
    again = assert_round_trip(load(folder), tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert block_of(tmp_path / "again") == block
    assert type(again.model.layers[1].mlp.gate_proj) is nn.Linear


@pytest.mark.parametrize("head", ["tied", "untied", "quantized", "untied by quantizing"])
def test_heads(head, tmp_path):
    config = tiny_config(**WIDE, tie_word_embeddings=head in ("tied", "untied by quantizing"))
    skip = () if "quantiz" in head else None
    model, dense = swapped("quip-int2", config, skip=skip)
    again = load(save_quantized(model, tmp_path / "out"))
    assert isinstance(again.lm_head, QuantLinear) == ("quantiz" in head)
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == (head == "tied")
    assert relative_error(logits(again), logits(dense)) <= CLOSE


def test_values_with_a_dtype_of_their_own_keep_it(tmp_path):
    model, _ = swapped("quip-e8p-2bit")
    save_quantized(model, tmp_path / "out")
    again = load(tmp_path / "out", dtype=torch.bfloat16)
    for (name, layer), (_, before) in zip(
        quantized_layers(again), quantized_layers(model), strict=True
    ):
        assert layer.SU.dtype == torch.bfloat16 and layer.Wscale.dtype == torch.float32, name
        assert torch.equal(layer.Wscale, before.Wscale)
        assert torch.equal(layer.state_dict()["Qidxs"], before.state_dict()["Qidxs"])


def test_layers_with_equal_sign_vectors_share_a_rotation_after_loading(tmp_path):
    model, _ = swapped({"*.q_proj": "quip-e8p-2bit", "*.k_proj": "quip-e8p-2bit"})
    for layer in model.model.layers:
        layer.self_attn.k_proj.load_state_dict(
            {**layer.self_attn.k_proj.state_dict(), "SU": layer.self_attn.q_proj.SU}
        )
    again = load(save_quantized(model, tmp_path / "out"))
    names = tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qk")
    assert names in share_rotations(again)
    assert torch.equal(logits(again), logits(model))


def test_evaluation_loads_it(tmp_path):
    model, dense = swapped("gptq-int4-g32")
    save_quantized(model, tmp_path / "out")
    assert relative_error(logits(load_model(tmp_path / "out")), logits(dense)) <= CLOSE


@pytest.mark.parametrize("first", ["aqlm_infer", "transformers"])
def test_both_import_orders(first, tmp_path):
    model, _ = swapped("quip-e8p-2bit")
    save_quantized(model, tmp_path / "out")
    second = {"aqlm_infer": "transformers", "transformers": "aqlm_infer"}[first]
    code = (
        f"import {first}, {second}\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "RotatedLinear", run.stderr[-2000:]


def test_dequantize(tmp_path):
    model, dense = swapped(MIXED)
    again = load(save_quantized(model, tmp_path / "out")).dequantize()
    assert not any(True for _ in quantized_layers(again))
    assert relative_error(logits(again), logits(dense)) <= CLOSE


def test_swapping_an_aqlm_layer_changes_the_method(tmp_path):
    model, _ = swapped("aqlm-2x4-g8")
    attach_config(model)
    assert model.config.quantization_config.quant_method == "aqlm"
    layer = random_layer("quip-int2", 128, 128)
    model.model.layers[0].self_attn.q_proj = QuantLinear.from_tensors(
        "quip-int2", layer.tensors, 128
    )
    attach_config(model)
    assert model.config.quantization_config.quant_method == "aqlm_infer"
    assert_round_trip(model, tmp_path / "out")


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop(f"{UP}.SV"), f"{UP}.SV is missing from the checkpoint .quip-e8p-2bit, N="),
        (
            lambda s: s.update({f"{UP}.SU": torch.ones(64)}),
            rf"{UP}.SU has shape \[64\], expected \[128\]",
        ),
        (
            lambda s: s.update({f"{UP}.SU": torch.full((128,), float("nan"))}),
            rf"{UP}.SU is not finite: nan at index \[0\]",
        ),
        (
            lambda s: s.update({f"{UP}.codebook_id": torch.tensor(17)}),
            f"{UP}.codebook_id is 17, expected 7",
        ),
        (
            lambda s: s.update({f"{UP}.Qidxs": s[f"{UP}.Qidxs"].int()}),
            f"{UP}.Qidxs has dtype torch.int32",
        ),
        (
            lambda s: s.update({"model.norm.Qidxs": torch.zeros(16, 2, dtype=torch.int64)}),
            "model.norm.Qidxs belongs to no layer that quantization_config lists",
        ),
    ],
)
def test_bad_tensors_are_refused(edit, message, tmp_path):
    model, _ = swapped("quip-e8p-2bit")
    folder = save_quantized(model, tmp_path / "out")
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((CheckpointError, FormatError), match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(version=2), "quantization_config has version 2, this program reads 1"),
        (lambda b: b.update(layers={}), "lists no quantized layer"),
        (lambda b: b["layers"].update({UP: "quip-e8p-9bit"}), "2, 3 or 4 bits a weight, not 9"),
        (lambda b: b["layers"].update({UP: "quip-e8p-3bit"}), r"Qidxs has shape \[256, 4\], expec"),
        (lambda b: b["layers"].update({"model.norm": "quip-int2"}), "has no linear layer of that"),
        (lambda b: b["layers"].pop(UP), f"{UP}.Qidxs belongs to no layer"),
        (
            lambda b: b["rotations"]["hadamard"]["128"].update(construction="paley-1 q=127"),
            "the rotation of size 128 was made as .*paley-1 q=127.*, this program makes",
        ),
    ],
)
def test_bad_blocks_are_refused(change, message, tmp_path):
    model, _ = swapped("quip-e8p-2bit")
    folder = save_quantized(model, tmp_path / "out")
    edit_config(folder, lambda c: change(c["quantization_config"]))
    with pytest.raises((CheckpointError, FormatError), match=message):
        load(folder)


def test_tied_quantized_layer_is_refused(tmp_path):
    model, _ = swapped("quip-int2", tiny_config(**WIDE), skip=())
    folder = save_quantized(model, tmp_path / "out")
    edit_config(folder, lambda c: c.update(tie_word_embeddings=True))
    assert_refused(folder, "the config ties lm_head.weight")


def test_the_block_names_the_construction_of_factors():
    format = parse_scheme("quip-e8p-2bit")
    fields = describe_layers({"up": (format, 11008, 5120), "down": (format, 5120, 18944)})
    assert fields["rotations"]["hadamard"] == {
        "11008": {"family": "hadamard", "factor": 172, "construction": "williamson"},
        "5120": {"family": "hadamard", "factor": 20, "construction": "paley-1 q=19"},
        "18944": {"family": "hadamard", "factor": 148, "construction": "paley-2 q=73"},
    }


# -- QuIP# checkpoints -----------------------------------------------------------------------------

BLOCK = {
    "self_attn": (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("o_proj", ())),
    "mlp": (("upgate_proj", ("up_proj", "gate_proj")), ("down_proj", ())),
}
CODEBOOKS = {2: "E8P12", 3: "E8P12RVQ3B", 4: "E8P12RVQ4B"}


def write_quip(folder, bits=2, params=None, edit=None, shards=1, old=False, config=None):
    """Write a checkpoint as relaxml publishes them; returns the dense twin."""
    dense = tiny_model(config or tiny_config(**WIDE), torch.float16)
    state = {n: p.detach() for n, p in dense.named_parameters()}
    seed = 0
    for index, layer in enumerate(dense.model.layers):
        for block, modules in BLOCK.items():
            for name, parts in modules:
                path = f"model.layers.{index}.{block}"
                linears = [layer.get_submodule(block).get_submodule(p) for p in parts or (name,)]
                sizes = tuple(linear.out_features for linear in linears)
                scheme = f"quip-e8p-{bits}bit" + (f"-f{'+'.join(map(str, sizes))}" if parts else "")
                K, seed = linears[0].in_features, seed + 1
                made = random_layer(scheme, sum(sizes), K, torch.float16, seed)
                tensors = dict(made.tensors)
                if not old:
                    tensors["SV"] = (tensors["SV"].float() * tensors["Wscale"]).half()
                    tensors["Wscale"] = torch.tensor(1.0)
                weight = made.format.dequantize(tensors, torch.float32)
                for linear, rows in zip(linears, weight.split(sizes), strict=True):
                    linear.weight = nn.Parameter(rows)
                for part in parts or (name,):
                    del state[f"{path}.{part}.weight"]
                state |= {f"{path}.{name}.{k}": t for k, t in tensors.items()}
    if edit:
        edit(state)
    folder.mkdir()
    body = json.loads(dense.config.to_json_string(use_diff=False))
    body |= {"dtype": "float16", "architectures": ["LlamaForCausalLM"]}
    body["quip_params"] = {
        "codebook": CODEBOOKS[bits], "codebook_version": 1, "codesz": 8, "lora_rank": 0,
        "packsz": {2: 4, 3: 8 / 3, 4: 2}[bits], "idx_dtype": "torch.int64", "fused": True,
        "rescale_WH": False, "outlier_channel_split": False, "resid_scale_override": -1,
        "model_version": 1, **(params or {}),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(body))
    names = sorted(state)
    for shard in range(shards):
        part = {n: state[n].contiguous() for n in names[shard::shards]}
        name = f"model-{shard + 1:05}-of-{shards:05}" if shards > 1 else "model"
        save_file(part, folder / f"{name}.safetensors")
    return dense.float()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_convert_quip(bits, old, tmp_path):
    dense = write_quip(tmp_path / "in", bits, shards=1 + bits % 2, old=old)
    kind, folder = convert(tmp_path / "in", tmp_path / "out")
    assert kind == "QuIP#" and "quip_params" not in json.loads((folder / "config.json").read_text())
    model = load(folder)
    assert relative_error(logits(model), logits(dense)) <= CLOSE
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.qkv_proj, RotatedLinear) and isinstance(attention.q_proj, FusedPart)
    assert sum(1 for _ in quantized_layers(model)) == 8
    again = assert_round_trip(model, tmp_path / "again")
    source = read_headers(sorted((tmp_path / "in").glob("*.safetensors")))
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert set(source) == set(saved)
    assert block_of(tmp_path / "again") == block_of(folder)
    assert torch.equal(logits(again), logits(model))


def test_converted_codes_and_values_are_the_published_ones(tmp_path):
    write_quip(tmp_path / "in", shards=2)
    folder = convert_quip(tmp_path / "in", tmp_path / "out")
    for file in (tmp_path / "in").glob("*.safetensors"):
        before, after = load_file(file), load_file(folder / file.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read_headers(folder.glob("*.safetensors")))


def test_scalars_of_other_shapes_and_a_missing_wscale(tmp_path):
    qkv = "model.layers.0.self_attn.qkv_proj"

    def edit(state):
        del state[f"{qkv}.Wscale"]
        state[f"{qkv}.codebook_id"] = state[f"{qkv}.codebook_id"].reshape(1).int()
        state["model.layers.1.mlp.down_proj.Wscale"] = torch.ones(1, dtype=torch.float16)

    dense = write_quip(tmp_path / "in", edit=edit)
    model = load(convert_quip(tmp_path / "in", tmp_path / "out"))
    assert relative_error(logits(model), logits(dense)) <= CLOSE


def test_another_residual_scale(tmp_path):
    write_quip(tmp_path / "in", 4, {"resid_scale_override": 3.6})
    folder = convert_quip(tmp_path / "in", tmp_path / "out")
    assert block_of(folder)["layers"]["model.layers.0.mlp.down_proj"] == "quip-e8p-4bit-r3.6"
    assert load(folder).model.layers[0].mlp.down_proj.format.residual == 3.6


def test_dequantize_splits_fused_layers(tmp_path):
    dense = write_quip(tmp_path / "in")
    model = load(convert_quip(tmp_path / "in", tmp_path / "out")).dequantize()
    assert not any(isinstance(m, (FusedPart, QuantLinear)) for m in model.modules())
    assert relative_error(logits(model), logits(dense)) <= CLOSE


def test_golden_fused_layer(tmp_path):
    """The published fused layer, in an attention block of its size, gives the published q, k, v."""
    tensors = golden_e8p(2)["fused"]
    config = tiny_config(
        hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_hidden_layers=1, intermediate_size=128,
    )  # fmt: skip

    def edit(state):
        names = ("Qidxs", "SU", "SV", "Wscale", "codebook_id", "fuse_scales")
        state.update({f"model.layers.0.self_attn.qkv_proj.{n}": tensors[n] for n in names})

    write_quip(tmp_path / "in", config=config, edit=edit)
    model = load(convert_quip(tmp_path / "in", tmp_path / "out"))
    attention, x = model.model.layers[0].self_attn, tensors["x"].float()
    with torch.no_grad():
        for part in "qkv":
            y = attention.get_submodule(f"{part}_proj")(x)
            assert relative_error(y, tensors[part]) < 1e-3, part


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"codebook": "D4"}, "codebook 'D4' is not supported; known: E8P12, E8P12RVQ3B"),
        ({"codebook_version": 0}, "codebook_version 0, only 1"),
        ({"lora_rank": 64}, "lora_rank=64 is not supported"),
        ({"outlier_channel_split": True}, "outlier_channel_split=True"),
        ({"rescale_WH": True}, "rescale_WH=True"),
        ({"codebook": "E8P12RVQ3B"}, r"Qidxs has shape \[128, 8\], expected \[128, 12\]"),
    ],
)
def test_unsupported_parameters_are_refused(params, message, tmp_path):
    write_quip(tmp_path / "in", params=params)
    with pytest.raises((CheckpointError, FormatError), match=message):
        convert_quip(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.update({f"{DOWN}.A": torch.ones(2)}), f"{DOWN}.A: low-rank and outlier"),
        (lambda s: s.update({f"{DOWN}.odd": torch.ones(2)}), f"{DOWN}.odd is no tensor of quip-e8"),
        (lambda s: s.pop(f"{DOWN}.SU"), f"{DOWN}.SU is missing"),
        (lambda s: s.update({f"{DOWN}.codebook_id": torch.tensor(9)}), "is 9, expected 7 .* suppo"),
        (
            lambda s: s.update({f"{DOWN}.fuse_scales": torch.ones(2)}),
            f"{DOWN} has fuse_scales; fused modules are known as qkv_proj, upgate_proj",
        ),
    ],
)
def test_unsupported_tensors_are_refused(edit, message, tmp_path):
    write_quip(tmp_path / "in", edit=edit)
    with pytest.raises((CheckpointError, FormatError), match=message):
        convert_quip(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_that_do_not_fit_the_config_are_refused(tmp_path):
    write_quip(tmp_path / "in")
    edit_config(tmp_path / "in", lambda c: c.update(num_key_value_heads=1))
    with pytest.raises(
        CheckpointError, match=r"qkv_proj has N=256, but .* parts are \[128, 32, 32"
    ):
        convert_quip(tmp_path / "in", tmp_path / "out")


def test_convert_names_the_kinds_it_knows(tmp_path):
    model, _ = swapped("quip-int2")
    folder = save_quantized(model, tmp_path / "q")
    with pytest.raises(CheckpointError, match=r'legacy AQLM \("aqlm"\), QuIP# \("quip_params"\)'):
        convert(folder, tmp_path / "out")
