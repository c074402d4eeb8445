"""Second moments of the inputs of a block's linear layers, collected while the block runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..quantizers.hessian import DAMPING, HessianWarning


class MomentError(ValueError):
    """Activations that no second moment can be taken of."""


class Moments:
    """Running sums of x^T x, float64 [K, K], for the named linear layers of a block.

    Layers that are called with the same tensor (q, k, v; gate, up) share one matrix. Products are
    float32, so that float16 activations do not overflow, and are added in float64.
    """

    def __init__(self, block: nn.Module, names: Sequence[str]):
        self._layers = {name: block.get_submodule(name) for name in names}
        self._leader: dict[str, str] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._seen: list[tuple[torch.Tensor, str]] = []

    @contextmanager
    def watching(self) -> Iterator[Moments]:
        """Collect from every forward of the block inside; call :meth:`next_batch` before each."""
        handles = [
            layer.register_forward_pre_hook(self._hook(name))
            for name, layer in self._layers.items()
        ]
        try:
            yield self
        finally:
            self._seen.clear()
            for handle in handles:
                handle.remove()

    def next_batch(self) -> None:
        """Forget which tensors were seen: identity means sharing only within one forward."""
        self._seen.clear()

    def _hook(self, name: str):
        def collect(module: nn.Module, inputs: tuple) -> None:
            x = inputs[0]
            for tensor, leader in self._seen:
                if tensor is x:
                    self._leader[name] = leader
                    return
            self._seen.append((x, name))
            self._leader[name] = name
            self.add(name, x.detach())

        return collect

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Add the second moment of ``inputs`` [..., K] to the sum of a layer.

        Raises MomentError when it is not finite.
        """
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        product = rows.T @ rows
        if not bool(torch.isfinite(product.diagonal()).all()):
            bad = int((~torch.isfinite(rows)).any(1).sum())
            raise MomentError(
                f"{name}: the input is not finite in {bad} of {len(rows)} tokens, after"
                f" {self.tokens.get(name, 0)} good ones"
            )
        if name in self._sums:
            self._sums[name] += product
        else:
            self._sums[name] = product.double()
        self.tokens[name] = self.tokens.get(name, 0) + len(rows)

    def leader(self, name: str) -> str:
        """The layer under whose name the matrix of ``name`` was collected."""
        return self._leader.get(name, name)

    def take(self, name: str, last: bool) -> torch.Tensor:
        """The second moment of ``name``'s input, float64 [K, K]; ``last`` drops the sum.

        An input that saw fewer than ten tokens a feature is damped by 1 % of its mean diagonal
        times K over tokens; below one token a feature (an expert that is rarely chosen) with a
        HessianWarning. One that saw none gets the identity, with another.
        """
        leader, K = self.leader(name), self._layers[name].in_features
        tokens = self.tokens.get(leader, 0)
        if not tokens:
            warnings.warn("no calibration token reached it", HessianWarning, stacklevel=2)
            device = self._layers[name].weight.device
            return torch.eye(K, dtype=torch.float64, device=device)
        moment = self._sums.pop(leader).div_(tokens) if last else self._sums[leader] / tokens
        if tokens < K:
            warnings.warn(f"{tokens} tokens for {K} inputs", HessianWarning, stacklevel=2)
        if tokens < 10 * K:
            moment.diagonal().add_(DAMPING * K / tokens * moment.diagonal().mean())
        return moment
