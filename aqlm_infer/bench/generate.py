"""``bench generate``: decode rate and time to first token of a quantized model and a dense one."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from ..evaluation.generation import TokenClock
from ..generation import prepare_for_generation, undo_prepare_for_generation
from ..generation.head import parse_head
from ..generation.prepare import captured
from ..layers import quantized_cost, quantized_layers, replace_linears
from .layers import BenchError
from .matmul import num_threads
from .record import Row, environment, rounded

PROMPT_TOKENS = 32
MODES = ("eager", "no-graph", "prepared")
"""A model as it is loaded, after ``prepare_for_generation(graphs=False)``, and after it with graphs
where the device has them."""

_ALONE, _IN_TURNS = (3, 5.0), (5, 15.0)
"""Most runs of a model by itself and in turns with another, and the seconds of its runs after which
there are no more. In turns: what is launched one by one runs at the rate of the host, which
scatters by a third from minute to minute (H200 machines, 2026-11-29)."""

_REPLAYS = 20


@dataclass(frozen=True)
class Case:
    """What is generated: ``batch`` prompts of ``prompt_tokens``, ``new_tokens`` for each."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    threads: int


@dataclass(frozen=True)
class Rate:
    """Tokens per second of the whole batch after the first token: of the median, 20th and 80th
    percentile step. ``step_us`` is a step alone, run after run: a replay where it is captured.

    ``capture_s`` is what the first call took longer than a later one: compiling and capturing.
    """

    tokens_per_s: float
    p20_tokens_per_s: float
    p80_tokens_per_s: float
    ttft_ms: float
    step_us: float | None
    capture_s: float | None
    peak_bytes: int | None


def _unfused(scheme: str) -> str:
    """A scheme without the sizes of parts that share a matrix."""
    return re.sub(r"-f\d[\d+]*$", "", scheme)


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in memory, shared tensors once."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def measure(model: nn.Module, case: Case) -> Rate:
    """Greedy generation of exactly ``new_tokens`` tokens after a random prompt, a few times."""
    return measure_in_turns([model], case, _ALONE)[0][0]


@torch.inference_mode()
def measure_in_turns(
    models: Sequence[nn.Module], case: Case, limits: tuple[int, float] = _IN_TURNS
) -> tuple[list[Rate], list[list[float]]]:
    """``measure`` of several models, one run of each in every round.

    Returns their rates, and for each round the tokens/s of each model's median step.
    """
    turns, (rounds, seconds) = [_Turns(model, case) for model in models], limits
    for turn in turns:
        turn.warm_up()
    while len(turns[0].runs) < rounds and max(turn.seconds for turn in turns) < seconds:
        for turn in turns:
            turn.run()
    medians = [[statistics.median(clock.steps()) for clock in turn.runs] for turn in turns]
    return (
        [turn.rate() for turn in turns],
        [[case.batch / step for step in steps] for steps in zip(*medians, strict=True)],
    )


class _Turns:
    """Runs of one model."""

    def __init__(self, model: nn.Module, case: Case):
        self.model, self.case, self.device = model, case, next(model.parameters()).device
        vocabulary = model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(0)
        shape = case.batch, case.prompt_tokens
        self.prompt = torch.randint(0, vocabulary, shape, generator=generator).to(self.device)
        self.runs: list[TokenClock] = []
        self.seconds, self.last, self.peak = 0.0, 0.0, 0

    def _generate(self, count: int) -> TokenClock:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        clock = TokenClock()
        self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
            streamer=clock,
        )
        self.last = time.perf_counter() - clock.start
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))
        return clock

    def warm_up(self) -> None:
        # On a GPU a whole run: graphs belong to a cache length, which follows from the number of
        # tokens, and in eager mode the host settles slowly (2x8: after 2 tokens a fifth of the
        # steps of three runs took three times the fastest ones).
        self._generate(self.case.new_tokens if self.device.type == "cuda" else 2)
        self.first = self.last

    def run(self) -> None:
        self.runs.append(self._generate(self.case.new_tokens))
        self.seconds += self.last

    def rate(self) -> Rate:
        fast, median, slow = _percentiles([step for clock in self.runs for step in clock.steps()])
        batch, on_gpu = self.case.batch, self.device.type == "cuda"
        captures = on_gpu and _runner(self.model) is not None
        return Rate(
            tokens_per_s=batch / median,
            p20_tokens_per_s=batch / slow,
            p80_tokens_per_s=batch / fast,
            ttft_ms=1e3 * statistics.median(clock.ttft_s for clock in self.runs),
            step_us=_step_us(self.model),
            capture_s=max(0.0, self.first - self.last) if captures else None,
            peak_bytes=self.peak if on_gpu else None,
        )


def _percentiles(steps: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile."""
    if len(steps) == 1:
        return steps[0], steps[0], steps[0]
    fifths = statistics.quantiles(steps, n=5, method="inclusive")
    return fifths[0], statistics.median(steps), fifths[3]


def _runner(model: nn.Module):
    """The runner of captured steps that a model has, or None."""
    return getattr(model.forward, "runner", None)


def _step_us(model: nn.Module) -> float | None:
    """The step that ran last once more, in microseconds; None without a runner."""
    runner = _runner(model)
    if runner is None or not runner.counts["replays"]:
        return None
    replay = runner.rehearsal()
    replay()
    if model.device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(_REPLAYS):
            replay()
        return (time.perf_counter() - begin) * 1e6 / _REPLAYS
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_REPLAYS):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / _REPLAYS


def check_sizes(
    model: nn.Module,
    batches: Sequence[int],
    new_tokens: int,
    prompt_tokens: Sequence[int] = (PROMPT_TOKENS,),
) -> None:
    """Raise BenchError for sizes that the model cannot run."""
    if new_tokens < 2 or min(*batches, *prompt_tokens) < 1:
        raise BenchError(
            f"new_tokens={new_tokens}, batch={min(batches)}, prompt={min(prompt_tokens)}: need at"
            " least 2, 1 and 1"
        )
    limit, longest = context_of(model), max(prompt_tokens)
    if limit is not None and longest + new_tokens > limit:
        raise BenchError(
            f"{longest} prompt tokens and {new_tokens} new ones exceed the model's context of"
            f" {limit}"
        )


def context_of(model: nn.Module) -> int | None:
    """The number of positions that a model was made for, None when its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


class Dense:
    """A dense model and its rates, measured once for all the schemes that are compared with it, but
    those in turns with a scheme: ``rates`` has the last of a case."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.rates: dict[Case, Rate] = {}
        self._compiled: dict[Case, Rate] = {}

    def eager(self, case: Case) -> Rate:
        """As loaded."""
        if case not in self.rates:
            self.rates[case] = measure(self.model, case)
        return self.rates[case]

    def compiled(self, case: Case) -> Rate | None:
        """Compiled and captured as a prepared model is; None on the CPU."""
        if next(self.model.parameters()).device.type != "cuda":
            return None
        if case not in self._compiled:
            with captured(self.model):
                self._compiled[case] = measure(self.model, case)
        return self._compiled[case]


def check_modes(modes: Sequence[str], lm_head: str | None = None) -> None:
    """Raise for an unknown mode, and for a head that they cannot have."""
    for mode in modes:
        if mode not in MODES:
            raise BenchError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
        if mode == "eager" and lm_head is not None:
            raise BenchError(f"lm_head={lm_head!r} needs mode prepared or no-graph, not eager")
    if lm_head is not None:
        parse_head(lm_head)


@contextmanager
def in_mode(model: nn.Module, mode: str, lm_head: str | None = None) -> Iterator[nn.Module]:
    """The model as ``mode`` says; afterwards it is as before."""
    check_modes([mode], lm_head)
    if mode == "eager":
        yield model
        return
    prepare_for_generation(model, lm_head=lm_head, graphs=False if mode == "no-graph" else None)
    try:
        yield model
    finally:
        undo_prepare_for_generation(model)


def bench_generate(
    name: str,
    quantized: nn.Module,
    dense: Dense | None,
    *,
    batches: Sequence[int] = (1,),
    prompt_tokens: Sequence[int] = (PROMPT_TOKENS,),
    new_tokens: int = 64,
    threads: Sequence[int] = (1,),
    modes: Sequence[str] = ("prepared",),
    lm_head: str | None = None,
) -> Iterator[Row]:
    """One row for each mode, thread count, batch and prompt length.

    Dense fields are None without a dense model: ``dense_*`` are those of the model as loaded,
    ``dense_compiled_*`` of the compiled and captured one (on a GPU, beside mode "prepared"). In the
    modes without graphs the two models run in turns: ``rounds`` are [tokens/s, dense] of each
    round, ``times_dense`` is the median of their ratios.
    """
    check_sizes(quantized, batches, new_tokens, prompt_tokens)
    layers = [layer for _, layer in quantized_layers(quantized)]
    cost, device = quantized_cost(quantized), next(quantized.parameters()).device.type
    fixed = {
        "backend": "+".join(sorted({layer.kernel_id.split(".")[0] for layer in layers})),
        "model": name,
        "scheme": "+".join(sorted({_unfused(layer.format.id) for layer in layers})),
        "bits_per_weight": cost.bits_per_weight,
        "dtype": str(quantized.dtype).removeprefix("torch."),
        "precision": "+".join(sorted({layer.precision for layer in layers})),
    }
    for mode in modes:
        with in_mode(quantized, mode, lm_head) as model:
            described = {**fixed, "mode": mode, "lm_head": lm_head, "bytes": model_bytes(model)}
            for count, batch, prompt in product(threads, batches, prompt_tokens):
                case = Case(batch, prompt, new_tokens, count)
                with num_threads(count):
                    if dense is None or mode == "prepared":
                        rates = rate_fields(measure(model, case)) | dense_fields(dense, case, mode)
                    else:
                        rates = _beside(model, dense, case)
                shared = environment("generate", device)
                yield rounded({**shared, **described, **case_fields(case), **rates})


def case_fields(case: Case) -> Row:
    """The columns that say what was generated."""
    return {
        "batch": case.batch,
        "prompt_tokens": case.prompt_tokens,
        "new_tokens": case.new_tokens,
        "context": case.prompt_tokens + case.new_tokens,
        "threads": case.threads,
    }


def rate_fields(rate: Rate) -> Row:
    """The columns of a measured model."""
    return dict(vars(rate))


def dense_fields(dense: Dense | None, case: Case, mode: str) -> Row:
    """The columns of the dense model beside it."""
    eager = dense.eager(case) if dense is not None else None
    compiled = dense.compiled(case) if dense is not None and mode == "prepared" else None
    return {
        "dense_tokens_per_s": eager and eager.tokens_per_s,
        "dense_ttft_ms": eager and eager.ttft_ms,
        "dense_compiled_tokens_per_s": compiled and compiled.tokens_per_s,
        "dense_compiled_ttft_ms": compiled and compiled.ttft_ms,
        "dense_step_us": compiled and compiled.step_us,
        "dense_bytes": model_bytes(dense.model) if dense is not None else None,
    }


def _beside(model: nn.Module, dense: Dense, case: Case) -> Row:
    """The columns of both, measured in turns."""
    (rate, dense.rates[case]), rounds = measure_in_turns([model, dense.model], case)
    return {
        **rate_fields(rate),
        **dense_fields(dense, case, "eager"),
        "rounds": [[round(value, 2) for value in pair] for pair in rounds],
        "times_dense": statistics.median(ours / theirs for ours, theirs in rounds),
    }


def quantized_copy(model: nn.Module, scheme: str, precision: str, progress: bool) -> nn.Module:
    """A copy of a dense model with its layers in ``scheme``, made by the scheme's own quantizer."""
    copy = deepcopy(model)
    replace_linears(copy, scheme, precision=precision, progress=progress)
    return copy
