"""Fields of packed words as numbers, without a conversion.

The bits of a field q go into the mantissa of 1.0, which makes 1 + q 2^-s: a mask-and-or a weight
and a shift for several of them, where a conversion of integers runs at a quarter of the rate. The
bits of 1.0 (``one``) are an argument of kernels: ptxas makes two instructions of a mask-and-or with
two immediate operands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ONE = {torch.float32: 0x3F800000, torch.float16: 0x3C003C00, torch.bfloat16: 0x3F803F80}
_MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 0}


def one_of(dtype: torch.dtype) -> int:
    """The bits of 1.0: of float32 once, of a 16-bit type in both halves of a word."""
    return _ONE[dtype]


def has_dp4a(x: torch.Tensor) -> bool:
    """Whether NVIDIA's dot product of four bytes may be used on x's device."""
    return x.is_cuda and torch.version.hip is None


def dot_precision(x: torch.Tensor) -> str:
    """How ``tl.dot`` multiplies float32 on the device of x.

    Three tf32 products keep its precision (codes are exact in one) and compile in a third of the
    time of the unrolled sums of "ieee" (scalar 3 bit, 64 tokens: 7.5 s instead of 27); other
    vendors' backends have "ieee" alone.
    """
    return "tf32x3" if x.is_cuda and torch.version.hip is None else "ieee"


def exact_type(dtype: torch.dtype, bits: int) -> bool:
    """Whether a tile of this dtype converts its codes: its mantissa does not hold a field.

    (Float32 would hold it, but not at every place of a word.)
    """
    return bits > _MANTISSA[dtype]


@triton.jit
def _moved(word, left: tl.constexpr):
    """The word shifted to the left, or to the right when ``left`` is negative."""
    if left > 0:
        return word << left
    elif left < 0:
        return word >> -left
    else:
        return word


@triton.jit
def _in_place(word, one, first: tl.constexpr, j: tl.constexpr, BITS: tl.constexpr,
              TOGETHER: tl.constexpr):  # fmt: skip
    """1 + q 2^-s as float32 of field j of the bits from ``first`` on; ``one`` is 0x3F800000.

    TOGETHER neighbouring fields share a shift, so that s is BITS (TOGETHER - j % TOGETHER): inputs
    are multiplied by 2^(s - BITS), see ``_unplaced``.
    """
    r: tl.constexpr = j % TOGETHER
    top: tl.constexpr = 23 - BITS * TOGETHER
    mask: tl.constexpr = ((1 << BITS) - 1) << (top + BITS * r)
    bits = _moved(word, top - first - BITS * (j - r)) & mask
    return (bits | one).to(tl.float32, bitcast=True)


@triton.jit
def _unplaced(j, BITS: tl.constexpr, TOGETHER: tl.constexpr):
    """2^(s - BITS) for fields j of ``_in_place``, float32: what inputs are multiplied by."""
    return ((j * 0 + 1) << (BITS * (TOGETHER - 1 - j % TOGETHER))).to(tl.float32)


@triton.jit
def _total(sums_ptr, count, BLOCK: tl.constexpr):
    """The sums of ``count`` pairs (x, scaled x) that a prepare kernel left, in order."""
    total_x = 0.0
    total_scaled = 0.0
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total_x += tl.sum(tl.load(sums_ptr + 2 * at, mask=at < count, other=0.0), 0)
        total_scaled += tl.sum(tl.load(sums_ptr + 2 * at + 1, mask=at < count, other=0.0), 0)
    return total_x, total_scaled


@triton.jit
def _row_sums(sums_ptr, m, stride, begin, end, BLOCK: tl.constexpr):
    """Sums over begin .. end - 1 of the rows m [R] of sums [.., stride], in order."""
    total = tl.zeros_like(m).to(tl.float32)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums = tl.load(sums_ptr + m[:, None] * stride + at[None, :], mask=(at < end)[None, :],
                       other=0.0)  # fmt: skip
        total += tl.sum(sums, 1)
    return total


@triton.jit
def _pair_bits(word, one, j, BITS: tl.constexpr, TYPE: tl.constexpr):
    """The bits of 1 + q/2^b in a 16-bit type of fields j of both halves of a word.

    A half has its field j at bit BITS j; ``word`` and ``j`` are broadcast together. ``one`` is the
    type's 1.0 in both halves.
    """
    top: tl.constexpr = (7 if tl.bfloat16 == TYPE else 10) - BITS
    left = BITS * (j + 1) + top <= 16  # otherwise the upper half's field would be shifted out
    bits = tl.where(left, word << top, word) >> (BITS * j - tl.where(left, 0, top))
    mask: tl.constexpr = (((1 << BITS) - 1) << top) * 0x10001
    return (bits & mask) | one


@triton.jit
def _pairs(word, one, j, BITS: tl.constexpr, TYPE: tl.constexpr):
    """1 + q/2^b in a 16-bit type of fields j of both halves of a word, last dimension 2."""
    bits = _pair_bits(word, one, j, BITS, TYPE)
    pair = tl.join(bits.to(tl.int16), (bits >> 16).to(tl.int16))
    return pair.to(TYPE, bitcast=True)


@triton.jit
def _code_pairs(word, j, BITS: tl.constexpr):
    """The codes of fields j of both halves of a word, int32, last dimension 2."""
    mask: tl.constexpr = (1 << BITS) - 1
    return tl.join((word >> (BITS * j)) & mask, (word >> (BITS * j + 16)) & mask)


@triton.jit
def _byte_fields(word, place, BITS: tl.constexpr, ASM: tl.constexpr):
    """The fields of BITS at bit ``place`` of each byte. ASM hides the mask from LLVM, which would
    not see bytes of one word in the topmost fields any more (``_bytes``)."""
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x01010101
    if BITS == 8:
        return word
    elif ASM:
        moved = word >> place
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,n", [moved, MASK], tl.int32, True, 1
        )
    else:
        return (word >> place) & MASK


@triton.jit
def _bytes(word):
    """The four bytes of each word as int8, two last dimensions of 2 (they stay one register)."""
    return tl.join(tl.join(word, word >> 16), tl.join(word >> 8, word >> 24)).to(tl.int8)


@triton.jit
def _dot4(bytes4, x4, total, ASM: tl.constexpr):
    """total + the sum of four products: unsigned bytes of bytes4 by signed bytes of x4, int32.

    ASM: NVIDIA's one instruction for it.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [bytes4, x4, total], tl.int32, True, 1
        )
    else:
        for b in tl.static_range(4):
            total += ((bytes4 >> (8 * b)) & 255) * ((x4 << (24 - 8 * b)) >> 24)
        return total


@triton.jit
def _sixteen_bits(x, unit):
    """x in units of ``unit``, rounded to 16 bits: (high, low) signed bytes, int32."""
    whole = tl.floor(x / unit + 0.5).to(tl.int32)
    low = ((whole + 128) & 255) - 128
    return (whole - low) >> 8, low


@triton.jit
def _unit(x_ptr, K, CHUNK: tl.constexpr):
    """max |x| / 32512, so that high bytes are at most 127; 1 for zeros."""
    largest = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, K, CHUNK):
        k = first + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    unit = tl.max(largest, 0) / 32512
    return tl.where(unit > 0, unit, 1.0)
