"""The command line, by subprocess where its streams and status matter and in process elsewhere."""

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
from safetensors.torch import load_file, save_file
from tiny_models import logits, tiny_config, tiny_model, write_checkpoint

import aqlm_infer
from aqlm_infer.calibration import TuneOptions, quantize_checkpoint
from aqlm_infer.cli.app import main
from aqlm_infer.cli.quantize import tune_options
from aqlm_infer.evaluation import load_model, perplexity, read_token_file
from aqlm_infer.quantizers import AdditiveQuantizer

ROOT = Path(__file__).parents[1]
LM7 = ROOT / "examples" / "lm7"
VALID = ROOT / "examples" / "text" / "valid.bin"
VERBS = (
    ("info",), ("quantize",), ("tune",), ("convert",), ("eval",), ("generate",),
    ("bench",), ("bench", "matmul"), ("bench", "generate"),
)  # fmt: skip


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "aqlm_infer", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Only the checkout on the path, and no way to the network."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("AQLM_DEBUG", "AQLM_KERNEL")}
    offline = {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    return {**inherited, **offline, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=120,
    )


def call(capfd, *arguments) -> tuple[int, str, str]:
    """Run the command line in this process: (status, stdout, stderr)."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    return exit.value.code, *capfd.readouterr()


def json_of(capfd, *arguments) -> dict:
    """The one JSON object that a verb prints on stdout with --json."""
    status, out, err = call(capfd, *arguments, "--json")
    assert status == 0, err
    record = json.loads(out)
    assert isinstance(record, dict)
    return record


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny layers lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_debug(monkeypatch):
    monkeypatch.setenv("AQLM_DEBUG", "0")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A tiny dense checkpoint without a tokenizer: 14 linear layers and a head."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_model(tiny_config(head_dim=16, hidden_size=64)).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    np.random.default_rng(0).integers(0, 64, 300).astype("<u2").tofile(path)
    return path


@pytest.fixture(scope="module")
def quantized(dense, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "q"
    quantize_checkpoint(dense, out, "aqlm-1x4-g8")
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# -- every verb ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help(capfd, verb):
    status, out, _ = call(capfd, *verb, "--help")
    assert status == 0 and "Usage" in out
    if verb != ("bench",):
        assert "--json" in out and "--debug" in out


def test_help_of_the_program_names_every_verb(capfd):
    status, out, _ = call(capfd, "--help")
    assert status == 0
    assert all(f" {verb} " in out for verb in ("info", "quantize", "eval", "generate", "bench"))


def test_version(capfd):
    assert call(capfd, "--version") == (0, f"aqlm-infer {aqlm_infer.__version__}\n", "")


def test_help_does_not_import_transformers():
    code = "import sys, aqlm_infer.cli.app; sys.exit('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT)
    assert done.returncode == 0


def test_info(capfd, quantized, dense):
    record = json_of(capfd, "info")
    assert record["version"] == aqlm_infer.__version__
    assert "ref.dequant" in record["kernels"]
    assert set(record["modules"]) == {"_cpu", "_cuda"}
    assert all(m["loaded"] or m["problem"] for m in record["modules"].values())
    record = json_of(capfd, "info", quantized)
    assert record["quantized_layers"] == 14 and record["schemes"][0]["scheme"] == "aqlm-1x4-g8"
    assert record["bytes"] == record["quantized_bytes"] + record["dense_bytes"]
    assert len(record["layers"]) == 14
    model = aqlm_infer.quantized_cost(load_model(quantized))
    assert record["bits_per_weight"] == pytest.approx(model.bits_per_weight)
    assert json_of(capfd, "info", dense)["quantized_layers"] == 0


def test_info_explains_a_choice(capfd):
    record = json_of(capfd, "info", "--explain", "aqlm-2x8-g8", "--shape", "64x128")
    problem = aqlm_infer.backends.Problem(
        aqlm_infer.parse_scheme("aqlm-2x8-g8"), 64, 128, torch.float32, M=1
    )
    chosen = [row["kernel"] for row in record["kernels"] if row["chosen"]]
    assert chosen == [aqlm_infer.select(problem).id]
    status, out, _ = call(capfd, "info", "--explain", "aqlm-2x8-g8", "--precision", "none")
    assert status == 0 and "precision" in out and "chosen" not in out


def test_tables_for_people(capfd, quantized):
    for arguments, expected in (
        (("info",), "CPU features"),
        (("info", quantized), "aqlm-1x4-g8"),
        (("info", "--explain", "aqlm-1x16-g8"), "takes 1..8 bits, not 16"),
    ):
        status, out, _ = call(capfd, *arguments)
        assert status == 0 and expected in out


def test_quantize_by_subprocess_then_eval(capfd, dense, tokens, tmp_path):
    out = tmp_path / "new" / "q"
    done = run("quantize", dense, "--scheme", "aqlm-2x4-g8", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert len(record["layers"]) == 14 and record["reused"] == 0
    assert "100%" in done.stderr
    cost = aqlm_infer.quantized_cost(load_model(out))
    assert record["bits_per_weight"] == pytest.approx(cost.bits_per_weight)
    originals = load_file(dense / "model.safetensors")
    model = load_model(out)
    for layer in record["layers"]:
        weight = originals[f"{layer['name']}.weight"].float()
        got = model.get_submodule(layer["name"]).weight
        error = ((weight - got).norm() / weight.norm()).item()
        # The report was made in float16, as the values are stored.
        assert layer["relative_error"] == pytest.approx(error, rel=1e-3)
    assert not out.with_name("q.partial").exists()
    assert [p.name for p in out.parent.iterdir()] == ["q"]

    options = ("--window", "32", "--windows", "4", "--batch", "3")
    found = json_of(capfd, "eval", out, "--tokens", tokens, *options)
    expected = perplexity(model, read_token_file(tokens, 64), window=32, windows=4)
    assert found["ppl"] == pytest.approx(expected.ppl, rel=1e-6)
    assert found["tokens"] == 124 and found["bits_per_weight"] == pytest.approx(
        record["bits_per_weight"]
    )


def test_generate_streams(capfd):
    arguments = ("generate", LM7, "--prompt", "The old man", "--max-new-tokens", "8")
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["text"].strip() in done.stderr
    assert record["new_tokens"] == 8 and record["decode_tokens_per_s"] > 0
    status, out, err = call(capfd, *arguments)
    assert status == 0 and out.strip() == record["text"].strip()
    assert "tokens/s, first token after" in err


def test_eval_of_text(capfd):
    text = VALID.with_suffix(".txt")
    options = ("--window", "128", "--windows", "2")
    record = json_of(capfd, "eval", LM7, "--text", text, *options)
    assert record["bits_per_weight"] is None and record["tokens"] == 254
    status, out, _ = call(capfd, "eval", LM7, "--text", text, *options)
    assert status == 0 and f"{record['ppl']:.4f}" in out


def test_bench_matmul(capfd, tmp_path):
    out = tmp_path / "rows.jsonl"
    record = json_of(
        capfd, "bench", "matmul", "--scheme", "aqlm-1x8-g8", "--shape", "64x64", "--m", "1,2",
        "--out", out,
    )  # fmt: skip
    assert [row["M"] for row in record["rows"]] == [1, 2]
    assert [json.loads(line) for line in out.read_text().splitlines()] == record["rows"]


def test_bench_generate(capfd, dense, quantized):
    options = ("--new-tokens", "4")
    record = json_of(capfd, "bench", "generate", dense, "--scheme", "aqlm-1x4-g8", *options)
    assert record["rows"][0]["dense_tokens_per_s"] > 0
    record = json_of(capfd, "bench", "generate", quantized, "--batch", "1,2", *options)
    assert [row["dense_tokens_per_s"] for row in record["rows"]] == [None, None]
    status, out, _ = call(capfd, "bench", "generate", quantized, "--dense", dense, *options)
    assert status == 0 and "tokens/s" in out


def test_bench_generate_of_a_shape(capfd, monkeypatch, tmp_path):
    from aqlm_infer.bench.shapes import SHAPES

    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 96}  # fmt: skip
    monkeypatch.setitem(SHAPES, "llama-3-8b", SHAPES["llama-3-8b"] | small)
    picture = tmp_path / "rates.svg"
    record = json_of(
        capfd, "bench", "generate", "--shape", "llama-3-8b", "--layers", "2", "--scheme",
        "aqlm-1x4-g8", "--scheme", "quip-e8p-2bit", "--mode", "eager", "--mode", "prepared",
        "--new-tokens", "3", "--prompt-tokens", "4,6", "--plot", picture,
    )  # fmt: skip
    cases = [(row["scheme"], row["mode"], row["prompt_tokens"]) for row in record["rows"]]
    assert cases[:3] == [("aqlm-1x4-g8", mode, prompt) for mode, prompt in
                         (("eager", 4), ("eager", 6), ("prepared", 4))]  # fmt: skip
    assert len(cases) == 8 and picture.is_file()
    for arguments, message in (
        ((), "give either MODEL or --shape"),
        (("--shape", "llama-3-8b"), "--shape needs --scheme"),
        (("--shape", "llama", "--scheme", "aqlm-1x4-g8"), "unknown shape 'llama'; known: llama-3"),
        (("--shape", "llama-3-8b", "--scheme", "aqlm-1x4-g8", "--layers", "99"), "outside 1..32"),
        (("--shape", "llama-3-8b", "--scheme", "int3"), "unknown scheme 'int3'"),
    ):
        status, _, err = call(capfd, "bench", "generate", *arguments)
        assert status == 1 and message in err


# -- quantize: plans, resume, nothing half-written -------------------------------------------------


def test_calibrated_quantize(capfd, dense, tokens, tmp_path):
    """The calibrated path end to end: a mixed plan for a target, fine-tuning, the report."""
    out = tmp_path / "q"
    options = (
        "quantize", dense, "--scheme", "gptq-int2-g16,gptq-int4-g16", "--target-bits", "4.2",
        "--calibration", tokens, "--samples", "4", "--seq-len", "32", "--fine-tune",
        "--epochs", "1", "--fine-tune-ahead", "1", "--fine-tune-per-token", "--out", out,
    )  # fmt: skip
    record = json_of(capfd, *options)
    schemes = {layer["scheme"] for block in record["blocks"] for layer in block["layers"]}
    assert schemes == {"gptq-int2-g16", "gptq-int4-g16"} and record["bits_per_weight"] <= 4.2
    assert json.loads((out / "quantize_report.json").read_text()) == record
    status, shown, _ = call(capfd, *options)
    assert status == 0 and "output error" in shown and "fine-tuning" in shown
    ppl = json_of(capfd, "eval", out, "--tokens", tokens, "--window", "32")["ppl"]
    assert ppl > 1


def test_options_of_fine_tuning(capfd, dense, tokens, tmp_path):
    assert tune_options(None, None, False) == TuneOptions()
    assert tune_options(2, 0, True) == TuneOptions(epochs=2, ahead=0, per_token=True)
    for given, message in (
        (("--fine-tune-ahead", "3"), "--fine-tune-ahead 3: at least 0, and only with --fine-tune"),
        (("--fine-tune", "--fine-tune-ahead", "-1"), "--fine-tune-ahead -1: at least 0"),
        (("--fine-tune-per-token",), "--fine-tune-per-token goes with --fine-tune"),
        (("--fine-tune", "--epochs", "0"), "--epochs 0: at least 1"),
    ):
        command = ("quantize", dense, "--scheme", "aqlm-1x4-g8", "--calibration", tokens)
        status, _, err = call(capfd, *command, "--out", tmp_path / "q", *given)
        assert status == 1 and message in err and not (tmp_path / "q").exists()


def test_plans_and_skips(capfd, dense, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text('"*.mlp.*": aqlm-1x5-g8\n"*.self_attn.q_proj": aqlm-1x4-g4\n')
    record = json_of(
        capfd,
        "quantize",
        dense,
        "--plan",
        plan,
        "--out",
        tmp_path / "q",
        "--skip",
        "*.1.mlp.up_proj",
    )
    schemes = {layer["name"]: layer["scheme"] for layer in record["layers"]}
    assert len(schemes) == 7
    assert schemes["model.layers.0.self_attn.q_proj"] == "aqlm-1x4-g4"
    assert "model.layers.1.mlp.up_proj" not in schemes
    assert json_of(capfd, "info", tmp_path / "q")["quantized_layers"] == 7


def test_an_earlier_result_is_replaced(capfd, dense, tmp_path):
    for seed in (0, 1):
        options = ("--scheme", "aqlm-1x4-g8", "--seed", seed, "--out", tmp_path / "q")
        assert json_of(capfd, "quantize", dense, *options)["reused"] == 0


def test_interrupted_quantization_resumes(capfd, dense, quantized, tmp_path, monkeypatch):
    out = tmp_path / "q"
    options = ("quantize", dense, "--scheme", "aqlm-1x4-g8", "--out", out)
    fit, calls = AdditiveQuantizer.fit, []

    def interrupted(self, weight, hessian=None):
        calls.append(weight.shape)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit(self, weight, hessian)

    with monkeypatch.context() as patch:
        patch.setattr(AdditiveQuantizer, "fit", interrupted)
        status, stdout, err = call(capfd, *options)
    assert status == 130 and not stdout and err.splitlines()[-1] == "error: interrupted"
    assert [p.name for p in tmp_path.iterdir()] == ["q.partial"]
    kept = sorted((tmp_path / "q.partial").iterdir())
    assert len(kept) == 3
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # cut short: not reused
    record = json_of(capfd, *options)
    assert record["reused"] == 2
    assert files_of(out) == files_of(quantized)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_kept_layers_of_other_settings_are_not_reused(capfd, dense, tmp_path, monkeypatch):
    out = tmp_path / "q"
    monkeypatch.setattr(
        "aqlm_infer.calibration.datafree.save_quantized",
        lambda *a: (_ for _ in ()).throw(OSError("full")),
    )
    options = ("quantize", dense, "--out", out, "--scheme")
    assert call(capfd, *options, "aqlm-1x4-g8")[0] == 1
    assert len(list((tmp_path / "q.partial").iterdir())) == 14
    monkeypatch.undo()
    assert json_of(capfd, *options, "aqlm-1x5-g8", "--seed", "7")["reused"] == 0


def test_a_killed_quantization_resumes(tmp_path):
    folder, out, clean = tmp_path / "dense", tmp_path / "q", tmp_path / "clean"
    config = tiny_config(hidden_size=64, head_dim=32, num_hidden_layers=4)
    tiny_model(config).half().save_pretrained(folder)
    arguments = ("quantize", folder, "--scheme", "aqlm-2x8-g8", "--out")
    process = subprocess.Popen(
        command(*arguments, out), env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    partial = tmp_path / "q.partial"
    while process.poll() is None and len(list(partial.glob("*.safetensors"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    report = quantize_checkpoint(folder, out, "aqlm-2x8-g8")
    assert 2 <= report.reused < 28
    quantize_checkpoint(folder, clean, "aqlm-2x8-g8")
    assert files_of(out) == files_of(clean)
    assert torch.equal(logits(load_model(out)), logits(load_model(clean)))


# -- bad input -------------------------------------------------------------------------------------


def refused(capfd, *arguments) -> str:
    """The one line that a failing command prints; nothing goes to stdout."""
    status, out, err = call(capfd, *arguments)
    assert status == 1 and out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--scheme", "int3"), "unknown scheme 'int3'"),
        (("--scheme", "aqlm-2x99-g8"), "nbits=99 is outside 1..16"),
        (("--scheme", "aqlm-2x8-g7"), "K=64 is not a multiple of 7"),
        (("--scheme", "aqlm-1x4-g8", "--skip", "*"), "no layer to replace"),
        (("--scheme", "aqlm-1x4-g8", "--skip", "*.nothing"), "'*.nothing' matches none"),
        (("--scheme", "aqlm-1x4-g8", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("--scheme", "aqlm-1x4-g8", "--device", "tpu"), "unknown device 'tpu'"),
        (("--scheme", "aqlm-1x4-g8", "--seed", "x"), "Invalid value for '--seed'"),
        ((), "give either --scheme ID or --plan FILE"),
        (("--scheme", "aqlm-1x4-g8", "--fine-tune"), "need --calibration FILE"),
        (("--scheme", "aqlm-1x4-g8", "--target-bits", "2"), "need --calibration FILE"),
        (("--scheme", "aqlm-1x4-g8", "--calibration", "none.bin"), "no such calibration file"),
        (("--scheme", "gptq-int2-g16"), "needs calibration"),
        (("--plan", "none.yaml"), "none.yaml: No such file"),
        (("--speed", "11"), "No such option: --speed"),
    ],
)
def test_quantize_refuses(capfd, dense, tmp_path, options, message):
    out = tmp_path / "q"
    assert message in refused(capfd, "quantize", dense, "--out", out, *options)
    assert not any(tmp_path.iterdir())


def test_quantize_refuses_folders_and_models(capfd, dense, quantized, tmp_path, monkeypatch):
    options = ("--scheme", "aqlm-1x4-g8", "--out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    assert "holds thesis.txt" in refused(capfd, "quantize", dense, *options, full)
    assert "choose another folder" in refused(capfd, "quantize", dense, *options, dense)
    out = tmp_path / "q"
    assert "no layer to replace" in refused(capfd, "quantize", quantized, *options, out)
    for model, message in (
        ("no/such/model", "no local folder, and no hub id"),
        (tmp_path, "has no config.json"),
        (VALID, "is a file"),
    ):
        assert message in refused(capfd, "quantize", model, *options, out)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "10 bytes free" in refused(capfd, "quantize", dense, *options, out)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert (full / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["[1, 2]", "{a: 1}", "a: b: c", "\x00"])
def test_plans_that_are_refused(capfd, dense, tmp_path, text):
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    assert str(plan) in refused(capfd, "quantize", dense, "--out", tmp_path / "q", "--plan", plan)


def test_weights_that_are_refused(capfd, dense, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(dense, folder)
    file = folder / "model.safetensors"
    tensors, whole = load_file(file), file.read_bytes()
    options = ("--scheme", "aqlm-1x4-g8", "--out", tmp_path / "q")
    file.write_bytes(whole[:-10])
    assert str(file) in refused(capfd, "quantize", folder, *options)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    message = "model.layers.0.mlp.up_proj.weight is not finite: inf at [3, 5]"
    assert message in refused(capfd, "quantize", folder, *options)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


LAYER = "model.layers.0.mlp.up_proj"


def _without_scales(state):
    del state[f"{LAYER}.scales"]


def _with_nan(state):
    state[f"{LAYER}.scales"][3] = float("nan")


def _with_wide_code(state):
    state[f"{LAYER}.codes"][1, 2, 0] = 99


def _with_wrong_rank(state):
    state[f"{LAYER}.codebooks"] = state[f"{LAYER}.codebooks"][0]


@pytest.mark.parametrize(
    "edit, message",
    [
        (_without_scales, f"{LAYER}.scales is missing"),
        (_with_nan, f"{LAYER}.scales is not finite: nan at index [3, 0, 0, 0]"),
        (_with_wide_code, f"{LAYER}.codes holds 99 at index [1, 2, 0], outside -8..7"),
        (_with_wrong_rank, "codebooks has shape [16, 1, 8]"),
    ],
)
def test_quantized_checkpoints_that_are_refused(capfd, tmp_path, tokens, edit, message):
    folder = write_checkpoint(tmp_path / "bad", plan="aqlm-2x4-g8", edit=edit).folder
    assert message in refused(capfd, "eval", folder, "--tokens", tokens, "--window", "32")
    if edit in (_without_scales, _with_wrong_rank):  # what headers show
        assert message in refused(capfd, "info", folder)


def test_token_files_that_are_refused(capfd, dense, tokens, tmp_path):
    odd, short = tmp_path / "odd.bin", tmp_path / "short.bin"
    odd.write_bytes(bytes(9))
    short.write_bytes(bytes(20))
    for options, message in (
        (("--tokens", odd), "9 bytes, an odd number"),
        (("--tokens", short, "--window", "64"), "10 tokens are too few: 1 windows of 64 need 64"),
        (("--tokens", VALID), "but the model's vocabulary has 64"),
        (("--tokens", tmp_path / "none.bin"), "none.bin: no such file"),
        (("--text", short), "has no tokenizer files"),
        ((), "give either --tokens"),
        (("--tokens", tokens, "--text", short), "give either --tokens"),
        (("--tokens", tokens, "--window", "32", "--precision", "fast"), "no quantized layer"),
        (("--tokens", tokens, "--window", "512"), "longer than the model's context of 64"),
        (("--tokens", tokens, "--device", "cuda:9"), "this machine has"),
    ):
        assert message in refused(capfd, "eval", dense, *options)


def test_generation_and_benchmarks_that_are_refused(capfd, dense, quantized):
    for arguments, message in (
        (("generate", LM7, "--prompt", "It", "--max-new-tokens", "2000"), "context of 1024"),
        (("generate", dense, "--prompt", "It"), "has no tokenizer files"),
        (("generate", LM7), "Missing option '--prompt'"),
        (("bench", "matmul", "--shape", "64"), "shape '64' is not NxK"),
        (("bench", "matmul", "--shape", "64x60"), "K=60 is not a multiple of 8"),
        (("bench", "matmul", "--m", "1,x"), "'1,x' is not a list of positive integers"),
        (("bench", "matmul", "--kernel", "cpu.none", "--shape", "64x64"), "unknown kernel"),
        (("bench", "matmul", "--isa", "mmx", "--shape", "64x64"), "mmx"),
        (("bench", "generate", dense), "is dense: give --scheme"),
        (("bench", "generate", quantized, "--scheme", "aqlm-1x4-g8"), "is quantized already"),
        (("info", "no-such-folder"), "no-such-folder is no folder"),
        (("info", ROOT), "has no config.json"),
        (("info", dense, "--explain", "aqlm-2x8-g8"), "give either MODEL or --explain"),
        (("train",), "No such command 'train'"),
        ((), "Missing command"),
    ):
        assert message in refused(capfd, *arguments)


def test_debug_shows_the_traceback(capfd):
    status, out, err = call(capfd, "info", "no-such-folder", "--debug")
    assert status == 1 and out == ""
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: no-such-folder")
