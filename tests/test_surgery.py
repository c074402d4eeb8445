"""Swapping layers of a model: plans, skips, refusals before any work, and what it all costs."""

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import nn

from aqlm_infer import PlanError, QuantLinear, plan_layers, quantized_cost, replace_linears


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.lm_head = nn.Linear(16, 10)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x):
        return self.lm_head(self.blocks(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def test_replaces_all_but_the_head(model):
    x = torch.randn(5, 16)
    dense = model(x)
    replaced = replace_linears(model, "aqlm-2x4-g4", progress=False)
    assert sorted(replaced) == [f"blocks.{b}.{n}" for b in (0, 1) for n in ("down", "up")]
    assert all(model.get_submodule(n) is layer for n, layer in replaced.items())
    assert type(model.lm_head) is nn.Linear
    assert 0 < (model(x) - dense).norm() / dense.norm() < 0.6


def test_plan_with_globs(model):
    plan = {"*.0.up": "dense", "*.up": "aqlm-1x4-g4", "*": "aqlm-2x2-g2"}
    replaced = replace_linears(model, plan, skip=["lm_head", "blocks.1.down"], progress=False)
    assert {n: layer.format.id for n, layer in replaced.items()} == {
        "blocks.0.down": "aqlm-2x2-g2",
        "blocks.1.up": "aqlm-1x4-g4",
    }
    assert type(model.blocks[0].up) is nn.Linear and type(model.blocks[1].down) is nn.Linear


def test_the_head_goes_when_asked(model):
    assert "lm_head" in replace_linears(model, "aqlm-1x2-g2", skip=[], progress=False)


@pytest.mark.parametrize(
    ("plan", "skip", "message"),
    [
        ({"*.gate": "aqlm-1x2-g2"}, None, r"'\*.gate' matches none of the model's 5 linear layers"),
        ("aqlm-1x2-g2", ["head"], "'head' matches none"),
        ("aqlm-1x2-g2", ["*"], "no layer to replace"),
        ({"*": "dense"}, None, "no layer to replace"),
        (
            {"*.up": "aqlm-1x2-g2", "*.down": "aqlm-1x2-g3"},
            None,
            "blocks.0.down: K=32 is not a mul",
        ),
        ("aqlm-1x2-g0", None, "in_group_size=0"),
        ("awq", None, "unknown scheme 'awq'"),
    ],
)
def test_refusals_change_nothing(model, plan, skip, message):
    with pytest.raises(ValueError, match=message):
        replace_linears(model, plan, skip=skip, progress=False)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_cost_counts_everything(model):
    with pytest.raises(PlanError, match="no quantized layer"):
        quantized_cost(model)
    chosen = plan_layers(model, "aqlm-2x4-g4")
    replace_linears(model, "aqlm-2x4-g4", progress=False)
    cost = quantized_cost(model)
    per_layer = [f.bits_per_weight(*_shape(model, n)) for n, f in chosen.items()]
    assert cost.layers == 4 and cost.weights == 4 * 512 and cost.dense_bytes == 8 * 512
    assert cost.bits_per_weight == pytest.approx(sum(per_layer) / 4)
    assert cost.quantized_bytes == round(cost.bits_per_weight * cost.weights / 8)


def test_the_head_is_left_alone_unless_a_plan_names_it():
    model = tiny_model(tiny_config(intermediate_size=64))
    rules = {"lm_head": "rtn-int4-g32", "*.mlp.*": "rtn-int2-g32"}
    assert plan_layers(model, rules)["lm_head"].bits == 4
    assert "lm_head" not in plan_layers(model, {"*.mlp.*": "rtn-int4-g32", "*": "aqlm-1x2-g4"})
    assert "lm_head" not in plan_layers(model, rules, ["lm_head"])


def _shape(model, name):
    layer = model.get_submodule(name)
    return layer.out_features, layer.in_features


def test_progress_goes_to_stderr(model, capsys):
    replace_linears(model, "aqlm-1x2-g2")
    captured = capsys.readouterr()
    assert captured.out == "" and "quantize" in captured.err and "4/4" in captured.err
