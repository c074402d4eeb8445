// Which body runs for a problem and how its grid is cut. All numbers are from measurements on one
// H200 (docs/notes/cuda.md); nothing is tuned at run time.
#pragma once

#include <algorithm>

#include "launch.h"

namespace aqlm::tune {

// Shape of the MMA body: registers and shared memory decide (0 spills).
AQLM_HD constexpr int mma_warps(int codebooks) { return codebooks == 4 ? 16 : 8; }
AQLM_HD constexpr int mma_ctas_per_sm(int codebooks, int tiles) {
  return codebooks == 4 || tiles > 2 ? 1 : tiles == 1 && codebooks == 2 ? 3 : 2;
}
// Units in flight per warp; with three CTAs per SM shared memory leaves room for two.
AQLM_HD constexpr int mma_depth(int codebooks, int tiles) {
  return mma_ctas_per_sm(codebooks, tiles) == 3 ? 2 : 4;
}
AQLM_HD constexpr int mma_smem(int codebooks, int tiles) {
  return codebooks * (32 << 10) + mma_warps(codebooks) * mma_depth(codebooks, tiles) * kUnitBytes;
}

// Variants of the table body: 1, 2, 4 = 8 warps x so many row blocks; 8 = 16 warps x 4 and
// 16 = 32 warps x 2 row blocks, both with two stages of tables.
constexpr int lut_group_rows(int variant) { return std::min(variant, 8) * 8 * kBlockRows; }

// Long vectors (G > 8) make the construction longer: 32 warps share it. 44 us against 63 at
// 28672 x 8192, 8x8 g32.
constexpr int kLutLongVectors = 16;

// The table body costs the same again for every token; up to these it beats the other bodies.
constexpr int kLutTokens = 1;       // against cuda.additive.mma
constexpr int kLutTokensOther = 8;  // against dequantize + GEMM (8x8 g32: 344 us against 472)

// Above 64 tokens the MMA body runs in passes of 64 while that beats dequantize + GEMM.
constexpr int kMmaTokens = 128;

// Hopper, one or two codebooks, exact: mma.sync with codes and activations from shared memory, from
// ring_first to kRingTokens tokens. In brackets mma.sync with activations from L1, from 9 tokens on
// warpgroup MMAs; M = 2, 4, 8, 16. 2x8 28672 x 8192: 46.8 (48.6), 47.0 (50.8), 47.2 (55.5), 47.7 us
// (60.9); 14336 x 4096: 16.3 (15.6), 16.4 (17.5), 16.6 (19.8), 17.1 (21.9); 4096 x 4096: 7.8 (6.8),
// 8.1 (8.6), 8.4 (8.1), 9.4 (11.2). 1x8 28672 x 8192: 33.1 (26.9), 33.4 (27.3), 33.8 (28.7), 34.6
// (41.8).
constexpr int kRingTokens = 16;
inline int ring_first(int codebooks, long long cells) {
  return codebooks == 1 || cells < 10000 ? 9 : cells < 50000 ? 4 : 2;
}

// Hopper: warpgroup MMAs decode weights once for up to 128 tokens. From kWgmmaFirst on they beat
// mma.sync (2x8, 28672 x 8192: M = 8 58 us both, M = 9 58 against 63, int8 111, M = 64 85 against
// 129); up to wgmma_tokens they beat dequantize + GEMM (2x8, M = 512: 541 against 556).
constexpr int kWgmmaFirst = 9;
inline int wgmma_tokens(int codebooks, long long cells) {
  if (cells < 10000) return 32;  // 4096 x 4096, M = 64: 27 us of mostly partial sums against 21
  const bool large = cells >= 50000;  // 2x8 14336 x 4096, M = 512: 147 us against 124
  return codebooks == 1 ? (large ? 2048 : 512) : codebooks == 2 ? (large ? 512 : 256) : 256;
}
// In int8 from and up to these (2x8, 28672 x 8192, M = 4 / 8 / 16 / 32: 36.2 / 36.5 / 41.6 / 57.0
// us, mma.sync 35.7 / 45.2 / - / -, exact - / 47.2 / 47.7 / 63.4; with 32 columns for 16 at M = 8
// 40.9).
constexpr int kWgmmaInt8First = 5;
constexpr int kWgmmaInt8Tokens = 32;

// 256 tokens a pass, B <= 2. 28672 x 8192, us, in brackets without: 2x8 M = 256 191 (268), 512 389
// (503), 2048 1538 (1616); 1x8 196 (219), 381 (426), 1516 (1475); 14336 x 4096, 2x8: 66 (80), 112
// (124); 4096 x 4096 is slower. Whole waves of items are never cut along K (2x8 M = 2048: 1783 us
// cut). Below kLongFirst passes of 128 and 32 are faster.
constexpr int kLongGroupRows = 128;
constexpr int kLongFirst = 176;
inline int long_tokens(int codebooks, long long cells) {
  return cells < 20000 ? 0 : cells < 50000 ? 512 : codebooks == 1 ? 768 : 2048;
}
// 8x8 g32 on Hopper: passes of up to 128 tokens. 28672 x 8192: 178 .. 185 us up to 32 tokens, 220 up
// to 64; tables 44 us a token, dequantize + GEMM 492 us at M = 128, two passes of 64 440. 4096 x
// 4096: 21 us against 20 a token.
inline int wide_first(long long cells) { return cells < 50000 ? 3 : 5; }
inline int wide_tokens(long long cells) { return cells < 50000 ? 64 : 128; }
AQLM_HD constexpr int wide_group_rows(int tokens) { return tokens > 64 ? 256 : 512; }

// Waves of items from which on whole waves are not cut along K: then direct stores pay for the
// uneven end (1x8 28672 x 8192: M = 1024 769 us against 868, M = 512 440 against 403).
constexpr int kWholeWaves = 6;

// Rows that a CTA of the warpgroup body covers: 128 tokens leave registers for half of them.
AQLM_HD constexpr int wgmma_group_rows(int tokens) { return tokens > 64 ? 256 : 512; }

// The split body runs in passes of 8 .. 32 tokens up to these.
constexpr int kSplitTokens = 64;
constexpr int kSplitRows = 512;  // all warps on rows: fewest partial sums

// Two copies of its table where shared memory has room for them.
AQLM_HD constexpr bool split_two_copies(int arch) { return arch >= 90 && arch < 120; }
AQLM_HD constexpr int split_table_bytes(int arch, int entries) {
  const int second = entries < kSecondEntries ? entries : kSecondEntries;
  return split_two_copies(arch) ? kSecondAt + 2 * second : 2 * entries;
}
// One token's activations are rounded in the body itself where they fit: bytes of a unit of K.
AQLM_HD constexpr int split_x_unit(bool int8) { return int8 ? 64 : 32; }
constexpr int kSplitStatic = 1024;  // bytes of its shared memory in front of the aligned table

// Hopper, word storage: from so many tokens on activations lie in shared memory, 64 a pass (28672 x
// 8192, M = 9 / 16: int8 71 / 73 us, exact 132 / 139; at 8 the other body takes 70 and 120, at 16 91
// and 144), up to those where dequantize + GEMM wins (465 us at M = 128 exact).
constexpr int kSplitWgmmaFirst = 9;
inline int split_wgmma_tokens(bool int8) { return int8 ? 256 : 64; }
constexpr int kSplitWgmmaRows = 256;  // 16 warps: 128 registers hold 128 columns of sums
constexpr int kSplitWgmmaCell = 8;    // units of K that are not cut: codes in flight

constexpr int kLutMaxX = 24 << 10;  // staged activations of one K range, bytes

struct LutRow {
  long long min_cells;  // 512-byte code units of the matrix
  int variant;
  int ctas_per_sm;
  const char* why;
};
constexpr LutRow kLut[] = {
    {50000, 8, 1, "large: 4096 rows share a table, two stages hide its construction"},
    {20000, 4, 2, "medium: 2048 rows share a table, a second CTA hides its construction"},
    {0, 2, 2, "small: more rows per table would leave too few units of K per CTA"},
};

// Hopper, G = 8, B in {1, 2, 4}: one copy of each table. A variant is the CTAs of an SM: 1 or 2.
// Also timed, and slower nearly everywhere: 16 warps of 1024 rows with five stages (2x8, M = 1:
// 7.3, 11.3, 11.1, 27.0 us for the shapes of issue 3, against 4.9, 10.8, 10.6, 24.2), prefetches to
// L2 four steps ahead (4.8, 11.0, 11.0, 28.1).
constexpr int kColumnsArch = 90;
constexpr int kColumnRows = 512;
inline int columns_variant(long long cells) {
  // One CTA an SM, two: 2x8 4096 x 4096 4.9 us, 5.9; 14336 x 4096 10.8, 10.8; 28672 x 8192 30.4,
  // 24.2; 1x8 14336 x 4096 7.3, 8.2; 28672 x 8192 17.3, 16.3.
  return cells < 20000 ? 1 : 2;
}

// owned_int8.cuh. `blocks` blocks share the pieces of so many rows of all parts.
constexpr int kOwnedTokens = 4;
constexpr int kOwnedColumns = 16384;  // of x, that its warps can hold
constexpr int kOwnedWarps = 16;
constexpr int kOwnedDepth = 4;
constexpr int kOwnedTable = 256 * 256;
constexpr int kOwnedMaxSmem = 227 << 10;  // of Hopper
AQLM_HD int owned_pieces(const Additive& a, int part, int rows) {
  return ceil_div(a.rows_of(part), rows);
}
AQLM_HD int owned_blocks(const Additive& a, int part, int rows, int blocks) {
  const int pieces = owned_pieces(a, part, rows);
  int all = 0;
  for (int i = 0; i < a.parts; ++i) all += owned_pieces(a, i, rows);
  const int share = all > 0 ? pieces * blocks / all : 0;
  return share > pieces ? pieces : share > 0 || pieces == 0 ? share : 1;
}
inline int owned_smem(int pairs, int tokens, int rows) {
  return kOwnedTable + pairs * tokens * 128 + (tokens * kOwnedWarps + 2) * rows * 4;
}
// Rows of a piece: where blocks have several, a whole 64-row block is loaded once and not twice (2x8
// 14336 x 4096, M = 1 / 2: 9.5 us / 10.1, halves 9.9 / 10.4; M = 3: 12.9, halves 11.4).
inline int owned_piece(const Additive& a, int tokens, int sms) {
  return tokens <= 2 && a.tile0(a.parts) > sms ? 64 : 32;
}
// us, in brackets what ran before (H200, 2026-11-29; M = 1, 2, 4). 2x8: 4096 x 4096 4.2 (4.7), 5.1
// (8.0), 6.5 (8.1); 14336 x 4096 9.5 (10.4), 10.1 (13.2), 12.0 (15.3); 4096 x 14336 9.9 (10.2), 10.8
// (13.7), 12.5 (13.9); 28672 x 8192 27.2 (23.9), 28 (34.3), 31.5 (36.2). 1x8: 4096 x 4096 2.9 (3.8),
// 3.9 (6.4), 5.1 (6.5); 14336 x 4096 5.8 (7.2), 6.2 (9.2), 8.6 (11.0); 4096 x 14336 7.4 (6.7), 8.1
// (9.5), 9.7 (9.9); 28672 x 8192 21 (15.6), 19 (19.7), 22 (19.8).
inline bool owned_wins(int codebooks, long long cells, int tokens, int piece) {
  if (codebooks == 1) return cells < (tokens == 1 && piece == 32 ? 10000 : 50000);
  return tokens > 1 || cells < 50000;
}
// One token, a half for each block and all codes of a warp in flight.
inline bool owned_short(int pairs, int tokens, int rows) {
  return tokens == 1 && rows <= 32 && pairs <= kOwnedWarps * kOwnedDepth;
}

struct MmaRow {
  long long min_cells;
  int row_warps;
  const char* why;
};
constexpr MmaRow kMma[] = {
    {0, 8, "all warps on rows: activations are shared through L1, fewest partial sums"},
};
// Units of K per CTA below which partial sums cost more than idle SMs.
inline int mma_min_units(int tokens) { return tokens <= 4 ? 3 : tokens <= 16 ? 6 : 12; }

}  // namespace aqlm::tune
