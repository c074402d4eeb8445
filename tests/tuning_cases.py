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


def representation(scheme: str, rows: int = N, columns: int = K) -> Representation:
    return represent(parse_scheme(scheme), tensors_of(scheme, rows, columns))


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
        dtype,
    )
