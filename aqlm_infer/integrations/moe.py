"""Mixture-of-experts blocks: quantized experts one by one, in place of fused 3-D weights.

transformers 5 fuses the experts of a layer into two parameters, which have no place for codes. One
``ExpertLayout`` says, for a fused class, what the checkpoint calls an expert's three matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..checkpoint import LinearShape
from ..layers import QuantLinear


@dataclass(frozen=True)
class ExpertLayout:
    """Names of one expert's matrices: ``y = down(act(gate x) * up x)``."""

    gate: str
    up: str
    down: str

    def shapes(self, fused: nn.Module) -> dict[str, LinearShape]:
        """Shapes of every expert's matrices, as ``{"3.w1": ...}``, from the fused parameters."""
        _, hidden, inner = fused.down_proj.shape
        inward, outward = LinearShape(inner, hidden, False), LinearShape(hidden, inner, False)
        one = {self.gate: inward, self.up: inward, self.down: outward}
        return {f"{e}.{n}": s for e in range(len(fused.down_proj)) for n, s in one.items()}


LAYOUTS = {"MixtralExperts": ExpertLayout(gate="w1", up="w3", down="w2")}
"""Fused classes of transformers that checkpoints store as separate experts."""


class QuantExpert(nn.Module):
    """One gated expert of three quantized layers, named as in the checkpoint."""

    def __init__(self, layout: ExpertLayout, layers: Mapping[str, QuantLinear], act: nn.Module):
        super().__init__()
        self.layout, self.act = layout, act
        for name in (layout.gate, layout.up, layout.down):
            self.add_module(name, layers[name])

    def parts(self) -> tuple[QuantLinear, QuantLinear, QuantLinear]:
        """The gate, up and down layers."""
        names = self.layout.gate, self.layout.up, self.layout.down
        gate, up, down = (self.get_submodule(name) for name in names)
        return gate, up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self.parts()
        return down(self.act(gate(x)) * up(x))


class QuantExperts(nn.ModuleList):
    """Drop-in for a fused experts module: experts "0".."E-1", called with the router's choice."""

    def __init__(self, fused: nn.Module, layers: Mapping[str, QuantLinear]):
        """``layers`` holds every expert's matrices under the names of ``ExpertLayout.shapes``."""
        layout = LAYOUTS[type(fused).__name__]
        super().__init__(
            QuantExpert(
                layout,
                {n: layers[f"{e}.{n}"] for n in (layout.gate, layout.up, layout.down)},
                fused.act_fn,
            )
            for e in range(len(fused.down_proj))
        )
        self.fused_class = type(fused)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, D] tokens, [T, k] expert numbers and their weights -> [T, D] in the tokens' dtype."""
        out = torch.zeros_like(hidden_states)
        if torch.compiler.is_compiling():
            # Shapes may not depend on the routing in a graph: every expert sees every token. The
            # select, unlike a product with zero, keeps what an unrouted expert overflows to out.
            for e, expert in enumerate(self):
                chosen = top_k_index == e
                weight = (top_k_weights * chosen).sum(-1, keepdim=True)
                part = (expert(hidden_states) * weight).to(out.dtype)
                out = out + torch.where(chosen.any(-1, keepdim=True), part, 0)
            return out
        for e in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == e)
            part = self[e](hidden_states[token]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, part.to(out.dtype))
        return out

    @torch.no_grad()
    def to_fused(self, config, dtype: torch.dtype) -> nn.Module:
        """The dense fused module that this one stands for, with dequantized weights."""
        with torch.device("meta"):
            fused = self.fused_class(config)
        gates, downs = [], []
        for expert in self:
            gate, up, down = expert.parts()
            gates.append(torch.cat([gate.weight, up.weight]).to(dtype))
            downs.append(down.weight.to(dtype))
        fused.gate_up_proj = nn.Parameter(torch.stack(gates))
        fused.down_proj = nn.Parameter(torch.stack(downs))
        return fused.train(self.training)
