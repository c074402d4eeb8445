// cuda.additive.wgmma_int8: y = x W^T in int8 for 2 .. 32 tokens a pass on Hopper's warpgroup MMA.
//
// nbits <= 8, G = 8, B in {1, 2}. A codebook lookup is 8 bytes = 8 weights of a row = half the A
// registers of one MMA of K = 32, read straight into them: two 4-byte loads, because registers of
// one row are not neighbours. Codebooks are additional K with the same activations: nothing is
// added outside the MMA. Half the shared-memory bytes of cuda.additive.wgmma.
//
//   entry: | elements 0 .. 3, 32 copies | elements 4 .. 7, 32 copies |                256 bytes
//     A lane reads its own bank, one PRMT makes the address (see columns.cuh).
//   x image (fragments.cuh), a step: [half c][column][vector t] words = elements 4c .. 4c + 3 of
//     vector t; column 2m = high bytes of token m, 2m + 1 = low bytes
//   warps 0 .. 7: MMAs of a 64-row block each, 4 MMA row tiles; warp 8 (of a warpgroup that gives
//     its registers away): bulk copies of a unit's codes and x into a ring of stages
//
// The entries of a unit are loaded when the MMAs of the last but one have finished, and by loads:
// ptxas moves register copies to before the wait for the MMAs that still read those registers.
// H200, 2026-11-29, 28672 x 8192, 2x8: M = 8 36.5 us, 16 41.6, 32 57.0; 1x8: M = 16 25.5.
// Architecture sm_90a only.
#pragma once

#include "decode/additive.cuh"
#include "columns.cuh"
#include "streamk.cuh"
#include "wgmma_ptx.cuh"

namespace aqlm {

constexpr int kWg8Warps = 8;   // that multiply
constexpr int kWg8Stages = 8;  // units in flight
constexpr int kWg8BookBytes = 256 * 256;

// Threads that the registers are divided by: up to 16 tokens a launch has 128 for a thread instead
// of 168, which leaves room for the kernel that adds its sums (sum_joined.cuh).
AQLM_HD constexpr int wg8_bound(int columns) { return (kWg8Warps + (columns == 32 ? 5 : 4)) * 32; }
AQLM_HD constexpr int wg8_steps(int codebooks) { return codebooks == 1 ? 2 : 1; }  // of a unit
AQLM_HD constexpr int wg8_x_bytes(int codebooks, int columns) {
  return wg8_steps(codebooks) * columns * 32;
}
AQLM_HD constexpr int wg8_stage_bytes(int codebooks, int columns) {
  return wg8_x_bytes(codebooks, columns) + kWg8Warps * kUnitBytes;
}
AQLM_HD constexpr int wg8_smem(int codebooks, int columns) {
  return codebooks * kWg8BookBytes + kWg8Stages * (wg8_stage_bytes(codebooks, columns) + 16);
}

// 4 bytes at a 16-bit table offset (see kColumnTableAt) plus a constant.
template <int kOffset>
__device__ __forceinline__ uint32_t table_word(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(at), "n"(kOffset + 1024) : "memory");
  return v;
}

// kColumns: of the MMA, two a token (16, 32 or 64).
template <typename T, int B, int kColumns>
__global__ void __launch_bounds__(wg8_bound(kColumns), 1)
wgmma_int8_kernel(const __grid_constant__ MatmulParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kTiles = kBlockRows / 16;
  constexpr int kX = wg8_x_bytes(B, kColumns), kStage = wg8_stage_bytes(B, kColumns);
  constexpr int kXStep = kColumns * 32;
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const stages = smem + B * kWg8BookBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + kWg8Stages * kStage);
  uint64_t* const empty = full + kWg8Stages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) mbar::init_ring<kWg8Stages>(full, empty, kWg8Warps);
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
      const int bytes = min(piece.tiles, kWg8Warps) * kUnitBytes;
      auto copy_x = [&](int u, int stage) {
        const int step = wg8_steps(B) * u;
        mbar::bulk_copy(stages + stage * kStage, p.x_fragments + size_t(step) * kXStep, kX,
                        full + stage);
      };
      auto copy_codes = [&](int stage) {
        mbar::expect(full + stage, kX + bytes);
        mbar::bulk_copy(stages + stage * kStage + kX, codes, bytes, full + stage);
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
        if (produced >= kWg8Stages) mbar::wait(empty + ring.stage, ring.phase ^ 1);
        copy_codes(ring.stage);
        copy_x(u, ring.stage);
      }
    });
  } else {
    registers_up<kColumns == 32 ? 176 : 240>();
    const int g = lane / 4, t = lane % 4;
    const uint32_t column = (smem_address(smem) & 0xffff0000) | lane * 4;
    if ((smem_address(smem) & 0xffff) != kColumnTableAt) __trap();
    int loaded_part = -1;
    Ring<kWg8Stages> ring, ahead;  // of the unit that is multiplied; of the codes that are read
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const int count = piece.u1 - piece.u0;
      if (piece.part != loaded_part) {
        if (loaded_part >= 0) consumers_sync<kWg8Warps * 32>();
        const int entries = p.a.entries();
        for (int i = threadIdx.x; i < B * 256; i += kWg8Warps * 32) {
          const int e = i % 256, index = (piece.part * B + i / 256) * entries + e;
          uint2 v = make_uint2(0, 0);
          if (e < entries) v = reinterpret_cast<const uint2*>(p.aux + kAuxHeader)[index];
          uint4* const to = reinterpret_cast<uint4*>(smem) + i * 16;
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            to[(c + e) & 7] = make_uint4(v.x, v.x, v.x, v.x);
            to[((c + e) & 7) + 8] = make_uint4(v.y, v.y, v.y, v.y);
          }
        }
        loaded_part = piece.part;
        consumers_sync<kWg8Warps * 32>();
      }
      // Warps past the part's last row block repeat it; they write nothing.
      const uint32_t code_offset = kX + min(warp, piece.tiles - 1) * kUnitBytes + lane * 16;
      int acc[kTiles][kColumns / 2] = {};
      auto read_codes = [&] {
        mbar::wait(full + ahead.stage, ahead.phase);
        const uint4 c =
            *reinterpret_cast<const uint4*>(stages + ahead.stage * kStage + code_offset);
        ahead.advance();
        return c;
      };
      // A registers of row tile m, first half of the unit (a codebook, or of one codebook a step)
      // and second: rows 2m and 2m + 1 of the lane are two bytes of words x, y and of z, w.
      auto lookup = [&](uint4 c, uint32_t (&r)[kTiles][8]) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          constexpr int kSecond = B == 1 ? 0 : kWg8BookBytes;
          const uint32_t w = m > 1 ? c.y : c.x, w2 = m > 1 ? c.w : c.z, byte = m % 2 * 2;
          const uint32_t lo = __byte_perm(w, column, 0x7604 | byte << 4);
          const uint32_t hi = __byte_perm(w, column, 0x7604 | (byte + 1) << 4);
          const uint32_t lo2 = __byte_perm(w2, column, 0x7604 | byte << 4);
          const uint32_t hi2 = __byte_perm(w2, column, 0x7604 | (byte + 1) << 4);
          r[m][0] = table_word<0>(lo), r[m][1] = table_word<0>(hi);
          r[m][2] = table_word<128>(lo), r[m][3] = table_word<128>(hi);
          r[m][4] = table_word<kSecond>(lo2), r[m][5] = table_word<kSecond>(hi2);
          r[m][6] = table_word<kSecond + 128>(lo2), r[m][7] = table_word<kSecond + 128>(hi2);
        }
      };

      // The entries of the next unit are read while this unit's MMAs run.
      uint32_t a[2][kTiles][8];
      uint4 c = read_codes();
      lookup(c, a[0]);
      if (count > 1) c = read_codes();
      int released = ring.stage;
      auto step = [&](const int d, int i) {  // d: constant once inlined
        const uint64_t x = core_matrices(stages + ring.stage * kStage, kColumns * 16, 128);
        const uint64_t second = B == 1 ? x + (kXStep >> 4) : x;
        mma_fence();
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          wgmma(acc[m], a[d][m], x);
          wgmma(acc[m], a[d][m] + 4, second);
        }
        mma_group_commit();
        mma_groups_wait<1>();  // unit i - 1
        if (i > 0 && lane == 0) mbar::arrive(empty + released);
        released = ring.stage;
        ring.advance();
        lookup(c, a[d ^ 1]);  // unit i + 1; past the end: dropped
        if (i + 2 < count) c = read_codes();
      };
      int i = 0;
      for (; i + 1 < count; i += 2) {
        step(0, i);
        step(1, i + 1);
      }
      if (i < count) step(0, i);
      mma_groups_wait<0>();
      if (lane == 0) mbar::arrive(empty + released);

      if (warp >= piece.tiles) return;
      float* out = slot_of(p, piece, 0) + warp * kBlockRows + g;
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
