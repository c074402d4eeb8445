"""Calibrated quantization of whole models: moments, resume, fine-tuning, mixed plans, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import nn

from aqlm_infer.calibration import TuneOptions, plan_for_bits, quantize_calibrated
from aqlm_infer.calibration.datafree import JobError
from aqlm_infer.calibration.driver import open_stream
from aqlm_infer.calibration.mixed import Choice, best_plan
from aqlm_infer.calibration.moments import MomentError, Moments
from aqlm_infer.calibration.windows import calibration_windows
from aqlm_infer.checkpoint import CheckpointError
from aqlm_infer.evaluation import load_model
from aqlm_infer.evaluation.tokens import TokenError
from aqlm_infer.formats import parse_scheme
from aqlm_infer.layers import PlanError, quantized_layers
from aqlm_infer.quantizers import AdditiveQuantizer, HessianWarning
from aqlm_infer.quantizers.hessian import relative_loss

ROOT = Path(__file__).parents[1]
SETTINGS = {"samples": 12, "seq_len": 32}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A tiny tied Llama with attention biases: 14 linear layers."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    config = tiny_config(
        head_dim=32, hidden_size=64, intermediate_size=128, attention_bias=True,
        tie_word_embeddings=True,
    )  # fmt: skip
    tiny_model(config).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "calib.bin"
    np.random.default_rng(0).integers(0, 64, 1000).astype("<u2").tofile(file)
    return file


def files_of(folder: Path) -> dict[str, bytes]:
    """The files whose bytes must not depend on how the run went (the report holds times)."""
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if "report" not in f.name}


# -- moments and streaming -------------------------------------------------------------------------


@torch.no_grad()
def test_moments_are_those_of_the_layers_inputs(dense, tokens):
    """Against hooks on the whole model in float64; q, k, v and gate, up share a matrix."""
    model = load_model(dense)
    windows = calibration_windows(tokens, dense, 64, seed=3, **SETTINGS)
    expected: dict[str, torch.Tensor] = {}

    def hook(name):
        def add(module, inputs):
            x = inputs[0].double().flatten(0, 1)
            expected[name] = expected.get(name, 0) + x.T @ x / windows.numel()

        return add

    names = [n for n, m in model.model.layers[1].named_modules() if isinstance(m, nn.Linear)]
    for name in names:
        model.model.layers[1].get_submodule(name).register_forward_pre_hook(hook(name))
    for window in windows:
        model(input_ids=window[None])

    stream = open_stream(dense, "cpu")
    hidden = stream.embed(windows, 5)
    for index in (0, 1):
        with stream.block(index) as block:
            moments = Moments(block, names)
            with moments.watching():
                outputs = []
                for group in hidden.split(5):
                    moments.next_batch()
                    outputs.append(stream.run(index, block, group))
            hidden = torch.cat(outputs)
            found = {n: moments.take(n, last=False) for n in names}
        assert next(stream.blocks[index].parameters()).is_meta
    assert [moments.leader(f"self_attn.{n}_proj") for n in "qkvo"] == [
        "self_attn.q_proj", "self_attn.q_proj", "self_attn.q_proj", "self_attn.o_proj",
    ]  # fmt: skip
    assert moments.leader("mlp.up_proj") == "mlp.gate_proj"
    for name in names:
        few = 10 * len(found[name]) > windows.numel()  # then the diagonal is damped
        mean = expected[name].diagonal().mean() * (0.01 * len(found[name]) / windows.numel()) * few
        damped = expected[name] + mean * torch.eye(len(found[name]))
        torch.testing.assert_close(found[name], damped, rtol=1e-4, atol=1e-5)
    reference = model.model(input_ids=windows).last_hidden_state
    stream.model.model.norm.to(hidden.dtype)
    torch.testing.assert_close(stream.model.model.norm(hidden), reference, rtol=1e-4, atol=1e-4)


def test_an_expert_that_saw_few_tokens_or_none():
    block = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})
    moments = Moments(block, ["a", "b"])
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with moments.watching():
        block["a"](x)
    with pytest.warns(HessianWarning, match="3 tokens for 8 inputs"):
        found = moments.take("a", last=True)
    assert torch.linalg.eigvalsh(found)[0] > 1e-3
    with pytest.warns(HessianWarning, match="no calibration token"):
        assert torch.equal(moments.take("b", last=True), torch.eye(8, dtype=torch.float64))


def test_inputs_that_are_not_finite_are_named():
    block = nn.ModuleDict({"a": nn.Linear(8, 4)})
    moments = Moments(block, ["a"])
    x = torch.zeros(5, 8)
    with moments.watching():
        block["a"](x)
        moments.next_batch()
        x[2, 3] = float("inf")
        with pytest.raises(MomentError, match="a: .* not finite in 1 of 5 tokens, after 5 good"):
            block["a"](x)


# -- whole runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["aqlm-2x4-g8", "gptq-int2-g32", "quip-int2", "quip-e8p-2bit"])
def test_a_calibrated_checkpoint_loads_and_is_what_the_report_says(dense, tokens, tmp_path, scheme):
    report = quantize_calibrated(dense, tmp_path / "q", scheme, tokens, **SETTINGS)
    model, source = load_model(tmp_path / "q"), load_model(dense)
    layers = dict(quantized_layers(model))
    assert len(layers) == 14 == sum(len(block.layers) for block in report.blocks)
    assert json.loads((tmp_path / "q" / "quantize_report.json").read_text())["weights"] > 0
    assert scheme in (tmp_path / "q" / "quantize_report.txt").read_text()
    assert not (tmp_path / "q.partial").exists()
    format = parse_scheme(scheme)
    for block in report.blocks:
        for layer in block.layers:
            assert layer.bits_per_weight == format.bits_per_weight(layer.N, layer.K)
            assert 0 < layer.relative_error < 0.5
    # The first block's first layer saw the very inputs that the dense model gives it.
    first = report.blocks[0].layers[0]
    windows = calibration_windows(tokens, dense, 64, seed=0, **SETTINGS)
    hidden = source.model.layers[0].input_layernorm(source.model.embed_tokens(windows))
    rows = hidden.detach().flatten(0, 1).double()
    weights = [m.get_submodule(first.name).weight.detach() for m in (source, model)]
    direct = relative_loss(*weights, rows.T @ rows)
    assert direct == pytest.approx(first.relative_error, rel=0.02, abs=2e-3)
    assert torch.equal(
        model.model.layers[0].self_attn.q_proj.bias, source.model.layers[0].self_attn.q_proj.bias
    )


def test_a_plan_with_a_quantized_head(dense, tokens, tmp_path):
    """A tied head becomes a layer of its own; its error is measured on what it really sees."""
    plan = {"lm_head": "gptq-int4-g32", "model.layers.1.mlp.*": "aqlm-2x4-g8"}
    settings = {**SETTINGS, "skip": ["model.layers.0.*"]}
    report = quantize_calibrated(dense, tmp_path / "q", plan, tokens, **settings)
    model = load_model(tmp_path / "q")
    assert [n for n, _ in quantized_layers(model)][-1] == "lm_head"
    head = report.blocks[-1].layers[0]
    windows = calibration_windows(tokens, dense, 64, seed=0, **SETTINGS)
    with torch.no_grad():
        rows = model.model(input_ids=windows).last_hidden_state.flatten(0, 1).double()
    weight = model.model.embed_tokens.weight.detach()
    direct = relative_loss(weight, model.lm_head.weight.detach(), rows.T @ rows)
    assert direct == pytest.approx(head.relative_error, rel=0.05)
    assert head.name == "lm_head" and head.bits_per_weight > 4


def test_a_full_disk_is_noticed_before_work(dense, tokens, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(JobError, match="10 bytes free"):
        quantize_calibrated(dense, tmp_path / "q", "aqlm-1x4-g8", tokens, **SETTINGS)
    assert not list(tmp_path.iterdir())


def test_experts_are_quantized_one_by_one(tokens, tmp_path):
    """A dense Mixtral, its experts fused in memory, with experts that few tokens reach."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=1,
        max_position_embeddings=64,
    )  # fmt: skip
    source = tiny_model(config)
    source.half().save_pretrained(tmp_path / "dense")
    out = tmp_path / "q"
    report = quantize_calibrated(tmp_path / "dense", out, "aqlm-2x6-g8", tokens, **SETTINGS)
    layers = {layer.name: layer for layer in report.blocks[0].layers}
    assert len(layers) == 4 + 4 * 3
    model = load_model(out)
    assert sum(1 for _ in quantized_layers(model)) == 16
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, found = (m(input_ids=ids).logits for m in (source.float(), model))
    assert (found - expected).norm() < 0.3 * expected.norm()


def test_calibration_beats_data_free_on_the_models_outputs(dense, tokens, tmp_path):
    from aqlm_infer.calibration import quantize_checkpoint

    quantize_calibrated(dense, tmp_path / "q", "aqlm-2x3-g8", tokens, **SETTINGS)
    quantize_checkpoint(dense, tmp_path / "free", "aqlm-2x3-g8")
    windows = calibration_windows(tokens, dense, 64, seed=0, **SETTINGS)
    outputs = []
    for folder in (dense, tmp_path / "q", tmp_path / "free"):
        with torch.no_grad():
            outputs.append(load_model(folder).model(input_ids=windows).last_hidden_state)
    errors = [float((out - outputs[0]).square().mean()) for out in outputs[1:]]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("scheme", ["aqlm-2x4-g8", "gptq-int2-g32", "quip-e8p-2bit"])
def test_fine_tuning_lowers_the_blocks_error_and_keeps_the_codes(dense, tokens, tmp_path, scheme):
    tune = TuneOptions(epochs=6, batch=2, held_out=0.2, codebook_rate=1e-2)
    plan, settings = {"model.layers.0.*": scheme}, {"samples": 31, "seq_len": 32}
    plain = quantize_calibrated(dense, tmp_path / "a", plan, tokens, **settings)
    tuned = quantize_calibrated(dense, tmp_path / "b", plan, tokens, tune=tune, **settings)
    block = tuned.blocks[0]
    assert block.error_after < 0.97 * block.error_before and block.epochs >= 1
    assert tuned.blocks[1].error_before is None and plain.blocks[0].error_before is None
    name = "model.layers.0.mlp.up_proj"
    models = [load_model(tmp_path / x) for x in "ab"]
    layers = [m.get_submodule(name) for m in models]
    codes = parse_scheme(scheme).code_names
    for key, tensor in layers[0].tensors().items():
        assert torch.equal(tensor, layers[1].tensors()[key]) == (key in codes or key == "Wscale")
    norms = [m.model.layers[0].input_layernorm.weight for m in models]
    assert not torch.equal(*norms)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["aqlm-2x4-g8", "quip-e8p-2bit"])
def test_fine_tuning_on_a_gpu_reproduces_bit_for_bit(dense, tokens, tmp_path, scheme):
    tune = TuneOptions(epochs=3, batch=2, held_out=0.2, codebook_rate=1e-2)
    settings = {"samples": 31, "seq_len": 32, "tune": tune, "device": "cuda"}
    reports = [quantize_calibrated(dense, tmp_path / x, scheme, tokens, **settings) for x in "ab"]
    assert reports[0].blocks[0].error_after < 0.98 * reports[0].blocks[0].error_before
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_an_interrupted_run_resumes_to_the_same_bits(dense, tokens, tmp_path, monkeypatch):
    """Stopped inside the second block, with fine-tuning: the first is not quantized again."""
    settings = {**SETTINGS, "tune": TuneOptions(epochs=1, batch=4)}
    clean = quantize_calibrated(dense, tmp_path / "clean", "aqlm-2x4-g8", tokens, **settings)
    fit, calls = AdditiveQuantizer.fit, []

    def interrupted(self, weight, hessian=None):
        calls.append(weight.shape)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return fit(self, weight, hessian)

    with monkeypatch.context() as patch:
        patch.setattr(AdditiveQuantizer, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize_calibrated(dense, tmp_path / "q", "aqlm-2x4-g8", tokens, **settings)
    assert not (tmp_path / "q").exists()
    assert [p.name for p in (tmp_path / "q.partial").iterdir()] == ["block-0000.safetensors"]
    report = quantize_calibrated(dense, tmp_path / "q", "aqlm-2x4-g8", tokens, **settings)
    assert report.reused == 1 and clean.reused == 0
    assert report.relative_error == clean.relative_error
    assert files_of(tmp_path / "q") == files_of(tmp_path / "clean")


@pytest.mark.parametrize("change", ["seed", "samples", "scheme", "truncated"])
def test_blocks_of_another_run_are_not_reused(dense, tokens, tmp_path, monkeypatch, change):
    def fails(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("aqlm_infer.calibration.driver.write_checkpoint", fails)
        with pytest.raises(OSError, match="No space"):
            quantize_calibrated(dense, tmp_path / "q", "aqlm-1x4-g8", tokens, **SETTINGS)
    kept = sorted((tmp_path / "q.partial").iterdir())
    assert len(kept) == 2 and not (tmp_path / "q").exists()
    settings, scheme = dict(SETTINGS), "aqlm-1x4-g8"
    if change == "truncated":
        kept[1].write_bytes(kept[1].read_bytes()[:200])
    elif change == "scheme":
        scheme = "aqlm-1x5-g8"
    else:
        settings[change] = 11
    report = quantize_calibrated(dense, tmp_path / "q", scheme, tokens, **settings)
    assert report.reused == (change == "truncated")


def test_a_killed_command_resumes(dense, tokens, tmp_path):
    out, clean = tmp_path / "q", tmp_path / "clean"
    arguments = [
        sys.executable, "-m", "aqlm_infer", "quantize", str(dense), "--scheme", "aqlm-1x6-g8",
        "--calibration", str(tokens), "--samples", "12", "--seq-len", "32", "--out",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    quiet = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen([*arguments, str(out)], stderr=subprocess.DEVNULL, **quiet)
    first = tmp_path / "q.partial" / "block-0000.safetensors"
    while process.poll() is None and not first.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    for folder in (out, clean):
        quantize_calibrated(dense, folder, "aqlm-1x6-g8", tokens, **SETTINGS)
    assert json.loads((out / "quantize_report.json").read_text())["reused"] >= 1
    assert files_of(out) == files_of(clean)


# -- mixed plans -----------------------------------------------------------------------------------


def test_best_plan_spends_the_budget_where_it_helps():
    def options(slope):
        return [Choice(f"{b}bit", 100.0 * b, slope * 4.0**-b) for b in (2, 3, 4)]

    table = {"a": options(1.0), "b": options(100.0), "c": options(1.0)}
    plan = best_plan(table, weights=300, target=8 / 3)
    assert plan == {"a": "2bit", "b": "4bit", "c": "2bit"}
    assert set(best_plan(table, 300, 4.0).values()) == {"4bit"}
    with pytest.raises(PlanError, match="target of 1.9 bits: .* already take 2.000"):
        best_plan(table, 300, 1.9)


def test_a_target_in_bits_is_met(dense, tokens, tmp_path):
    schemes = ["gptq-int2-g32", "gptq-int4-g32"]
    plan = plan_for_bits(dense, schemes, 3.6, tokens, samples=12, seq_len=32)
    assert set(plan.values()) == set(schemes) and len(plan) == 14
    report = quantize_calibrated(dense, tmp_path / "q", plan, tokens, **SETTINGS)
    assert 3.3 < report.bits_per_weight <= 3.6
    with pytest.raises(PlanError, match="already take"):
        plan_for_bits(dense, schemes, 2.0, tokens, samples=12, seq_len=32)
    with pytest.raises(PlanError, match="at least two schemes"):
        plan_for_bits(dense, schemes[:1], 3.0, tokens, samples=12, seq_len=32)


# -- bad input: refused before any work ------------------------------------------------------------


def test_what_is_refused(dense, tokens, tmp_path):
    def run(scheme="aqlm-1x4-g8", file=tokens, out="q", **changes):
        quantize_calibrated(dense, tmp_path / out, scheme, file, **{**SETTINGS, **changes})

    short, text = tmp_path / "short.bin", tmp_path / "text.txt"
    short.write_bytes(tokens.read_bytes()[:60])
    text.write_text("hello")
    wide = tmp_path / "wide.bin"
    np.full(1000, 64, "<u2").tofile(wide)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    for error, message, call in (
        (FileNotFoundError, "no such calibration file", {"file": tmp_path / "none.bin"}),
        (TokenError, "30 tokens, 0 windows of 32: fewer than the 12", {"file": short}),
        (TokenError, "31 windows of 32: fewer than the 32 asked for", {"samples": 32}),
        (TokenError, "token id 64 at position 0, but the model's vocabulary", {"file": wide}),
        (ValueError, "has no tokenizer files", {"file": text}),
        (JobError, "seq_len=65 is longer than the model's context of 64", {"seq_len": 65}),
        (PlanError, "K=64 is not a multiple of 7", {"scheme": "aqlm-1x4-g7"}),
        (CheckpointError, "holds thesis.txt", {"out": "full"}),
    ):
        with pytest.raises(error, match=message):
            run(**call)
    before = {"short.bin", "text.txt", "wide.bin", "full"}
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_tokenizer_that_does_not_match_is_refused(dense, tokens, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("hello")
    monkeypatch.setattr("aqlm_infer.calibration.windows.load_tokenizer", lambda model: None)
    monkeypatch.setattr(
        "aqlm_infer.calibration.windows.read_text_file",
        lambda file, tokenizer: torch.arange(100),
    )
    with pytest.raises(TokenError, match="token id 99, but the model's vocabulary has 64"):
        calibration_windows(text, dense, 64, samples=1, seq_len=8, seed=0)
