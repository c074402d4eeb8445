"""``bench matmul``: one quantized layer against dense ``F.linear``, case by case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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
from .timing import REST_SECONDS, Timing, time_calls, time_graph


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


def timed(calls: Sequence[Callable[[], object]], device: str) -> Timing:
    """Calls one by one on the CPU, as a replayed graph on a GPU."""
    return time_calls(calls) if device == "cpu" else time_graph(calls, rest_s=REST_SECONDS)


@lru_cache
def copy_bandwidth(device: str) -> float:
    """GB/s, read plus written, of an elementwise kernel over 2 GB.

    (A copy node inside a graph is slower: 2.8 against 4.2 TB/s on an H200.)
    """
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    timing = time_graph([lambda: torch.neg(source, out=target)])
    return 2 * source.nbytes / timing.median_us / 1e3


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
        return timed(calls, device)


class Layers:
    """The distinct layers of a case: ``layer(seed)``. Kept for the next case that differs in M."""

    kept: tuple[MatmulCase, Layers] | None = None

    def __init__(self, case: MatmulCase, format: Format) -> None:
        self.case, self.format = case, format
        self.made: dict[int, QuantLinear] = {}
        self.tensors = self.random(0)

    @classmethod
    def of(cls, case: MatmulCase, format: Format) -> Layers:
        key = replace(case, M=1)
        if cls.kept is None or cls.kept[0] != key:
            cls.kept = None  # frees the previous case's layers first
            cls.kept = (key, cls(case, format))
        return cls.kept[1]

    def random(self, seed: int) -> dict[str, torch.Tensor]:
        case = self.case
        dtype = DTYPES[case.dtype]
        return random_tensors(self.format, case.N, case.K, dtype, seed, case.device)

    def layer(self, seed: int) -> QuantLinear:
        if seed not in self.made:
            self.made[seed] = QuantLinear.from_tensors(
                self.format,
                self.tensors if seed == 0 else self.random(seed),
                self.case.K,
                precision=self.case.precision,
                kernel=self.case.kernel,
            )
        return self.made[seed]


@torch.inference_mode()
def time_case(case: MatmulCase, format: Format) -> Row:
    """Verify one case against float64, then time it."""
    x = torch.randn(case.M, case.K, generator=torch.Generator().manual_seed(0))
    x = x.to(DTYPES[case.dtype]).to(case.device)
    with num_threads(case.threads):
        layers = Layers.of(case, format)
        sample = layers.layer(0)
        weight = format.dequantize(layers.tensors, torch.float64)
        error = verified_error(sample(x), x, weight, case.precision, str(case))
        del weight
        nbytes = packed_bytes(sample)

        def make(seed: int) -> Callable[[], object]:
            layer = layers.layer(seed)
            return lambda: layer(x)

        timing = timed(rotation(make, case.cache, nbytes), case.device)
    return {
        "backend": sample.kernel_id.split(".")[0],
        "kernel": sample.kernel_id,
        "relative_error": error,
        **asdict(timing),
        "gb_per_s": nbytes / timing.median_us / 1e3,
    }


def dense_columns(case: MatmulCase) -> Row:
    """The dense times and the bandwidth that go beside a case; on the CPU bfloat16 as well."""
    cpu = case.device == "cpu"
    names = dict.fromkeys((case.dtype, "bfloat16") if cpu else (case.dtype,))
    dense = {
        name: dense_timing(case.N, case.K, case.M, name, case.threads, case.cache, case.device)
        for name in names
    }
    same, half = dense[case.dtype], dense.get("bfloat16")
    return {
        "read_gb_per_s": read_bandwidth(case.threads) if cpu else None,
        "copy_gb_per_s": None if cpu else copy_bandwidth(case.device),
        "dense_us": same.median_us,
        "dense_min_us": same.min_us,
        "dense_bf16_us": half and half.median_us,
        "dense_bf16_min_us": half and half.min_us,
    }


def bench_matmul(cases: Sequence[MatmulCase], isa: str | None = None) -> Iterator[Row]:
    """One row a case, as it is measured. Raises BenchError when a result is wrong."""
    with cpu_isa(isa):
        for case in cases:
            shared = environment("matmul", case.device)
            measured = time_case(case, parse_scheme(case.scheme))
            fields = {k: v for k, v in asdict(case).items() if k not in ("kernel", "device")}
            yield rounded({**shared, **fields, **measured, **dense_columns(case)})
