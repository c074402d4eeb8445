"""The decode step of Llama and its like, from fused operators.

The model's own modules do the matmuls (stacked, rotated or dense); between them run the operators
of ``ops``, four a block. Results are rounded where the model's own forward rounds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from ..layers import FusedPart, RotatedLinear
from . import ops
from .cache import StepCache

MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Classes of transformers whose blocks are computed here (grouped heads, SwiGLU, pre-norm)."""

_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on the position alone, so that they can be tabulated."""


def why_not_llama(model: nn.Module) -> str | None:
    """Reason why this module does not know the model's blocks, or None."""
    kind, config = type(model), model.config
    if kind.__name__ not in MODELS or not kind.__module__.startswith("transformers."):
        return f"{kind.__name__} is none of {', '.join(MODELS)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in _ROTARY:
        return f"its rotary embedding ({rotary}) is none of {', '.join(_ROTARY)}"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head % 2:
        return f"its head dimension {head} is odd"
    return None


class LlamaStep:
    """Logits of one new token a sequence, over one cache (whose lengths it leaves)."""

    def __init__(self, model: nn.Module, cache: StepCache, batch: int):
        self.model, self.cache = model, cache
        base = model.model
        device, dtype = model.device, model.dtype
        with torch.no_grad():
            places = torch.arange(cache.length, device=device)[None]
            like = torch.empty(0, dtype=dtype, device=device)
            cos, sin = base.rotary_emb(like, places)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()
        self.norms = [*(block.input_layernorm for block in base.layers), base.norm]
        heads = model.config.num_key_value_heads
        self.counts = torch.zeros(batch * heads, dtype=torch.int32, device=device)

    def __call__(self, tokens, ids, valid) -> torch.Tensor:
        """tokens, ids (rotary positions) [B, 1], valid bool [B, L] -> logits [B, 1, vocabulary]."""
        base, cache = self.model.model, self.cache
        x, y = ops.embed_norm(tokens[:, 0], base.embed_tokens.weight, *_norm(self.norms[0]))
        for block, layer, norm in zip(base.layers, cache.layers, self.norms[1:], strict=True):
            y = self._attention(block.self_attn, layer, y, ids, valid)
            x, y = ops.add_rms_norm(x, y, *_norm(block.post_attention_layernorm))
            gate, up = _siblings((block.mlp.gate_proj, block.mlp.up_proj), y)
            y = block.mlp.down_proj(ops.swiglu(gate, up))
            x, y = ops.add_rms_norm(x, y, *_norm(norm))
        return self.model.lm_head(y)[:, None]

    def _attention(self, attention: nn.Module, layer, y, ids, valid) -> torch.Tensor:
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (
            part.unflatten(1, (-1, attention.head_dim)) for part in _siblings(parts, y)
        )  # [B, heads, D]
        z = ops.rope_attention(
            q, k, v, self.cos, self.sin, ids, self.cache.lengths[:1], layer.keys, layer.values,
            valid, self.counts, attention.scaling,
        )  # fmt: skip
        return attention.o_proj(z.flatten(1))


def _norm(module: nn.Module) -> tuple[torch.Tensor, float]:
    return module.weight, module.variance_epsilon


def _siblings(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Every layer's result for x; a fused product or a rotated input is computed once."""
    with ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, FusedPart):
                stack.enter_context(layer.shared.kept_open())
            elif isinstance(layer, RotatedLinear) and layer._sharing is not None:
                stack.enter_context(layer._sharing.shared.kept_open())
        return [layer(x) for layer in layers]
