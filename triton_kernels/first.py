"""Products whose first operand is the weight, decoded in registers: MMAs of Hopper's warp groups.

64 rows and more as the first operand of ``tl.dot`` make Triton take MMAs of four warps (wgmma),
whose first operand may come from registers and whose second one, inputs, is in shared memory: it is
loaded there ahead (``num_stages``) and read once for 64 rows, where MMAs of one warp
(``operands``) have every warp read all inputs. A lane of a warp holds of 16 numbers of a row two
pairs, of 8 bytes in turn:

    K is counted as [.., half 2, t 4, pair 2], rows as [.., warp, half 2, g 8] of lane g 4 + t

so weights are decoded in pairs, and inputs lie in the order in which decoding leaves them. Loads by
inline assembly (``shared``) are made in that layout; those of ``tl.load`` would be moved.
"""

import triton
import triton.language as tl

SHARED = 48 << 10  # bytes that launches have without asking for more


def stages(wanted: int, stage: int, tables: int) -> int:
    """``wanted`` stages of inputs of ``stage`` bytes, or more, beside ``tables`` bytes that Triton
    does not know of (``shared``): both fit, or its own share is so large that it asks for more."""
    while tables and wanted * stage <= SHARED < wanted * stage + tables:
        wanted += 1
    return wanted


@triton.jit
def _input_of_word(k, STEP: tl.constexpr):
    """The input at place k of a step of vectors of 8: those of lane t are STEP / 4 neighbours, and
    pair j of each is at [vector, j, t, pair]."""
    inside = k % (8 * STEP)
    vector = inside % 8 // 2 * (STEP // 4) + inside // 32
    return k - inside + vector * 8 + inside % 32 // 8 * 2 + k % 2


@triton.jit
def _input_of_field(k, C: tl.constexpr):
    """The input at place k of C planes (``scalar``): word w of lane t has of each plane its inputs
    2 (4 t + w) and one more, at [w, plane, t, pair]."""
    inside = k % (32 * C)
    plane, word = inside // 8 % C, inside // (8 * C)
    return k - inside + plane * 32 + 2 * (inside % 8 // 2 * 4 + word) + k % 2


@triton.jit
def _spread(x_ptr, out_ptr, sums_ptr, M, K, x_stride, FIELDS: tl.constexpr, STEP: tl.constexpr,
            CHUNK: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """CHUNK inputs of all tokens in their order, [k, BLOCK_M]; past M and K zeros. sums[chunk, m]
    are their sums. FIELDS: STEP planes' order, else that of vectors of 8."""
    chunk = tl.program_id(0)
    k = chunk * CHUNK + tl.arange(0, CHUNK)
    token = tl.program_id(1) * 16 + tl.arange(0, 16)
    source = _input_of_field(k, STEP) if FIELDS else _input_of_word(k, STEP)
    ok = (source < K)[:, None] & (token < M)[None, :]
    x = tl.load(x_ptr + token[None, :] * x_stride + source[:, None], mask=ok, other=0.0)
    tl.store(out_ptr + k[:, None] * BLOCK_M + token[None, :], x)
    tl.store(sums_ptr + chunk * BLOCK_M + token, tl.sum(x.to(tl.float32), 0))


@triton.jit
def _inputs(x_ptr, begin, COUNT: tl.constexpr, BLOCK_M: tl.constexpr):
    """``_spread``'s numbers begin .. begin + COUNT - 1, [COUNT, BLOCK_M]."""
    k = begin + tl.arange(0, COUNT)[:, None]
    return tl.load(x_ptr + k * BLOCK_M + tl.arange(0, BLOCK_M)[None, :])


@triton.jit
def _settled(total, ASM: tl.constexpr):
    """The accumulators of a loop's ``tl.dot`` when its MMAs have ended: no instruction, but a use.

    Without one in the loop Triton 3.6 lets all but the first of a dot's MMAs run on into the next
    turn, which decodes into the registers that they still read: results were wrong (int2, 64
    tokens, 2e-2, others each time).
    """
    if ASM:
        return tl.inline_asm_elementwise("", "=f,0", [total], tl.float32, True, 1)
    else:
        return total


@triton.jit
def _sums_of(sums_ptr, begin, end, BLOCK_M: tl.constexpr, AT_ONCE: tl.constexpr):
    """Sums [BLOCK_M] over chunks begin .. end - 1, in order."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(begin, end, AT_ONCE):
        chunk = first + tl.arange(0, AT_ONCE)[:, None]
        at = sums_ptr + chunk * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        total += tl.sum(tl.load(at, mask=chunk < end, other=0.0), 0)
    return total


@triton.jit
def _store(partial_ptr, place, y, rows, M, N, BLOCK_M: tl.constexpr):
    """y [rows, BLOCK_M] to partial[place, m, n]."""
    tokens = tl.arange(0, BLOCK_M)
    at = partial_ptr + (place * M + tokens[:, None]) * N + rows[None, :]
    tl.store(at, tl.trans(y), mask=(rows < N)[None, :] & (tokens < M)[:, None])
