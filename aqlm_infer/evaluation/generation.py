"""Generate text and time it: first token and decode rate, as a reader of the stream sees them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TextIO

import torch
from torch import nn
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer


class GenerationError(ValueError):
    """A prompt or settings that a model cannot generate from."""


@dataclass(frozen=True)
class Generation:
    """``decode_tokens_per_s`` counts the tokens after the first; None when there are none."""

    text: str
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_tokens_per_s: float | None
    seconds: float


class TokenClock(BaseStreamer):
    """Notes when each generation step delivers its tokens. The prompt arrives first."""

    def __init__(self):
        self.start = time.perf_counter()
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass

    @property
    def ttft_s(self) -> float:
        """Seconds from the clock's creation to the first new token."""
        return self.times[0] - self.start

    def steps(self) -> list[float]:
        """Seconds of each decode step after the first token."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def steps_per_s(self) -> float | None:
        """Decode steps per second after the first token."""
        steps = len(self.times) - 1
        return steps / (self.times[-1] - self.times[0]) if steps > 0 else None


class _TimedText(TextStreamer):
    """Writes the text to a stream as it grows, and notes when each token arrives."""

    def __init__(self, tokenizer, stream: TextIO | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.clock = TokenClock()
        self.stream = stream

    def put(self, value) -> None:
        self.clock.put(value)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.stream is not None:
            self.stream.write(text + ("\n" if stream_end else ""))
            self.stream.flush()


def _check(model, prompt_tokens: int, max_new_tokens: int, temperature: float, top_p: float):
    if prompt_tokens == 0:
        raise GenerationError("the prompt has no tokens")
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise GenerationError(
            f"temperature={temperature}, top_p={top_p}: need temperature >= 0 and 0 < top_p <= 1"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise GenerationError(
            f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones exceed the model's"
            f" context of {limit}"
        )


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: TextIO | None = None,
) -> Generation:
    """Continue ``prompt``, writing the new text to ``stream`` as it comes.

    ``temperature`` 0 takes the most likely token every time; ``seed`` makes sampling repeatable and
    leaves the caller's generator alone. Raises GenerationError before any work.
    """
    encoded = tokenizer(prompt, return_tensors="pt")
    prompt_ids = encoded["input_ids"].to(next(model.parameters()).device)
    _check(model, prompt_ids.shape[1], max_new_tokens, temperature, top_p)
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        streamer = _TimedText(tokenizer, stream)
        output = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
        )
    clock = streamer.clock
    new = output[0, prompt_ids.shape[1] :]
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=prompt_ids.shape[1],
        new_tokens=len(clock.times),
        ttft_s=clock.ttft_s,
        decode_tokens_per_s=clock.steps_per_s,
        seconds=clock.times[-1] - clock.start,
    )
