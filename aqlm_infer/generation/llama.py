"""The decode step of Llama and its like, and their prompts, from fused operators.

The model's own modules do the matmuls (stacked, rotated or dense); between them run the operators
of ``ops``, four a block. Results are rounded where the model's own forward rounds them, but for
norms that a rotation follows in the same launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .additive_step import joined_blocks
from .cache import StepCache
from .siblings import Siblings, product_of

MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Classes of transformers whose blocks are computed here (grouped heads, SwiGLU, pre-norm)."""

_MOST_FETCHED = 4 << 20
"""Bytes of a layer's keys and values up to which they are fetched into a GPU's L2 while the matmul
before their attention runs: 1 MB gains 0.6 us a layer, 17 MB cost the norm twice what they gain."""

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
    """Logits of a prompt's last token, or of one new token a sequence, over one cache.

    ``prompt`` fills the cache; a step leaves its lengths. ``capture``: steps are put into a graph.
    """

    def __init__(self, model: nn.Module, cache: StepCache, batch: int, capture: bool = True):
        self.model, self.cache = model, cache
        self.eager = ops.EAGER if model.device.type == "cuda" else ops
        self.operators = ops if capture else self.eager
        self.fetches = capture and model.device.type == "cuda"
        base = model.model
        device, dtype = model.device, model.dtype
        with torch.no_grad():
            places = torch.arange(cache.length, device=device)[None]
            like = torch.empty(0, dtype=dtype, device=device)
            cos, sin = base.rotary_emb(like, places)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()
        self.blocks = [_Block(block) for block in base.layers]
        self.norms = [*(block.input_layernorm for block in base.layers), base.norm]
        heads = model.config.num_key_value_heads
        self.counts = torch.zeros(batch * heads, dtype=torch.int32, device=device)
        self.joined = joined_blocks(self.blocks, batch) if self.fetches else None

    def __call__(self, tokens, ids, valid) -> torch.Tensor:
        """tokens, ids (rotary positions) [B, 1], valid bool [B, L] -> logits [B, 1, vocabulary]."""

        def attend(attention, layer, qkv, image: int = 0):
            q, k, v = (part.unflatten(1, (-1, attention.head_dim)) for part in qkv)  # [B, heads, D]
            given = (
                q, k, v, self.cos, self.sin, ids, self.cache.lengths[:1], layer.keys, layer.values,
                valid, self.counts, attention.scaling,
            )  # fmt: skip
            if image:
                return ops.rope_attention_image(*given, image)
            return ops.rope_attention(*given).flatten(1)

        if self.joined is not None:
            return self._joined_logits(tokens, attend)
        return self._logits(tokens, attend, self.operators, self.fetches)

    def prompt(self, tokens, ids) -> torch.Tensor:
        """tokens, ids (rotary positions) [B, T] -> logits of the last, [B, 1, vocabulary].

        The cache, empty before, holds all of them. Every token sees those before it: no padding.
        """
        B, T = tokens.shape

        def attend(attention, layer, qkv):
            q, k, v = (part.view(B, T, -1, attention.head_dim) for part in qkv)
            layer.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
            q = self.eager.rope_store(q, k, v, self.cos, self.sin, ids, layer.keys, layer.values)
            z = F.scaled_dot_product_attention(
                q.transpose(1, 2), layer.keys[:, :, :T], layer.values[:, :, :T], is_causal=True,
                scale=attention.scaling, enable_gqa=q.shape[2] != k.shape[2],
            )  # fmt: skip
            return z.transpose(1, 2).reshape(B * T, -1)

        logits = self._logits(tokens, attend, self.eager)
        self.cache.lengths.fill_(T)
        return logits

    def _norm_before(self, layer) -> Callable:
        """add_rms_norm, which also fetches the layer's keys and values."""

        def norm(*given):
            return ops.add_rms_norm_fetch(*given, layer.keys, layer.values, self.cache.lengths[:1])

        return norm if 2 * layer.keys.nbytes <= _MOST_FETCHED else ops.add_rms_norm

    def _joined_logits(self, tokens, attend) -> torch.Tensor:
        layers, table = self.cache.layers, self.model.model.embed_tokens.weight
        x, y = ops.embed_norm(tokens.reshape(-1), table, *_norm(self.norms[0]))
        after = [*self.joined[1:], None]
        for block, own, layer, norm, following in zip(
            self.joined, self.blocks, layers, self.norms[1:], after, strict=True
        ):
            z = attend(own.attention, layer, block.products(y), block.attended)
            x, y = block(x, z, norm, following)
        return self.model.lm_head(y)[:, None]

    def _logits(self, tokens, attend, operators, fetches: bool = False) -> torch.Tensor:
        base, cache, add = self.model.model, self.cache, operators.add_rms_norm
        T, table = tokens.shape[1], base.embed_tokens.weight
        x, y = operators.embed_norm(tokens.reshape(-1), table, *_norm(self.norms[0]))
        qkv = self.blocks[0].qkv(y)
        after = [*(block.qkv for block in self.blocks[1:]), None]
        for block, layer, norm, siblings, following in zip(
            self.blocks, cache.layers, self.norms[1:], after, [*cache.layers[1:], None], strict=True
        ):
            z = attend(block.attention, layer, qkv)  # [M, heads * D]
            if siblings is None:  # after the last attention only the last tokens count
                x, z = x[T - 1 :: T], z[T - 1 :: T]
            o = block.attention.o_proj
            x, *y = block.gate_up.norm_of_product(x, o, z, False, *_norm(block.norm), add)
            y, turned = block.gate_up.gated(*y, block.down, operators.swiglu)
            if siblings is None:
                _, y = add(x, product_of(block.down, y, turned), *_norm(norm))
            else:
                before = self._norm_before(following) if fetches else add
                x, *y = siblings.norm_of_product(x, block.down, y, turned, *_norm(norm), before)
                qkv = siblings.of_norm(*y)
        return self.model.lm_head(y)[:, None]


class _Block:
    """A block's layers, by the inputs that they read."""

    def __init__(self, block: nn.Module):
        attention, mlp = block.self_attn, block.mlp
        self.attention, self.down = attention, mlp.down_proj
        self.norm = block.post_attention_layernorm
        self.qkv = Siblings((attention.q_proj, attention.k_proj, attention.v_proj))
        self.gate_up = Siblings((mlp.gate_proj, mlp.up_proj))


def _norm(module: nn.Module) -> tuple[torch.Tensor, float]:
    return module.weight, module.variance_epsilon
