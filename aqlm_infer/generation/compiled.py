"""The decode step of any model of transformers: its own forward, compiled before it is captured."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from . import attention
from .cache import StepCache


class ForwardStep:
    """Logits of one new token a sequence from ``forward``, the model's own, over one cache.

    ``compile``: torch.compile fuses what lies between the matmuls.
    """

    def __init__(self, model: nn.Module, forward: Callable, cache: StepCache, compile: bool):
        attention.register()
        self.config, self.forward, self.cache = model.config.get_text_config(), forward, cache
        self.columns = torch.arange(cache.length, device=cache.lengths.device)
        self._step = _compiled(self) if compile else self._run

    def __call__(self, tokens, ids, valid) -> torch.Tensor:
        """tokens, ids (positions) [B, 1], valid bool [B, L] -> logits [B, 1, vocabulary]."""
        with self._decoding():
            return self._step(tokens, ids, valid)

    def _run(self, tokens, ids, valid) -> torch.Tensor:
        lengths = self.cache.lengths
        mask = ((self.columns <= lengths[:1]) & valid)[:, None, None, :]
        output = self.forward(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=ids,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        return output.logits

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Our attention, and cache layers in their step state, while the model runs."""
        before = self.config._attn_implementation
        self.config._attn_implementation = attention.NAME
        for layer in self.cache.layers:
            layer.position = self.cache.lengths[:1]
        try:
            yield
        finally:
            self.config._attn_implementation = before
            for layer in self.cache.layers:
                layer.position = None


def _compiled(step: ForwardStep) -> Callable:
    """``step._run`` compiled, with a code object of its own.

    Dynamo keeps what it compiled by code object: what was compiled for another batch size or cache
    must not count against its limit.
    """
    function = ForwardStep._run
    fresh = types.FunctionType(
        function.__code__.replace(), function.__globals__, "decode_step", None, function.__closure__
    )
    options = {}
    if hasattr(torch._inductor.config.triton, "enable_pdl"):
        options["triton.enable_pdl"] = _depends(step.columns.device)
    return torch.compile(
        types.MethodType(fresh, step), fullgraph=True, dynamic=False, options=options
    )


def _depends(device: torch.device) -> bool:
    """Whether the GPU can launch kernels dependently."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
