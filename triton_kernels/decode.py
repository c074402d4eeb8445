"""What a model runs between its matmuls, in Triton: attention over a cache, norms, SwiGLU.

All kernels are launched dependently on GPUs that can (sm_90): they start while the kernel before
them ends, load what it does not write, and wait before they read its results. Captured in a graph,
that hides most of the latency of a small kernel.

Attention is flash-decoding with a fixed split: the cache's positions are cut into chunks, a program
computes one chunk for all query heads of one key/value head, and the program that ends last adds
the chunks of its heads in order, so runs are bitwise equal.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_TILE = 64
_MAX_CHUNKS = 32
_SUMMED = 4096
"""Numbers of other programs that a program loads at once where it adds up chunks."""


@triton.jit
def _rotated(x_ptr, at, d, ok, cos, sin, D: tl.constexpr):
    """x cos + rotate_half(x) sin, in x's dtype, of the vectors that start at ``at``."""
    half: tl.constexpr = D // 2
    x = tl.load(x_ptr + at + d, mask=ok, other=0.0)
    other = tl.load(x_ptr + at + tl.where(d < half, d + half, d - half), mask=ok, other=0.0)
    return x * cos + tl.where(d < half, -other, other) * sin


@triton.jit
def _place(m, h, d, H, D: tl.constexpr, IMAGE: tl.constexpr):
    """Where number d of head h of sequence m lies among results [M, H, D]; IMAGE: in the image of
    [M, H * D] that is so many tokens wide."""
    k = h * D + d
    if IMAGE > 0:
        at = ((k // 32 * 4 + k % 8 // 2) * IMAGE + m) * 8 + k % 32 // 8 * 2 + k % 2
    else:
        at = m * (H * D) + k
    return at


@triton.jit
def _attend(q_ptr, new_k_ptr, new_v_ptr, cos_ptr, sin_ptr, ids_ptr, at_ptr, k_ptr, v_ptr, mask_ptr,
            partial_ptr, stats_ptr, count_ptr, out_ptr, scale, L, CHUNK,
            q_b, q_h, nk_b, nk_h, nv_b, nv_h, ids_b, k_b, k_h, k_l, v_b, v_h, v_l, mask_b,
            GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            TILE: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr, GP: tl.constexpr,
            SEGMENT: tl.constexpr, NEW: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
            IMAGE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One chunk of positions for the query heads of one key/value head.

    NEW: q and the new key still need their rotation, and key and value their place in the cache.
    EARLY: a chunk is one tile, which is loaded before the wait. IMAGE: as ``_place`` has it.
    """
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, d, cols = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, TILE)
    d_ok, row_ok = d < D, rows < GROUP
    q_ok = row_ok[:, None] & d_ok[None, :]
    begin = chunk * CHUNK
    k_base, v_base = k_ptr + batch * k_b + head * k_h, v_ptr + batch * v_b + head * v_h
    if PDL:
        gdc_launch_dependents()
    # The mask and what earlier steps cached were complete before this graph was launched.
    filled = tl.load(at_ptr).to(tl.int32) if NEW else L
    active = filled // CHUNK + 1 if NEW else CHUNKS  # chunks with any position: the others end here
    if chunk < active:
        end = tl.minimum(tl.minimum(begin + CHUNK, L), filled)
        if EARLY:
            at0 = begin + cols
            seen0 = tl.load(mask_ptr + batch * mask_b + at0, mask=at0 < end, other=0) != 0
            ok0 = (at0 < end)[:, None] & d_ok[None, :]
            k0 = tl.load(k_base + at0[:, None] * k_l + d[None, :], mask=ok0, other=0.0)
            v0 = tl.load(v_base + at0[:, None] * v_l + d[None, :], mask=ok0, other=0.0)
        if NEW:
            place = tl.load(ids_ptr + batch * ids_b)
            cos = tl.load(cos_ptr + place * D + d, mask=d_ok, other=0.0)
            sin = tl.load(sin_ptr + place * D + d, mask=d_ok, other=0.0)
        if PDL:
            gdc_wait()
        q_at = batch * q_b + (head * GROUP + rows)[:, None] * q_h
        if NEW:
            q = _rotated(q_ptr, q_at, d[None, :], q_ok, cos[None, :], sin[None, :], D)
        else:
            q = tl.load(q_ptr + q_at + d[None, :], mask=q_ok, other=0.0)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, DP), tl.float32)
        if NEW:  # noqa: SIM102 (known at compile time)
            if chunk == active - 1:
                k = _rotated(new_k_ptr, batch * nk_b + head * nk_h, d, d_ok, cos, sin, D)
                v = tl.load(new_v_ptr + batch * nv_b + head * nv_h + d, mask=d_ok, other=0.0)
                tl.store(k_base + filled * k_l + d, k, d_ok)
                tl.store(v_base + filled * v_l + d, v, d_ok)
                top = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
                total = tl.full((ROWS,), 1.0, tl.float32)
                acc += v.to(tl.float32)[None, :]
        for first in range(begin, end, TILE):
            # Loads depend on the position alone, not on the mask, so that they can be pipelined.
            if EARLY:
                seen, k, v = seen0, k0, v0
            else:
                at = first + cols
                seen = tl.load(mask_ptr + batch * mask_b + at, mask=at < end, other=0) != 0
                ok = (at < end)[:, None] & d_ok[None, :]
                k = tl.load(k_base + at[:, None] * k_l + d[None, :], mask=ok, other=0.0)
                v = tl.load(v_base + at[:, None] * v_l + d[None, :], mask=ok, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new_top > float("-inf"), new_top, 0.0)
            shrink = tl.exp(top - base)
            weights = tl.exp(scores - base[:, None])
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None]
            acc += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            top = new_top
        heads = tl.num_programs(1) * GROUP
        row = batch * heads + head * GROUP + rows
        out_at = _place(batch, (head * GROUP + rows)[:, None], d[None, :], heads, D, IMAGE)
        if active == 1:
            y = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), q_ok)
        else:
            slot = row * CHUNKS + chunk
            tl.store(partial_ptr + slot[:, None] * D + d[None, :], acc, q_ok)
            tl.store(stats_ptr + slot * 2, top, row_ok)
            tl.store(stats_ptr + slot * 2 + 1, total, row_ok)
            tl.debug_barrier()
            count_at = count_ptr + batch * tl.num_programs(1) + head
            if tl.atomic_add(count_at, 1, sem="acq_rel") == active - 1:
                tl.store(count_at, 0)
                # Past L1, which other programs' results have never been in.
                g, slots, s = tl.arange(0, GP), tl.arange(0, SLOTS), tl.arange(0, SEGMENT)
                g_ok, first_row = g < GROUP, batch * heads + head * GROUP
                every = tl.load(stats_ptr + ((first_row + g)[:, None] * CHUNKS + slots) * 2,
                                mask=g_ok[:, None] & (slots < active)[None, :],
                                other=float("-inf"), cache_modifier=".cg")  # fmt: skip
                highest = tl.max(every, 1)
                highest = tl.where(highest > float("-inf"), highest, 0.0)
                under = tl.zeros((GP,), tl.float32)
                whole = tl.zeros((GP, DP), tl.float32)
                for first in range(0, active, SEGMENT):
                    one = (first_row + g)[:, None] * CHUNKS + (first + s)[None, :]
                    ok = g_ok[:, None] & (first + s < active)[None, :]
                    tops = tl.load(stats_ptr + one * 2, mask=ok, other=float("-inf"),
                                   cache_modifier=".cg")  # fmt: skip
                    sums = tl.load(stats_ptr + one * 2 + 1, mask=ok, other=0.0,
                                   cache_modifier=".cg")  # fmt: skip
                    part = tl.load(partial_ptr + one[:, :, None] * D + d[None, None, :],
                                   mask=ok[:, :, None] & d_ok[None, None, :], other=0.0,
                                   cache_modifier=".cg")  # fmt: skip
                    weight = tl.exp(tops - highest[:, None])
                    under += tl.sum(weight * sums, 1)
                    whole += tl.sum(weight[:, :, None] * part, 1)
                whole = whole / tl.where(under > 0, under, 1.0)[:, None]
                whole_at = _place(batch, (head * GROUP + g)[:, None], d[None, :], heads, D, IMAGE)
                whole_ok = g_ok[:, None] & d_ok[None, :]
                tl.store(out_ptr + whole_at, whole.to(out_ptr.dtype.element_ty), whole_ok)


@triton.jit
def _rope_store(q_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, ids_ptr, out_ptr, keys_ptr, values_ptr,
                T, q_b, q_t, q_h, nk_b, nk_t, nk_h, nv_b, nv_t, nv_h, ids_b, ids_t, k_b, k_h, k_l,
                v_b, v_h, v_l, H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                HP: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    """All heads of one token of a prompt: q rotated, key rotated and value into the cache."""
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h, g, d = tl.arange(0, HP)[:, None], tl.arange(0, KP)[:, None], tl.arange(0, DP)
    d_ok = d < D
    q_ok, k_ok, d = (h < H) & d_ok[None, :], (g < HEADS) & d_ok[None, :], d[None, :]
    if PDL:
        gdc_launch_dependents()
    place = tl.load(ids_ptr + b * ids_b + t * ids_t) * D
    cos = tl.load(cos_ptr + place + d, mask=d_ok[None, :], other=0.0)
    sin = tl.load(sin_ptr + place + d, mask=d_ok[None, :], other=0.0)
    if PDL:
        gdc_wait()
    q = _rotated(q_ptr + b * q_b + t * q_t, h * q_h, d, q_ok, cos, sin, D)
    tl.store(out_ptr + ((b * T + t) * H + h) * D + d, q, q_ok)
    k = _rotated(key_ptr + b * nk_b + t * nk_t, g * nk_h, d, k_ok, cos, sin, D)
    tl.store(keys_ptr + b * k_b + g * k_h + t * k_l + d, k, k_ok)
    v = tl.load(value_ptr + b * nv_b + t * nv_t + g * nv_h + d, mask=k_ok, other=0.0)
    tl.store(values_ptr + b * v_b + g * v_h + t * v_l + d, v, k_ok)


@triton.jit
def _add_rms_norm(x_ptr, delta_ptr, token_ptr, weight_ptr, sum_ptr, y_ptr, eps, N, x_m, delta_m,
                  BLOCK: tl.constexpr, ADD: tl.constexpr, EMBED: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """sum = x + delta, y = weight * (sum / rms(sum)), rounded as transformers does; one token.

    EMBED: x is a table, sum the row of the token's number.
    """
    m, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    ok = n < N
    if PDL:
        gdc_launch_dependents()
    weight = tl.load(weight_ptr + n, mask=ok, other=0.0)
    if PDL:
        gdc_wait()
    row = tl.load(token_ptr + m) if EMBED else m
    x = tl.load(x_ptr + row * x_m + n, mask=ok, other=0.0)
    if ADD:
        x = x + tl.load(delta_ptr + m * delta_m + n, mask=ok, other=0.0)
    if ADD or EMBED:
        tl.store(sum_ptr + m * N + n, x, ok)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / N + eps)
    tl.store(y_ptr + m * N + n, weight * (wide * scale).to(x.dtype), ok)


@triton.jit
def _fetch(base_ptr, count, LINE: tl.constexpr, STEP: tl.constexpr):
    """Ask for ``count`` numbers from ``base_ptr`` on, LINE of them in 128 bytes, to be in L2."""
    for first in range(0, count, LINE * STEP):
        at = first + tl.arange(0, STEP) * LINE
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.u32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;}",
            "=r,l,r", [base_ptr + at, (at < count).to(tl.int32)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
def _add_rms_norm_fetch(x_ptr, delta_ptr, weight_ptr, sum_ptr, y_ptr, keys_ptr, values_ptr, at_ptr,
                        eps, N, M, x_m, delta_m, k_b, k_h, v_b, v_h, HEADS, D, LINE: tl.constexpr,
                        BLOCK: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The norm of M programs; the others fetch what is filled of one head's keys and values."""
    program = tl.program_id(0)
    if program < M:
        _add_rms_norm(x_ptr, delta_ptr, x_ptr, weight_ptr, sum_ptr, y_ptr, eps, N, x_m, delta_m,
                      BLOCK, True, False, PDL)  # fmt: skip
    else:
        if PDL:
            gdc_launch_dependents()
        b, h = ((program - M) // HEADS).to(tl.int64), (program - M) % HEADS
        count = tl.load(at_ptr).to(tl.int32) * D
        _fetch(keys_ptr + b * k_b + h * k_h, count, LINE, STEP)
        _fetch(values_ptr + b * v_b + h * v_h, count, LINE, STEP)


@triton.jit
def _swiglu(gate_ptr, up_ptr, y_ptr, N, gate_m, up_m, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y = silu(gate) * up, each rounded to the dtype: BLOCK columns of one row."""
    columns = tl.cdiv(N, BLOCK)
    m = (tl.program_id(0) // columns).to(tl.int64)  # 64 long prompts have 2^31 gates and more
    n = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    ok = n < N
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_ptr + m * gate_m + n, mask=ok, other=0.0)
    up = tl.load(up_ptr + m * up_m + n, mask=ok, other=0.0)
    wide = gate.to(tl.float32)
    tl.store(y_ptr + m * N + n, (wide / (1 + tl.exp(-wide))).to(gate.dtype) * up, ok)


@triton.jit
def _choose(scores_ptr, tops_ptr, places_ptr, count_ptr, best_ptr, tokens_ptr, positions_ptr,
            lengths_ptr, V, EACH, scores_m, LAYERS, BLOCK: tl.constexpr, PARTS: tl.constexpr,
            LAYER_BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The place of a row's largest score, the first of equals (NaN is the largest): next token.

    The program that ends last takes the best of all parts, and counts on positions and lengths.
    """
    part, m = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    top = tl.full((), float("-inf"), tl.float32)
    place = tl.full((), 0, tl.int32) + part * EACH
    end = tl.minimum((part + 1) * EACH, V)
    for first in range(part * EACH, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(scores_ptr + m * scores_m + at, mask=at < end, other=float("-inf"))
        x = x.to(tl.float32)
        x = tl.where(x == x, x, float("inf"))
        high = tl.max(x, 0)
        here = tl.min(tl.where((x == high) & (at < end), at, V), 0)
        place = tl.where(high > top, here, place)
        top = tl.maximum(high, top)
    tl.store(tops_ptr + m * PARTS + part, top)
    tl.store(places_ptr + m * PARTS + part, place)
    tl.debug_barrier()
    if tl.atomic_add(count_ptr + m, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(count_ptr + m, 0)
        parts = tl.arange(0, PARTS)
        ok = parts < tl.num_programs(0)
        tops = tl.load(tops_ptr + m * PARTS + parts, mask=ok, other=float("-inf"),
                       cache_modifier=".cg")  # fmt: skip
        places = tl.load(places_ptr + m * PARTS + parts, mask=ok, other=V,
                         cache_modifier=".cg")  # fmt: skip
        best = tl.min(tl.where(ok & (tops == tl.max(tops, 0)), places, V), 0).to(tl.int64)
        tl.store(best_ptr + m, best)
        tl.store(tokens_ptr + m, best)
        tl.store(positions_ptr + m, tl.load(positions_ptr + m) + 1)
        if m == 0:
            layers = tl.arange(0, LAYER_BLOCK)
            lengths = tl.load(lengths_ptr + layers, mask=layers < LAYERS, other=0)
            tl.store(lengths_ptr + layers, lengths + 1, layers < LAYERS)


@functools.cache
def launch_options(device: torch.device) -> dict[str, object]:
    """Launch options: dependent launch where the GPU has it."""
    pdl = torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}


def chunking(length: int) -> tuple[int, int]:
    """(positions a chunk, chunks) for a cache of ``length``."""
    size = triton.cdiv(triton.cdiv(length, _MAX_CHUNKS), _TILE) * _TILE
    return size, triton.cdiv(length, size)


def attention(
    q, k, v, mask, scale: float, new=None, counts=None, chunk: int | None = None, image: int = 0
) -> torch.Tensor:
    """q [B, H, D], k and v [B, Hkv, L, D], mask bool [B, L] -> [B, H, D] in q's dtype.

    ``new``: (key, value [B, Hkv, D], cos, sin [L, D], ids [B, 1], filled [1]): q and key are
    rotated to position ids, key and value are stored at position ``filled``, and only positions up
    to it are seen. ``counts``: int32 zeros [B * Hkv], left as zeros. ``chunk`` forces a size.
    ``image``: the result is the image of [B, H * D] that is so many tokens wide
    (``aqlm_infer/generation/additive_ops.py``).
    """
    B, H, D = q.shape
    kv_heads, L = k.shape[1], k.shape[2]
    size, chunks = chunking(L) if chunk is None else (chunk, triton.cdiv(L, chunk))
    group, tile = H // kv_heads, min(size, _TILE)
    padded, slots, width = map(triton.next_power_of_2, (group, chunks, D))
    segment = min(slots, max(1, _SUMMED // (padded * width)))
    floats = torch.empty(B * H * chunks * (D + 2), dtype=torch.float32, device=q.device)
    partial, stats = floats[: B * H * chunks * D], floats[B * H * chunks * D :]
    if counts is None:
        counts = torch.zeros(B * kv_heads, dtype=torch.int32, device=q.device)
    shape = (H * D // 32, 4, image, 8) if image else (B, H, D)
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    key, value, cos, sin, ids, filled = new or (k, v, q, q, mask, mask)
    _attend[(chunks, kv_heads, B)](
        q, key, value, cos, sin, ids, filled, k, v, mask, partial, stats, counts, out, scale, L,
        size, q.stride(0), q.stride(1), key.stride(0), key.stride(1), value.stride(0),
        value.stride(1), ids.stride(0), k.stride(0), k.stride(1), k.stride(2), v.stride(0),
        v.stride(1), v.stride(2), mask.stride(0), GROUP=group,
        ROWS=max(16, padded), D=D, DP=width, TILE=tile, CHUNKS=chunks,
        SLOTS=slots, GP=padded, SEGMENT=segment, NEW=new is not None,
        EARLY=size == tile and new is not None, num_warps=4,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", IMAGE=image,
        **launch_options(q.device),
    )  # fmt: skip
    return out


def rope_store(q, key, value, cos, sin, ids, keys, values) -> torch.Tensor:
    """q [B, T, H, D], key and value [B, T, Hkv, D], cos and sin [L, D], ids [B, T] -> q rotated.

    Rotated keys and the values become the first T positions of keys and values [B, Hkv, L, D].
    """
    B, T, H, D = q.shape
    heads = keys.shape[1]
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    padded, few, width = map(triton.next_power_of_2, (H, heads, D))
    _rope_store[(T, B)](
        q, key, value, cos, sin, ids, out, keys, values, T, *q.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], *ids.stride(), *keys.stride()[:3], *values.stride()[:3], H=H,
        HEADS=heads, D=D, HP=padded, KP=few, DP=width, num_warps=4, **launch_options(q.device),
    )  # fmt: skip
    return out


def add_rms_norm(x, delta, weight, eps: float, tokens=None) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta [M, N] (or None for x alone), weight [N] -> (x + delta, its norm), both [M, N].

    With tokens, int64 [M], x is a table [V, N], and its rows of these numbers take x's place.
    """
    M, N = (x.shape[0] if tokens is None else tokens.shape[0]), x.shape[1]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    total = x if delta is None and tokens is None else torch.empty_like(y)
    other = x if delta is None else delta
    block = triton.next_power_of_2(N)
    _add_rms_norm[(M,)](
        x, other, x if tokens is None else tokens, weight, total, y, eps, N, x.stride(0),
        other.stride(0), BLOCK=block, ADD=delta is not None, EMBED=tokens is not None,
        num_warps=max(1, min(16, block // 256)), **launch_options(x.device),
    )  # fmt: skip
    return total, y


def add_rms_norm_fetch(x, delta, weight, eps: float, keys, values, filled):
    """``add_rms_norm``; keys, values [B, Hkv, L, D] up to position filled [1] are on their way to
    L2 after it."""
    (M, N), (B, heads, _, D) = x.shape, keys.shape
    y, total = (torch.empty((M, N), dtype=x.dtype, device=x.device) for _ in range(2))
    block = triton.next_power_of_2(N)
    warps = max(1, min(16, block // 256))
    _add_rms_norm_fetch[(M + B * heads,)](
        x, delta, weight, total, y, keys, values, filled, eps, N, M, x.stride(0), delta.stride(0),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), heads, D,
        LINE=128 // keys.element_size(), BLOCK=block, STEP=32 * warps, num_warps=warps,
        **launch_options(x.device),
    )  # fmt: skip
    return total, y


def swiglu(gate, up) -> torch.Tensor:
    """gate, up [M, N] with any row stride -> silu(gate) * up [M, N]."""
    M, N = gate.shape
    y = torch.empty((M, N), dtype=gate.dtype, device=gate.device)
    # 512 is fastest for one token, 1024 for a prompt (2048 x 14336: 42 us against 70).
    block, warps = (512, 2) if M <= 64 else (1024, 4)
    _swiglu[(triton.cdiv(N, block) * M,)](
        gate, up, y, N, gate.stride(0), up.stride(0), BLOCK=block, num_warps=warps,
        **launch_options(gate.device),
    )  # fmt: skip
    return y


def choose(scores, best, tokens, positions, lengths, counts) -> None:
    """best, tokens [M] = argmax of scores [M, V]; positions [M] and lengths [layers] += 1.

    counts: int32 zeros [M], left as zeros. All others but the scores are int64 and contiguous.
    """
    M, V = scores.shape
    parts = min(128, triton.cdiv(V, 1024))
    each = triton.cdiv(V, parts)
    slots = triton.next_power_of_2(parts)
    tops = torch.empty(M * slots, dtype=torch.float32, device=scores.device)
    places = torch.empty(M * slots, dtype=torch.int32, device=scores.device)
    _choose[(parts, M)](
        scores, tops, places, counts, best, tokens, positions, lengths, V, each, scores.stride(0),
        lengths.shape[0], BLOCK=min(1024, triton.next_power_of_2(each)), PARTS=slots,
        LAYER_BLOCK=triton.next_power_of_2(lengths.shape[0]), num_warps=4,
        **launch_options(scores.device),
    )  # fmt: skip
