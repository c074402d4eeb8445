"""Operators between the matmuls of a model: of a decode step, where M tokens are M sequences with
one new token each, and of a prompt.

    rms_norm(x [M, N], weight [N]) -> y          add_rms_norm(x, delta) -> (x + delta, its norm)
    add_rms_norm_fetch: add_rms_norm, in whose time keys and values [B, Hkv, L, D] below position
    filled [1] begin to move to the cache of a GPU that has one
    swiglu(gate [M, N], up [M, N]) -> silu(gate) * up
    embed_norm(tokens [M], table [V, N], weight [N]) -> (the tokens' rows, their norm)
    rotated_norm: add_rms_norm, and the rotation of a rotated layer's input after it, not rounded
    between: U^T (su * norm) with h the factor matrix [factor, factor]
    choose(scores [M, V]): writes their argmax into best and tokens, and counts the step
    decode_attention(q [B, H, 1, D], k and v [B, Hkv, L, D], mask bool [B, L]) -> [B, 1, H, D]
    rope_attention: the same with the rotary embedding and the cache's update in one launch
    rope_attention_image: its [B, H * D] as an image of ``image`` tokens (``additive_ops``)
    step_attention: either (image=0: rows) by clusters, for GPUs and sizes that ``by_clusters`` says
    rope_store(q [B, T, H, D], key, value [B, T, Hkv, D]) -> q with the rotary embedding of a
    prompt; key (with it) and value become the first T positions of the cache

On CUDA they are Triton kernels (``triton_kernels/decode.py``), but ``rotated_norm`` is one of
``_cuda``; elsewhere plain torch. ``EAGER`` has those that are launched one by one, without a graph:
of ``_cuda`` where it is built, which costs the host less. Everything else is rounded where
transformers rounds it. Inference only: they have no gradients.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from ..backends import native  # noqa: F401 (``_cuda`` registers its operators before)
from ..formats.rotation import hadamard_transform
from ..ops.library import LIBRARY, OperandError, define
from ..ops.rotated import check_rotation

_SCHEMAS = (
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps) -> (Tensor, Tensor)",
    "add_rms_norm_fetch(Tensor x, Tensor delta, Tensor weight, float eps, Tensor keys,"
    " Tensor values, Tensor filled) -> (Tensor, Tensor)",
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    "embed_norm(Tensor tokens, Tensor table, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rotated_norm(Tensor x, Tensor delta, Tensor weight, float eps, Tensor su, Tensor h,"
    " int factor) -> (Tensor, Tensor)",
    "choose(Tensor scores, Tensor(a!) best, Tensor(b!) tokens, Tensor(c!) positions,"
    " Tensor(d!) lengths, Tensor(e!) counts) -> ()",
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor",
    "rope_attention(Tensor q, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor ids,"
    " Tensor filled, Tensor(a!) keys, Tensor(b!) values, Tensor mask, Tensor(c!) counts,"
    " float scale) -> Tensor",
    "rope_attention_image(Tensor q, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor ids,"
    " Tensor filled, Tensor(a!) keys, Tensor(b!) values, Tensor mask, Tensor(c!) counts,"
    " float scale, int image) -> Tensor",
    "step_attention(Tensor q, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor ids,"
    " Tensor filled, Tensor(a!) keys, Tensor(b!) values, Tensor mask, float scale, int image)"
    " -> Tensor",
    "rope_store(Tensor q, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor ids,"
    " Tensor(a!) keys, Tensor(b!) values) -> Tensor",
)

_LONGEST_OF_FEW, _MANY = 4096, 128
"""Positions of a cache up to which attention by clusters is faster than by chunks for any number of
sequences, and sequences times key/value heads from which on it is for any length. 32 and 8 heads of
128, H200, us a call by clusters and by chunks: one sequence of 256 2.6, 3.9, of 1024 4.3, 5.3, of
4096 13.2, 13.8; 16 of 256 6.5, 7.1, of 1024 23.2, 30.4, of 4096 67, 91."""

_EAGER = ("add_rms_norm", "swiglu", "embed_norm", "rope_store")
"""Operators with a second kernel, for launches that no graph holds."""

_SCHEMAS += tuple(f"eager_{s}" for s in _SCHEMAS if s.split("(")[0] in _EAGER)


def check_rows(x, *others) -> None:
    """Raise OperandError unless x is [M, N] and the others are [M, N] or [N] of its dtype."""
    if x.dim() != 2 or x.stride(1) != 1:
        raise OperandError(f"x is {list(x.shape)}, strides {x.stride()}: expected rows [M, N]")
    for other in others:
        if other.shape not in (x.shape, x.shape[1:]) or other.dtype != x.dtype:
            raise OperandError(
                f"{other.dtype} {list(other.shape)} beside {x.dtype} {list(x.shape)}"
            )


def check_tokens(tokens, table) -> None:
    """Raise OperandError unless tokens are int64 [M] and the table is [V, N]."""
    if tokens.dim() != 1 or tokens.dtype != torch.long or table.dim() != 2:
        raise OperandError(
            f"tokens {tokens.dtype} {list(tokens.shape)}, table {list(table.shape)}: expected int64"
            " [M] and [V, N]"
        )


def check_rotated(x, delta, weight, su, h, factor) -> None:
    """Raise OperandError unless (su, h, factor) rotate the rows of x [M, K], K/factor >= 128."""
    check_rows(x, delta, weight)
    K = x.shape[1]
    check_rotation(K, h, factor, 0, "K")
    if factor < 1 or K // factor < 128:
        raise OperandError(f"K={K}, factor={factor}: K/factor must be at least 128")
    if su.dtype != torch.float32 or list(su.shape) != [K]:
        raise OperandError(f"su is {su.dtype} {list(su.shape)}, expected float32 [{K}]")


def check_choice(scores, best, tokens, positions, lengths, counts) -> None:
    """Raise OperandError unless scores are [M, V] and the rest has what ``choose`` writes."""
    M = scores.shape[0]
    places = {"best": best, "tokens": tokens, "positions": positions, "counts": counts}
    for name, tensor in places.items():
        if tensor.numel() != M or not tensor.is_contiguous():
            raise OperandError(f"{name} is {list(tensor.shape)}, expected {M} contiguous numbers")
    if scores.dim() != 2 or scores.stride(1) != 1 or lengths.dim() != 1:
        raise OperandError(
            f"scores are {list(scores.shape)}, lengths {list(lengths.shape)}: expected rows [M, V]"
            " and [layers]"
        )


def check_attention(q, k, v, mask) -> None:
    """Raise OperandError unless q [B, H, D] attends to k and v [B, Hkv, L, D] through the mask."""
    B, H, D = q.shape
    expected = [B, k.shape[1], k.shape[2], D]
    if list(k.shape) != expected or list(v.shape) != expected or H % k.shape[1]:
        raise OperandError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected [B, H, D] and"
            " [B, Hkv, L, D] with H a multiple of Hkv"
        )
    if list(mask.shape) != [B, k.shape[2]] or mask.dtype != torch.bool:
        raise OperandError(f"mask is {mask.dtype} {list(mask.shape)}, expected bool [B, L]")
    if any(t.stride(-1) != 1 for t in (q, k, v, mask)):
        raise OperandError("the last dimension of q, k, v and mask must be contiguous")


def check_new(q, key, value, cos, sin, ids, filled, keys, mask, counts) -> None:
    """Raise OperandError unless a new key and value [B, Hkv, D] fit q and the cache."""
    B, heads, L, D = keys.shape
    shapes = {
        "key": (key, [B, heads, D]), "value": (value, [B, heads, D]), "cos": (cos, [L, D]),
        "sin": (sin, [L, D]), "ids": (ids, [B, 1]), "filled": (filled, [1]),
        "counts": (counts, [B * heads]),
    }  # fmt: skip
    for name, (tensor, shape) in shapes.items():
        if list(tensor.shape) != shape or tensor.stride(-1) != 1:
            raise OperandError(f"{name} is {list(tensor.shape)}, expected contiguous {shape}")


def check_image(M: int, K: int, tokens: int) -> None:
    """Raise OperandError unless [M, K] has an image that is ``tokens`` wide."""
    if tokens < max(M, 1) or K % 32:
        raise OperandError(f"image={tokens} is no image of {M} tokens of {K}")


def image_of(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """The image of x [M, K], ``tokens`` wide, with zeros past M."""
    M, K = x.shape
    padded = torch.cat([x, x.new_zeros((tokens - M, K))])
    return padded.view(tokens, K // 32, 4, 4, 2).permute(1, 3, 0, 2, 4).reshape(-1, 4, tokens, 8)


def check_fetch(keys, values, filled) -> None:
    """Raise OperandError unless every head's keys and values lie one after the other."""
    for name, tensor in {"keys": keys, "values": values}.items():
        if tensor.dim() != 4 or tensor.stride(3) != 1 or tensor.stride(2) != tensor.shape[3]:
            raise OperandError(
                f"{name} is {list(tensor.shape)}, strides {tensor.stride()}: expected"
                " [B, Hkv, L, D] with contiguous heads"
            )
    if values.shape != keys.shape or filled.dtype != torch.long or filled.numel() != 1:
        raise OperandError(
            f"values {list(values.shape)} beside keys {list(keys.shape)}, or filled"
            f" {filled.dtype} {list(filled.shape)} is not one int64"
        )


def check_prompt(q, key, value, cos, sin, ids, keys, values) -> None:
    """Raise OperandError unless a prompt's q, key and value [B, T, heads, D] fit the cache."""
    B, heads, L, D = keys.shape
    T, H = q.shape[1], q.shape[2]
    shapes = {
        "q": (q, [B, T, H, D]), "key": (key, [B, T, heads, D]), "value": (value, [B, T, heads, D]),
        "cos": (cos, [L, D]), "sin": (sin, [L, D]), "values": (values, [B, heads, L, D]),
        "keys": (keys, [B, heads, L, D]), "ids": (ids, [B, T]),
    }  # fmt: skip
    for name, (tensor, shape) in shapes.items():
        if list(tensor.shape) != shape or tensor.stride(-1) != 1:
            raise OperandError(
                f"{name} is {list(tensor.shape)}, expected {shape}, contiguous in the last"
            )
    if T > L or H % heads:
        raise OperandError(
            f"{T} tokens of {H} heads do not fit a cache of {L} positions and {heads} heads"
        )


def _norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rms_norm(x, weight, eps):
    check_rows(x, weight)
    return _norm(x, weight, eps)


def _add_rms_norm(x, delta, weight, eps):
    check_rows(x, delta, weight)
    total = x + delta
    return total, _norm(total, weight, eps)


def _add_rms_norm_fetch(x, delta, weight, eps, keys, values, filled):
    check_fetch(keys, values, filled)
    return add_rms_norm(x, delta, weight, eps)


def _swiglu(gate, up):
    check_rows(gate, up)
    return F.silu(gate) * up


def _embed_norm(tokens, table, weight, eps):
    check_tokens(tokens, table)
    x = table[tokens]
    return x, _rms_norm(x, weight, eps)


def _rotated_norm(x, delta, weight, eps, su, h, factor):
    check_rotated(x, delta, weight, su, h, factor)
    total = x + delta
    wide = total.float()
    y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)) * su
    matrix = h if factor > 1 else None
    return total, hadamard_transform(y, factor, 0, True, matrix).to(x.dtype)


def _choose(scores, best, tokens, positions, lengths, counts):
    check_choice(scores, best, tokens, positions, lengths, counts)
    best.copy_(scores.argmax(-1).view(best.shape))
    tokens.copy_(best.view(tokens.shape))
    positions.add_(1)
    lengths.add_(1)


def _decode_attention(q, k, v, mask, scale):
    check_attention(q[:, :, 0], k, v, mask)
    return _attend(q[:, :, 0], k, v, mask, scale)[:, None]


def _attend(q, k, v, mask, scale):
    B, H, D = q.shape
    # The query heads of a key/value head are the rows of one product: no repeated keys.
    rows = q.reshape(B, k.shape[1], -1, D)
    y = F.scaled_dot_product_attention(rows, k, v, mask[:, None, None, :], scale=scale)
    return y.reshape(B, H, D)


def _rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _rope_attention(q, key, value, cos, sin, ids, filled, keys, values, mask, counts, scale):
    check_attention(q, keys, values, mask)
    check_new(q, key, value, cos, sin, ids, filled, keys, mask, counts)
    cos, sin = cos[ids], sin[ids]  # [B, 1, D]
    keys.index_copy_(2, filled, _rotate(key, cos, sin)[:, :, None])
    values.index_copy_(2, filled, value[:, :, None])
    seen = mask & (torch.arange(mask.shape[1], device=mask.device) <= filled)
    return _attend(_rotate(q, cos, sin), keys, values, seen, scale)


def _rope_attention_image(q, key, value, cos, sin, ids, filled, keys, values, mask, counts, scale,
                          image):  # fmt: skip
    check_image(q.shape[0], q[0].numel(), image)
    y = rope_attention(q, key, value, cos, sin, ids, filled, keys, values, mask, counts, scale)
    return image_of(y.flatten(1), image)


def _step_attention(q, key, value, cos, sin, ids, filled, keys, values, mask, scale, image):
    counts = torch.zeros(q.shape[0] * keys.shape[1], dtype=torch.int32, device=q.device)
    given = q, key, value, cos, sin, ids, filled, keys, values, mask, counts, scale
    return _rope_attention_image(*given, image) if image else _rope_attention(*given)


def _rope_store(q, key, value, cos, sin, ids, keys, values):
    check_prompt(q, key, value, cos, sin, ids, keys, values)
    T = q.shape[1]
    cos, sin = cos[ids][:, :, None], sin[ids][:, :, None]  # [B, T, 1, D]
    keys[:, :, :T] = _rotate(key, cos, sin).transpose(1, 2)
    values[:, :, :T] = value.transpose(1, 2)
    return _rotate(q, cos, sin)


def _rms_norm_fake(x, weight, eps):
    check_rows(x, weight)
    return x.new_empty(x.shape)


def _add_rms_norm_fake(x, delta, weight, eps):
    check_rows(x, delta, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _add_rms_norm_fetch_fake(x, delta, weight, eps, keys, values, filled):
    check_fetch(keys, values, filled)
    return _add_rms_norm_fake(x, delta, weight, eps)


def _swiglu_fake(gate, up):
    check_rows(gate, up)
    return gate.new_empty(gate.shape)


def _embed_norm_fake(tokens, table, weight, eps):
    check_tokens(tokens, table)
    shape = tokens.shape[0], table.shape[1]
    return table.new_empty(shape), table.new_empty(shape)


def _rotated_norm_fake(x, delta, weight, eps, su, h, factor):
    check_rotated(x, delta, weight, su, h, factor)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _choose_fake(scores, best, tokens, positions, lengths, counts):
    check_choice(scores, best, tokens, positions, lengths, counts)


def _decode_attention_fake(q, k, v, mask, scale):
    check_attention(q[:, :, 0], k, v, mask)
    return q.new_empty((q.shape[0], 1, q.shape[1], q.shape[3]))


def _rope_attention_fake(q, key, value, cos, sin, ids, filled, keys, values, mask, counts, scale):
    check_attention(q, keys, values, mask)
    return q.new_empty(q.shape)


def _rope_attention_image_fake(q, key, value, cos, sin, ids, filled, keys, values, mask, counts,
                               scale, image):  # fmt: skip
    check_attention(q, keys, values, mask)
    check_new(q, key, value, cos, sin, ids, filled, keys, mask, counts)
    check_image(q.shape[0], q[0].numel(), image)
    return q.new_empty((q[0].numel() // 32, 4, image, 8))


def _step_attention_fake(q, key, value, cos, sin, ids, filled, keys, values, mask, scale, image):
    check_attention(q, keys, values, mask)
    return q.new_empty((q[0].numel() // 32, 4, image, 8) if image else q.shape)


def _rope_store_fake(q, key, value, cos, sin, ids, keys, values):
    check_prompt(q, key, value, cos, sin, ids, keys, values)
    return q.new_empty(q.shape)


define(
    _SCHEMAS,
    (_rms_norm_fake, _add_rms_norm_fake, _add_rms_norm_fetch_fake, _swiglu_fake, _embed_norm_fake,
     _rotated_norm_fake, _choose_fake, _decode_attention_fake, _rope_attention_fake,
     _rope_attention_image_fake, _step_attention_fake, _rope_store_fake,
     _add_rms_norm_fake, _swiglu_fake, _embed_norm_fake, _rope_store_fake),
    (_rms_norm, _add_rms_norm, _add_rms_norm_fetch, _swiglu, _embed_norm, _rotated_norm, _choose,
     _decode_attention, _rope_attention, _rope_attention_image, _step_attention, _rope_store,
     _add_rms_norm, _swiglu, _embed_norm, _rope_store),
)  # fmt: skip

_ops = torch.ops.aqlm_infer
rms_norm = _ops.rms_norm.default
add_rms_norm = _ops.add_rms_norm.default
add_rms_norm_fetch = _ops.add_rms_norm_fetch.default
swiglu = _ops.swiglu.default
embed_norm = _ops.embed_norm.default
rotated_norm = _ops.rotated_norm.default
choose = _ops.choose.default
decode_attention = _ops.decode_attention.default
rope_attention = _ops.rope_attention.default
rope_attention_image = _ops.rope_attention_image.default
rope_store = _ops.rope_store.default
EAGER = SimpleNamespace(**{name: getattr(_ops, f"eager_{name}").default for name in _EAGER})
"""The operators of ``_EAGER`` under their own names, for launches that no graph holds."""


def _kernels():
    from ..triton_kernels import decode  # Triton is imported when a CUDA tensor first comes

    return decode


def _cuda_rms_norm(x, weight, eps):
    check_rows(x, weight)
    return _kernels().add_rms_norm(x, None, weight, eps)[1]


def _cuda_add_rms_norm(x, delta, weight, eps):
    check_rows(x, delta, weight)
    return _kernels().add_rms_norm(x, delta, weight, eps)


def _cuda_add_rms_norm_fetch(x, delta, weight, eps, keys, values, filled):
    check_rows(x, delta, weight)
    check_fetch(keys, values, filled)
    return _kernels().add_rms_norm_fetch(x, delta, weight, eps, keys, values, filled)


def _cuda_swiglu(gate, up):
    check_rows(gate, up)
    return _kernels().swiglu(gate, up)


def _cuda_embed_norm(tokens, table, weight, eps):
    check_tokens(tokens, table)
    check_rows(table, weight)
    return _kernels().add_rms_norm(table, None, weight, eps, tokens)


def _cuda_choose(scores, best, tokens, positions, lengths, counts):
    check_choice(scores, best, tokens, positions, lengths, counts)
    _kernels().choose(scores, best, tokens, positions, lengths, counts)


def _cuda_decode_attention(q, k, v, mask, scale):
    check_attention(q[:, :, 0], k, v, mask)
    return _kernels().attention(q[:, :, 0], k, v, mask, scale)[:, None]


def _cuda_rope_attention(q, key, value, cos, sin, ids, filled, keys, values, mask, counts, scale):
    check_attention(q, keys, values, mask)
    check_new(q, key, value, cos, sin, ids, filled, keys, mask, counts)
    new = key, value, cos, sin, ids, filled
    if by_clusters(q, keys):
        return _ops.step_attention(q, *new, keys, values, mask, scale, 0)
    return _kernels().attention(q, keys, values, mask, scale, new, counts)


def _cuda_rope_attention_image(q, key, value, cos, sin, ids, filled, keys, values, mask, counts,
                               scale, image):  # fmt: skip
    check_attention(q, keys, values, mask)
    check_new(q, key, value, cos, sin, ids, filled, keys, mask, counts)
    check_image(q.shape[0], q[0].numel(), image)
    new = key, value, cos, sin, ids, filled
    if by_clusters(q, keys):
        return _ops.step_attention(q, *new, keys, values, mask, scale, image)
    return _kernels().attention(q, keys, values, mask, scale, new, counts, image=image)


@functools.cache
def _has_clusters(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9 and _in_module("step_attention")


def by_clusters(q: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether ``step_attention`` takes q [B, H, D] and the cache [B, Hkv, L, D], and is faster."""
    (B, H, D), (_, heads, L, _) = q.shape, keys.shape
    taken = D in (64, 128) and H // heads <= 8 and q.dtype != torch.float32
    return taken and (L <= _LONGEST_OF_FEW or B * heads >= _MANY) and _has_clusters(q.device)


def _cuda_rope_store(q, key, value, cos, sin, ids, keys, values):
    check_prompt(q, key, value, cos, sin, ids, keys, values)
    return _kernels().rope_store(q, key, value, cos, sin, ids, keys, values)


def _in_module(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aqlm_infer::{name}", "CUDA")


for _name, _function in {
    "rms_norm": _cuda_rms_norm,
    "add_rms_norm": _cuda_add_rms_norm,
    "add_rms_norm_fetch": _cuda_add_rms_norm_fetch,
    "swiglu": _cuda_swiglu,
    "embed_norm": _cuda_embed_norm,
    "rope_store": _cuda_rope_store,
    "choose": _cuda_choose,
    "decode_attention": _cuda_decode_attention,
    "rope_attention": _cuda_rope_attention,
    "rope_attention_image": _cuda_rope_attention_image,
}.items():
    LIBRARY.impl(_name, _function, "CUDA")
    if _name in _EAGER and not _in_module(f"eager_{_name}"):
        LIBRARY.impl(f"eager_{_name}", _function, "CUDA")
