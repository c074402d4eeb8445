"""Shared by the tests of tuning: quantized weights of every family, tiny models to tune."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache

import torch
from tiny_models import tiny_config, tiny_model
from torch import nn

from aqlm_infer.formats import parse_scheme
from aqlm_infer.layers import replace_linears
from aqlm_infer.quantizers import quantizer_for
from aqlm_infer.training import Representation, RunFolder, Student, Trainer, TuneSettings, represent
from aqlm_infer.training.vstep import Choice, Moved, v_step

SCHEMES = (
    "aqlm-2x4-g8",
    "aqlm-1x4-g4",
    "aqlm-2x3-g4-o2",
    "gptq-int2-g32",
    "rtn-int3-g64",
    "quip-int2",
    "quip-int2-b128",
    "quip-int3-kron",
    "quip-e8p-2bit",
    "quip-e8p-3bit",
    "quip-e8p-4bit",
)
N, K = 128, 128


def quick_quantizer(scheme: str):
    """The scheme's quantizer, with few rounds: any codes will do."""
    if scheme.startswith("aqlm"):
        return quantizer_for(scheme, kmeans_rounds=4, refit_rounds=1, metric_rounds=1, beam=2)
    return quantizer_for(scheme, **({"passes": 0} if scheme.startswith("quip") else {}))


def random_hessian(size: int, seed: int = 0) -> torch.Tensor:
    """Second moment of correlated inputs, float64 [size, size], well conditioned."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size, generator=rng, dtype=torch.float64)
    x[:, 1:] += 0.5 * x[:, :-1]
    return x.T @ x / len(x)


@lru_cache(maxsize=32)
def _quantized(scheme: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=rng) * (0.5 + torch.rand(columns, generator=rng))
    return quick_quantizer(scheme).fit(weight, random_hessian(columns))


def tensors_of(scheme: str, rows: int = N, columns: int = K) -> dict[str, torch.Tensor]:
    """Canonical tensors of a quantized random weight, for the test to change."""
    return {n: t.clone() for n, t in _quantized(scheme, rows, columns).items()}


class Single:
    """A representation of one matrix, without the first dimension; codes can be assigned."""

    def __init__(self, stack: Representation):
        self.stack, self.format = stack, stack.format
        self.groups, self.width, self.books = stack.groups, stack.width, stack.books
        self.values = {n: _Slice(v) for n, v in stack.values.items()}

    @property
    def codes(self) -> torch.Tensor:
        return self.stack.codes[0]

    @codes.setter
    def codes(self, codes: torch.Tensor) -> None:
        self.stack.codes = codes[None].to(self.stack.codes.dtype)

    @property
    def top(self) -> int:
        return self.stack.top

    @property
    def columns(self) -> int:
        return self.stack.columns

    def grid(self):
        return tuple(t.repeat_interleave(self.stack.tile, 1)[0] for t in self.stack.grid())

    def weight(self) -> torch.Tensor:
        return self.stack.weight()[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.stack.tensors(0)

    def decode(self, codes, index=None) -> torch.Tensor:
        return self.stack.decode(codes[None], _first(index))[0]

    def gradients(self, gradient) -> torch.Tensor:
        return self.stack.gradients(gradient[None])[0]

    def search(self, targets, index=None, beam=1, order=None) -> torch.Tensor:
        return self.stack.search(targets[None], _first(index), beam, _first(order))[0]

    def two_nearest(self, targets, beam, order) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.stack.two_nearest(targets[None], beam, _first(order))
        return first[0], second[0]


class _Slice:
    """The first of a stack of values, as a parameter looks."""

    def __init__(self, value: nn.Parameter):
        self._value = value

    @property
    def data(self) -> torch.Tensor:
        return self._value.data[0]

    @property
    def grad(self) -> torch.Tensor:
        return self._value.grad[0]

    def detach(self) -> torch.Tensor:
        return self._value.detach()[0]


def _first(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x[None]


def representation(scheme: str, rows: int = N, columns: int = K) -> Single:
    return Single(represent(parse_scheme(scheme), [tensors_of(scheme, rows, columns)]))


def v_step_of(rep: Single, buffer, choice: Choice, seed=(0,), gradient=None) -> Moved:
    """``v_step`` of one matrix: its numbers have no dimension."""
    moved = v_step(rep.stack, buffer[None], choice, [seed], _first(gradient))
    return Moved(**{name: value[0] for name, value in vars(moved).items()})


class _Fitted:
    """A quantizer that makes up its Hessian."""

    def __init__(self, scheme: str):
        self.scheme = scheme

    def fit(self, weight, hessian=None):
        return quick_quantizer(self.scheme).fit(weight, random_hessian(weight.shape[1]))


def wide_config(**changes):
    """A Llama whose linear layers fit every format but the block rotations."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 4}
    return tiny_config(**sizes, **changes)


@lru_cache(maxsize=32)
def _quantized_model(scheme: str, **changes) -> nn.Module:
    model = tiny_model(wide_config(**changes))
    replace_linears(model, scheme, quantizer=_Fitted(scheme))
    return model


def quantized_model(scheme: str, **changes) -> nn.Module:
    """The tiny model in ``scheme``, float32, for the test to change."""
    return deepcopy(_quantized_model(scheme, **changes))


def random_windows(count: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(seed))


def make_trainer(
    folder,
    scheme="aqlm-2x4-g8",
    teacher=True,
    model=None,
    parallel=None,
    device="cpu",
    dtype=torch.float32,
    **changes,
) -> Trainer:
    """A trainer of the tiny quantized model against its dense self, on random tokens."""
    fields = {"steps": 4, "batch": 4, "seq_len": 16, "eval_every": 2, "save_every": 2, "chunk": 24}
    settings = TuneSettings(**{**fields, "poison": True, **changes})
    model = (model or quantized_model(scheme)).to(device)
    return Trainer(
        Student(model, settings, dtype, parallel),
        tiny_model(wide_config()).to(device) if teacher else None,
        random_windows(10, 16, seed=1),
        random_windows(3, 16, seed=2),
        settings,
        RunFolder(folder, parallel),
    )


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
