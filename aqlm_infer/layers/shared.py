"""Compute once what several layers of a block need: a rotated input, a fused layer's output.

The result is kept from the first use to the end of the block's own ``forward``, and is found by the
identity of the input, so layers may be grouped freely: with different inputs they share nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class SharedInBlock:
    """Keeps results of one input at a time while ``block.forward`` runs (compiled as well)."""

    def __init__(self, block: nn.Module):
        self._open = False
        self._kept: tuple | None = None  # input, its version, ((key, result), ...)
        self._parts: tuple | None = None  # input, its version, the parts of a fused result
        self.sizes: list[int] = []  # of those parts, in order
        self._hooks = (
            block.register_forward_pre_hook(self._begin),
            block.register_forward_hook(self._end),
        )

    def _begin(self, block, args) -> None:
        self._open, self._kept, self._parts = True, None, None

    def _end(self, block, args, output) -> None:
        self._open, self._kept, self._parts = False, None, None

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Keep results for the ``with`` block, for callers that run a block's layers themselves."""
        self._begin(None, ())
        try:
            yield
        finally:
            self._end(None, (), None)

    def detach(self) -> None:
        """Take the hooks off the block: nothing is kept from then on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def get(self, x: torch.Tensor, key, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``compute()``, or its kept result for this very ``x`` and ``key`` (both by identity).

        A change of x in place is noticed, but where torch does not count changes: in compiled
        graphs and in inference mode.
        """
        kept, version = self._kept, _version(x)
        if kept is None or kept[0] is not x or kept[1] != version:
            kept = x, version, ()
        for known, result in kept[2]:
            if known is key:
                return result
        result = compute()
        if self._open:
            self._kept = x, version, (*kept[2], (key, result))
        return result

    def __getstate__(self) -> dict:
        # Copies and pickles hold no activations.
        return {**self.__dict__, "_open": False, "_kept": None, "_parts": None}


def _version(x: torch.Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
