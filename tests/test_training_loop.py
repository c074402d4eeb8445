"""The loop on tiny models: methods, export, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import IDS, tiny_model
from torch import nn
from tuning_cases import (
    SCHEMES,
    assert_same,
    make_trainer,
    parameters,
    quantized_model,
    wide_config,
)

from aqlm_infer.layers import quantized_layers
from aqlm_infer.training import (
    METHODS,
    Student,
    TuneSettings,
    TuningError,
)
from aqlm_infer.training.data import Order
from aqlm_infer.training.vstep import Choice, v_step

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*slow reference kernel"),
]
TUNABLE = tuple(s for s in SCHEMES if not s.endswith("b128"))


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
