// cuda.additive.mma: y = x W^T for up to 64 tokens (Hopper: 8), codebook entries straight into MMA
// fragments.
//
// nbits <= 8, G = 8, B in {1, 2, 4}. Weights are the A operand, tokens the N columns, and the
// codebooks are additional K with the same activations, so nothing is added outside the MMA.
//
//   exact: m16n8k16; a lookup is 16 bytes = 8 weights of one row = half the A registers of two MMAs
//   int8:  m16n8k32; a lookup is 8 bytes = half the A registers of one MMA; activations are int16
//          split into two int8 columns (high, low), accumulated exactly in int32
//
// With 4 or more column tiles the tensor cores would be the limit: exact mode then adds the two
// codebooks of a unit in 16 bits first (the rounding of a dequantized weight) and halves the MMAs.
//
//   A fragment of lane (g, t), rows g and g + 8:     codebook in shared memory, 128 bytes an entry:
//     regs 0, 2: entry of (row g,     vector t)        exact: 8 copies x 16 bytes
//     regs 1, 3: entry of (row g + 8, vector t)        int8: 16 copies x 8 bytes
//   K is permuted within the 4 vectors of a step; the B fragment of lane (g, t) is then simply
//   vector t of token g: one 16-byte (int8: 8-byte) read per step.
//
// A warp owns a 64-row block and walks units of K (16 bytes of codes per lane); kDepth units are in
// flight in registers. Warps of a CTA: `group_rows / 64` along rows, the rest along K.
// Bytes of shared memory per weight and codebook: 2 exact, 1 int8. Architectures sm_80+.
// H200, 2026-11-22, 2x8 g8 28672 x 8192: M = 4 exact 52 us, int8 35 us; M = 8 58 us.
#pragma once

#include "decode/additive.cuh"
#include "streamk.cuh"
#include "tune.h"

namespace aqlm {

constexpr int kMmaBookBytes = 256 * 128;

template <typename T, bool kInt8>
struct MmaTraits {
  using Acc = float;
  using Entry = uint4;     // 8 weights
  using Fragment = uint4;  // 8 activations of one token
  static constexpr int kTokensPerTile = 8;
  static __device__ __forceinline__ Entry lookup(const unsigned char* a) {
    return *reinterpret_cast<const uint4*>(a);
  }
  static __device__ __forceinline__ Entry add(Entry a, Entry b) {
    return make_uint4(add2(a.x, b.x, T()), add2(a.y, b.y, T()), add2(a.z, b.z, T()),
                      add2(a.w, b.w, T()));
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], Entry lo, Entry hi, Fragment x) {
    const uint32_t a0[4] = {lo.x, hi.x, lo.y, hi.y}, a1[4] = {lo.z, hi.z, lo.w, hi.w};
    mma_16816(c, a0, x.x, x.y, T());
    mma_16816(c, a1, x.z, x.w, T());
  }
};
template <typename T>
struct MmaTraits<T, true> {
  using Acc = int;
  using Entry = uint2;
  using Fragment = uint2;
  static constexpr int kTokensPerTile = 4;
  static __device__ __forceinline__ Entry lookup(const unsigned char* a) {
    return *reinterpret_cast<const uint2*>(a);
  }
  static __device__ __forceinline__ void multiply(int (&c)[4], Entry lo, Entry hi, Fragment x) {
    const uint32_t a[4] = {lo.x, hi.x, lo.y, hi.y};
    mma_16832(c, a, x.x, x.y);
  }
};

// Copies one part's codebooks to shared memory, every entry to all of its bank columns; by threads
// 0 .. threads - 1.
template <typename T, int B, bool kInt8, typename Params>
__device__ __forceinline__ void fill_books(const Params& p, int part, unsigned char* smem,
                                           int threads = blockDim.x) {
  const int entries = p.a.entries();
  for (int i = threadIdx.x; i < B * 256; i += threads) {
    const int e = i % 256, index = (part * B + i / 256) * entries + e;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (e < entries) {
      if constexpr (kInt8) {
        const uint2 h = reinterpret_cast<const uint2*>(p.aux + kAuxHeader)[index];
        v = make_uint4(h.x, h.y, h.x, h.y);
      } else {
        v = static_cast<const uint4*>(p.codebooks)[index];
      }
    }
    uint4* row = reinterpret_cast<uint4*>(smem) + i * 8;
#pragma unroll
    for (int c = 0; c < 8; ++c) row[(c + e) & 7] = v;
  }
}

// kTiles: MMA column tiles (8 tokens exact, 4 tokens int8).
template <typename T, int B, int kTiles, bool kInt8>
__global__ void __launch_bounds__(tune::mma_warps(B) * 32, tune::mma_ctas_per_sm(B, kTiles))
mma_kernel(const __grid_constant__ MatmulParams p) {
  using Traits = MmaTraits<T, kInt8>;
  using Fragment = typename Traits::Fragment;
  constexpr int kDepth = tune::mma_depth(B, kTiles);
  constexpr bool kSumBooks = !kInt8 && B > 1 && kTiles >= 4;
  constexpr int kLaneMask = kInt8 ? 15 : 7;
  constexpr int kLaneBytes = kInt8 ? 8 : 16;
  extern __shared__ __align__(1024) unsigned char smem[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row_warps = p.s.group_rows / kBlockRows;
  const int row_warp = warp % row_warps, k_warp = warp / row_warps, k_warps = p.s.lanes;
  const uint32_t lane_offset = (lane & kLaneMask) * kLaneBytes;
  const uint32_t K = p.a.in_features(), x_stride = p.x_stride;
  unsigned char* ring = smem + B * kMmaBookBytes;
  int loaded_part = -1;
  grid_dependents_start();

  for_each_piece(p.a, p.s, [&](const Piece& piece) {
    const bool active = row_warp < piece.tiles;
    const int u0 = piece.u0 + k_warp, u_end = active ? piece.u1 : 0;
    // The lane's codes of the next unit to fetch, and the way to the one after it, in 16 bytes.
    const uint32_t code_stride = k_warps * p.s.tiles * (kUnitBytes / 16);
    auto code_at = [&](int u) {
      return (u * p.s.tiles + piece.tile + row_warp) * uint32_t(kUnitBytes / 16) + lane;
    };
    uint32_t codes = code_at(u0);
    const uint32_t codes_end = code_at(u_end);
    typename Traits::Acc acc[4][kTiles][4] = {};

    // This lane's 16 bytes of the i-th unit of this warp.
    auto slot = [&](int i) {
      return reinterpret_cast<uint4*>(ring + (warp * kDepth + i % kDepth) * kUnitBytes) + lane;
    };
    auto fetch = [&](int i) {
      if (codes < codes_end) copy_async(slot(i), p.packed + size_t(codes) * 16);
      codes += code_stride;
      copy_commit();
    };
    auto load_x = [&](int step, Fragment (&x)[kTiles]) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if constexpr (kInt8) {
          x[n] = load_cached8(p.x_fragments + (size_t(step * kTiles + n) * 32 + lane) * 8);
        } else {
          const uint32_t row = min(n * 8 + g, p.tokens - 1);
          const uint32_t k = step * 32 + t * 8;
          x[n] = make_uint4(0, 0, 0, 0);
          if (k < K) x[n] = load_cached(static_cast<const T*>(p.x) + (row * x_stride + k));
        }
      }
    };
    auto multiply = [&](int u, uint4 c) {
      const uint32_t w[4] = {c.x, c.y, c.z, c.w};
      Fragment x[kTiles];
      auto entry = [&](int i) {  // of byte i of the lane's codes
        const int book = B == 1 ? 0 : B == 2 ? i / 8 : (u & 1) * 2 + i / 8;
        return Traits::lookup(smem + book * kMmaBookBytes +
                              entry_offset<7>(w[i / 4], i & 3, lane_offset));
      };
#pragma unroll
      for (int i = 0; i < (kSumBooks ? 8 : 16); i += 2) {
        if constexpr (kTiles == 8) __syncwarp();  // else lookups move up and registers spill
        if (i == 0 || (B == 1 && i == 8)) load_x(B == 1 ? 2 * u + i / 8 : B == 2 ? u : u / 2, x);
        auto lo = entry(i), hi = entry(i + 1);
        if constexpr (kSumBooks) {
          lo = Traits::add(lo, entry(i + 8));
          hi = Traits::add(hi, entry(i + 9));
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) Traits::multiply(acc[i % 8 / 2][n], lo, hi, x[n]);
      }
    };
    auto write = [&] {
      float* out = slot_of(p, piece, k_warp) + row_warp * kBlockRows + g;
      auto put = [&](int token, int row, float v) {
        if (token < p.tokens) out[token * p.s.group_rows + row] = v;
      };
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const auto lo = acc[m][n][2 * h], hi = acc[m][n][2 * h + 1];
            if constexpr (kInt8) {
              put(n * 4 + t, m * 16 + h * 8, 256.f * lo + hi);
            } else {
              put(n * 8 + 2 * t, m * 16 + h * 8, lo);
              put(n * 8 + 2 * t + 1, m * 16 + h * 8, hi);
            }
          }
    };

#pragma unroll
    for (int i = 0; i < kDepth - 1; ++i) fetch(i);
    if (piece.part != loaded_part) {
      fill_books<T, B, kInt8>(p, piece.part, smem);
      if (loaded_part < 0) grid_dependency_wait();
      loaded_part = piece.part;
      __syncthreads();
    }
    for (int i = 0, u = u0; u < u_end; ++i, u += k_warps) {
      fetch(i + kDepth - 1);
      copy_wait<kDepth - 1>();
      multiply(u, *slot(i));
    }
    if (active) write();
  });
}

}  // namespace aqlm
