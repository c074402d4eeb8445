"""Triton backend: kernel records over ``aqlm_infer.triton_kernels``, imported on first use.

It takes what no CUDA kernel of ours was built for. With TRITON_INTERPRET=1 it also runs on the CPU,
slowly, through Triton's interpreter: that is how CI tests it without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch

from ..formats import AdditiveFormat, Format, Tensors
from .registry import Buffers, Kernel, Partitions, Problem, first_reason, register

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INDEX_LIMIT = 1 << 31


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _device_reason(device: str, dtype: torch.dtype) -> str | None:
    if interpreted():
        if dtype == torch.bfloat16:
            return "TRITON_INTERPRET=1 multiplies bfloat16 as if its bits were integers"
        return None if device == "cpu" else f"TRITON_INTERPRET=1 runs on cpu, not {device}"
    if device not in ("cuda", "xpu"):
        return f"runs on cuda or xpu, not {device} (on cpu with TRITON_INTERPRET=1, for tests)"
    return None


_LOADED: dict[str, ModuleType] = {}


def kernels(family: str) -> ModuleType:
    """``aqlm_infer.triton_kernels.<family>_ops``. A prepared layer has imported it, so that
    torch.compile, which cannot trace an import, finds it here."""
    if not _LOADED:
        importlib.import_module("aqlm_infer.triton_kernels.keys").fix()
    if family not in _LOADED:
        _LOADED[family] = importlib.import_module(f"aqlm_infer.triton_kernels.{family}_ops")
    return _LOADED[family]


def run(operator: Callable, *args):
    """Call a Triton operator on its first argument's device: launches go to the current one."""
    device = args[0].device
    if (
        device.type != "cuda"
        or torch.compiler.is_compiling()
        or device.index == torch.cuda.current_device()
    ):
        return operator(*args)
    with torch.cuda.device(device):
        return operator(*args)


def _repack(format: AdditiveFormat, tensors: Tensors, partitions: Partitions, precision: str):
    codes = kernels("additive").pack(tensors["codes"], format.out_group_size, list(partitions))
    books = tensors["codebooks"].detach().float().unflatten(0, (len(partitions), -1))
    return {"packed_codes": codes, "widest": books.abs().flatten(1).amax(1)}


def _unpack(format: AdditiveFormat, buffers: Buffers, N: int, K: int, partitions: Partitions):
    codes = kernels("additive").unpack(
        buffers["packed_codes"],
        K // format.in_group_size,
        format.num_codebooks,
        format.out_group_size,
        list(partitions),
    )
    return {"codes": codes}


def _matmul(format: Format, x, buffers: Buffers, values: Tensors, bias, partitions, precision):
    return run(
        kernels("additive").additive_matmul,
        x, buffers["packed_codes"], values["codebooks"], values["scales"], bias,
        buffers["widest"], list(partitions),
    )  # fmt: skip


def _dequantize(format: Format, buffers: Buffers, values: Tensors, K: int, partitions: Partitions):
    return run(
        kernels("additive").additive_dequantize,
        buffers["packed_codes"], values["codebooks"], values["scales"], K, list(partitions),
    )  # fmt: skip


def why_not_here(problem: Problem, largest: int) -> str | None:
    """Why Triton does not run a problem here; its largest tensor has ``largest`` elements."""
    return first_reason(
        _missing(),
        _device_reason(problem.device, problem.dtype),
        None if problem.dtype in _DTYPES else f"takes {list(_DTYPES)}, not {problem.dtype}",
        None if problem.precision == "exact" else f"has precision exact, not {problem.precision}",
        None if largest < _INDEX_LIMIT else f"{largest} elements, at most 2^31 - 1 (32-bit)",
    )


def _why_not(problem: Problem) -> str | None:
    format = problem.format
    if not isinstance(format, AdditiveFormat):
        return f"takes additive codebooks, not {format.id}"
    codes = problem.N * problem.K // (format.in_group_size * format.out_group_size)
    return why_not_here(problem, max(problem.N * problem.K, codes * format.num_codebooks))


def _cost(problem: Problem) -> float:
    """Behind the CUDA kernels, ahead of the reference; last of all in the interpreter."""
    if interpreted():
        return 1e9
    format = problem.format
    vector = format.in_group_size * format.out_group_size
    codes = problem.N * problem.K / vector * format.num_codebooks
    return 10.0 + codes * (0.001 if format.nbits <= 8 else 0.012)


register(Kernel("triton.additive", _repack, _unpack, _matmul, _dequantize, _why_not, _cost))
