"""Whole models with the ``aqlm`` package's layers, under the harness that times ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import product

import torch
from peers import missing_aqlm
from torch import nn

from aqlm_infer.bench import environment
from aqlm_infer.bench.generate import (
    Case,
    Dense,
    case_fields,
    dense_fields,
    measure,
    model_bytes,
    rate_fields,
)
from aqlm_infer.bench.record import Row, rounded
from aqlm_infer.formats import AdditiveFormat
from aqlm_infer.generation.prepare import captured
from aqlm_infer.layers import quantized_cost, quantized_layers


def with_aqlm_layers(model: nn.Module) -> None:
    """Replace every additive layer of ``model`` by ``aqlm.QuantizedLinear`` with its tensors."""
    reason = missing_aqlm()
    if reason is not None:
        raise SystemExit(f"error: --peer aqlm: {reason}")
    from aqlm import QuantizedLinear

    for name, layer in list(quantized_layers(model)):
        format: AdditiveFormat = layer.format
        peer = QuantizedLinear(
            layer.in_features,
            layer.out_features,
            format.in_group_size,
            format.out_group_size,
            format.num_codebooks,
            format.nbits,
            bias=layer.bias is not None,
            dtype=layer.scales.dtype,
            device=layer.scales.device,
        )
        bias = {} if layer.bias is None else {"bias": layer.bias.detach()}
        peer.load_state_dict({**layer.tensors(), **bias})
        model.set_submodule(name, peer)


def peer_rows(
    name: str,
    model: nn.Module,
    scheme: str,
    dense: Dense | None,
    batches: Sequence[int],
    prompt_tokens: Sequence[int],
    new_tokens: int,
) -> Iterator[Row]:
    """Rows of a quantized ``model`` after its layers became the package's.

    Eager, and on a GPU "captured": in a CUDA graph with our operators between the matmuls.
    """
    bits, device = quantized_cost(model).bits_per_weight, next(model.parameters()).device.type
    with_aqlm_layers(model)
    fixed = {
        "backend": "aqlm",
        "model": name,
        "scheme": scheme,
        "bits_per_weight": bits,
        "dtype": str(model.dtype).removeprefix("torch."),
        "precision": "exact",
        "lm_head": None,
        "bytes": model_bytes(model),
    }
    modes = {"eager": nullcontext} if device == "cpu" else {"eager": nullcontext,
                                                            "captured": captured}  # fmt: skip
    for mode, context in modes.items():
        with context(model) if mode == "captured" else context():
            for batch, prompt in product(batches, prompt_tokens):
                case = Case(batch, prompt, new_tokens, torch.get_num_threads())
                rates = rate_fields(measure(model, case))
                beside = dense_fields(dense, case, "prepared" if mode == "captured" else mode)
                shared = environment("generate", device)
                described = {**fixed, "mode": mode, **case_fields(case)}
                yield rounded({**shared, **described, **rates, **beside})
