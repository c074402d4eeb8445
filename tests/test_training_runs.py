"""Runs on tiny models: resuming, what is kept and logged, and where they stop."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tuning_cases import (
    assert_same,
    make_trainer,
    parameters,
)

import aqlm_infer.training.runs as runs
from aqlm_infer.training import (
    NotFinite,
    TuneSettings,
    TuningError,
)
from aqlm_infer.training.runs import tensors_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*slow reference kernel"),
]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "pv-ste", "code_lr": 0.1, "warm_up": False, "temperature": 0.5},
        {"method": "stochastic", "scheme": "gptq-int2-g32", "optimizer": "adam"},
        {"method": "pv", "scheme": "quip-e8p-2bit", "microbatch": 2, "final_lr": 0.1},
    ],
)
def test_resumed_run_equals_an_undisturbed_one(tmp_path, monkeypatch, changes):
    settings = {**changes, "steps": 8, "batch": 4}
    whole = make_trainer(tmp_path / "whole", **settings)
    result = whole.run()
    broken = make_trainer(tmp_path / "broken", **settings)
    step = broken._step

    def dies(number):
        if number == 5:
            raise Killed
        return step(number)

    monkeypatch.setattr(broken, "_step", dies)
    with pytest.raises(Killed):
        broken.run()
    again = make_trainer(tmp_path / "broken", **settings)
    resumed = again.run(resume=True)
    states = [t.folder.checkpoints()[-1] / "state-0.safetensors" for t in (whole, again)]
    assert_same(*(load_file(s) for s in states))
    assert_same(parameters(whole), parameters(again))  # the best model, in both
    assert {**vars(result), "seconds": 0} == {**vars(resumed), "seconds": 0}
    rows = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in t.folder.rows()]
        for t in (whole, again)
    ]
    assert rows[0] == rows[1] and [r["step"] for r in rows[0] if r["kind"] == "step"] == [
        *range(1, 9)
    ]


def test_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    whole = make_trainer(tmp_path / "whole", steps=6)
    whole.run()
    save, saved = runs.save_file, []

    def dies(state, file):
        if file.name == "state-0.safetensors":
            saved.append(file)
        if len(saved) == 3:  # those of steps 0 and 2 are whole
            file.write_bytes(b"half")
            raise Killed
        save(state, file)

    monkeypatch.setattr(runs, "save_file", dies)
    with pytest.raises(Killed):
        make_trainer(tmp_path / "broken", steps=6).run()
    monkeypatch.undo()
    again = make_trainer(tmp_path / "broken", steps=6)
    assert [c.name for c in again.folder.checkpoints()] == ["step-000002"]
    again.run(resume=True)
    assert_same(parameters(whole), parameters(again))
    again.folder.finish()
    assert [f.name for f in (tmp_path / "broken").iterdir()] == ["log.jsonl"]


def test_same_seed_same_bits_and_other_seed_other_order(tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = make_trainer(tmp_path / name, seed=seed, steps=2)
        trainer.run()
        found.append(parameters(trainer))
    assert_same(found[0], found[1])
    assert any(not torch.equal(t, found[2][n]) for n, t in found[0].items())


def test_best_is_kept_and_patience_stops(tmp_path):
    trainer = make_trainer(tmp_path, method="ste", code_lr=2.0, lr=0.5, steps=40, patience=2,
                           eval_every=1, save_every=5)  # fmt: skip
    before = tensors_of(trainer.student)
    before = {n: t.clone() for n, t in before.items()}
    result = trainer.run()
    assert result.stopped == "patience" and result.steps < 40
    rows = [r for r in trainer.folder.rows() if r["kind"] == "eval"]
    assert result.best["kl"] == min(r["kl"] for r in rows)
    found = trainer.evaluate()
    assert found["kl"] == pytest.approx(result.best["kl"], rel=1e-6)
    if result.best["step"] == 0:
        assert_same(before, tensors_of(trainer.student))


def test_log_rows(tmp_path):
    trainer = make_trainer(tmp_path, method="pv", steps=2, code_lr=1.0)
    trainer.run()
    rows = trainer.folder.rows()
    steps = [r for r in rows if r["kind"] == "step"]
    assert len(steps) == 2 and [r["step"] for r in rows if r["kind"] == "eval"] == [0, 2]
    for row in steps:
        assert 0 < row["flips"] <= 0.011 and row["moved"] > 0 and 0 < row["drift"] < 1
        assert row["budget"] > 0
    trainer.folder.finish()
    assert [f.name for f in tmp_path.iterdir()] == ["log.jsonl"]


def test_learning_rates_fall_by_a_half_cosine(tmp_path):
    settings = TuneSettings(steps=5, final_lr=0.2)
    rates = [settings.rate(step) for step in range(5)]
    assert rates == pytest.approx([1, 0.8828, 0.6, 0.3172, 0.2], abs=1e-4)
    trainer = make_trainer(tmp_path, steps=5, final_lr=0.2)
    for step in range(5):
        trainer._step(step)
    assert {g["lr"] / g["first_lr"] for g in trainer.optimizer.param_groups} == {0.2}
    trainer.run()
    with pytest.raises(TuningError, match="steps=5, not 6"):  # the rates depend on it
        make_trainer(tmp_path, steps=6, final_lr=0.2).run(resume=True)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_checkpoint(tmp_path, where):
    trainer = make_trainer(tmp_path, steps=6)
    step = trainer._step

    def poisoned(number):
        if number == 3 and where == "loss":
            next(iter(trainer.student.layers.values())).weight.data.fill_(torch.nan)
        if number == 3 and where == "gradient":
            norm = trainer.student.others["model.norm.weight"]
            norm.register_hook(lambda g: g * torch.inf)
        return step(number)

    trainer._step = poisoned
    with pytest.raises(NotFinite, match=r"step 4.*step-000002"):
        trainer.run()
    kept = trainer.folder.checkpoints()
    assert [k.name for k in kept] == ["step-000002"]
    state = load_file(kept[0] / "state-0.safetensors")
    assert all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point())
    again = make_trainer(tmp_path, steps=2)
    assert again.run(resume=True).steps == 2  # the best so far, without another step


def test_resume_refuses_other_settings_and_data(tmp_path):
    make_trainer(tmp_path, steps=2).run()
    with pytest.raises(TuningError, match=r"lr=0.0003, not 0.001"):
        make_trainer(tmp_path, steps=2, lr=1e-3).run(resume=True)
    with pytest.raises(TuningError, match="interrupted run"):
        make_trainer(tmp_path, steps=2).run()
    other = make_trainer(tmp_path, steps=2)
    other.train = other.train + 1
    with pytest.raises(TuningError, match="other tokens"):
        other.run(resume=True)
    with pytest.raises(TuningError, match="no checkpoint"):
        make_trainer(tmp_path / "none", steps=2).run(resume=True)
    record = json.loads((tmp_path / "step-000002" / "run.json").read_text())
    assert record["settings"]["method"] == "pv-ste"
