"""Inputs in the order in which MMAs of one warp take their first operand (NVIDIA's ``mma.sync``).

Less than 64 tokens as the first operand of ``tl.dot`` make Triton take MMAs of 16 tokens by 32
bytes of inputs. A lane g 4 + t of the warp holds four 32-bit words of such a tile: of tokens g and
g + 8, from two places in K. Inputs lie in memory as those words one after the other,

    int32 [pairs of tiles of K, tiles of 16 tokens, PARTS, j 2, g 8, t 4, low 2, half 2]

so that a lane reads 16 bytes that are its operand as they are: no shared memory, no barrier and no
move. Of token 16 tile + 8 half + g a word holds what is at [pair, low, t, j] of K as the MMA counts
it: neighbouring words j are of one lane, because Triton (3.6) gives a lane of the second operand
eight neighbouring bytes.
"""

import triton
import triton.language as tl

from .shared import _gather4, _gather4_some


@triton.jit
def _place(pair, low, t, j, token, part, TILES: tl.constexpr, PARTS: tl.constexpr):
    """The index of a word of ``part``; TILES is the number of tiles of 16 tokens."""
    tile = (pair * TILES + token // 16) * PARTS + part
    return ((tile * 2 + j) * 32 + token % 8 * 4 + t) * 4 + low * 2 + token // 8 % 2


@triton.jit
def _operand(x_ptr, pair, first, part: tl.constexpr, PAIRS: tl.constexpr, COUNT: tl.constexpr,
             TILES: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr, M=None):  # fmt: skip
    """Words of PAIRS pairs from ``pair`` on of COUNT tiles of tokens from ``first`` on.

    int32 [COUNT, half, g, PAIRS, low, t, j]: [16 COUNT, 8 PAIRS] of words, bytes or halves. Where
    there are M <= 8 tokens, lanes of others read nothing: of one token an eighth of a warp reads.
    """
    tile = tl.arange(0, COUNT)[:, None, None, None, None]
    pairs = tl.arange(0, PAIRS)[None, :, None, None, None]
    j = tl.arange(0, 2)[None, None, :, None, None]
    g = tl.arange(0, 8)[None, None, None, :, None]
    t = tl.arange(0, 4)[None, None, None, None, :]
    at = x_ptr + _place(pair + pairs, 0, t, j, (first + tile) * 16 + g, part, TILES, PARTS)
    if ASM and M is not None:
        w0, w1, w2, w3 = _gather4_some(at, g, M)
    elif ASM:
        w0, w1, w2, w3 = _gather4(at)
    else:
        w0, w1, w2, w3 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    return tl.permute(words, (0, 5, 3, 1, 6, 4, 2))
