"""Time single calls, or replays of a CUDA graph of them. Never the first: warm-up runs before."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

MIN_CALLS = 30
MIN_SECONDS = 0.5
MAX_SECONDS = 20.0
GRAPH_CALLS = 16
GRAPH_REPLAYS = 15

REST_SECONDS = 0.1
"""Idle time before a measurement whose GPU may have been busy with heavier work, such as a dense
reference or the making of random weights, after which kernels are slow for tens of milliseconds
(presumably the clock). An H200 after 0.3 s of dense GEMMs, microseconds of a 64-token E8P matmul of
28672 x 8192 begun 0, 0.02, 0.05, 0.1, 0.2 s later: 70.3, 60.4, 55.2, 54.0, 53.6; of one token of
4-bit scalars: 34.3, 32.6, 32.8, 32.6, 32.3 (2026-11-29)."""


@dataclass(frozen=True)
class Timing:
    """Microseconds a call, over ``calls`` calls timed one by one."""

    calls: int
    median_us: float
    p20_us: float
    p80_us: float
    min_us: float


def time_calls(
    calls: Sequence[Callable[[], object]],
    *,
    min_calls: int = MIN_CALLS,
    min_seconds: float = MIN_SECONDS,
    max_seconds: float = MAX_SECONDS,
    synchronize: Callable[[], None] | None = None,
) -> Timing:
    """Call ``calls`` in rotation until ``min_calls`` calls and ``min_seconds`` are both reached.

    Several calls over distinct data defeat the caches; one call stays in them. A slow case stops
    after ``max_seconds`` once it has three calls. ``synchronize`` waits for a device.
    """
    wait = synchronize or (lambda: None)
    for call in calls[:3] if len(calls) > 1 else [calls[0]] * 3:
        call()
    wait()
    times: list[int] = []
    start = time.perf_counter_ns()
    for call in cycle(calls):
        before = time.perf_counter_ns()
        call()
        wait()
        after = time.perf_counter_ns()
        times.append(after - before)
        elapsed = (after - start) * 1e-9
        if len(times) >= min_calls and elapsed >= min_seconds:
            break
        if elapsed >= max_seconds and len(times) >= 3:
            break
    return summarize(times)


def time_graph(
    calls: Sequence[Callable[[], object]], replays: int = GRAPH_REPLAYS, rest_s: float = 0.0
) -> Timing:
    """Replay a CUDA graph of ``calls``, in rotation and at least ``GRAPH_CALLS`` of them.

    Each replay gives one time per call (device events); graphs leave out the host's launch cost.
    Distinct data in the calls defeats the L2 cache. The GPU rests for ``rest_s`` before the first
    replays, which warm up.
    """
    rotated = [calls[i % len(calls)] for i in range(max(GRAPH_CALLS, len(calls)))]
    for call in rotated[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        for call in rotated:
            call()
    time.sleep(rest_s)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(round(start.elapsed_time(end) * 1e6 / len(rotated)))
    return summarize(times)


def summarize(times_ns: Sequence[int]) -> Timing:
    """Median, 20th and 80th percentile and minimum, in microseconds."""
    fifths = statistics.quantiles(times_ns, n=5, method="inclusive")
    return Timing(
        calls=len(times_ns),
        median_us=statistics.median(times_ns) / 1e3,
        p20_us=fifths[0] / 1e3,
        p80_us=fifths[3] / 1e3,
        min_us=min(times_ns) / 1e3,
    )
