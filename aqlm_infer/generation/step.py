"""One decode step, as a captured CUDA graph: a token a sequence in, logits out, no Python between.

Everything that changes from step to step lives in tensors that stay in place: the tokens, their
positions, which cached positions are not padding, and the number of filled positions. The graph
itself counts up, and puts the likeliest tokens in the place of its inputs: greedy steps follow each
other without anything between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from . import ops
from .cache import StepCache

_WARM_UP = 2

Body = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens [B, 1], positions [B, 1], valid bool [B, L]) -> logits [B, 1, vocabulary].

Stores the new keys and values at ``cache.lengths``. A body that knows the model's blocks also has
``prompt``: tokens and positions [B, T] -> logits of the last, with the keys and values stored.
"""


class DecodeStep:
    """The step of ``batch`` sequences over one ``StepCache``, captured when first run.

    ``make_body`` is called once. ``counts`` counts the "bodies" that were made, the "prompts" that
    they ran and the "replays". ``pool`` is the memory pool that graphs share; without ``capture``
    there is no graph, and every run launches the body's kernels.
    """

    def __init__(
        self,
        cache: StepCache,
        batch: int,
        make_body: Callable[[], Body],
        counts: Counter,
        pool=None,
        capture: bool = True,
    ):
        self.cache, self.make_body, self.counts, self.pool = cache, make_body, counts, pool
        self.capture = capture
        device = cache.lengths.device
        self.body: Body | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: torch.Tensor | None = None
        with torch.inference_mode(False):
            self.tokens = torch.zeros((batch, 1), dtype=torch.long, device=device)
            self.positions = torch.zeros((batch, 1), dtype=torch.long, device=device)
            self.valid = torch.ones((batch, cache.length), dtype=torch.bool, device=device)
            self.best = torch.zeros(batch, dtype=torch.long, device=device)
            self._counts = torch.zeros(batch, dtype=torch.int32, device=device)
        self._all_valid = True

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return self.tokens.shape[0]

    def set_inputs(self, tokens, positions, mask: torch.Tensor | None) -> None:
        """Copy a step's inputs.

        tokens [B, 1]; positions [B, 1] below the cache's length, or None for the next one; mask
        over the positions so far, [B, T] or [B, 1, 1, T] (boolean or additive), None for all seen.
        """
        self.tokens.copy_(tokens)
        if positions is None:
            positions = self.cache.lengths[:1]
        self.positions.copy_(positions)
        if not self._all_valid:
            self.valid.fill_(True)
        self._all_valid = mask is None
        if mask is None:
            return
        if mask.dim() == 4:
            mask = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] == 0
        self.valid[:, : mask.shape[1]].copy_(mask)

    def run(self, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """The logits [B, 1, vocabulary] of the inputs that are set, and ``best``, their argmax [B].

        Both are overwritten by the next run, whose inputs are ``best`` at the next positions;
        ``tokens`` [B] take the place of the input tokens.
        """
        if tokens is not None:
            self.tokens.copy_(tokens[:, None])
        self.counts["replays"] += 1
        if not self.capture:
            self.logits = self.eager()
            return self.logits
        if self.graph is None:
            self._capture()
        self.graph.replay()
        return self.logits

    def prompt(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, 1, vocabulary] of the last of tokens [B, T], which fill the empty cache."""
        self.counts["prompts"] += 1
        with torch.inference_mode(False), torch.no_grad():
            return self._made_body().prompt(tokens, positions.expand(tokens.shape))

    def _made_body(self) -> Body:
        if self.body is None:
            self.body = self.make_body()
            self.counts["bodies"] += 1
        return self.body

    def eager(self) -> torch.Tensor:
        """What the graph computes, without one."""
        # In normal mode, whatever mode the caller is in: what is made here outlives the call.
        with torch.inference_mode(False), torch.no_grad():
            logits = self._made_body()(self.tokens, self.positions, self.valid)
            ops.choose(
                logits[:, -1], self.best, self.tokens, self.positions, self.cache.lengths,
                self._counts,
            )  # fmt: skip
            return logits

    def _capture(self) -> None:
        state = self.tokens, self.positions, self.cache.lengths
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self.eager()
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # torch's own stream for captures is of the device that a process captured on first.
        with torch.cuda.graph(graph, pool=self.pool, stream=stream):
            self.logits = self.eager()
        self.graph = graph
