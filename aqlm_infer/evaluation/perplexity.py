"""Perplexity over non-overlapping windows.

The stream is cut into windows from its start and the tail is dropped. Each window runs on its own,
with nothing added in front; every token but its first is scored;
ppl = exp(total negative log-likelihood / scored tokens). It is a token perplexity: compare it only
with numbers from the same tokenizer.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .tokens import TokenError


@dataclass(frozen=True)
class Perplexity:
    """``ppl`` over ``tokens`` scored tokens of ``windows`` windows; ``nll`` is the mean, nats."""

    ppl: float
    nll: float
    tokens: int
    windows: int
    window: int
    seconds: float


def _check(model: nn.Module, count: int, window: int, windows: int | None, batch: int) -> int:
    """Windows to run, after every check that needs no work."""
    if window < 2:
        raise TokenError(f"window={window}: at least 2 tokens are needed to score one")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise TokenError(f"window={window} is longer than the model's context of {limit}")
    if batch < 1 or (windows is not None and windows < 1):
        raise TokenError(f"batch={batch}, windows={windows}: both must be at least 1")
    available = count // window
    if available < (windows or 1):
        raise TokenError(
            f"{count} tokens are too few: {windows or 1} windows of {window} need"
            f" {(windows or 1) * window}"
        )
    return windows or available


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    ids: torch.Tensor,
    *,
    window: int = 512,
    windows: int | None = None,
    batch: int = 8,
    progress: bool = False,
) -> Perplexity:
    """Score the 1-D token stream ``ids``.

    ``windows`` keeps only the first so many. Raises TokenError when the stream is too short or the
    model's logits are not finite.
    """
    count = _check(model, ids.numel(), window, windows, batch)
    device = next(model.parameters()).device
    total, scored, start = 0.0, 0, time.perf_counter()
    groups = ids[: count * window].view(count, window).split(batch)
    with tqdm(groups, desc="eval", unit="batch", disable=not progress) as bar:
        for index, group in enumerate(bar):
            group = group.to(device)
            logits = model(input_ids=group, use_cache=False).logits[:, :-1].float()
            losses = F.cross_entropy(logits.flatten(0, 1), group[:, 1:].flatten(), reduction="none")
            loss = losses.double().sum().item()
            if not math.isfinite(loss):
                raise TokenError(f"the model's logits are not finite in batch {index}")
            total, scored = total + loss, scored + losses.numel()
    seconds = time.perf_counter() - start
    mean = total / scored
    return Perplexity(math.exp(mean), mean, scored, count, window, seconds)
