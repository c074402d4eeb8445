"""The timing harness: quantized layers and models beside dense ones, in the same run.

``bench.generate`` times whole models; it is not imported here, because it imports transformers.
"""

from .layers import BenchError
from .matmul import MatmulCase, bench_matmul, matmul_cases
from .record import append_rows, environment
from .timing import Timing, time_calls

__all__ = [
    "BenchError",
    "MatmulCase",
    "Timing",
    "append_rows",
    "bench_matmul",
    "environment",
    "matmul_cases",
    "time_calls",
]
