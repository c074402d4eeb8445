// Launch shapes of the rotated and scalar matmul. Numbers: docs/notes/cuda_rotated.md (H200).
#pragma once

#include <algorithm>

#include "rotated.h"

namespace aqlm::tune {

// Warps of a CTA, 32 rows each: 8 where the accumulators need more than 128 registers a lane, but
// 16 where a block stages x itself: twice the rows, half the range of K.
AQLM_HD constexpr int rotated_warps(Coding coding, int bits, int tiles, bool grouped,
                                    Share share) {
  if (share != Share::kRing && !grouped) return 16;
  return tiles >= 8 || (tiles >= 2 && (grouped || (coding == Coding::kE8p && bits > 2))) ? 8 : 16;
}

// Threads that ptxas must leave registers for: 96 each of a body for few tokens, so that a block of
// the rotations before and after it fits beside it (a layer of 4096 x 4096 took 10.2 us with 105
// registers, 8.6 with 90). Where they are enough, that is.
AQLM_HD constexpr int rotated_bound(Coding coding, int bits, int tiles, bool grouped, int warps,
                                    Share share) {
  const bool enough = share == Share::kLocal ||
                      (bits != 3 && (coding == Coding::kScalar || bits == 2));
  return tiles == 1 && !grouped && warps == 16 && enough ? 640 : warps * 32;
}

// One token of a large 2-bit matrix: 24 warps with less in flight each, 22.0 -> 20.9 us at
// 28672 x 8192 (E8P: no gain, and 8 % slower at 14336 x 4096). 32 x 64 cells per SM from which on.
constexpr int kWideWarps = 24, kWideDepth = 3, kWideCells = 400;
inline bool rotated_wide(const RotatedWeight& w) {
  return w.coding == Coding::kScalar && w.bits == 2 && w.group == w.K;
}

// Staged activations: cells per chunk and chunks in the ring (more than one tile); 24 KB in all, so
// that they and 64 KB of tables fit in 99 KB.
AQLM_HD constexpr int rotated_chunk(int tiles) { return 16 / tiles; }
constexpr int kRotatedStages = 3;
constexpr int kRotatedMaxX = 64 << 10;  // staged by the CTA itself (one tile), bytes

// Bytes of decoding tables at the start of shared memory.
AQLM_HD constexpr int rotated_tables(Coding coding, int bits) {
  return coding == Coding::kScalar ? 0 : bits == 3 ? 128 << 10 : 64 << 10;
}

// Codes of a weight that are decoded and multiplied one after the other: E8P with a residual has 2.
AQLM_HD constexpr int rotated_planes(Coding coding, int bits) {
  return coding == Coding::kE8p && bits > 2 ? 2 : 1;
}

// The body of scale groups for few tokens: warps of a CTA, cells in flight per warp.
constexpr int kGroupWarps = 16;
AQLM_HD constexpr int rotated_group_depth(int bits) {
  return bits == 8 ? 1 : bits == 4 ? 3 : bits == 3 ? 4 : 6;
}
// Scale groups that a warp holds at a time, and bytes of scales and zeros: two buffers of 32 rows.
constexpr int kGroupChunk = 8, kGroupBytes = 2 * 2 * kCellRows * kGroupChunk * 2;
// Whether it and the warpgroup body take the weight: pairs of 16-bit scales (rotated_scales.cuh),
// and sums of a group in int32.
inline bool rotated_group_scales(const RotatedWeight& w) {
  auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return w.group % kCellColumns == 0 && w.group <= 512 && w.zeros != nullptr &&
         w.scale_type != DType::kFloat32 && w.K / w.group % 2 == 0 && aligned(w.scales) &&
         aligned(w.zeros);
}

// Hopper, more than one tile: warpgroup MMAs. Warps that multiply: as many as registers allow, one
// warp's decode is latency. Stages of x, cells of codes in flight per warp: what fits beside 128 KB
// of tables at 3 bits.
AQLM_HD constexpr int rotated_wg_warps(Coding coding, int bits, int tiles, bool grouped) {
  const int accumulators = tiles * (8 + (grouped ? 6 : 0));
  return accumulators <= 32 && bits < 8 ? 16 : accumulators <= 64 ? 12 : 8;
}
// Whether its warps exchange their rows to do more bits of the output rotation: from 17 tokens on
// that costs more than it saves (28672 x 8192, M = 64: whole layer 102 against 92 us).
AQLM_HD constexpr bool rotated_exchanges(int tiles) { return tiles <= 4; }
// Cells a step: two, but where a scale group has an odd number of them, or shared memory is short.
// With one, 28672 x 8192: 64 tokens 73.6 against 66.3 us, gptq-int4-g128 of 16 tokens 56.4 (even by
// 16 warps) against 51.4.
AQLM_HD constexpr int rotated_wg_most_cells(Coding coding, int bits, int tiles) {
  return tiles == 16 && rotated_planes(coding, bits) == 2 ? 1 : 2;
}
inline int rotated_wg_cells(const RotatedWeight& w, int tiles, bool grouped) {
  return grouped && w.group % (2 * kCellColumns) != 0
             ? 1
             : rotated_wg_most_cells(w.coding, w.bits, tiles);
}
// Stages of x: thread 0 fills two fewer ahead of its own step.
AQLM_HD constexpr int rotated_wg_stages(Coding coding, int bits, int tiles, int cells) {
  if (coding == Coding::kE8p && bits == 3) return cells == 2 ? 3 : 4;
  return cells == 2 ? 4 : tiles == 4 ? 8 : 6;
}
AQLM_HD constexpr int rotated_wg_depth(Coding coding, int bits, int warps, int cells) {
  return coding == Coding::kE8p && bits == 3 && cells == 1 ? 4
         : cells == 1 ? (bits == 8 ? 32 : 64) / warps
         : coding == Coding::kE8p && bits == 3 && warps > 8 ? 2
                                                            : (bits == 8 || warps == 16 ? 3 : 4);
}

// The body whose blocks hold all their x (rotated_resident.cuh), E8P 2 bit: warps; cells of a block
// up to which it quantizes them itself (5 .. 16 tokens, 16-bit x); from which on stage_kernel and
// it beat a block's own staging for mma.sync (9 .. 16 tokens, now where x is float32). H200, us of
// 8 tokens alone, 16 alone and of a whole layer, cells of a block in parentheses; then before
// (mma.sync up to 8 tokens and 11 cells, stage_kernel):
//    4096 x 4096   (4)    6.9   7.7 10.8    8.9   9.6 13.0
//    6144 x 4096   (6)    7.1   7.9 11.0    9.1  10.3 13.5
//    4096 x 14336 (14)   11.5  13.0 24.8   13.5  16.2 26.7
//   14336 x 4096  (14)   10.3  12.0 17.7   12.4  13.6 18.9
//   28672 x 4096  (28)   16.2  17.8 26.1   17.7  18.6 27.5
// Beyond, 16 tokens: 28672 x 8192 (56) 28.9, 8192 x 28672 (56) 31.5 against 33.8 and 36.0 of
// rotated_wgmma.cuh.
constexpr int kResidentWarps = 16, kResidentOwnCells = 28, kResidentLeastCells = 12;
AQLM_HD constexpr bool rotated_resident(Coding coding, int bits, int tiles) {
  return tiles == 4 && coding == Coding::kE8p && bits == 2;
}
// Cells whose MMAs are waited for together. One, by so few registers that a block of the kernels
// before and after has 20480, where blocks are short: with few cells (16 tokens, one against two:
// 4096 x 4096 7.7 and 8.4 us, its norm in a step 2.8 and 3.6) or tokens (a step of the Llama-3-8B
// shape with 8: 2105 and 2175). With 28 cells in a step of 16 tokens 19.1 and 17.3.
AQLM_HD constexpr int rotated_resident_group(int tokens, int cells) {
  return tokens <= 8 || cells <= 8 ? 1 : 2;
}
AQLM_HD constexpr int rotated_resident_registers(int group) { return group == 1 ? 88 : 128; }
// Bytes of x in shared memory: 16 rows of K (a core matrix of every eight columns), a cell. A block
// that writes it itself pads both, so that a warp's stores of four cells are to 32 banks.
AQLM_HD constexpr int rotated_resident_chunk(int tiles, bool own) {
  return tiles * 128 + (own ? 16 : 0);
}
AQLM_HD constexpr int rotated_resident_cell(int tiles, bool own) {
  return 4 * rotated_resident_chunk(tiles, own) + (own ? 32 : 0);
}
// Scales of x, or barriers of steps. Floats between the exchanged rows of two tokens, so that a
// store of four tokens is to 32 banks.
constexpr int kResidentHead = 512, kResidentPad = 8;
// steps: of x of a block.
AQLM_HD constexpr int rotated_resident_smem(int steps, int tokens, bool own) {
  return rotated_tables(Coding::kE8p, 2) + kResidentHead +
         steps * 2 * rotated_resident_cell(4, own) +
         tokens * (kResidentWarps * kCellRows + kResidentPad) * 4;
}

// The body of pairs of warps (rotated_pairs.cuh), 33 .. 64 tokens: cells a step, stages of x and of
// a pair's codes.
constexpr int kPairWarps = 16, kPairCells = 4, kPairStages = 3;
// Not for two planes (E8P 28672 x 8192, 64 tokens: 3 bit 110 against 104 us, 4 bit 110 against
// 108), nor for 3 bits, whose codes are not whole 16 bytes of a lane.
AQLM_HD constexpr bool rotated_pairs(Coding coding, int bits, int tiles, bool grouped) {
  return tiles == 16 && !grouped && bits != 3 && rotated_planes(coding, bits) == 1;
}
AQLM_HD constexpr int rotated_pair_smem(Coding coding, int bits) {
  const int codes = kPairWarps / 2 * (kPairCells * kCellRows * kCellColumns / 8 * bits + 8);
  return rotated_tables(coding, bits) + kPairStages * (kPairCells * 16 * 512 + 16 + codes) +
         kPairWarps * (2 * 128 + (coding == Coding::kE8p ? 0 : 64)) * 4;
}

// The body of float16 operands (rotated_half.cuh), up to 64 tokens: warps, stages of x, steps of codes
// in a warp's ring.
AQLM_HD constexpr int rotated_half_warps(int tiles) { return tiles == 16 ? 12 : 16; }
constexpr int kHalfStages = 4;
constexpr int kHalfPasses = 16;  // as rotated_passes: four of 64 tokens 300 us at 28672 x 8192
AQLM_HD constexpr int rotated_half_depth(int bits) { return bits == 8 ? 4 : 3; }
// Cells a step, as above; two of 8 bits are too many registers.
AQLM_HD constexpr int rotated_half_most_cells(int bits) { return bits == 8 ? 1 : 2; }
inline int rotated_half_cells(const RotatedWeight& w) {
  return w.group % (2 * kCellColumns) != 0 ? 1 : rotated_half_most_cells(w.bits);
}
AQLM_HD constexpr int rotated_half_smem(int bits, int tiles, int cells) {
  const int warps = rotated_half_warps(tiles), codes = cells * kCellRows * kCellColumns / 8 * bits;
  return warps * (rotated_half_depth(bits) * codes + kGroupBytes) +
         kHalfStages * (cells * kCellColumns * 4 * tiles * 2 + 16);
}
// Whether it is faster, 28672 x 8192: int4-g128 16 tokens 54.2 against 51.7 us of the int8 body, 32
// tokens 56.7 against 72.5, 64 tokens 75.3 against 144; int4-g64 8 tokens 65.5 against 74.6.
inline bool rotated_half(const RotatedWeight& w, DType x_type, int tokens) {
  return x_type == DType::kFloat16 && w.scale_type == DType::kFloat16 && rotated_group_scales(w) &&
         (tokens > 16 || (tokens > 4 && w.group < 2 * kCellColumns));
}

template <Coding kCoding, int kBits, int kTiles>
struct RotatedShape {
  static constexpr bool kE8p = kCoding == Coding::kE8p;
  static constexpr int kPlanes = rotated_planes(kCoding, kBits);
  // Separate accumulators for high and low nibbles while registers allow.
  static constexpr bool kSplit = kE8p && kPlanes * kTiles <= 2;
  static constexpr int kSets = kPlanes * (kSplit ? 2 : 1);
  static constexpr int kTables = rotated_tables(kCoding, kBits);
  // Cells in flight per warp.
  static constexpr int kDepth = kBits == 8 ? 1 : kBits == 4 ? 2 : kTiles >= 8 ? 2 : 4;
};

// Cells of x that a CTA stages itself up to which that beats warpgroup MMAs for 9 .. 16 tokens: 14
// (14336 x 4096) 15.4 against 17.0 us, 55 (28672 x 8192) 39.2 against 36.7.
constexpr int kLocalCells = 32;

// Cells of x that one CTA stages itself.
inline int local_cells(const RotatedSchedule& s) {
  const long long cells = static_cast<long long>(s.groups) * s.units;
  return static_cast<int>(std::min<long long>(s.units, (cells + s.ctas - 1) / s.ctas));
}
// Row groups that a block holds until their transform; 1: none waits, which needs registers.
AQLM_HD constexpr int rotated_held(Coding coding, int bits, int tiles) {
  return tiles == 1 && rotated_planes(coding, bits) == 1 ? 2 : 1;
}
// Dynamic shared memory of the staged activations: cells, sums, peaks, scales, exchanged rows.
inline int staged_bytes(const RotatedSchedule& s, int tokens, int tiles, Share share, int warps) {
  if (share == Share::kRing) return rotated_chunk(tiles) * kRotatedStages * tiles * 512;
  const int slots = local_cells(s);
  return slots * ((tiles > 1 ? tiles * 512 : tokens * 128) + tokens * 8) +
         (std::max(slots, warps) + tokens) * 4 +
         (tiles == 1 ? 2 : 1) * tokens * warps * kCellRows * 4;
}
AQLM_HD constexpr int rotated_most_x(int tiles) { return tiles == 1 ? kRotatedMaxX : 1 << 20; }

// The body whose blocks own rows (rotated_owned.cuh): threads, cells that a warp has looked up when
// x comes, and whether K is longer than those cells of its warps. Blocks that fit an SM: two where
// 64 registers are enough.
constexpr int kOwnedThreads = 512, kOwnedAhead = 4, kOwnedMostCells = 16;  // of a warp
AQLM_HD constexpr bool rotated_owned_long(int units) {
  return units > kOwnedAhead * kOwnedThreads / 32;
}
AQLM_HD constexpr int rotated_owned_blocks(Coding coding, int bits, bool is_long) {
  return bits == 2 && !is_long ? 2 : 1;
}
// Two planes, or 8 bits: more registers than there are.
AQLM_HD constexpr bool rotated_owned_takes_long(Coding coding, int bits) {
  return bits < 8 && rotated_planes(coding, bits) == 1;
}
// Threads that ptxas must leave registers for, as rotated_bound.
AQLM_HD constexpr int rotated_owned_bound(Coding, int bits, bool is_long) {
  return bits == 2 && is_long ? 640 : kOwnedThreads;
}
inline int rotated_owned_smem(const RotatedWeight& w, int tokens) {
  return rotated_tables(w.coding, w.bits) + tokens * (w.units() * 128 + kOwnedThreads * 4);
}
// Whether it is taken: no slots to add, for a matrix of few rows. More blocks than SMs only without
// a rotation, which would mix more rows: 6144 x 4096 alone 4.1 against 5.8 us, but the step of the
// Llama-3-8B shape, whose second kernel of q, k and v (mix_rows.cu) wants 512 rows a block, 1857
// against 1791. Several tokens: neither for fewer blocks (4 tokens, 3584 x 3584 6.6 against 5.9 us,
// 4096 x 4096 6.9 against 7.5) nor with a rotation (4096 x 4096 12.3 against 11.3).
inline bool rotated_owned(const RotatedWeight& w, int tokens, bool rotates,
                          const DeviceInfo& device) {
  const int blocks = w.blocks();
  const bool is_long = rotated_owned_long(w.units()), full = 10 * blocks >= 9 * device.sms;
  if (w.units() > kOwnedMostCells * kOwnedThreads / 32) return false;
  if (tokens > 1 && (rotates || !full || is_long)) return false;
  if (is_long && (!full || !rotated_owned_takes_long(w.coding, w.bits))) return false;
  const int smem = rotated_owned_smem(w, tokens);
  const bool twice = tokens == 1 && !rotates && 2 * (smem + 1024) <= device.max_smem &&
                     rotated_owned_blocks(w.coding, w.bits, is_long) == 2;
  return blocks <= (twice ? 2 : 1) * device.sms && smem <= device.max_smem;
}

// Most tiles for which a block stages x itself: more accumulators than 16 warps have registers.
AQLM_HD constexpr int rotated_local_tiles(Coding coding, int bits) {
  return rotated_planes(coding, bits) == 2 ? 2 : 4;
}

// Most tiles of one pass: registers again. Warpgroup MMAs take both planes into one accumulator.
AQLM_HD constexpr int rotated_max_tiles(Coding coding, int bits, bool grouped, bool wgmma) {
  return grouped || bits == 8 || (!wgmma && rotated_planes(coding, bits) == 2) ? 8 : 16;
}

// Bytes of a stage's sums of activations, of the exchanged rows.
AQLM_HD constexpr int rotated_wg_sums(int tiles, bool grouped) { return grouped ? tiles * 32 : 0; }
AQLM_HD constexpr int rotated_wg_exchange(int tiles, int warps) {
  return rotated_exchanges(tiles) ? 2 * 4 * warps * kCellRows * 4 : 0;
}
AQLM_HD constexpr int rotated_wg_smem(Coding coding, int bits, int tiles, bool grouped, int cells,
                                      int warps) {
  const int codes = cells * kCellRows * kCellColumns / 8 * bits;
  const int x = rotated_planes(coding, bits) * tiles * 512 + rotated_wg_sums(tiles, grouped);
  return rotated_tables(coding, bits) +
         warps * rotated_wg_depth(coding, bits, warps, cells) * codes +
         rotated_wg_stages(coding, bits, tiles, cells) * (cells * x + 16) +
         rotated_wg_exchange(tiles, warps) + (grouped ? warps * kGroupBytes : 0);
}

// Up to this many tokens per tile of a pass, passes of the MMA bodies beat dequantized slices and a
// GEMM: 66 us for 64 tokens against 183 us and the GEMM (H200, E8P 28672 x 8192).
AQLM_HD constexpr int rotated_passes(bool hopper, bool grouped, int planes) {
  return hopper && !grouped && planes == 1 ? 24 : 12;
}

// Bytes that the blocks of a spread rotation read from L2 in all, up to which it is faster than
// clusters that exchange: 8192 x 16 tokens 2.6 against 4.0 us at 4 MB, 14336 x 4 4.8 against 6.3 at
// 3 MB, 28672 x 4 8.1 against 7.8 at 6.4 MB (H200).
constexpr double kSpreadMegabytes = 4.5;

// Whether rows of x are rotated by the kernel for many tokens (hadamard_many.cu), H200, by itself:
// 4096 x 128 5.6 against 4.9 us, x 512 6.7 against 9.4; 8192 x 64 4.7 against 6.0; 14336 (F = 28) x 16
// 5.3 against 7.3. Its blocks leave no room for a matmul's beside them: a layer of 28672 x 8192 with
// 64 tokens is 95 us with it and 89 without.
inline bool rotates_many(const Rotation& r, int tokens) {
  const double elements = static_cast<double>(r.n) * tokens;
  return r.factor > 1 ? elements >= 1 << 19 : elements * r.n >= 8589934592.;
}

// Cells of K per CTA below which partial sums cost more than idle SMs.
constexpr int kRotatedMinCells = 4;

}  // namespace aqlm::tune
