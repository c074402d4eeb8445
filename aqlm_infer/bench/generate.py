"""``bench generate``: decode rate and time to first token of a quantized model and a dense one."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from ..evaluation.generation import TokenClock
from ..layers import quantized_cost, quantized_layers, replace_linears
from .layers import BenchError
from .matmul import num_threads
from .record import Row, environment, rounded

PROMPT_TOKENS = 32
_REPEATS = 3


@dataclass(frozen=True)
class Rate:
    """``tokens_per_s`` counts the whole batch's tokens after the first."""

    tokens_per_s: float
    ttft_ms: float


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in memory, shared tensors once."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@torch.inference_mode()
def measure(model: nn.Module, batch: int, new_tokens: int) -> Rate:
    """Greedy generation of exactly ``new_tokens`` tokens after a random prompt: medians of runs."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, vocabulary, (batch, PROMPT_TOKENS), generator=generator)
    prompt = prompt.to(next(model.parameters()).device)

    def run(count: int) -> TokenClock:
        clock = TokenClock()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
            streamer=clock,
        )
        return clock

    run(2)
    clocks = [run(new_tokens) for _ in range(_REPEATS)]
    return Rate(
        tokens_per_s=batch * statistics.median(clock.steps_per_s for clock in clocks),
        ttft_ms=1e3 * statistics.median(clock.ttft_s for clock in clocks),
    )


def check_sizes(model: nn.Module, batches: Sequence[int], new_tokens: int) -> None:
    """Raise BenchError for sizes that the model cannot run."""
    if new_tokens < 2 or min(batches) < 1:
        raise BenchError(
            f"new_tokens={new_tokens}, batch={min(batches)}: need at least 2 and at least 1"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and PROMPT_TOKENS + new_tokens > limit:
        raise BenchError(
            f"{PROMPT_TOKENS} prompt tokens and {new_tokens} new ones exceed the model's context"
            f" of {limit}"
        )


def bench_generate(
    name: str,
    quantized: nn.Module,
    dense: nn.Module | None,
    *,
    batches: Sequence[int] = (1,),
    new_tokens: int = 64,
    threads: Sequence[int] = (1,),
) -> Iterator[Row]:
    """One row for each batch and thread count; dense fields are None without a dense model."""
    check_sizes(quantized, batches, new_tokens)
    layers = [layer for _, layer in quantized_layers(quantized)]
    schemes = sorted({layer.format.id for layer in layers})
    backends = sorted({layer.kernel_id.split(".")[0] for layer in layers})
    cost = quantized_cost(quantized)
    device = next(quantized.parameters()).device.type
    for count in threads:
        for batch in batches:
            with num_threads(count):
                ours = measure(quantized, batch, new_tokens)
                theirs = measure(dense, batch, new_tokens) if dense is not None else None
            yield rounded(
                {
                    **environment("generate", device),
                    "backend": "+".join(backends),
                    "model": name,
                    "scheme": "+".join(schemes),
                    "bits_per_weight": cost.bits_per_weight,
                    "batch": batch,
                    "new_tokens": new_tokens,
                    "threads": count,
                    "dtype": str(quantized.dtype).removeprefix("torch."),
                    "tokens_per_s": ours.tokens_per_s,
                    "dense_tokens_per_s": theirs.tokens_per_s if theirs else None,
                    "ttft_ms": ours.ttft_ms,
                    "dense_ttft_ms": theirs.ttft_ms if theirs else None,
                    "bytes": model_bytes(quantized),
                    "dense_bytes": model_bytes(dense) if dense is not None else None,
                }
            )


def quantized_copy(model: nn.Module, scheme: str, precision: str, progress: bool) -> nn.Module:
    """A copy of a dense model with its layers in ``scheme``, made by the scheme's own quantizer."""
    copy = deepcopy(model)
    replace_linears(copy, scheme, precision=precision, progress=progress)
    return copy
