"""Operands that a layer's backend keeps, so that an eager call passes their number.

A call of an operator costs the host about half a microsecond for every tensor that it passes, and a
layer has five to eight. The kernels are the same, and so is every bit of the results.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from operator import is_

import torch

from .. import ops

_NOTHING = type(None)


class Held:
    """The number of a layer's operands (``Kernel.hold``), given back when this goes.

    Copies and pickles of it are None. ``index`` is the operands' device, -1 for the CPU;
    ``counted`` the values that buffers derive from: their changes in place are noticed.
    """

    __slots__ = ("__weakref__", "buffers", "counted", "index", "number", "parameters", "versions")

    def __init__(
        self, number: int, parameters: Mapping, buffers: Mapping, counted: list[torch.Tensor]
    ):
        self.number, self.counted = number, counted
        self.parameters, self.buffers = list(parameters.values()), list(buffers.values())
        self.versions = [value._version for value in counted]
        self.index = self.buffers[0].get_device()
        # At the end of the process nothing is given back: CUDA may have ended before.
        weakref.finalize(self, ops.release, number).atexit = False

    def is_of(self, parameters: Mapping, buffers: Mapping) -> bool:
        """Whether these are the very tensors, with the values that buffers were made of."""
        return (
            all(map(is_, self.parameters, parameters.values()))
            and all(map(is_, self.buffers, buffers.values()))
            and (not self.counted or self.versions == [value._version for value in self.counted])
        )

    def __reduce__(self):
        return _NOTHING, ()
