"""The loop on tiny models: loss, modes, resuming, export, and what it refuses."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import IDS, tiny_model
from torch import nn
from tuning_cases import (
    SCHEMES,
    make_trainer,
    quantized_model,
    random_windows,
    wide_config,
)

import aqlm_infer.training.runs as runs
from aqlm_infer.layers import quantized_layers
from aqlm_infer.training import (
    METHODS,
    NotFinite,
    Student,
    TuneSettings,
    TuningError,
)
from aqlm_infer.training.additive import summed
from aqlm_infer.training.data import Order
from aqlm_infer.training.loss import ChunkedLoss, score
from aqlm_infer.training.runs import tensors_of
from aqlm_infer.training.vstep import Choice, v_step

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*slow reference kernel"),
]
TUNABLE = tuple(s for s in SCHEMES if not s.endswith("b128"))


def parameters(trainer) -> dict[str, torch.Tensor]:
    """Everything a step changes."""
    named = {n: p.clone() for n, p, _ in trainer.student.parameters()}
    return named | {n: y.codes.clone() for n, y in trainer.student.layers.items()}


def gradients(trainer) -> dict[str, torch.Tensor]:
    """``.grad`` of every master after the first step's backward pass, by name."""
    student = trainer.student
    found = trainer._gradients(0)[1]
    for stack in (None, *student.stacks):
        student.spread(found, stack)
    return {n: g for m in student.masters() for n, g in m.slices(m.parameter.grad).items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# -- loss and gradient -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_chunked_loss_equals_the_whole(loss):
    model, teacher = tiny_model(wide_config()), tiny_model(wide_config(), seed=1)
    ids = random_windows(3, 10, seed=0)
    logits, target = model(ids).logits, teacher(ids).logits.detach()
    if loss == "kl":
        p = target.double().softmax(-1)
        direct = (p * (p.log() - logits.double().log_softmax(-1))).sum()
    else:
        direct = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).double()
    expected = torch.autograd.grad(direct, list(model.parameters()))
    for chunk in (1, 7, 1000):
        chunked = ChunkedLoss(model, teacher if loss == "kl" else None, chunk)
        total = chunked(ids)
        assert float(total.detach()) == pytest.approx(float(direct.detach()), rel=1e-5)
        found = torch.autograd.grad(total, list(model.parameters()))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert chunked.scored(3, 10) == (30 if loss == "kl" else 27)


@pytest.mark.parametrize("columns", [50, 4096, 5000])
def test_divergence_kernel(columns):
    """In Triton's interpreter without a GPU: against float64, and the gradient in place."""
    divergence = pytest.importorskip("aqlm_infer.triton_kernels.divergence").divergence
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = torch.Generator().manual_seed(0)
    student, teacher = 5 * torch.randn(2, 6, columns, generator=rng)
    teacher[0] = student[0]
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    expected = (p * (p.log() - q.log())).sum(1)
    logits = student.to(device).clone()
    found = divergence(logits, teacher.to(device)).cpu().double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.cpu().double(), q - p, rtol=1e-5, atol=1e-7)
    again = student.to(device).clone()
    assert torch.equal(divergence(again, teacher.to(device)).cpu().double(), found)
    assert torch.equal(again, logits)


@pytest.mark.parametrize("shape", [(3, 2, 16, 8), (1, 1, 300, 8), (2, 3, 8, 6)])
def test_codewords_kernel(shape):
    """In Triton's interpreter without a GPU: the bits of the sums that torch makes."""
    codewords = pytest.importorskip("aqlm_infer.triton_kernels.codewords").codewords
    device = "cuda" if torch.cuda.is_available() else "cpu"
    L, books, count, _ = shape
    rng = torch.Generator().manual_seed(0)
    tables = torch.randn(shape, generator=rng)
    dtype = torch.uint8 if count <= 256 else torch.int32
    codes = torch.randint(0, count, (L, 150, books), generator=rng).to(dtype)
    scales = torch.randn(L, 50, generator=rng)
    index = torch.randint(0, 150, (L, 150), generator=rng)
    expected = summed(tables, codes)
    given = [t.to(device) for t in (tables, codes, scales, index)]
    assert torch.equal(codewords(*given[:2]).cpu(), expected)
    found = codewords(*given[:3], 3).cpu()
    assert torch.equal(found, expected * scales.repeat_interleave(3, 1)[..., None])
    found = codewords(*given[:3], 3, given[3]).cpu()
    assert torch.equal(found, expected * scales.gather(1, index // 3)[..., None])


def test_score_is_the_perplexity_of_evaluation():
    from aqlm_infer.evaluation import perplexity

    model, teacher = tiny_model(wide_config()), tiny_model(wide_config(), seed=1)
    windows = random_windows(5, 12, seed=3)
    found = score(model, teacher, windows, 2, 7)
    expected = perplexity(model, windows.flatten(), window=12)
    assert found["nll"] == pytest.approx(expected.nll, rel=1e-6)
    p, q = (m(windows).logits.double().log_softmax(-1) for m in (teacher, model))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert found["kl"] == pytest.approx(float(kl.detach()), rel=1e-5)
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found["top1"] == pytest.approx(float(agree))


@pytest.mark.parametrize("changes", [{"microbatch": 1}, {"gradient_checkpointing": True}])
def test_accumulation_and_checkpointing_change_nothing(tmp_path, changes):
    plain = make_trainer(tmp_path / "a", method="ste", code_lr=0.02)
    other = make_trainer(tmp_path / "b", method="ste", code_lr=0.02, **changes)
    losses = [float(sum(t._gradients(0)[0])) for t in (plain, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one in (plain, other):
        one.student.model.zero_grad()
    one, two = gradients(plain), gradients(other)
    assert one.keys() == two.keys()
    for name, a in one.items():
        error = (a - two[name]).norm() / a.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_tied_embeddings_train_through_both_uses(tmp_path):
    model = quantized_model("aqlm-2x4-g8", tie_word_embeddings=True)
    trainer = make_trainer(tmp_path, model=model)
    assert trainer.student.tied and "lm_head.weight" not in trainer.student.others
    trainer._gradients(0)
    table = trainer.student.others["model.embed_tokens.weight"]
    used = trainer.train[trainer.order[0]].flatten().unique()
    unused = torch.tensor([i for i in range(64) if i not in used.tolist()])
    assert len(unused) and table.grad[unused].abs().min(1).values.max() > 0  # through the head
    with pytest.raises(TuningError, match="name both or neither"):
        make_trainer(tmp_path, model=quantized_model(
            "aqlm-2x4-g8", tie_word_embeddings=True), train=["head"])  # fmt: skip


def test_what_trains(tmp_path):
    for kinds, expected in (
        ([], set()),
        (["norms"], {"norm"}),
        (["embeddings"], {"embed_tokens"}),
        (["head"], {"lm_head"}),
    ):
        student = make_trainer(tmp_path, train=kinds).student
        found = set(student.others)
        assert all(any(word in n for word in expected) for n in found)
        assert bool(found) == bool(expected)


# -- methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", TUNABLE)
@pytest.mark.parametrize("method", ["pv", "pv-ste", "ste", "continuous", "naive-pv"])
def test_a_step_of_every_method_and_format(tmp_path, scheme, method):
    large = {"code_lr": 1.0} if method == "pv" else {}
    trainer = make_trainer(tmp_path, scheme, method=method, steps=2, **large)
    before = parameters(trainer)
    row = trainer._step(0)
    assert row["loss"] > 0 and torch.isfinite(torch.tensor(row["loss"]))
    after = parameters(trainer)
    for name, layer in trainer.student.layers.items():
        groups = layer.groups
        limit = (METHODS[method].max_code_change or 0) * groups
        assert (after[name] != before[name]).any(1).sum() <= -(-limit // 1)
        expected = layer.stack.rep.weight().detach()[layer.place]
        torch.testing.assert_close(layer.weight.detach(), expected)
    moved = [n for n, _, buffer in trainer.student.parameters() if not buffer]
    assert all(not torch.equal(before[n], after[n]) for n in moved)
    if method == "pv":
        assert row["flips"] > 0
    if method in ("continuous", "naive-pv"):
        assert row["flips"] == 0


@pytest.mark.parametrize("method", ["stochastic", "clamp-ste", "sigmoid-ste", "softclamp",
                                    "sigmoid-softclamp"])  # fmt: skip
@pytest.mark.parametrize("scheme", ["gptq-int2-g32", "quip-int2"])
def test_methods_of_scalar_grids(tmp_path, scheme, method):
    trainer = make_trainer(tmp_path, scheme, method=method, steps=2, code_lr=0.5, warm_up=False)
    first, second = trainer._step(0), trainer._step(1)
    assert (
        second["flips"] > 0 and torch.isfinite(torch.tensor([first["loss"], second["loss"]])).all()
    )


def test_naive_pv_flips_nothing_where_ste_does(tmp_path):
    flips = {}
    for method in ("naive-pv", "ste"):
        trainer = make_trainer(tmp_path / method, method=method, code_lr=0.02, warm_up=False)
        flips[method] = sum(trainer._step(step)["flips"] for step in range(12))
    assert flips["naive-pv"] == 0 < flips["ste"]


def test_zero_learning_rates_change_nothing(tmp_path):
    trainer = make_trainer(tmp_path, method="pv-ste", lr=0.0, code_lr=0.0)
    before = parameters(trainer)
    for step in range(3):
        trainer._step(step)
    assert_same(before, parameters(trainer))


def test_surrogate_gradients_equal_autograd(tmp_path):
    """Both surrogates against autograd through a fake quantization with the same slopes."""
    trainer = make_trainer(tmp_path, "gptq-int2-g32", method="sigmoid-softclamp")
    stack = trainer.student.stacks[0]
    rng = torch.Generator().manual_seed(0)
    stack.buffer.data.add_(0.2 * torch.randn(stack.buffer.shape, generator=rng))
    seeds = [(0,)] * len(stack.layers)
    assert (
        v_step(stack.rep, stack.buffer, Choice(), seeds).flips.min() > 0
    )  # codes are the buffer's
    gradient = torch.randn(stack.weights.shape, generator=rng)
    stack.spread_gradients(list(gradient.clone()), 20.0)
    w = stack.buffer.detach().double().view(-1, 32).requires_grad_()
    s = stack.rep.values["scales"].detach().double().view(-1, 1).requires_grad_()
    zero = stack.rep.zeros.double().view(-1, 1)
    x = w / s + zero
    soft = x.floor() + torch.sigmoid(20.0 * (x - x.floor() - 0.5)) - zero
    g, a, b = torch.sigmoid, -zero, 3 - zero
    soft = soft * g(soft - a) * g(b - soft) + a * g(a - soft) + b * g(soft - b)
    hard = (w / s + zero).round().clamp(0, 3) - zero
    fake = s * (soft + (hard - soft).detach())
    fake.backward(gradient.double().view(-1, 32))
    torch.testing.assert_close(
        stack.buffer.grad.view(-1, 32).double(), w.grad, rtol=1e-3, atol=1e-4
    )
    scaled = (s.grad / (32 * 3) ** 0.5).view_as(stack.rep.values["scales"])
    torch.testing.assert_close(
        stack.rep.values["scales"].grad.double(), scaled, rtol=1e-3, atol=1e-3
    )


class NearestLinear(nn.Module):
    """An independent straight-through layer: float master weights, nearest codes in the forward."""

    def __init__(self, tensors, format, bias):
        super().__init__()
        weight = format.dequantize(tensors, torch.float32)
        self.master = nn.Parameter(weight.clone())
        G = format.group_size
        self.scale = tensors["scales"].repeat_interleave(G, 1)
        self.zero = format.zero_points(tensors, torch.float32).repeat_interleave(G, 1)
        self.top = (1 << format.bits) - 1

    def nearest(self):
        codes = (self.master / self.scale + self.zero).round().clamp(0, self.top)
        return (codes - self.zero) * self.scale

    def forward(self, x):
        return F.linear(x, self.master + (self.nearest() - self.master).detach())


def test_ste_equals_an_independent_implementation(tmp_path):
    scheme, steps, rate = "gptq-int2-g32", 8, 0.05
    trainer = make_trainer(
        tmp_path, scheme, method="ste", optimizer="adam", lr=0.0, code_lr=rate, train=[]
    )
    other = quantized_model(scheme)
    masters = {}
    for name, layer in list(quantized_layers(other)):
        masters[name] = NearestLinear(layer.tensors(), layer.format, layer.bias)
        other.set_submodule(name, masters[name])
    other.requires_grad_(False)
    groups = []
    for layer in masters.values():
        layer.master.requires_grad_(True)
        rms = float(layer.master.detach().square().mean().sqrt())
        groups.append({"params": [layer.master], "lr": rate * rms})
    adam = torch.optim.Adam(groups, betas=(0.0, 0.95))
    teacher = tiny_model(wide_config())
    for step in range(steps):
        ids = trainer.train[trainer.order[step]]
        row = trainer._step(step)
        logits, target = other(ids).logits, teacher(ids).logits.detach()
        loss = F.kl_div(
            logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1).mean()  # fmt: skip
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert row["flips"] > 1e-3
    for name, layer in trainer.student.layers.items():
        mine = layer.stack.buffer.detach()[layer.place].view_as(layer.weight)
        error = (mine - masters[name].master.detach()).norm() / mine.norm()
        assert error < 1e-3, f"{name}: {error:.1e}"
        same = (layer.weight.detach() - masters[name].nearest().detach()).abs() < 1e-5
        assert same.double().mean() > 0.999


def test_loss_falls_and_codes_help(tmp_path):
    """Over-fitting twenty windows: every method gains, those that move codes more."""
    gains = {}
    for method, rate in (("continuous", None), ("pv-ste", 0.05), ("ste", 0.02)):
        trainer = make_trainer(
            tmp_path / method, "gptq-int2-g32", method=method, code_lr=rate, lr=1e-3, steps=30,
            eval_every=30, save_every=30,
        )  # fmt: skip
        losses = [trainer._step(step)["loss"] for step in range(30)]
        gains[method] = sum(losses[-5:]) / sum(losses[:5])
    assert gains["continuous"] < 1
    assert gains["pv-ste"] < gains["continuous"] and gains["ste"] < gains["continuous"]


# -- runs ------------------------------------------------------------------------------------------


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


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", TUNABLE)
def test_exported_model_computes_what_was_trained(tmp_path, scheme, dtype):
    trainer = make_trainer(tmp_path, scheme, method="pv", lr=1e-2)
    for step in range(2):
        trainer._step(step)
    with torch.no_grad():
        expected = trainer.student.model(IDS).logits
        model = trainer.student.export(dtype)
        found = model(IDS).logits.float()
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} <= {dtype, torch.float32}
    assert model.model.norm.weight.dtype == dtype
    assert sum(1 for _ in quantized_layers(model)) == 14
    tolerance = 2e-3 if dtype == torch.float32 else 3e-2
    assert (found - expected).norm() < tolerance * expected.norm()
    with torch.no_grad():
        other = quantized_model(scheme)(IDS).logits
    assert (other - expected).norm() > 2 * (found - expected).norm()  # the training is in it


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "nope"}, "method='nope' is not one of continuous"),
        ({"loss": "mse"}, "loss='mse'"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"ranking": "best"}, "ranking='best'"),
        ({"train": ["codes"]}, "train='codes'"),
        ({"steps": -1}, "steps=-1 is not at least 0"),
        ({"batch": 0}, "batch=0"),
        ({"batch": 6, "microbatch": 4}, "microbatch=4 is not a divisor of batch=6"),
        ({"seq_len": 1}, "seq_len=1"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"final_lr": 1.5}, "final_lr=1.5 is not in 0..1"),
        ({"delta_decay": 1.5}, "delta_decay=1.5"),
        ({"max_code_change": 0.0}, "max_code_change=0.0"),
        ({"trust_ratio": -0.1}, "trust_ratio=-0.1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"sigmoid_temperature": 0.0}, "sigmoid_temperature=0.0"),
        ({"beam": 0}, "beam=0"),
        ({"method": "continuous", "code_lr": 0.1}, "code_lr has no meaning"),
        ({"method": "stochastic", "max_code_change": 0.1}, "max_code_change=0.1: method"),
        ({"method": "stochastic", "ranking": "gain"}, "ranking=gain: method"),
        ({"optimizer": "adam", "warm_up": False}, "warm_up=False is a setting of lamb"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(TuningError, match=message):
        TuneSettings(**changes)


def test_bad_combinations(tmp_path):
    with pytest.raises(TuningError, match="aqlm-2x4-g8 is no scalar grid"):
        make_trainer(tmp_path, method="sigmoid-ste")
    with pytest.raises(TuningError, match="10 windows, too few for a batch of 11"):
        make_trainer(tmp_path, batch=11)
    with pytest.raises(TuningError, match="no quantized layer"):
        Student(tiny_model(wide_config()), TuneSettings(), torch.float32)
    with pytest.raises(TuningError, match="loss='kl' without a teacher"):
        make_trainer(tmp_path, teacher=False)
    trainer = make_trainer(tmp_path, teacher=False, loss="ce", steps=1)
    assert trainer.run().best["nll"] > 0


def test_scaled_logits_are_refused(tmp_path):
    model = quantized_model("aqlm-2x4-g8")
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 0.1)
        return output

    model.forward = capped
    with pytest.raises(TuningError, match="student: the logits of LlamaForCausalLM are not"):
        make_trainer(tmp_path, model=model)


def test_order_uses_every_window_once_a_shuffle():
    order = Order(10, 4, seed=3)
    drawn = torch.cat([order[step] for step in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == [*range(10)]
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert order[2].tolist() == Order(10, 4, seed=3)[2].tolist()
    assert order.epochs(5) == 2.0


def test_bfloat16_student_learns(tmp_path):
    """Autocast and 16-bit copies of the weights: masters stay float32, small updates add up."""
    trainer = make_trainer(tmp_path, microbatch=2, dtype=torch.bfloat16)
    layer = next(iter(trainer.student.layers.values()))
    before = layer.stack.rep.values_of(layer.place)["codebooks"].clone()
    trainer._step(0)
    after = layer.stack.rep.values_of(layer.place)["codebooks"]
    assert layer.weight.dtype == torch.bfloat16 and after.dtype == torch.float32
    relative = float((after - before).norm() / before.norm())
    assert relative == pytest.approx(3e-4 * (1 - 0.95) ** 0.5 / 0.1, rel=1e-3)


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["aqlm-2x4-g8", "gptq-int2-g32", "quip-int2", "quip-e8p-2bit"])
def test_cuda_takes_the_steps_of_the_cpu(tmp_path, scheme):
    given = {"method": "pv", "code_lr": 1.0, "steps": 2}
    pair = [make_trainer(tmp_path / d, scheme, device=d, **given) for d in ("cpu", "cuda")]
    for step in range(2):
        rows = [trainer._step(step) for trainer in pair]
        assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-3)
        assert rows[0]["flips"] > 0
    one, two = (parameters(t) for t in pair)
    for name, tensor in one.items():
        if tensor.is_floating_point():
            error = (tensor - two[name].cpu()).norm() / tensor.norm()
            assert error < 1e-2, f"{name}: {error:.1e}"
        else:
            assert (tensor == two[name].cpu()).double().mean() > 0.99, name


@pytest.mark.gpu
def test_cuda_resumes_bit_for_bit(tmp_path):
    given = {"method": "pv-ste", "code_lr": 0.1, "warm_up": False, "device": "cuda",
             "dtype": torch.bfloat16, "microbatch": 2}  # fmt: skip
    whole = make_trainer(tmp_path / "whole", steps=6, **given)
    whole.run()
    make_trainer(tmp_path / "cut", steps=4, **given).run()
    again = make_trainer(tmp_path / "cut", steps=6, **given)
    again.run(resume=True)
    states = [t.folder.checkpoints()[-1] / "state-0.safetensors" for t in (whole, again)]
    assert_same(*(load_file(s) for s in states))
