// cuda.additive.wgmma: y = x W^T for 9 .. 128 tokens a pass on Hopper's warpgroup MMA.
//
// nbits <= 8, G = 8, B in {1, 2, 4}. As in cuda.additive.mma a codebook lookup (16 bytes,
// replicated tables) is half the A registers of two MMAs; here the tokens are the B operand in
// shared memory, where all warps share them, and the MMAs run while the next lookups are under way.
// Weights are decoded once for up to 128 tokens.
//
//   x image (x_image_kernel), one K step of 32 columns: [pair c = 0..3][token][vector t = 0..3]
//     = elements 2c, 2c + 1 of vector t: the columns that lane t holds of A, as 8 x 16-byte core
//     matrices without swizzle
//   8 or 16 warps: MMAs of a 64-row block each, 4 MMA row tiles; 16 warps or 128 tokens: of half
//   one more (of a warpgroup that gives its registers away): bulk copies of a unit's codes (one run
//     of neighbouring row blocks) and x into a ring of stages
//
// Codebooks are added in 16 bits (the rounding of a dequantized weight; B = 1: exact): of four, one
// MMA instead of two, and x is read once.
// H200, 2x8 28672 x 8192, 2026-11-28: M = 32 65 us, 64 83; M = 16 62 with 32 columns (4096 x 14336
// and 4096 x 4096: 21.4 and 11.9; with 16, 2026-11-29, 18.9 and 10.9: docs/notes/cuda.md).
// Architecture sm_90a only.
#pragma once

#include "decode/additive.cuh"
#include "mma.cuh"
#include "wgmma_ptx.cuh"

namespace aqlm {

constexpr int kWgStages = 8;  // cells in flight: one unit, of four codebooks two (one K step)

// Warps that multiply: 16 with half a row block each where registers allow (2x8, 32 columns: 62.3
// us against 65.7 with 8; 16 columns: a step of sixteen 2768 us against 2682 with 8, which read
// codes once instead of twice).
AQLM_HD constexpr int wg_warps(int codebooks, int tokens) {
  return tokens == 32 && codebooks <= 2 || tokens == 16 && codebooks == 1 ? 16 : 8;
}
// Threads that the registers are divided by. Eight warps of 16 tokens: 128 for a thread instead of
// 168, which leaves room for the kernels that add the sums (sum_joined.cuh).
AQLM_HD constexpr int wg_bound(int codebooks, int tokens) {
  const int warps = wg_warps(codebooks, tokens);
  return (warps + (tokens == 16 && warps == 8 ? 5 : 4)) * 32;
}
AQLM_HD constexpr int wg_ksteps(int codebooks) { return codebooks == 1 ? 2 : 1; }  // of a cell
AQLM_HD constexpr int wg_units(int codebooks) { return codebooks == 4 ? 2 : 1; }
AQLM_HD constexpr int wg_x_bytes(int codebooks, int tokens) {
  return wg_ksteps(codebooks) * tokens * 64;
}
AQLM_HD constexpr int wg_stage_bytes(int codebooks, int tokens) {
  return wg_x_bytes(codebooks, tokens) +
         wg_units(codebooks) * tune::wgmma_group_rows(tokens) / kBlockRows * kUnitBytes;
}
AQLM_HD constexpr int wg_smem(int codebooks, int tokens) {
  return codebooks * kMmaBookBytes + kWgStages * (wg_stage_bytes(codebooks, tokens) + 16);
}

// Grid: (K steps / 8, ceil(padded tokens / 32), passes); one thread transposes 4 vectors of a
// token.
template <typename T>
__global__ void __launch_bounds__(256)
x_image_kernel(const __grid_constant__ MatmulParams p, int padded_tokens) {
  const int token0 = blockIdx.z * padded_tokens;
  const int m = blockIdx.y * 32 + threadIdx.x % 32, step = blockIdx.x * 8 + threadIdx.x / 32;
  const int K = p.a.in_features();
  grid_dependents_start();
  grid_dependency_wait();
  if (m >= padded_tokens || step >= p.s.x_steps) return;
  uint4 v[4] = {};
  const T* x = static_cast<const T*>(p.x) + (token0 + m) * p.x_stride + step * 32;
#pragma unroll
  for (int t = 0; t < 4; ++t)
    if (token0 + m < p.tokens && step * 32 + t * 8 < K) v[t] = load_cached(x + t * 8);
  uint4* out = reinterpret_cast<uint4*>(p.x_fragments) +
               (size_t(blockIdx.z) * p.s.x_steps + step) * 4 * padded_tokens + m;
  out[0] = make_uint4(v[0].x, v[1].x, v[2].x, v[3].x);
  out[padded_tokens] = make_uint4(v[0].y, v[1].y, v[2].y, v[3].y);
  out[2 * padded_tokens] = make_uint4(v[0].z, v[1].z, v[2].z, v[3].z);
  out[3 * padded_tokens] = make_uint4(v[0].w, v[1].w, v[2].w, v[3].w);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "Hopper needs its own instructions: build for 9.0a, not 9.0"
#endif

// Sums of an MMA row tile into a slot; `out` is the lane's first row.
template <int kTokens>
__device__ __forceinline__ void put_partials(float* out, int group_rows, int tokens,
                                             const float (&acc)[kTokens / 2]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = n * 8 + 2 * t + i % 2;
      if (token < tokens) out[token * group_rows + i / 2 * 8] = acc[n * 4 + i];
    }
}

// The same as results. Lanes of rows g and g ^ 1 exchange, so that each stores two neighbouring
// rows of a token and a warp stores whole sectors.
template <typename T, int kTokens>
__device__ __forceinline__ void store_rows(const MatmulParams& p, const Piece& piece, int row0,
                                           const float (&acc)[kTokens / 2]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int token0 = piece.pass * kTokens, tokens = min(kTokens, p.tokens - token0);
  const bool odd = g % 2;
  T* const y = static_cast<T*>(p.y) + piece.row;
  float scale[2], bias[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int n = piece.row + min(row0 + g + h * 8, piece.rows - 1);
    scale[h] = to_float(__ldg(static_cast<const T*>(p.scales) + n));
    bias[h] = p.bias == nullptr ? 0.f : to_float(__ldg(static_cast<const T*>(p.bias) + n));
  }
  const int row = row0 + g + (odd ? 7 : 0);
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float lo = acc[n * 4 + i] * scale[0] + bias[0];
      const float hi = acc[n * 4 + 2 + i] * scale[1] + bias[1];
      const float other = __shfl_xor_sync(~0u, odd ? lo : hi, 4);
      const T first = from_float<T>(odd ? other : lo);
      const T second = from_float<T>(odd ? hi : other);
      const int token = n * 8 + 2 * t + i;
      if (token >= tokens) continue;
      T* to = y + size_t(token0 + token) * p.a.out_groups() + row;
      if (row + 1 < piece.rows && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
        *reinterpret_cast<uint32_t*>(to) = uint32_t(*reinterpret_cast<const uint16_t*>(&first)) |
                                           uint32_t(*reinterpret_cast<const uint16_t*>(&second))
                                               << 16;
      } else {
        if (row < piece.rows) to[0] = first;
        if (row + 1 < piece.rows) to[1] = second;
      }
    }
}

// kTokens: columns of the MMA (16, 32, 64 or 128).
template <typename T, int B, int kTokens>
__global__ void __launch_bounds__(wg_bound(B, kTokens), 1)
wgmma_kernel(const __grid_constant__ MatmulParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Traits = MmaTraits<T, false>;
  constexpr int kWgWarps = wg_warps(B, kTokens), kSteps = wg_ksteps(B);
  constexpr int kTiles = tune::wgmma_group_rows(kTokens) / (kWgWarps * 16);
  constexpr int kX = wg_x_bytes(B, kTokens), kStage = wg_stage_bytes(B, kTokens);
  constexpr int kUnits = wg_units(B);  // of a cell, each with so many bytes of codes
  constexpr int kCodes = tune::wgmma_group_rows(kTokens) / kBlockRows * kUnitBytes;
  constexpr int kGroups = kTiles * kSteps * kUnits;  // groups of lookups in a cell
  constexpr int kSlots = B == 4 ? 2 : kTiles;        // A registers of so many MMA groups
  constexpr int kBooks = B == 1 ? 1 : 2;             // codebooks of a group
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const stages = smem + B * kMmaBookBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + kWgStages * kStage);
  uint64_t* const empty = full + kWgStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) mbar::init_ring<kWgStages>(full, empty, kWgWarps);
  grid_dependents_start();
  __syncthreads();

  if (warp >= kWgWarps) {
    registers_down<24>();
    if (threadIdx.x != kWgWarps * 32) return;
    Ring<kWgStages> ring;
    bool waited = false;
    int produced = 0;
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const size_t unit_stride = size_t(p.s.tiles) * kUnitBytes;
      const uint8_t* x_image = p.x_fragments + size_t(piece.pass) * p.s.x_steps * kTokens * 64;
      const uint8_t* codes =
          p.packed + kUnits * piece.u0 * unit_stride + size_t(piece.tile) * kUnitBytes;
      const int bytes = min(piece.tiles * kUnitBytes, kCodes);
      auto copy_x = [&](int u, int stage) {
        mbar::bulk_copy(stages + stage * kStage, x_image + size_t(u * kSteps) * kTokens * 64, kX,
                        full + stage);
      };
      auto copy_codes = [&](int stage) {
        mbar::expect(full + stage, kX + kUnits * bytes);
#pragma unroll
        for (int i = 0; i < kUnits; ++i, codes += unit_stride)
          mbar::bulk_copy(stages + stage * kStage + kX + i * kCodes, codes, bytes, full + stage);
      };
      int u = piece.u0;
      if (!waited) {  // codes do not depend on the previous kernel
        const int first = min(kWgStages, piece.u1 - u);
        for (int i = 0; i < first; ++i) copy_codes(i);
        grid_dependency_wait();
        waited = true;
        for (int i = 0; i < first; ++i, ++u, ++produced, ring.advance()) copy_x(u, i);
      }
      for (; u < piece.u1; ++u, ++produced, ring.advance()) {
        if (produced >= kWgStages) mbar::wait(empty + ring.stage, ring.phase ^ 1);
        copy_codes(ring.stage);
        copy_x(u, ring.stage);
      }
    });
  } else {
    // Of what a launch has: 640 threads of 96, 384 of 128 or of 168.
    registers_up<kWgWarps == 16 ? 112 : kTokens == 16 ? 176 : 240>();
    const int g = lane / 4;
    // Lane 0's: the compiler then knows that a warp does not diverge, and keeps addresses of stages
    // and descriptors in uniform registers (16 R2UR less a step of 32 tokens).
    const int own = __shfl_sync(~0u, warp, 0);
    const int block = kTiles == 4 ? own : own / 2, half = kTiles == 4 ? 0 : own % 2;
    const uint32_t lane_offset = lane % 8 * 16;
    int loaded_part = -1;
    Ring<kWgStages> ring, ahead;  // of the unit that is multiplied; of the codes that are read
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const int count = piece.u1 - piece.u0;
      if (piece.part != loaded_part) {
        if (loaded_part >= 0) consumers_sync<kWgWarps * 32>();
        fill_books<T, B, false>(p, piece.part, smem, kWgWarps * 32);
        loaded_part = piece.part;
        consumers_sync<kWgWarps * 32>();
      }
      // Warps past the part's last row block repeat it; they write nothing.
      const uint32_t code_offset = kX + min(block, piece.tiles - 1) * kUnitBytes + lane * 16;
      float acc[kTiles][kTokens / 2] = {};
      struct Codes {
        uint4 unit[kUnits];
      };
      auto read_codes = [&] {
        mbar::wait(full + ahead.stage, ahead.phase);
        const unsigned char* from = stages + ahead.stage * kStage + code_offset;
        Codes c;
#pragma unroll
        for (int i = 0; i < kUnits; ++i)
          c.unit[i] = *reinterpret_cast<const uint4*>(from + i * kCodes);
        ahead.advance();
        return c;
      };
      // Group n of a cell: MMA row tile m, K step n / kTiles or (B = 4) codebooks n % 2.
      auto tile_of = [](int n) { return B == 4 ? n / 2 : n % kTiles; };
      // Rows 2m and 2m + 1 of the lane are two bytes of one word.
      auto lookup = [&](int n, const Codes& codes, uint4 (&e)[2 * kBooks]) {
        const int m = tile_of(n), byte = m % 2 * 2;
        const bool high = kTiles == 2 ? half : m > 1;
        const uint4 c = codes.unit[n % kUnits];
        const unsigned char* book = smem + n % kUnits * 2 * kMmaBookBytes;
        const uint32_t w[2] = {high ? c.y : c.x, high ? c.w : c.z};
#pragma unroll
        for (int i = 0; i < 2 * kBooks; ++i)
          e[i] = Traits::lookup(book + i / 2 * kMmaBookBytes +
                                entry_offset<7>(w[B == 1 ? n / kTiles : i / 2], byte + i % 2,
                                                lane_offset));
      };

      // The lookups of two further groups are under way while this group's MMAs are issued.
      uint32_t a[kSlots][8];
      uint4 e[2][2 * kBooks];
      Codes c = read_codes(), next = c, after = c;
      if (count > 1) next = read_codes();
      lookup(0, c, e[0]);
      lookup(1, c, e[1]);
      int released = ring.stage;
      for (int i = 0; i < count; ++i) {
        if (i + 2 < count) after = read_codes();
        const uint64_t x = core_matrices(stages + ring.stage * kStage, kTokens * 16, 128);
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
          const int m = tile_of(n), step = B == 1 ? n / kTiles : 0;
          const bool first = n % kUnits == 0, last = n % kUnits == kUnits - 1;
          if (first) mma_groups_wait<kSlots - 1>();
          if (n == (kSlots - 1) * kUnits && i > 0 && lane == 0) mbar::arrive(empty + released);
          uint4 lo = e[n % 2][0], hi = e[n % 2][1];
          if constexpr (B > 1) {
            lo = Traits::add(lo, e[n % 2][2]);
            hi = Traits::add(hi, e[n % 2][3]);
          }
          uint32_t(&r)[8] = a[m % kSlots];
          if (!first) {
            lo = Traits::add(lo, make_uint4(r[0], r[2], r[4], r[6]));
            hi = Traits::add(hi, make_uint4(r[1], r[3], r[5], r[7]));
          }
          r[0] = lo.x, r[1] = hi.x, r[2] = lo.y, r[3] = hi.y;
          r[4] = lo.z, r[5] = hi.z, r[6] = lo.w, r[7] = hi.w;
          if (n + 2 < kGroups) lookup(n + 2, c, e[n % 2]);
          else lookup(n + 2 - kGroups, next, e[n % 2]);  // past the end: dropped
          if (!last) continue;
          mma_fence();
          const uint64_t at = x + (step * 4 * kTokens * 16 >> 4);
          wgmma(acc[m], r, at, T());
          wgmma(acc[m], r + 4, at + (2 * kTokens * 16 >> 4), T());
          mma_group_commit();
        }
        released = ring.stage;
        ring.advance();
        c = next;
        next = after;
      }
      mma_groups_wait<0>();
      if (lane == 0) mbar::arrive(empty + released);

      if (block >= piece.tiles) return;
      const int row = block * kBlockRows + half * 32;
      if (B == 4 || piece.item >= 0) {  // of four codebooks all items are cut: registers
        float* const out = slot_of(p, piece, 0) + row + g;
        const int tokens = min(kTokens, p.tokens - piece.pass * kTokens);
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
          put_partials<kTokens>(out + m * 16, p.s.group_rows, tokens, acc[m]);
      } else {
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
          store_rows<T, kTokens>(p, piece, row + m * 16, acc[m]);
      }
    });
  }
#endif
}

}  // namespace aqlm
