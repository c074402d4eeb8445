"""The peers that the matmul benchmark times: the ``aqlm`` package, and dense ``F.linear``."""

from __future__ import annotations

import os

# Read when numba and scipy's BLAS are loaded. aqlm's threaded kernel races: one thread only.
os.environ["NUMBA_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch.utils.cpp_extension

from aqlm_infer import parse_scheme
from aqlm_infer.bench import MatmulCase, Timing
from aqlm_infer.bench.layers import random_tensors, rotation, verified_error
from aqlm_infer.bench.matmul import dense_columns, dense_timing, num_threads, timed
from aqlm_infer.bench.record import Row, environment, rounded
from aqlm_infer.evaluation import DTYPES


def missing_aqlm() -> str | None:
    """Why ``aqlm`` cannot be timed here, or None."""
    for name in ("aqlm", "numba", "scipy"):
        if find_spec(name) is None:
            return f"{name} is not installed"
    return None


def _row(case: MatmulCase, backend: str, kernel: str, timing: Timing, **extra) -> Row:
    fields = {k: v for k, v in asdict(case).items() if k not in ("kernel", "device")}
    shared = environment("matmul", case.device)
    return rounded(
        {**shared, **fields, "backend": backend, "kernel": kernel, **extra, **asdict(timing)}
    )


def use_built_extension(path: Path) -> None:
    """Let ``aqlm`` load its CUDA kernels from ``path``, codebook_cuda.so.

    It compiles them when its first CUDA layer runs, which takes minutes and needs nvcc; the file
    must be built from its sources for the same Python and torch.
    """
    spec = spec_from_file_location("codebook_cuda", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    compiler = torch.utils.cpp_extension.load
    torch.utils.cpp_extension.load = lambda **_: module
    try:
        import_module("aqlm.inference_kernels.cuda_kernel")
    finally:
        torch.utils.cpp_extension.load = compiler


@torch.inference_mode()
def aqlm_row(case: MatmulCase, triton: bool = False) -> Row:
    """One row of ``aqlm.QuantizedLinear``, verified like ours. On the CPU it takes float32 only.

    ``triton``: its Triton kernel on the same layer, which it runs itself where it has no CUDA one.
    """
    from aqlm import QuantizedLinear

    format = parse_scheme(case.scheme)
    dtype = DTYPES[case.dtype]
    x = torch.randn(case.M, case.K, generator=torch.Generator().manual_seed(0))
    x = x.to(dtype).to(case.device)

    def random(seed: int) -> dict[str, torch.Tensor]:
        return random_tensors(format, case.N, case.K, dtype, seed, case.device)

    def build(seed: int) -> QuantizedLinear:
        layer = QuantizedLinear(
            case.K,
            case.N,
            format.in_group_size,
            format.out_group_size,
            format.num_codebooks,
            format.nbits,
            bias=False,
            dtype=dtype,
            device=case.device,
        )
        layer.load_state_dict(random(seed))
        return layer

    def forward(layer: QuantizedLinear) -> torch.Tensor:
        if not triton:
            return layer(x)
        product = import_module("aqlm.inference_kernels.triton_kernel").triton_matmul
        return product(x, layer.codes, layer.codebooks, layer.scales, layer.bias)

    weight = format.dequantize(random(0), torch.float64)
    with num_threads(case.threads):
        sample = build(0)
        # The peer's rounding is recorded, not judged: the bound only catches a wrong set-up.
        error = verified_error(forward(sample), x, weight, "fast", f"aqlm {case}")
        del weight
        nbytes = sample.codes.nbytes

        def make(seed: int) -> Callable[[], object]:
            layer = sample if seed == 0 else build(seed)
            return lambda: forward(layer)

        calls = rotation(make, case.cache, nbytes)
        timing = timed(calls, case.device)
    extra = {"relative_error": error, "gb_per_s": nbytes / timing.median_us / 1e3}
    name = "aqlm.triton_matmul" if triton else "aqlm.QuantizedLinear"
    return _row(case, "aqlm", name, timing, **extra, **dense_columns(case))


def dense_row(case: MatmulCase, dtype: str) -> Row:
    """One row of ``F.linear`` in ``dtype`` at the case's sizes."""
    dense = replace(case, scheme="dense", dtype=dtype, precision="exact")
    timing = dense_timing(case.N, case.K, case.M, dtype, case.threads, case.cache, case.device)
    gb_per_s = case.N * case.K * DTYPES[dtype].itemsize / timing.median_us / 1e3
    extra = {"relative_error": None, "gb_per_s": gb_per_s}
    return _row(dense, "torch", "torch.linear", timing, **extra, **dense_columns(dense))
