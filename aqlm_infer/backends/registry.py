"""One registry of kernels: dispatch is a filter and a minimum, and a failure explains itself.

A kernel says why it cannot take a problem, and what the problem would cost it. ``select`` returns
the cheapest one that can; ``explain`` lists every candidate with its verdict.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..formats import Format, Tensors

Partitions = tuple[int, ...]
"""out_features of the fused parts that share an input (one part: the layer's own)."""

Buffers = Mapping[str, torch.Tensor]
"""A kernel's runtime tensors, by buffer name."""


class KernelError(RuntimeError):
    """No kernel takes the problem, or the forced kernel does not; the message says why."""


@dataclass(frozen=True)
class Problem:
    """All that kernel selection may look at.

    ``M`` None means any number of tokens (a layer is prepared once and serves every M).
    """

    format: Format
    N: int
    K: int
    dtype: torch.dtype
    device: str = "cpu"
    precision: str = "exact"
    M: int | None = None
    parts: int = 1

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        M = "any" if self.M is None else self.M
        shape = f"N={self.N} K={self.K} M={M}"
        return f"{self.format.id} {shape} {dtype} {self.precision} on {self.device}"


@dataclass(frozen=True)
class Kernel:
    """One way to compute ``y = x W^T + bias`` from packed tensors.

    ``repack(format, tensors, partitions, precision)`` turns the canonical code tensors of one layer
    into runtime buffers; ``unpack`` restores the code tensors bit for bit. ``matmul(x, buffers,
    tensors, bias, partitions, precision)`` is what a layer calls; ``dequantize`` gives the weight.

    ``fold(format, values)`` gives buffers that are derived from the values (codebooks, sign
    vectors): a layer computes them anew when the values have changed. ``rotate(format, x, buffers,
    values)`` transforms the input first: ``matmul`` takes its result, which layers may share.
    ``trains``: all of them together are differentiable in the values, not in x and bias alone.

    ``hold(format, buffers, values, bias, partitions, precision)`` keeps a layer's operands, so that
    one call rotates and multiplies, and returns the number that ``backends.held.Held`` takes; None
    for a layer that it does not keep.
    """

    id: str
    repack: Callable[..., dict[str, torch.Tensor]]
    unpack: Callable[..., dict[str, torch.Tensor]]
    matmul: Callable[..., torch.Tensor]
    dequantize: Callable[..., torch.Tensor]
    why_not: Callable[[Problem], str | None]
    cost: Callable[[Problem], float]
    fold: Callable[..., dict[str, torch.Tensor]] | None = None
    rotate: Callable[..., torch.Tensor] | None = None
    trains: bool = False
    hold: Callable[..., int | None] | None = None


@dataclass(frozen=True)
class Verdict:
    """One row of ``explain``."""

    kernel: str
    reason: str | None
    predicted_us: float | None
    chosen: bool = False


KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """Add a kernel; ids are unique."""
    if kernel.id in KERNELS:
        raise KernelError(f"kernel id {kernel.id!r} is registered twice")
    KERNELS[kernel.id] = kernel
    return kernel


def select(problem: Problem, forced: str | None = None) -> Kernel:
    """The cheapest kernel that takes ``problem``.

    ``forced`` (or the environment variable AQLM_KERNEL) names the only one to consider. Raises
    KernelError listing every candidate's reason when none takes it.
    """
    forced = forced or os.environ.get("AQLM_KERNEL") or None
    if forced and forced not in KERNELS:
        raise KernelError(f"unknown kernel {forced!r}; registered: {', '.join(sorted(KERNELS))}")
    candidates = [KERNELS[forced]] if forced else list(KERNELS.values())
    fits = [k for k in candidates if k.why_not(problem) is None]
    if not fits:
        reasons = "; ".join(f"{k.id}: {k.why_not(problem)}" for k in candidates)
        raise KernelError(f"no kernel for {problem} ({reasons})")
    return min(fits, key=lambda k: k.cost(problem))


def why_not_fast(problem: Problem) -> str:
    """Why no kernel of the problem's own device takes it: what to say when the reference runs."""
    own = [k for k in KERNELS.values() if k.id.startswith(f"{problem.device}.")]
    return "; ".join(f"{k.id}: {k.why_not(problem)}" for k in own) or "no kernel for this device"


def explain(problem: Problem) -> list[Verdict]:
    """Every registered kernel with its verdict on ``problem``, the chosen one first."""
    rows = []
    for kernel in KERNELS.values():
        reason = kernel.why_not(problem)
        rows.append(Verdict(kernel.id, reason, None if reason else kernel.cost(problem)))
    rows.sort(key=lambda r: (r.reason is not None, r.predicted_us or 0.0))
    try:
        chosen = select(problem).id
    except KernelError:
        return rows
    return [Verdict(r.kernel, r.reason, r.predicted_us, r.kernel == chosen) for r in rows]


def call(op, *args):
    """Call an operator. Where no gradient is recorded the Python autograd kernel is skipped.

    It would only pass the arguments on, and costs 5 us: 4.2 us a call instead of 9.2 (Zen 5,
    torch 2.13, an operator that does nothing).
    """
    # In inference mode torch skips it by itself.
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
    ):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def first_reason(*reasons: str | None) -> str | None:
    """The first reason that is not None: ``why_not`` functions are lists of checks."""
    return next((r for r in reasons if r), None)


__all__ = [
    "KERNELS",
    "Buffers",
    "Kernel",
    "KernelError",
    "Partitions",
    "Problem",
    "Tensors",
    "Verdict",
    "call",
    "explain",
    "first_reason",
    "register",
    "select",
    "why_not_fast",
]
