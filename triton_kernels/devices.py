"""Where a kernel is launched."""

import functools
from collections.abc import Callable

import torch


def on_its_device(function: Callable) -> Callable:
    """Launch ``function``'s kernels on the device of its first argument, a tensor.

    Triton launches on the current device, loads a kernel for the number that torch gives it, and
    into the context that the driver has: after work on cuda:1 alone the two can differ, so the
    device is set even where torch says that it is the current one.
    """

    @functools.wraps(function)
    def launched(first: torch.Tensor, *args, **kwargs):
        if first.device.type != "cuda":  # Triton's interpreter
            return function(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return function(first, *args, **kwargs)

    return launched
