"""``aqlm-infer tune`` on tiny checkpoints: the file it writes, killing and resuming, errors."""

import importlib.util
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
from safetensors.torch import load_file
from tiny_models import logits, tiny_config, tiny_model, write_checkpoint
from tuning_cases import quantized_model, wide_config

from aqlm_infer.checkpoint import save_quantized
from aqlm_infer.cli.app import main
from aqlm_infer.evaluation import (
    load_model,
    load_tokenizer,
    perplexity,
    read_text_file,
    read_token_file,
)
from aqlm_infer.layers import quantized_layers
from aqlm_infer.training import TuneSettings, TuningError, tune_checkpoint
from aqlm_infer.training.data import read_windows

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
FEW = ("--steps", 4, "--batch", 4, "--seq-len", 16, "--eval-every", 2, "--save-every", 2)


def write_tokens(path: Path, count: int, seed: int, vocabulary: int = 64) -> Path:
    np.random.default_rng(seed).integers(0, vocabulary, count).astype("<u2").tofile(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A quantized checkpoint with a mixed plan, a teacher, and tokens."""
    folder = tmp_path_factory.mktemp("tune")
    write_checkpoint(folder / "q", {"*mlp*": "aqlm-1x4-g4", "*": "aqlm-2x8-g8"})
    tiny_model(seed=7).save_pretrained(folder / "t")
    write_tokens(folder / "train.bin", 400, 0)
    write_tokens(folder / "valid.bin", 100, 1)
    return folder


def arguments(files, out, *more) -> list[str]:
    fixed = ("tune", files / "q", "--teacher", files / "t", "--data", files / "train.bin")
    return [str(a) for a in (*fixed, "--valid", files / "valid.bin", "--out", out, *FEW, *more)]


def call(capfd, *given) -> tuple[int, str, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(list(given))
    return exit.value.code, *capfd.readouterr()


def test_tune_writes_what_it_evaluated(capfd, files, tmp_path):
    out = tmp_path / "out"
    status, text, err = call(capfd, *arguments(files, out, "--method", "pv", "--code-lr", "1",
                                               "--lr", "0.01", "--json"))  # fmt: skip
    assert status == 0, err
    report = json.loads(text)
    assert report["run"]["steps"] == 4 and report["run"]["flips"] > 0
    assert report["run"]["best"]["kl"] < report["run"]["first"]["kl"]
    model = load_model(out)
    ids = read_token_file(files / "valid.bin", 64)
    scored = perplexity(model, ids, window=16)
    assert report["final"]["ppl"] == pytest.approx(scored.ppl, rel=1e-6)
    # float16 values beside the float32 masters of the run
    assert report["final"]["kl"] == pytest.approx(report["run"]["best"]["kl"], rel=2e-2)
    before, after = (load_file(f / "model.safetensors") for f in (files / "q", out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape
        if not name.endswith("codes"):
            assert not torch.equal(after[name], tensor), name
    changed = [n for n in before if n.endswith("codes") and not torch.equal(before[n], after[n])]
    assert changed
    assert [f.name for f in (tmp_path / "out.tuning").iterdir()] == ["log.jsonl"]


def test_round_trip_is_bit_equal(files, tmp_path, monkeypatch):
    """The exported model in memory and the one loaded from its files give the same logits."""
    import aqlm_infer.training.job as job

    seen = []
    save = job.save_quantized

    def remember(model, out, tokenizer):
        seen.append(logits(model))
        return save(model, out, tokenizer)

    monkeypatch.setattr(job, "save_quantized", remember)
    settings = TuneSettings(steps=2, batch=4, seq_len=16, method="pv", code_lr=1.0)
    for dtype in (torch.float32, torch.float16):
        out = tmp_path / str(dtype)
        tune_checkpoint(
            files / "q", out, files / "train.bin", files / "valid.bin", settings,
            teacher=files / "t", dtype=dtype,
        )  # fmt: skip
        again = load_model(out, dtype)
        assert torch.equal(logits(again), seen.pop())
        assert len({layer.format for _, layer in quantized_layers(again)}) == 2


@pytest.mark.filterwarnings("ignore:.*slow reference kernel")
@pytest.mark.parametrize("scheme", ["gptq-int2-g32", "quip-int3-kron", "quip-e8p-2bit"])
def test_other_families_round_trip(files, tmp_path, scheme):
    save_quantized(quantized_model(scheme), tmp_path / "q")
    tiny_model(wide_config()).save_pretrained(tmp_path / "t")
    settings = TuneSettings(steps=3, batch=4, seq_len=16, method="pv", code_lr=1.0, lr=1e-3)
    report = tune_checkpoint(
        tmp_path / "q", tmp_path / "out", files / "train.bin", files / "valid.bin", settings,
        teacher=tmp_path / "t",
    )  # fmt: skip
    assert report.run.best["kl"] < report.run.first["kl"] and report.run.flips > 0
    assert report.final["kl"] == pytest.approx(report.run.best["kl"], rel=1e-3)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("q", "out"))
    assert before.keys() == after.keys()
    changed = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert changed >= ({"qweight"} if "int" in scheme else {"Qidxs"}) | {"weight"}


def test_killed_run_resumes_to_the_same_file(capfd, files, tmp_path):
    """A real SIGKILL at an arbitrary moment, in another process."""
    more = ("--method", "pv-ste", "--code-lr", "0.1", "--no-code-warmup", "--steps", "24",
            "--eval-every", "8", "--save-every", "3")  # fmt: skip
    status, _, err = call(capfd, *arguments(files, tmp_path / "whole", *more))
    assert status == 0, err
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "aqlm_infer", *arguments(files, tmp_path / "cut", *more)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    run = tmp_path / "cut.tuning"
    deadline = time.monotonic() + 100
    while not [*run.glob("step-00000[3-9]"), *run.glob("step-0000[1-9]*")]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut").exists() and list(run.glob("step-*"))
    status, _, err = call(capfd, *arguments(files, tmp_path / "cut", *more))
    assert status == 1 and "--resume" in err
    status, _, err = call(capfd, *arguments(files, tmp_path / "cut", *more, "--resume"))
    assert status == 0, err
    pair = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(tensor, pair[1][name]) for name, tensor in pair[0].items())


def test_zero_steps_write_the_model_back(capfd, files, tmp_path):
    out = tmp_path / "same"
    status, _, err = call(capfd, *arguments(files, out, "--steps", "0"))
    assert status == 0, err
    before, after = (load_file(f / "model.safetensors") for f in (files / "q", out))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_cross_entropy_needs_no_teacher(files, tmp_path):
    settings = TuneSettings(steps=1, batch=4, seq_len=16, loss="ce")
    report = tune_checkpoint(
        files / "q", tmp_path / "ce", files / "train.bin", files / "valid.bin", settings
    )
    assert "kl" not in report.final and report.final["ppl"] > 1


def errors(files, tmp_path):
    """(changed options, part of the message) of calls that are refused before any work."""
    tiny_model(tiny_config(vocab_size=48), seed=1).save_pretrained(files / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    short = write_tokens(files / "short.bin", 40, 2)
    odd = files / "odd.bin"
    odd.write_bytes(b"123")
    wide = write_tokens(files / "wide.bin", 400, 3, 1000)
    return (
        (("--teacher", files / "other"), "vocabulary has 48 tokens, the student's 64"),
        (("--teacher", files / "none"), "none"),
        (("--data", short), "2 windows, too few for a batch of 4"),
        (("--valid", short, "--seq-len", 50), "40 tokens, not one window of 50"),
        (("--data", odd), "3 bytes, an odd number"),
        (("--data", wide), "vocabulary has 64"),
        (("--data", files / "none.bin"), "none.bin: no such file"),
        (("--out", tmp_path / "full"), "notes.txt"),
        (("--out", files / "q"), "the model itself"),
        (("--method", "magic"), "method='magic' is not one of"),
        (("--method", "softclamp"), "aqlm-2x8-g8 is no scalar grid"),
        (("--seq-len", 65), "longer than a model's context of 64"),
        (("--loss", "ce"), "loss='ce': no teacher"),
        (("--microbatch", 3), "microbatch=3 is not a divisor"),
        (("--train", "norms,codes"), "train='codes'"),
        (("--device", "tpu"), "device"),
        (("--resume",), "no checkpoint to resume"),
    )


def test_errors(capfd, files, tmp_path):
    for changed, message in errors(files, tmp_path):
        before = sorted(p for p in tmp_path.rglob("*"))
        given = [*arguments(files, tmp_path / "out"), *(str(a) for a in changed)]
        status, out, err = call(capfd, *given)
        assert status == 1 and not out, (changed, out)
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: ") and message in last, (changed, last)
        assert sorted(p for p in tmp_path.rglob("*")) == before, changed


def test_a_full_disk_is_noticed_before_work(capfd, files, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    given = arguments(files, tmp_path / "out", "--save-every", "1")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    status, _, err = call(capfd, *given)
    assert status == 1 and "10 bytes free, up to" in err and not list(tmp_path.iterdir())
    needed = int(err.partition("up to ")[2].split()[0]) + 10
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    largest, rename = [], os.rename

    def measure(draft, place):
        """The folder is at its largest when a new checkpoint is whole and the old one not gone."""
        largest.append(sum(f.stat().st_size for f in draft.parent.rglob("*") if f.is_file()))
        rename(draft, place)

    monkeypatch.setattr(os, "rename", measure)
    status, _, err = call(capfd, *given)
    assert status == 0, err
    written = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert 0.5 * needed < max(largest) + written  # not far above what it takes
    assert max(largest) < needed + 200_000  # headers: these models are tiny


def test_a_teacher_that_numbers_tokens_otherwise_is_refused(capfd, files, tmp_path, monkeypatch):
    """Of the same size, another vocabulary shows in the tokenizers alone."""
    import aqlm_infer.training.job as job

    class Tokenizer:
        def __init__(self, model):
            self.words = ["a", "b"] if Path(model).name == "q" else ["b", "a"]

        def get_vocab(self):
            return {word: number for number, word in enumerate(self.words)}

    monkeypatch.setattr(job, "load_tokenizer", Tokenizer)
    status, _, err = call(capfd, *arguments(files, tmp_path / "out"))
    assert status == 1 and "'a' is its token 1, the student's 0" in err
    assert not list(tmp_path.iterdir())


def test_models_without_a_tokenizer_are_not_compared_in_silence(files):
    from aqlm_infer.training.job import check_tokenizers

    with pytest.warns(UserWarning, match="the vocabularies were not compared"):
        check_tokenizers(str(files / "q"), files / "t")


def test_text_is_read_with_the_models_tokenizer(tmp_path):
    examples = ROOT / "examples"
    windows = read_windows(examples / "text" / "valid.txt", str(examples / "lm7"), 8192, 64)
    ids = read_text_file(examples / "text" / "valid.txt", load_tokenizer(examples / "lm7"))
    assert torch.equal(windows.flatten(), ids[: len(ids) // 64 * 64])
    with pytest.raises(TuningError, match="encodes to id [0-9]+, beyond 100"):
        read_windows(examples / "text" / "valid.txt", str(examples / "lm7"), 100, 64)


def test_dense_model_is_refused(capfd, files, tmp_path):
    given = arguments(files, tmp_path / "out")
    given[1] = str(files / "t")
    status, _, err = call(capfd, *given)
    assert status == 1 and "no quantized layer" in err


def test_plot_or_a_clear_error(capfd, files, tmp_path):
    status, _, err = call(capfd, *arguments(files, tmp_path / "out", "--plot"))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert status == 1 and "pip install matplotlib" in err
        assert not (tmp_path / "out").exists()
        return
    assert status == 0, err
    assert (tmp_path / "out.tuning" / "curves.png").stat().st_size > 5000


def test_help(capfd):
    status, out, _ = call(capfd, "tune", "--help")
    assert status == 0 and "--trust-ratio" in out and "--json" in out and "--debug" in out


def test_function_refuses_a_teacher_with_cross_entropy(files, tmp_path):
    with pytest.raises(TuningError, match="no teacher"):
        tune_checkpoint(
            files / "q", tmp_path / "x", files / "train.bin", files / "valid.bin",
            TuneSettings(loss="ce"), teacher=files / "t",
        )  # fmt: skip


def test_comparison_of_methods(files, tmp_path, monkeypatch):
    """bench_tuning.py: choice on valid, a run a seed, paired windows, finished runs skipped."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_tuning

    monkeypatch.setitem(bench_tuning.GRIDS, "pv", bench_tuning.grid((0.5, 1.0)))
    given = [files / "q", "--teacher", files / "t", "--data", files / "train.bin",
             "--valid", files / "valid.bin", "--test", files / "valid.bin", "--work", tmp_path,
             "--out", tmp_path / "r.json", "--method", "pv", "continuous", "softclamp",
             "--seed", 0, 1, "--steps", 2, "--batch", 4, "--window", 16,
             "--grid", '{"continuous": [{"lr": 0.01}]}']  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bench_tuning.py", *map(str, given)])
    bench_tuning.main()
    body = json.loads((tmp_path / "r.json").read_text())
    start, first, second = body["rows"]  # softclamp is for scalar grids: named, and left out
    assert (first["method"], second["method"]) == ("continuous", "pv")
    best = min(second["tried"], key=lambda t: t["valid_kl"])
    assert (
        second["settings"] == {"code_lr": best["code_lr"], "lr": 0.01}
        and len(second["valid_kl"]) == 2
    )
    assert start["method"] == "start" and "gain" not in start["test"]["valid.bin"]
    for row in (first, second):
        scored = row["test"]["valid.bin"]
        assert len(scored["ppl_by_seed"]) == 2
        ratio, low, high = scored["ratio"]
        assert low < ratio < high
        assert ratio == pytest.approx(scored["ppl"] / body["dense"]["valid.bin"], rel=1e-6)
    assert first["test"]["valid.bin"]["gain"] == [1, 1, 1]
    lines = (tmp_path / "r.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    runs = [row for row in rows if row["kind"] == "tune"]
    assert len([row for row in runs if "error" not in row]) == 5 and len(runs) == 8
    (tmp_path / "r.jsonl").write_text(lines + '{"kind": "tune", "mod')  # cut off
    bench_tuning.main()
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == body["rows"]
    assert (tmp_path / "r.jsonl").read_text().startswith(lines)
    untested = tmp_path / "untested.jsonl"
    place = given.index("--test")
    argv = ["bench_tuning.py", *given[:place], *given[place + 2 :], "--rows", untested]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    bench_tuning.main()
    assert {json.loads(line)["kind"] for line in untested.read_text().splitlines()} == {"tune"}
    if importlib.util.find_spec("matplotlib"):
        bench_tuning.plot(body["rows"], tmp_path / "r.png")
        assert (tmp_path / "r.png").stat().st_size > 5000


def test_sampled_tokens_follow_the_given_ones(files, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sample_tokens

    given = [files / "t", "--out", tmp_path / "s.bin", "--data", files / "valid.bin", "--device",
             "cpu", "--windows", 3, "--window", 16, "--batch", 2]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["sample_tokens.py", *map(str, given)])
    sample_tokens.main()
    before, ids = (np.fromfile(f, "<u2") for f in (files / "valid.bin", tmp_path / "s.bin"))
    assert len(ids) == 96 + 48 and (ids[:96] == before[:96]).all()
    windows = ids[96:].reshape(3, 16)
    assert (windows[:, 0] == tiny_config().bos_token_id).all() and len(np.unique(windows)) > 8


def test_bench_tuning_step_writes_a_row(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_tuning_step

    out = tmp_path / "rows.jsonl"
    model = str(ROOT / "examples" / "lm7")
    given = [model, "--out", out, "--scheme", "gptq-int2-g64", "--batch", 2, "--microbatch", 1]
    given += ["--seq-len", 16, "--steps", 1, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench_tuning_step.py", *map(str, given)])
    bench_tuning_step.main()
    row = json.loads(out.read_text())
    assert row["ratio"] == pytest.approx(row["seconds"] / row["plain_seconds"], rel=1e-3)
    assert row["scheme"] == "gptq-int2-g64" and row["method"] == "pv-ste"
