// Launch shapes of the rotated and scalar matmul. Numbers: docs/notes/cuda_rotated.md (H200).
#pragma once

#include <algorithm>

#include "rotated.h"

namespace aqlm::tune {

// Warps of a CTA, 32 rows each: 8 where the accumulators need more than 128 registers a lane.
AQLM_HD constexpr int rotated_warps(Coding coding, int bits, int tiles, bool grouped) {
  return tiles >= 8 || (tiles >= 2 && (grouped || (coding == Coding::kE8p && bits > 2))) ? 8 : 16;
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

// Hopper, more than one tile: warpgroup MMAs. Warps that multiply: as many as registers allow, one
// warp's decode is latency. Stages of x, cells of codes in flight per warp.
AQLM_HD constexpr int rotated_wg_warps(Coding coding, int bits, int tiles, bool grouped) {
  const int planes = coding == Coding::kE8p && bits > 2 ? 2 : 1;
  const int accumulators = tiles * (planes * 8 + (grouped ? 6 : 0));
  return accumulators <= 32 ? 16 : accumulators <= 64 ? 12 : 8;
}
constexpr int kRotatedWgStages = 4;
AQLM_HD constexpr int rotated_wg_depth(int bits, int warps) {
  return (bits == 8 ? 32 : 64) / warps;
}

template <Coding kCoding, int kBits, int kTiles>
struct RotatedShape {
  static constexpr bool kE8p = kCoding == Coding::kE8p;
  static constexpr int kPlanes = kE8p && kBits > 2 ? 2 : 1;
  // Separate accumulators for high and low nibbles while registers allow.
  static constexpr bool kSplit = kE8p && kPlanes * kTiles <= 2;
  static constexpr int kSets = kPlanes * (kSplit ? 2 : 1);
  static constexpr int kTables = rotated_tables(kCoding, kBits);
  // Cells in flight per warp.
  static constexpr int kDepth = kBits == 8 ? 1 : kBits == 4 ? 2 : kTiles >= 8 ? 2 : 4;
};

// Cells of x that one CTA stages itself.
inline int local_cells(const RotatedSchedule& s) {
  const long long cells = static_cast<long long>(s.groups) * s.units;
  return static_cast<int>(std::min<long long>(s.units, (cells + s.ctas - 1) / s.ctas));
}
// Dynamic shared memory of the staged activations.
inline int staged_bytes(const RotatedSchedule& s, int tokens, int tiles) {
  if (tiles > 1) return rotated_chunk(tiles) * kRotatedStages * tiles * 512;
  return local_cells(s) * (tokens * (128 + 8) + 4) + 16;
}

// Most tiles of one pass: registers again.
AQLM_HD constexpr int rotated_max_tiles(Coding coding, int bits, bool grouped) {
  return grouped || bits == 8 || (coding == Coding::kE8p && bits > 2) ? 8 : 16;
}

AQLM_HD constexpr int rotated_wg_smem(Coding coding, int bits, int tiles, int warps) {
  return rotated_tables(coding, bits) +
         warps * rotated_wg_depth(bits, warps) * kCellRows * kCellColumns / 8 * bits +
         kRotatedWgStages * (tiles * 512 + 16);
}

// Up to this many tokens per tile of a pass, passes of the MMA bodies beat dequantized slices and a
// GEMM: 66 us for 64 tokens against 183 us and the GEMM (H200, E8P 28672 x 8192).
AQLM_HD constexpr int rotated_passes(bool hopper, bool grouped) {
  return hopper && !grouped ? 24 : 12;
}

// Cells of K per CTA below which partial sums cost more than idle SMs.
constexpr int kRotatedMinCells = 4;

}  // namespace aqlm::tune
