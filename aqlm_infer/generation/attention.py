"""``decode_attention`` as an attention function of transformers, for models we have no step of."""

from __future__ import annotations

from . import ops
from .errors import GenerationSetupError

NAME = "aqlm_infer_decode"
"""The attention implementation's name in transformers' table."""


def attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
):
    """The attention function that transformers calls: (y [B, 1, H, D], None).

    Raises GenerationSetupError for what the operator does not compute (soft caps, biases, sinks,
    sliding windows).
    """
    for name in ("softcap", "position_bias", "s_aux", "sliding_window"):
        if kwargs.get(name) is not None:
            raise GenerationSetupError(f"{type(module).__name__} asks for {name} in attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ops.decode_attention(query, key, value, attention_mask[:, 0, 0], scale), None


def register() -> None:
    """Put the attention function into transformers' table."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
