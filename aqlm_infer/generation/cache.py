"""The static cache that a captured step reads and writes, kept from one call to the next."""

from __future__ import annotations

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer


class StepLayer(StaticLayer):
    """A layer of a static cache whose storage stays where it is.

    Outside a captured step it is transformers' static layer, but that a prompt attends to its own
    keys alone, not to the empty rest of the storage: as in a dynamic cache, so by the same kernel.
    In a step, new keys go to ``position`` (a tensor), and the step counts for all layers at once.
    """

    position: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.keys is not None:
            self.is_initialized = True
            return
        length = self.cumulative_length
        # Normal tensors, so that calls with and without inference mode may both write them.
        with torch.inference_mode(False):
            super().lazy_initialization(key_states, value_states)
        self.cumulative_length = length  # a view of the cache's lengths: never a copy

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.position is None:
            empty = not self.is_initialized
            stored = super().update(key_states, value_states, *args, **kwargs)
            return (key_states, value_states) if empty else stored
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length) if self.is_initialized else (query_length, 0)


class StepCache(StaticCache):
    """A static cache of ``length`` positions whose filled lengths are one tensor, ``lengths``.

    ``filled`` is the number of filled positions where the host knows it, else None.
    """

    def __init__(self, config, length: int, device: torch.device):
        super().__init__(config=config, max_cache_len=length)
        self.layers = [StepLayer(length) for _ in self.layers]
        with torch.inference_mode(False):
            self.lengths = torch.zeros(len(self.layers), dtype=torch.long, device=device)
            for index, layer in enumerate(self.layers):
                layer.cumulative_length = self.lengths[index]
        self.length = length
        self.filled: int | None = 0

    def clear(self) -> None:
        """Forget what is stored. The next prefill sees an empty cache, in the same memory."""
        self.lengths.zero_()
        self.filled = 0
        used = [layer for layer in self.layers if layer.is_initialized]
        if used:  # one launch: a prompt waits for it
            torch._foreach_zero_([t for layer in used for t in (layer.keys, layer.values)])
        for layer in self.layers:
            # What transformers asks for an empty cache: it then attends causally, with no mask.
            layer.is_initialized = False

    def known_filled(self) -> int:
        """The number of filled positions, read from the device if need be."""
        if self.filled is None:
            self.filled = int(self.lengths[0])
        return self.filled


def why_not_static(config) -> str | None:
    """Reason why a model of this config cannot use a ``StepCache``, or None."""
    if config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    layers = StaticCache(config=config, max_cache_len=16).layers
    kinds = sorted({type(layer).__name__ for layer in layers if type(layer) is not StaticLayer})
    return f"its cache has layers of other kinds ({', '.join(kinds)})" if kinds else None
