"""Tables in shared memory that last for the whole kernel, in copies for the lanes of a warp.

Triton has no shared memory of the kernel's own: ``tl.gather`` copies its table at every call and
waits twice for all warps. PTX lets inline assembly declare some, whose addresses are integers.
With what Triton takes itself it must stay within 48 KB: beyond, launches fail ("invalid argument"),
because Triton asks for more only when its own share is larger.

All of it counts as pure: of a kernel that has assembly with side effects ``torch.compile`` takes
every argument for written, and copies the weights. What orders stores before loads is data: a store
has a result, and ``_ready`` adds those of all threads to the address that loads take.

Loads by inline assembly are elementwise, so unlike those of ``tl.load`` they run in whatever layout
the result is wanted, such as the operand of an MMA. NVIDIA alone.

Lanes that read different words of a bank wait for each other. So a table has copies, and a lane
reads copy ``lane % COPIES``. The copies of entry e of one table lie beside those of entry e of the
next one, in 128 bytes where all banks are: while some lanes read one table, the others read the
next, and then the other way round (``side``), so that no two share a bank.
"""

import triton
import triton.language as tl


@triton.jit
def _declare(BYTES: tl.constexpr):
    """The address of 16 or 32 KB of shared memory, int32. Once a kernel."""
    tl.static_assert(BYTES == 16384 or BYTES == 32768)
    if BYTES == 16384:
        return tl.inline_asm_elementwise(
            "{ .shared .align 16 .b8 t[16384]; mov.u32 $0, t; }", "=r", [], tl.int32, True, 1
        )
    else:
        return tl.inline_asm_elementwise(
            "{ .shared .align 16 .b8 t[32768]; mov.u32 $0, t; }", "=r", [], tl.int32, True, 1
        )


@triton.jit
def _load_byte(at):
    """The unsigned byte at each pointer, int32."""
    return tl.inline_asm_elementwise(
        "{ .reg .u16 b; ld.global.nc.u8 b, [$1]; cvt.u32.u16 $0, b; }", "=r,l", [at], tl.int32,
        True, 1,
    )  # fmt: skip


@triton.jit
def _load_half(at):
    """The unsigned 16 bits at each pointer, int32."""
    return tl.inline_asm_elementwise(
        "{ .reg .u16 b; ld.global.nc.u16 b, [$1]; cvt.u32.u16 $0, b; }", "=r,l", [at], tl.int32,
        True, 1,
    )  # fmt: skip


@triton.jit
def _store4(at, w0, w1, w2, w3):
    """Store four neighbouring words at each shared address; zeros."""
    return tl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;", "=r,r,r,r,r,r",
        [at, w0, w1, w2, w3], tl.int32, True, 1,
    )  # fmt: skip


@triton.jit
def _share(table_ptr, to, COPIES: tl.constexpr, STRIDE: tl.constexpr):
    """Copy a table of 256 words to the shared address ``to``, the copies of a word STRIDE bytes
    after those of the one before; COPIES is a multiple of 4. Zeros."""
    QUADS: tl.constexpr = COPIES // 4
    e = tl.arange(0, 256 * QUADS)
    word = tl.load(table_ptr + e // QUADS)
    return _store4(to + e // QUADS * STRIDE + e % QUADS * 16, word, word, word, word)


@triton.jit
def _share4(table_ptr, to, ENTRIES: tl.constexpr, COPIES: tl.constexpr, STRIDE: tl.constexpr):
    """Copy a table of entries of four words to the shared address ``to``, the copies of an entry
    STRIDE bytes after those of the one before. Zeros."""
    e = tl.arange(0, ENTRIES * COPIES)
    w0, w1, w2, w3 = _load4(table_ptr + e // COPIES * 8, False)
    return _store4(to + e // COPIES * STRIDE + e % COPIES * 16, w0, w1, w2, w3)


@triton.jit
def _ready(base, stored):
    """``base`` when all warps have stored what has the results ``stored``: their sum over several
    warps waits for all (Triton's way through shared memory)."""
    return base + tl.sum(stored, 0)


@triton.jit
def _load(at, SHARED: tl.constexpr):
    """A word from each shared address, or else from each pointer."""
    if SHARED:
        return tl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [at], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [at], tl.int32, True, 1
        )


@triton.jit
def _load4(at, SHARED: tl.constexpr):
    """Four neighbouring words from each shared address, or else from each pointer."""
    if SHARED:
        return tl.inline_asm_elementwise(
            "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [at],
            (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at],
            (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
        )  # fmt: skip


@triton.jit
def _load_once(at):
    """A word from each pointer that is read once: it takes no place in the L1 cache."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.L1::no_allocate.b32 $0, [$1];", "=r,l", [at], tl.int32, True, 1
    )


@triton.jit
def _load_once2(at):
    """Two neighbouring words from each pointer that are read once."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.L1::no_allocate.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [at],
        (tl.int32, tl.int32), True, 1,
    )  # fmt: skip


@triton.jit
def _load_once4(at):
    """Four neighbouring words from each pointer that are read once."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at],
        (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
    )  # fmt: skip


@triton.jit
def _gather4(at):
    """Four neighbouring words from each pointer into a table, which stays in the L1 cache."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.L1::evict_last.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at],
        (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
    )  # fmt: skip


@triton.jit
def _gather4_some(at, i, count):
    """``_gather4`` where i < count; elsewhere zeros, and nothing is read."""
    return tl.inline_asm_elementwise(
        """{ .reg .pred p; setp.lt.s32 p, $5, $6; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0;
        mov.b32 $3, 0; @p ld.global.nc.L1::evict_last.v4.b32 {$0, $1, $2, $3}, [$4]; }""",
        "=&r,=&r,=&r,=&r,l,r,r", [at, i, count], (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
    )  # fmt: skip


@triton.jit
def _load_number(at):
    """The 16 or 32-bit number at each pointer, float32."""
    TYPE: tl.constexpr = at.dtype.element_ty
    if TYPE.primitive_bitwidth == 16:
        return _load_half(at).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
    else:
        return _load(at, False).to(TYPE, bitcast=True).to(tl.float32)
