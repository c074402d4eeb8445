"""LAMB (arXiv 1904.00962) without weight decay: Adam's direction, a step of a fixed fraction.

    u = m / (sqrt(v) + eps)        delta = -lr * bias * |p| / |u| * u

so that a step moves a tensor by exactly ``lr * bias`` of its norm (by ``lr * bias * |u|`` where the
tensor or u is zero). torch has no LAMB; this one keeps no first moment where beta1 is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.optim import Optimizer


class Lamb(Optimizer):
    """Args: parameter groups with ``lr``, ``betas``, ``eps``, ``debias`` and ``stacked``.

    ``debias``: the step is multiplied by sqrt(1 - beta2^t) / (1 - beta1^t), else by 1.
    ``stacked``: a parameter is a stack of tensors along its first dimension, each with its own
    norms.
    """

    def __init__(self, params, lr=3e-4, betas=(0.9, 0.95), eps=1e-6, debias=True, stacked=False):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "debias": debias, "stacked": stacked}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        """One step on every parameter that has a gradient, float32 or float64."""
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if held:
                self._step(group, held)

    def _step(self, group: dict, params: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        gradients = [p.grad for p in params]
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["v"] = torch.zeros_like(p)
                if beta1:
                    state["m"] = torch.zeros_like(p)
            state["step"] += 1
        states = [self.state[p] for p in params]
        v = [s["v"] for s in states]
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        if beta1:
            m = [s["m"] for s in states]
            torch._foreach_mul_(m, beta1)
            torch._foreach_add_(m, gradients, alpha=1 - beta1)
        else:
            m = gradients
        update = torch._foreach_sqrt(v)
        torch._foreach_add_(update, group["eps"])
        update = torch._foreach_div(m, update)
        sizes, lengths = (_norms(x, group["stacked"]) for x in (params, update))
        for p, u, size, length, state in zip(params, update, sizes, lengths, states, strict=True):
            t, bias = state["step"].item(), 1.0
            if group["debias"]:
                bias = math.sqrt(1 - beta2**t) / (1 - beta1**t)
            # Where either is zero the ratio is 1: |p| / |u| is then 0, inf or nan.
            ratio = size / length
            ratio = torch.where((ratio > 0) & (ratio < torch.inf), ratio, 1.0)
            p.addcmul_(u, ratio, value=-group["lr"] * bias)


def _norms(tensors: list[torch.Tensor], stacked: bool) -> Sequence[torch.Tensor]:
    """The norm of each tensor, or those of its slices, broadcastable to it."""
    if not stacked:
        return torch._foreach_norm(tensors)
    dims = [tuple(range(1, x.dim())) for x in tensors]
    pairs = zip(tensors, dims, strict=True)
    return [torch.linalg.vector_norm(x, dim=d, keepdim=True) for x, d in pairs]
