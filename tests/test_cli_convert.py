"""``aqlm-infer convert``, and ``info`` on checkpoints with our own config block."""

import json

import pytest
from cases import GOLDEN
from test_checkpoint_rotated import MIXED, swapped, write_quip
from test_cli import call, json_of
from tiny_models import logits, relative_error

from aqlm_infer import quantized_cost, quantized_layers, save_quantized
from aqlm_infer.evaluation import load_model


@pytest.fixture(autouse=True)
def no_debug(monkeypatch):
    monkeypatch.setenv("AQLM_DEBUG", "0")


def test_convert_and_info(capfd, tmp_path):
    dense = write_quip(tmp_path / "in", 4, shards=2)
    record = json_of(capfd, "convert", tmp_path / "in", tmp_path / "out")
    assert record["kind"] == "QuIP#" and record["quantized_layers"] == 8
    model = load_model(tmp_path / "out")
    assert relative_error(logits(model), logits(dense)) <= 5e-4
    assert record["bits_per_weight"] == pytest.approx(quantized_cost(model).bits_per_weight)
    found = json_of(capfd, "info", tmp_path / "out")
    assert found["quant_method"] == "aqlm_infer" and found["files"] == 2
    assert {s["scheme"]: s["quantized_layers"] for s in found["schemes"]} == {
        "quip-e8p-4bit-f128+64+64": 2,
        "quip-e8p-4bit": 4,
        "quip-e8p-4bit-f256+256": 2,
    }
    status, out, _ = call(capfd, "convert", tmp_path / "in", tmp_path / "again")
    assert status == 0 and "QuIP#" in out and "bits a weight" in out


def test_convert_legacy_aqlm(capfd, tmp_path):
    source = GOLDEN / "hf_llama_2x8g8"
    (tmp_path / "in").mkdir()
    config = json.loads((source / "config.json").read_text())
    config["aqlm"] = config.pop("quantization_config")
    config["model_type"] = "llama_aqlm"
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    file = (source / "model.safetensors").read_bytes()
    (tmp_path / "in" / "model.safetensors").write_bytes(file)
    record = json_of(capfd, "convert", tmp_path / "in", tmp_path / "out")
    assert record["kind"] == "legacy AQLM" and record["quantized_layers"] == 14
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == file


@pytest.mark.parametrize("what", ["missing", "dense"])
def test_what_cannot_be_converted_is_refused(capfd, what, tmp_path):
    if what == "dense":
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "config.json").write_text("{}")
    status, out, err = call(capfd, "convert", tmp_path / "in", tmp_path / "out")
    message = "no block of a checkpoint to convert" if what == "dense" else "not a readable config"
    assert status == 1 and out == "" and message in err and err.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_info_on_mixed_schemes(capfd, tmp_path):
    model, _ = swapped(MIXED)
    save_quantized(model, tmp_path / "out")
    found = json_of(capfd, "info", tmp_path / "out")
    assert found["quantized_layers"] == 13
    assert found["bits_per_weight"] == pytest.approx(quantized_cost(model).bits_per_weight)
    by_name = {layer["name"]: layer for layer in found["layers"]}
    for name, layer in quantized_layers(model):
        row = by_name[name]
        shape = layer.out_features, layer.in_features
        assert (row["scheme"], row["N"], row["K"]) == (layer.format.id, *shape)
        assert row["bytes"] == sum(t.nbytes for t in layer.tensors().values())


def test_info_explains_rotated_schemes(capfd):
    for scheme, kernel in (("quip-e8p-2bit", "cpu.e8p"), ("rtn-int4-g64", "cpu.scalar")):
        record = json_of(capfd, "info", "--explain", scheme, "--shape", "128x192")
        assert [k["kernel"] for k in record["kernels"] if k["chosen"]] == [kernel]
    status, _, err = call(capfd, "info", "--explain", "quip-e8p-2bit", "--shape", "64x13696")
    assert status == 1 and "no Hadamard rotation of size 13696" in err
