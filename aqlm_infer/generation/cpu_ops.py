"""The operators of ``ops`` on the CPU, native (csrc/cpu/step.h); without the module plain torch.

A step calls four of them a block, so each asks for as little as it can.
"""

from __future__ import annotations

import torch

from ..backends import native
from ..backends.cpu import _dtype_name
from ..ops.library import LIBRARY
from . import ops


def _rms_norm(x, weight, eps):
    ops.check_rows(x, weight)
    weight, y = weight.contiguous(), x.new_empty(x.shape)
    M, N = x.shape
    native.cpu.add_norm(
        x.data_ptr(), x.stride(0), 0, 0, weight.data_ptr(), eps, 0, y.data_ptr(),
        _dtype_name(x, "x"), M, N, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _add_rms_norm(x, delta, weight, eps):
    ops.check_rows(x, delta, weight)
    delta, weight = delta.expand_as(x), weight.contiguous()
    total, y = x.new_empty(x.shape), x.new_empty(x.shape)
    M, N = x.shape
    native.cpu.add_norm(
        x.data_ptr(), x.stride(0), delta.data_ptr(), delta.stride(0), weight.data_ptr(), eps,
        total.data_ptr(), y.data_ptr(), _dtype_name(x, "x"), M, N, torch.get_num_threads(),
    )  # fmt: skip
    return total, y


def _embed_norm(tokens, table, weight, eps):
    ops.check_tokens(tokens, table)
    x = table[tokens]
    return x, _rms_norm(x, weight, eps)


def _swiglu(gate, up):
    ops.check_rows(gate, up)
    up = up.expand_as(gate)
    y = gate.new_empty(gate.shape)
    M, N = gate.shape
    native.cpu.swiglu(
        gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), y.data_ptr(),
        _dtype_name(gate, "gate"), M, N, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _choose(scores, best, tokens, positions, lengths, counts):
    ops.check_choice(scores, best, tokens, positions, lengths, counts)
    M, N = scores.shape
    native.cpu.argmax(
        scores.data_ptr(), scores.stride(0), _dtype_name(scores, "scores"), M, N, best.data_ptr()
    )
    tokens.copy_(best.view(tokens.shape))
    positions.add_(1)
    lengths.add_(1)


def _rope_attention(q, key, value, cos, sin, ids, filled, keys, values, mask, counts, scale):
    ops.check_attention(q, keys, values, mask)
    ops.check_new(q, key, value, cos, sin, ids, filled, keys, mask, counts)
    cos, sin, ids = cos.contiguous(), sin.contiguous(), ids.contiguous()
    y = q.new_empty(q.shape)
    B, H, D = q.shape
    heads, L = keys.shape[1:3]
    native.cpu.rope_attention(
        q.data_ptr(), q.stride()[:2], key.data_ptr(), key.stride()[:2], value.data_ptr(),
        value.stride()[:2], cos.data_ptr(), sin.data_ptr(), ids.data_ptr(), int(filled),
        keys.data_ptr(), keys.stride()[:3], values.data_ptr(), values.stride()[:3],
        mask.data_ptr(), mask.stride(0), scale, y.data_ptr(), _dtype_name(q, "q"),
        (B, H, heads, D, L), torch.get_num_threads(),
    )  # fmt: skip
    return y


if native.cpu is not None:
    for _name, _function in {
        "rms_norm": _rms_norm,
        "add_rms_norm": _add_rms_norm,
        "swiglu": _swiglu,
        "embed_norm": _embed_norm,
        "choose": _choose,
        "rope_attention": _rope_attention,
    }.items():
        LIBRARY.impl(_name, _function, "CPU")
