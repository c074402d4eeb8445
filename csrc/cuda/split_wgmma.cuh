// cuda.additive.split_wgmma: cuda.additive.split for 9 .. 64 tokens a pass on Hopper.
//
// The same classes and lookups (split.cuh); the activations are the B operand of a warpgroup MMA in
// shared memory, where 16 warps share them, instead of registers that every warp loads: the cost of
// a token is that of the MMA alone. 64 tokens in int8 are 128 columns (high and low bytes).
//
//   image of one class and unit (fragments.cuh): [half c][column][t = 0..3] words of 4 bytes
//     = vectors 4t + 2c and 4t + 2c + 1, the dimensions of the class
//
// A 17th warp (of a warpgroup that gives its registers away) copies a unit's codes (16 neighbouring
// row tiles) and x into a ring of stages.
// H200, 2026-11-22, 28672 x 8192, int8: M = 16 89 us, M = 64 117 us.
// Architecture sm_90a only.
#pragma once

#include <type_traits>

#include "decode/additive.cuh"
#include "streamk.cuh"
#include "tune.h"
#include "wgmma_ptx.cuh"

namespace aqlm {

constexpr int kSplitWgWarps = tune::kSplitWgmmaRows / kTileRows;  // that multiply
constexpr int kSplitWgStages = 8;  // five starve the MMA warps: 172 us against 104

AQLM_HD constexpr int split_wg_stage_bytes(int columns) {
  return columns * 32 + kSplitWgWarps * kUnitBytes;
}
AQLM_HD constexpr int split_wg_smem(int nbits, int columns) {
  return (2 << nbits) + kSplitWgStages * (split_wg_stage_bytes(columns) + 16);
}

template <typename T, int kTokens, bool kInt8>
__global__ void __launch_bounds__((kSplitWgWarps + 4) * 32, 1)
split_wgmma_kernel(const __grid_constant__ MatmulParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kColumns = kInt8 ? 2 * kTokens : kTokens, kX = kColumns * 32;
  constexpr int kStage = split_wg_stage_bytes(kColumns);
  using Acc = std::conditional_t<kInt8, int, float>;
  extern __shared__ __align__(1024) unsigned char smem[];
  const int table_bytes = p.a.entries() * 2;
  unsigned char* const stages = smem + table_bytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + kSplitWgStages * kStage);
  uint64_t* const empty = full + kSplitWgStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dims = blockIdx.x % p.s.classes;
  if (threadIdx.x == 0) mbar::init_ring<kSplitWgStages>(full, empty, kSplitWgWarps);
  grid_dependents_start();
  __syncthreads();

  if (warp >= kSplitWgWarps) {
    registers_down<24>();
    if (threadIdx.x != kSplitWgWarps * 32) return;
    const uint8_t* image = p.x_fragments + size_t(dims) * p.s.units * kX;
    const size_t unit_stride = size_t(p.s.tiles) * kUnitBytes;
    Ring<kSplitWgStages> ring;
    int produced = 0;
    grid_dependency_wait();
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const uint8_t* codes = p.packed + piece.u0 * unit_stride + size_t(piece.tile) * kUnitBytes;
      const int bytes = min(piece.tiles, kSplitWgWarps) * kUnitBytes;
      for (int u = piece.u0; u < piece.u1; ++u, ++produced, ring.advance()) {
        if (produced >= kSplitWgStages) mbar::wait(empty + ring.stage, ring.phase ^ 1);
        unsigned char* const stage = stages + ring.stage * kStage;
        mbar::expect(full + ring.stage, kX + bytes);
        mbar::bulk_copy(stage + kX, codes, bytes, full + ring.stage);
        mbar::bulk_copy(stage, image + size_t(u) * kX, kX, full + ring.stage);
        codes += unit_stride;
      }
    });
  } else {
    registers_up<112>();
    const int g = lane / 4, t = lane % 4;
    int loaded_part = -1;
    Ring<kSplitWgStages> ring, ahead;  // of the unit that is multiplied; of the codes that are read
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const int count = piece.u1 - piece.u0;
      if (piece.part != loaded_part) {
        if (loaded_part >= 0) consumers_sync<kSplitWgWarps * 32>();
        const uint8_t* from = p.aux + kAuxHeader +
                              size_t(piece.part * p.s.classes + dims) * table_bytes;
        for (int i = threadIdx.x * 16; i < table_bytes; i += kSplitWgWarps * 32 * 16)
          *reinterpret_cast<uint4*>(smem + i) = *reinterpret_cast<const uint4*>(from + i);
        loaded_part = piece.part;
        consumers_sync<kSplitWgWarps * 32>();
      }
      // Warps past the part's last row tile repeat it; they write nothing.
      const uint32_t code_offset = kX + min(warp, piece.tiles - 1) * kUnitBytes + lane * 16;
      Acc acc[kColumns / 2] = {};
      uint32_t a[2][4], e[2][8];
      uint4 c = make_uint4(0, 0, 0, 0);
      auto read_codes = [&](int i) {  // in order; past the end the last ones stay
        if (i >= count) return;
        mbar::wait(full + ahead.stage, ahead.phase);
        c = *reinterpret_cast<const uint4*>(stages + ahead.stage * kStage + code_offset);
        ahead.advance();
      };
      auto lookup = [&](uint32_t (&e)[8]) {
        const uint32_t w[4] = {c.x, c.z, c.y, c.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          e[2 * j] = *reinterpret_cast<const uint16_t*>(smem + low_word_offset(w[j]));
          e[2 * j + 1] = *reinterpret_cast<const uint16_t*>(smem + high_word_offset(w[j]));
        }
      };

      // The lookups of two further units are under way while this unit's MMA is issued.
      int released = ring.stage, previous = ring.stage;
      read_codes(0);
      lookup(e[0]);
      read_codes(1);
      lookup(e[1]);
      read_codes(2);
      auto step = [&](const int d, int i) {  // d: constant once inlined
        mma_groups_wait<1>();                // unit i - 2
        if (i >= 2 && lane == 0) mbar::arrive(empty + released);
        released = previous;
        previous = ring.stage;
#pragma unroll
        for (int j = 0; j < 4; ++j) a[d][j] = e[d][2 * j] | e[d][2 * j + 1] << 16;
        lookup(e[d]);  // unit i + 2
        read_codes(i + 3);
        const uint64_t x = core_matrices(stages + ring.stage * kStage, kColumns * 16, 128);
        mma_fence();
        if constexpr (kInt8) wgmma(acc, a[d], x);
        else wgmma(acc, a[d], x, T());
        mma_group_commit();
        ring.advance();
      };
      int i = 0;
      for (; i + 1 < count; i += 2) {
        step(0, i);
        step(1, i + 1);
      }
      if (i < count) step(0, i);
      mma_groups_wait<0>();
      if (count >= 2 && lane == 0) mbar::arrive(empty + released);
      if (lane == 0) mbar::arrive(empty + previous);

      if (warp >= piece.tiles) return;
      float* out = slot_of(p, piece, 0) + warp * kTileRows + g;
      auto put = [&](int token, int row, float v) {
        if (token < p.tokens) out[token * p.s.group_rows + row] = v;
      };
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto lo = acc[n * 4 + 2 * h], hi = acc[n * 4 + 2 * h + 1];
          if constexpr (kInt8) {
            put(n * 4 + t, h * 8, 256.f * lo + hi);
          } else {
            put(n * 8 + 2 * t, h * 8, lo);
            put(n * 8 + 2 * t + 1, h * 8, hi);
          }
        }
    });
  }
#endif
}

}  // namespace aqlm
