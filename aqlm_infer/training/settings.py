"""Methods of tuning and their settings: ``METHODS`` is the one table.

    method        buffer      codes chosen among      step of the buffer
    continuous    none        none
    naive-pv      reset       all groups              small: expected to flip nothing
    pv            reset       the 1 % furthest off    large, most of it thrown away (subspace)
    pv-ste        kept        the 1 % furthest off    small, adds up (the published recipe)
    ste           kept        all groups              small, adds up
    stochastic    reset       all groups              small, rounded at random

The four below are ``ste`` on scalar grids with other gradients through rounding and clamping
(arXiv 2410.10849): ``clamp-ste`` (none beyond the grid), ``sigmoid-ste``, ``softclamp``, and both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from .representation import TuningError


@dataclass(frozen=True)
class Method:
    """How codes move; None where there is nothing to say.

    Attributes:
        code_lr: relative step of the buffer (see ``TuneSettings.lr``).
        delta_decay: 1 resets the buffer to the quantized weight after every step, 0 keeps it.
        max_code_change: largest fraction of a tensor's groups that may change in one step.
        trust_ratio: largest |dW| of a V step, relative to |W|; 0 is no limit.
        warm_up: whether the code step has LAMB's bias correction, which with betas (0, .95) starts
            at .22 of the full step and reaches .96 at step 50.
        stochastic: round at random between the two nearest words.
        rounding, clamp: gradient through them: "identity", "sigmoid"; "none", "hard", "soft".
    """

    code_lr: float | None = None
    delta_decay: float | None = None
    max_code_change: float | None = None
    trust_ratio: float | None = None
    warm_up: bool = True
    stochastic: bool = False
    rounding: str = "identity"
    clamp: str = "none"

    @property
    def moves_codes(self) -> bool:
        return self.code_lr is not None

    @property
    def surrogate(self) -> bool:
        """Whether gradients through rounding or clamping are other than the identity."""
        return (self.rounding, self.clamp) != ("identity", "none")


_STE = Method(code_lr=3e-3, delta_decay=0.0, max_code_change=1.0, trust_ratio=0.0)

METHODS: dict[str, Method] = {
    "continuous": Method(),
    "naive-pv": replace(_STE, delta_decay=1.0),
    "pv": Method(0.3, 1.0, 1e-2, 1e-2, warm_up=False),
    "pv-ste": Method(1e-2, 0.0, 1e-2, 1e-2),
    "ste": _STE,
    "stochastic": replace(_STE, delta_decay=1.0, stochastic=True),
    "clamp-ste": replace(_STE, clamp="hard"),
    "sigmoid-ste": replace(_STE, rounding="sigmoid", clamp="hard"),
    "softclamp": replace(_STE, clamp="soft"),
    "sigmoid-softclamp": replace(_STE, rounding="sigmoid", clamp="soft"),
}

LOSSES = ("kl", "ce")
OPTIMIZERS = ("lamb", "adam")
RANKINGS = ("residual", "change", "gain")
TRAINABLE = ("norms", "biases", "embeddings", "head", "linears")


@dataclass(frozen=True)
class TuneSettings:
    """Everything that a run depends on but models and data. None: the method's own value.

    Attributes:
        method: a key of ``METHODS``.
        loss: "kl" to the teacher's logits, or "ce" (no teacher).
        steps, batch, seq_len: optimiser steps, windows a step, tokens a window.
        microbatch: windows run at once (gradients add up to a batch).
        optimizer: "lamb", or "adam" (torch's).
        lr: relative step of values, norms, embeddings and head: LAMB moves a tensor by this
            fraction of its norm, Adam every element by about this fraction of the tensor's root
            mean square at the start.
        final_lr: fraction that both learning rates fall to until the last step, by a half cosine.
        code_lr, delta_decay, max_code_change, trust_ratio, warm_up: see ``Method``.
        temperature: of the choice of groups; 0 takes the largest, T > 0 samples without
            replacement with probabilities proportional to score^(1/T).
        ranking: score of a group: "residual" |Buf - What| as published; among the groups whose
            nearest word changes, the size of the "change" or its predicted "gain" -<G, dW>.
        beam: hypotheses of the code search (no effect with one codebook).
        rounding_temperature: T of stochastic rounding; 1 is unbiased on a scalar grid.
        sigmoid_temperature: T of the sigmoid methods.
        train: kinds of unquantized parameters to train, of ``TRAINABLE``.
        seed: of the order of windows and of all sampling.
        eval_every, patience: steps between evaluations; evaluations without a better one before an
            early stop (0: never).
        valid_windows: most validation windows (None: all).
        save_every: steps between checkpoints of the run.
        chunk: tokens whose logits exist at once (None: see ``loss.default_chunk``).
        gradient_checkpointing: recompute each block's activations in the backward pass.
        poison: fill weights with NaN before they are refreshed, to catch one that is not.
    """

    method: str = "pv-ste"
    loss: str = "kl"
    steps: int = 100
    batch: int = 32
    seq_len: int = 512
    microbatch: int | None = None
    optimizer: str = "lamb"
    lr: float = 3e-4
    final_lr: float = 1.0
    code_lr: float | None = None
    delta_decay: float | None = None
    max_code_change: float | None = None
    trust_ratio: float | None = None
    warm_up: bool | None = None
    temperature: float = 0.0
    ranking: str = "residual"
    beam: int = 4
    rounding_temperature: float = 1.0
    sigmoid_temperature: float = 20.0
    train: Sequence[str] = ("norms", "biases", "embeddings", "head")
    seed: int = 0
    eval_every: int = 25
    patience: int = 0
    valid_windows: int | None = None
    save_every: int = 50
    chunk: int | None = None
    gradient_checkpointing: bool = False
    poison: bool = False

    def __post_init__(self):
        object.__setattr__(self, "train", tuple(self.train))
        for name, known in (
            ("method", tuple(METHODS)),
            ("loss", LOSSES),
            ("optimizer", OPTIMIZERS),
            ("ranking", RANKINGS),
        ):
            if getattr(self, name) not in known:
                raise TuningError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}"
                )
        for kind in self.train:
            if kind not in TRAINABLE:
                raise TuningError(f"train={kind!r} is not one of {', '.join(TRAINABLE)}")
        for name in ("batch", "microbatch", "beam", "eval_every", "valid_windows", "save_every"):
            self._check(name, lambda v: v >= 1, "at least 1")
        for name in ("steps", "patience", "seed", "lr", "temperature", "code_lr", "trust_ratio"):
            self._check(name, lambda v: v >= 0, "at least 0")
        self._check("chunk", lambda v: v >= 1, "at least 1")
        self._check("seq_len", lambda v: v >= 2, "at least 2")
        self._check("final_lr", lambda v: 0 <= v <= 1, "in 0..1")
        self._check("delta_decay", lambda v: 0 <= v <= 1, "in 0..1")
        self._check("max_code_change", lambda v: 0 < v <= 1, "above 0, at most 1")
        for name in ("rounding_temperature", "sigmoid_temperature"):
            self._check(name, lambda v: v > 0, "above 0")
        self._check("microbatch", lambda v: self.batch % v == 0, f"a divisor of batch={self.batch}")
        moved = [f.name for f in fields(Method) if f.name in _METHOD_OPTIONS]
        if not METHODS[self.method].moves_codes:
            for name in moved:
                if getattr(self, name) is not None:
                    raise TuningError(f"{name} has no meaning for method {self.method!r}")

        rule = self.rule
        if rule.stochastic:
            for name, value, only in (
                ("max_code_change", rule.max_code_change, 1.0),
                ("trust_ratio", rule.trust_ratio, 0.0),
                ("temperature", self.temperature, 0.0),
                ("ranking", self.ranking, "residual"),
            ):
                if value != only:
                    raise TuningError(
                        f"{name}={value}: method {self.method!r} rounds every group, none is chosen"
                    )
        if self.optimizer == "adam" and self.warm_up is not None:
            raise TuningError(f"warm_up={self.warm_up} is a setting of lamb, not of adam")

    def rate(self, step: int) -> float:
        """What multiplies the learning rates in the step after ``step`` others."""
        along = min(1.0, step / max(1, self.steps - 1))
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * along)) / 2

    def _check(self, name: str, good, expected: str) -> None:
        value = getattr(self, name)
        if value is not None and not good(value):
            raise TuningError(f"{name}={value} is not {expected}")

    @property
    def rule(self) -> Method:
        """The method, with what these settings change of it."""
        given = {n: getattr(self, n) for n in _METHOD_OPTIONS if getattr(self, n) is not None}
        return replace(METHODS[self.method], **given)


_METHOD_OPTIONS = ("code_lr", "delta_decay", "max_code_change", "trust_ratio", "warm_up")
