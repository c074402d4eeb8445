// cuda.additive.wgmma_int8: y = x W^T in int8 for 2 .. 64 tokens a pass on Hopper's warpgroup MMA.
//
// nbits <= 8, G = 8, B in {1, 2, 4}. A codebook lookup is 8 bytes (16 copies of each table, one per
// lane of a half warp: no conflicts) = 8 weights of a row = half the A registers of one MMA of
// K = 32. Codebooks are additional K with the same activations: nothing is added outside the MMA.
// Half the shared-memory bytes of cuda.additive.wgmma.
//
//   x image (fragments.cuh), a step: [half c][column][vector t] words = elements 4c .. 4c + 3 of
//     vector t; column 2m = high bytes of token m, 2m + 1 = low bytes
//   warps 0 .. 7: MMAs. Up to 64 columns: a 64-row block each, 4 MMA row tiles; 128: half a block
//   warp 8 (of a warpgroup that gives its registers away): bulk copies of a unit's codes and x into
//     a ring of stages
//
// Architecture sm_90a only.
#pragma once

#include "decode/additive.cuh"
#include "mma.cuh"
#include "wgmma_ptx.cuh"

namespace aqlm {

constexpr int kWg8Warps = 8;   // that multiply
constexpr int kWg8Stages = 8;  // units in flight

AQLM_HD constexpr int wg8_steps(int codebooks) { return codebooks == 1 ? 2 : 1; }  // of a unit
AQLM_HD constexpr int wg8_x_bytes(int codebooks, int columns) {
  return wg8_steps(codebooks) * columns * 32;
}
AQLM_HD constexpr int wg8_stage_bytes(int codebooks, int columns) {
  return wg8_x_bytes(codebooks, columns) +
         tune::wgmma_group_rows(columns) / kBlockRows * kUnitBytes;
}
AQLM_HD constexpr int wg8_smem(int codebooks, int columns) {
  return codebooks * kMmaBookBytes + kWg8Stages * (wg8_stage_bytes(codebooks, columns) + 16);
}

// kColumns: of the MMA, two a token (32, 64 or 128).
template <typename T, int B, int kColumns>
__global__ void __launch_bounds__((kWg8Warps + 4) * 32, 1)
wgmma_int8_kernel(const __grid_constant__ MatmulParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kTiles = tune::wgmma_group_rows(kColumns) / (kWg8Warps * 16);
  constexpr int kX = wg8_x_bytes(B, kColumns), kStage = wg8_stage_bytes(B, kColumns);
  constexpr int kXStep = kColumns * 32;
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const stages = smem + B * kMmaBookBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + kWg8Stages * kStage);
  uint64_t* const empty = full + kWg8Stages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWg8Stages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kWg8Warps);
    }
    barrier_init_fence();
  }
  grid_dependents_start();
  __syncthreads();

  if (warp >= kWg8Warps) {
    registers_down<24>();
    if (threadIdx.x != kWg8Warps * 32) return;
    Ring<kWg8Stages> ring;
    bool waited = false;
    int produced = 0;
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const size_t unit_stride = size_t(p.s.tiles) * kUnitBytes;
      const uint8_t* codes = p.packed + piece.u0 * unit_stride + size_t(piece.tile) * kUnitBytes;
      const int bytes = min(piece.tiles, tune::wgmma_group_rows(kColumns) / kBlockRows) * kUnitBytes;
      auto copy_x = [&](int u, int stage) {
        const int step = B == 1 ? 2 * u : B == 2 ? u : u / 2;
        bulk_copy(stages + stage * kStage, p.x_fragments + size_t(step) * kXStep, kX, full + stage);
      };
      auto copy_codes = [&](int stage) {
        barrier_expect(full + stage, kX + bytes);
        bulk_copy(stages + stage * kStage + kX, codes, bytes, full + stage);
        codes += unit_stride;
      };
      int u = piece.u0;
      if (!waited) {  // codes do not depend on the previous kernel
        const int first = min(kWg8Stages, piece.u1 - u);
        for (int i = 0; i < first; ++i) copy_codes(i);
        grid_dependency_wait();
        waited = true;
        for (int i = 0; i < first; ++i, ++u, ++produced, ring.advance()) copy_x(u, i);
      }
      for (; u < piece.u1; ++u, ++produced, ring.advance()) {
        if (produced >= kWg8Stages) barrier_wait(empty + ring.stage, ring.phase ^ 1);
        copy_codes(ring.stage);
        copy_x(u, ring.stage);
      }
    });
  } else {
    registers_up<240>();
    const int g = lane / 4, t = lane % 4;
    const int block = kTiles == 4 ? warp : warp / 2, half = kTiles == 4 ? 0 : warp % 2;
    const uint32_t lane_offset = lane % 16 * 8;
    int loaded_part = -1;
    Ring<kWg8Stages> ring, ahead;  // of the unit that is multiplied; of the codes that are read
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const int count = piece.u1 - piece.u0;
      if (piece.part != loaded_part) {
        if (loaded_part >= 0) consumers_sync<kWg8Warps * 32>();
        fill_books<T, B, true>(p, piece.part, smem, kWg8Warps * 32);
        loaded_part = piece.part;
        consumers_sync<kWg8Warps * 32>();
      }
      // Warps past the part's last row block repeat it; they write nothing.
      const uint32_t code_offset = kX + min(block, piece.tiles - 1) * kUnitBytes + lane * 16;
      int acc[kTiles][kColumns / 2] = {};
      auto read_codes = [&] {
        barrier_wait(full + ahead.stage, ahead.phase);
        const uint4 c =
            *reinterpret_cast<const uint4*>(stages + ahead.stage * kStage + code_offset);
        ahead.advance();
        return c;
      };
      // Row tile m of unit u: rows 2m and 2m + 1 of the lane are two bytes of a word; words x, y
      // are the unit's first half (a codebook, or of one codebook a step), z and w the second.
      auto lookup = [&](int m, int u, uint4 c, uint2 (&e)[4]) {
        const bool high = kTiles == 2 ? half : m > 1;
        const uint32_t w[2] = {high ? c.y : c.x, high ? c.w : c.z};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int book = B == 1 ? 0 : B == 2 ? i / 2 : (u & 1) * 2 + i / 2;
          e[i] = *reinterpret_cast<const uint2*>(
              smem + book * kMmaBookBytes + entry_offset<7>(w[i / 2], m % 2 * 2 + i % 2, lane_offset));
        }
      };

      // The lookups of the next unit are under way while this unit's MMAs are issued.
      uint32_t a[kTiles][8];
      uint2 e[kTiles][4];
      uint4 c = read_codes();
#pragma unroll
      for (int m = 0; m < kTiles; ++m) lookup(m, piece.u0, c, e[m]);
      if (count > 1) c = read_codes();
      int released = ring.stage;
      for (int i = 0; i < count; ++i) {
        const uint64_t x = core_matrices(stages + ring.stage * kStage, kColumns * 16, 128);
        const uint64_t second = B == 1 ? x + (kXStep >> 4) : x;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma_groups_wait<kTiles - 1>();  // tile m of the last unit
          if (m == kTiles - 1 && i > 0 && lane == 0) barrier_arrive(empty + released);
          uint32_t(&r)[8] = a[m];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const uint2 lo = e[m][2 * j], hi = e[m][2 * j + 1];
            r[4 * j] = lo.x, r[4 * j + 1] = hi.x, r[4 * j + 2] = lo.y, r[4 * j + 3] = hi.y;
          }
          lookup(m, piece.u0 + i + 1, c, e[m]);  // past the end: dropped
          mma_fence();
          wgmma(acc[m], r, x);
          wgmma(acc[m], r + 4, second);
          mma_group_commit();
        }
        released = ring.stage;
        ring.advance();
        if (i + 2 < count) c = read_codes();
      }
      mma_groups_wait<0>();
      if (lane == 0) barrier_arrive(empty + released);

      if (block >= piece.tiles) return;
      float* out = slot_of(p, piece, 0) + block * kBlockRows + half * 32 + g;
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int token = n * 4 + t;
            if (token < p.tokens)
              out[token * p.s.group_rows + m * 16 + h * 8] =
                  256.f * acc[m][n * 4 + 2 * h] + acc[m][n * 4 + 2 * h + 1];
          }
    });
  }
#endif
}

}  // namespace aqlm
