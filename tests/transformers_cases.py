"""What the tests of the transformers integration share: loading that is complete, round trips."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import logits, relative_error
from transformers import AutoModelForCausalLM

from aqlm_infer import FormatError
from aqlm_infer.checkpoint import CheckpointError

GOLDEN_MODELS = ("hf_llama_2x8g8", "hf_llama_tied_1x8g8", "hf_mixtral_1x8g8")
Q, K, UP = (f"model.layers.0.{n}_proj" for n in ("self_attn.q", "self_attn.k", "mlp.up"))

# A wrong layout, scheme or layer gives errors near one; kernels are held to their own bounds.
CLOSE = 5e-4


def load(folder, cls=AutoModelForCausalLM, **options):
    """The model in float32, after checking that every tensor found its place."""
    options = {"dtype": torch.float32, **options}
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def assert_matches(model, written):
    assert relative_error(logits(model), written.logits()) <= CLOSE


def assert_round_trip(model, folder):
    """Save, load, and find bit-equal logits and tensors."""
    before, state = logits(model), copy.deepcopy(model.state_dict())
    model.save_pretrained(folder)
    again = load(folder, type(model), dtype="auto")
    assert torch.equal(logits(again), before)
    loaded = again.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in state.items())
    return again


def assert_refused(folder, *fragments, **options):
    files = {f: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises((CheckpointError, FormatError)) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message
    assert {f: f.read_bytes() for f in folder.iterdir()} == files, "a failed load wrote something"
