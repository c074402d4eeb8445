// cuda.additive.mma_ring: y = x W^T for 2 .. 16 tokens with one or two codebooks, mma.sync, Hopper.
//
// nbits <= 8, G = 8, B in {1, 2}. The lookups and MMAs of cuda.additive.mma; codes and activations
// come through a ring of stages in shared memory. A warp keeps the activations of a unit in
// registers for its four row tiles: 8 wavefronts of shared memory a K step of 64 rows. The
// warpgroup MMA of cuda.additive.wgmma reads them for every 64 x 16 weights anew, in 1.5 cycles of
// shared memory for each 128 bytes (32 columns: 12 cycles of the 16 of the MMA).
//
//   entry: | codebook 0: 8 copies of 16 bytes | codebook 1 |      256 bytes
//     Lanes of a quarter warp read eight copies, one PRMT makes the address (see columns.cuh).
//   stage: | x of a K step: [token][32 columns] as they are | codes of 8 row blocks |
//     Lane (g, t) of an MMA takes vector t of token g (mma.cuh): 16 bytes at 16 * lane.
//   warps 0 .. 7: a 64-row block each; warp 8, of a warpgroup that gives its registers away: copies
//
// Two codebooks are added in 16 bits (the rounding of a dequantized weight).
// H200, 2026-11-29, 28672 x 8192, 2x8: M = 4 47.0 us, 16 47.7 (wgmma 60.9, with MMAs of 16 columns
// 54.5), 94 % of the shared-memory rate.
#pragma once

#include "columns.cuh"
#include "mma.cuh"
#include "wgmma_ptx.cuh"

namespace aqlm {

constexpr int kRingTokens = tune::kRingTokens;
static_assert(kRingTokens == 16);  // two MMA column tiles
constexpr int kRingWarps = 8;      // that multiply
constexpr int kRingStages = 8;     // units in flight
constexpr int kRingTableBytes = 256 * 256;
constexpr int kRingXStep = kRingTokens * 64;

AQLM_HD constexpr int ring_steps(int codebooks) { return codebooks == 1 ? 2 : 1; }  // of a unit
AQLM_HD constexpr int ring_stage_bytes(int codebooks) {
  return ring_steps(codebooks) * kRingXStep + kRingWarps * kUnitBytes;
}
AQLM_HD constexpr int ring_smem(int codebooks) {
  return kRingTableBytes + kRingStages * (ring_stage_bytes(codebooks) + 16);
}

// 16 bytes at a 16-bit table offset (see kColumnTableAt) plus a constant.
template <int kOffset>
__device__ __forceinline__ uint4 table_quad(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4 + %5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at), "n"(kOffset + 1024)
               : "memory");
  return v;
}

template <typename T, int B>
__global__ void __launch_bounds__((kRingWarps + 4) * 32, 1)
mma_ring_kernel(const __grid_constant__ MatmulParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kTiles = kBlockRows / 16, kSteps = ring_steps(B);
  constexpr int kX = kSteps * kRingXStep, kStage = ring_stage_bytes(B);
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const stages = smem + kRingTableBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + kRingStages * kStage);
  uint64_t* const empty = full + kRingStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < kRingStages) {  // full: lanes that copy x, and one more for codes
    mbar::init(full + threadIdx.x, 33);
    mbar::init(empty + threadIdx.x, kRingWarps * mbar::kWarpArrivals);
  }
  mbar::init_fence();
  grid_dependents_start();
  __syncthreads();

  if (warp >= kRingWarps) {
    registers_down<40>();
    if (warp > kRingWarps) return;
    Ring<kRingStages> ring;
    bool waited = false;
    int produced = 0;
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const size_t unit_stride = size_t(p.s.tiles) * kUnitBytes;
      const uint8_t* codes = p.packed + piece.u0 * unit_stride + size_t(piece.tile) * kUnitBytes;
      const int bytes = min(piece.tiles, kRingWarps) * kUnitBytes;
      // Vector lane % 4 of a K step of tokens lane / 4 and lane / 4 + 8; zeros past K and M.
      auto copy_x = [&](int u, int stage) {
        const T* const x = static_cast<const T*>(p.x);
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const int k = (u * kSteps + s) * 32 + lane % 4 * 8, m = n * 8 + lane / 4;
            const bool valid = k < p.a.in_features() && m < p.tokens;
            copy_async_or_zero(stages + stage * kStage + s * kRingXStep + n * 512 + lane * 16,
                               valid ? x + m * p.x_stride + k : x, valid);
          }
        mbar::arrive_after_copies(full + stage);
      };
      auto copy_codes = [&](int stage) {
        if (lane == 0) {
          mbar::expect(full + stage, bytes);
          mbar::bulk_copy(stages + stage * kStage + kX, codes, bytes, full + stage);
        }
        codes += unit_stride;
      };
      int u = piece.u0;
      if (!waited) {  // codes do not depend on the previous kernel
        const int first = min(kRingStages, piece.u1 - u);
        for (int i = 0; i < first; ++i) copy_codes(i);
        grid_dependency_wait();
        waited = true;
        for (int i = 0; i < first; ++i, ++u, ++produced, ring.advance()) copy_x(u, i);
      }
      for (; u < piece.u1; ++u, ++produced, ring.advance()) {
        if (produced >= kRingStages) mbar::wait(empty + ring.stage, ring.phase ^ 1);
        copy_codes(ring.stage);
        copy_x(u, ring.stage);
      }
    });
    copy_wait<0>();
  } else {
    registers_up<232>();
    const int g = lane / 4, t = lane % 4;
    const uint32_t column = (smem_address(smem) & 0xffff0000) | lane % 8 * 16;
    if ((smem_address(smem) & 0xffff) != kColumnTableAt) __trap();
    int loaded_part = -1;
    Ring<kRingStages> ring, ahead;  // of the unit that is multiplied; of the codes that are read
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const int count = piece.u1 - piece.u0;
      if (piece.part != loaded_part) {
        if (loaded_part >= 0) consumers_sync<kRingWarps * 32>();
        const int entries = p.a.entries();
        for (int i = threadIdx.x; i < B * 256; i += kRingWarps * 32) {
          const int e = i % 256;
          uint4 v = make_uint4(0, 0, 0, 0);
          if (e < entries)
            v = static_cast<const uint4*>(p.codebooks)[(piece.part * B + i / 256) * entries + e];
          uint4* const to = reinterpret_cast<uint4*>(smem) + e * 16 + i / 256 * 8;
#pragma unroll
          for (int c = 0; c < 8; ++c) to[(c + e) & 7] = v;
        }
        loaded_part = piece.part;
        consumers_sync<kRingWarps * 32>();
      }
      // Warps past the part's last row block repeat it; they write nothing.
      const uint32_t code_offset = kX + min(warp, piece.tiles - 1) * kUnitBytes + lane * 16;
      auto read_codes = [&] {
        mbar::wait(full + ahead.stage, ahead.phase);
        const uint4 c =
            *reinterpret_cast<const uint4*>(stages + ahead.stage * kStage + code_offset);
        ahead.advance();
        return c;
      };
      uint4 x[2][kSteps][2];  // of two units; tokens g and g + 8
      auto load_x = [&](uint4 (&to)[kSteps][2]) {
        const unsigned char* const from = stages + ring.stage * kStage + lane * 16;
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
#pragma unroll
          for (int n = 0; n < 2; ++n)
            to[s][n] = *reinterpret_cast<const uint4*>(from + s * kRingXStep + n * 512);
      };
      // Entries of a row tile: of rows g and g + 8, first half of the unit (a codebook, or of one
      // codebook a step) and second. These rows are two bytes of words x, y and of z, w.
      uint4 e[kTiles][4];
      auto lookup = [&](uint4 c, const int m) {
        constexpr int kSecond = B == 1 ? 0 : 128;
        const uint32_t w = m > 1 ? c.y : c.x, w2 = m > 1 ? c.w : c.z, byte = m % 2 * 2;
        e[m][0] = table_quad<0>(__byte_perm(w, column, 0x7604 | byte << 4));
        e[m][1] = table_quad<0>(__byte_perm(w, column, 0x7604 | (byte + 1) << 4));
        e[m][2] = table_quad<kSecond>(__byte_perm(w2, column, 0x7604 | byte << 4));
        e[m][3] = table_quad<kSecond>(__byte_perm(w2, column, 0x7604 | (byte + 1) << 4));
      };
      float acc[kTiles][2][4] = {};
      auto multiply = [&](const int m, const uint4 (&x)[kSteps][2]) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          uint4 lo = e[m][2 * s], hi = e[m][2 * s + 1];
          if constexpr (B == 2) {
            lo = MmaTraits<T, false>::add(lo, e[m][2]);
            hi = MmaTraits<T, false>::add(hi, e[m][3]);
          }
#pragma unroll
          for (int n = 0; n < 2; ++n) MmaTraits<T, false>::multiply(acc[m][n], lo, hi, x[s][n]);
        }
      };

      // Lookups are two row tiles ahead, codes two units, activations half a unit.
      uint4 c = read_codes(), next = c;
      load_x(x[0]);
      lookup(c, 0);
      lookup(c, 1);
      if (count > 1) next = read_codes();
      auto step = [&](const int d, int i) {  // d: constant once inlined
        const int stage = ring.stage;
        ring.advance();
        uint4 after = next;
        if (i + 2 < count) after = read_codes();
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          if (m < 2) lookup(c, m + 2);
          else lookup(next, m - 2);  // past the end: dropped
          if (m == 2 && i + 1 < count) load_x(x[d ^ 1]);
          multiply(m, x[d]);
        }
        mbar::arrive_warp(empty + stage);
        c = next;
        next = after;
      };
      int i = 0;
      for (; i + 1 < count; i += 2) {
        step(0, i);
        step(1, i + 1);
      }
      if (i < count) step(0, i);

      if (warp >= piece.tiles) return;
      float* const out = slot_of(p, piece, 0) + warp * kBlockRows + g;
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int token = n * 8 + 2 * t + j % 2;
            if (token < p.tokens)
              out[token * p.s.group_rows + m * 16 + j / 2 * 8] = acc[m][n][j];
          }
    });
  }
#endif
}

}  // namespace aqlm
