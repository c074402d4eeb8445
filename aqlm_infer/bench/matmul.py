"""``bench matmul``: one quantized layer against dense ``F.linear``, case by case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F

from ..backends import native
from ..evaluation.loading import DTYPES
from ..formats import Format, parse_scheme
from ..layers import QuantLinear
from .layers import DRAM_BYTES, BenchError, packed_bytes, random_tensors, rotation, verified_error
from .record import Row, environment, rounded
from .timing import Timing, time_calls


@dataclass(frozen=True)
class MatmulCase:
    """One thing to time. ``kernel`` None lets the registry choose."""

    scheme: str
    N: int
    K: int
    M: int = 1
    dtype: str = "float32"
    precision: str = "exact"
    threads: int = 1
    cache: str = "warm"
    device: str = "cpu"
    kernel: str | None = None

    def __str__(self) -> str:
        return (
            f"{self.scheme} N={self.N} K={self.K} M={self.M} {self.dtype} {self.precision}"
            f" {self.cache}, {self.threads} threads"
        )


def matmul_cases(
    schemes: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    ms: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    caches: Sequence[str] = ("warm",),
    **fixed,
) -> list[MatmulCase]:
    """All combinations, checked: schemes are known, shapes divide, numbers are positive."""
    for scheme, (N, K) in product(schemes, shapes):
        parse_scheme(scheme).check_shape(N, K)
    for value in (*ms, *threads):
        if value < 1:
            raise BenchError(f"M and threads must be at least 1, not {value}")
    return [
        MatmulCase(scheme, N, K, M, threads=count, cache=cache, **fixed)
        for (N, K), scheme, cache, count, M in product(shapes, schemes, caches, threads, ms)
    ]


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Run with ``count`` torch threads, which are also those of the CPU kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def cpu_isa(name: str | None) -> Iterator[None]:
    """Run with one instruction set of the CPU kernels; None leaves the choice."""
    if name is None:
        yield
        return
    if native.cpu is None:
        raise BenchError(f"isa {name!r}: {native.cpu_problem}")
    native.cpu.set_isa(name)
    try:
        yield
    finally:
        native.cpu.set_isa("auto")


def synchronizer(device: str) -> Callable[[], None] | None:
    """What waits for the device's work, None on the CPU."""
    return None if device == "cpu" else torch.cuda.synchronize


@lru_cache
def read_bandwidth(threads: int) -> float | None:
    """Best of five streaming reads past the caches in GB/s; None when ``_cpu`` is not built."""
    if native.cpu is None:
        return None
    data = torch.empty(DRAM_BYTES, dtype=torch.uint8)
    native.cpu.advise_huge_pages(data.data_ptr(), data.nbytes)
    data.random_(255)
    reads = (
        native.cpu.measure_read_bandwidth(data.data_ptr(), data.nbytes, threads) for _ in range(5)
    )
    return data.nbytes / min(reads) / 1e9


@lru_cache
def dense_timing(
    N: int, K: int, M: int, dtype: str, threads: int, cache: str, device: str
) -> Timing:
    """``F.linear`` on a random dense weight, under the same rules as the quantized layer."""
    torch_dtype = DTYPES[dtype]
    x = torch.randn(M, K, device=device).to(torch_dtype)

    def make(seed: int) -> Callable[[], object]:
        generator = torch.Generator(device).manual_seed(seed)
        weight = torch.randn(N, K, generator=generator, device=device).to(torch_dtype)
        return lambda: F.linear(x, weight)

    with num_threads(threads), torch.inference_mode():
        calls = rotation(make, cache, N * K * torch_dtype.itemsize)
        return time_calls(calls, synchronize=synchronizer(device))


@torch.inference_mode()
def time_case(case: MatmulCase, format: Format) -> Row:
    """Verify one case against float64, then time it."""
    dtype = DTYPES[case.dtype]
    x = torch.randn(case.M, case.K, generator=torch.Generator().manual_seed(0)).to(dtype)

    def layer(seed: int) -> QuantLinear:
        tensors = random_tensors(format, case.N, case.K, dtype, seed)
        if seed == 0:
            first.update(tensors)
        return QuantLinear.from_tensors(
            format,
            {name: tensor.to(case.device) for name, tensor in tensors.items()},
            case.K,
            precision=case.precision,
            kernel=case.kernel,
        )

    first: dict[str, torch.Tensor] = {}
    with num_threads(case.threads):
        sample = layer(0)
        weight = format.dequantize(first, torch.float64)
        moved = x.to(case.device)
        error = verified_error(sample(moved).cpu(), x, weight, case.precision, str(case))
        nbytes = packed_bytes(sample)

        def make(seed: int) -> Callable[[], object]:
            copy = sample if seed == 0 else layer(seed)
            return lambda: copy(moved)

        calls = rotation(make, case.cache, nbytes)
        timing = time_calls(calls, synchronize=synchronizer(case.device))
    return {
        "backend": "cuda" if case.device != "cpu" else sample.kernel_id.split(".")[0],
        "kernel": sample.kernel_id,
        "relative_error": error,
        **asdict(timing),
        "gb_per_s": nbytes / timing.median_us / 1e3,
    }


def dense_columns(case: MatmulCase) -> Row:
    """The dense times that go beside a case: the same dtype, and bfloat16."""
    same, half = (
        dense_timing(case.N, case.K, case.M, dtype, case.threads, case.cache, case.device)
        for dtype in (case.dtype, "bfloat16")
    )
    read = read_bandwidth(case.threads) if case.device == "cpu" else None
    return {
        "read_gb_per_s": read,
        "dense_us": same.median_us,
        "dense_min_us": same.min_us,
        "dense_bf16_us": half.median_us,
        "dense_bf16_min_us": half.min_us,
    }


def bench_matmul(cases: Sequence[MatmulCase], isa: str | None = None) -> Iterator[Row]:
    """One row a case, as it is measured. Raises BenchError when a result is wrong."""
    with cpu_isa(isa):
        for case in cases:
            shared = environment("matmul", case.device)
            measured = time_case(case, parse_scheme(case.scheme))
            fields = {k: v for k, v in asdict(case).items() if k not in ("kernel", "device")}
            yield rounded({**shared, **fields, **measured, **dense_columns(case)})
