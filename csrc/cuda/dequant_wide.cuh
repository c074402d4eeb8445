// cuda.additive.dequant for long vectors (G = 16, 32) whose codebooks fit in shared memory.
//
// The codebooks lie there once. The G / 8 lanes of a group share one code and read the 16-byte
// parts of its entry, so that shared memory is read, and the weight written, in whole runs of G
// values. H200, 2026-11-22, 28672 x 8192, 8x8 g32: with the GEMM of 64 tokens 476 us, with entries
// gathered by single lanes through L1 1200.
// Architectures sm_80+.
#pragma once

#include "dequant.cuh"

namespace aqlm {

constexpr int kWideWarps = 16;

// kRound: codebooks are added in pairs in 16 bits (DequantParams::rounded_sum).
template <typename T, int kG, bool kRound>
__global__ void __launch_bounds__(kWideWarps * 32, 1)
dequant_wide_kernel(const __grid_constant__ DequantParams p, int tile0, int tiles) {
  constexpr int kParts = kG / 8, kRowStep = 8 / kParts;
  extern __shared__ __align__(1024) unsigned char smem[];
  const Additive& a = p.a;
  const int B = a.codebooks, entries = a.entries(), book_bytes = entries * kG * sizeof(T);
  const int lane = threadIdx.x % 32, part_of_vector = lane % kParts, group = lane / kParts;
  const int v = group % 4, first_r = group / 4;  // vector of the step, row % 8
  const int kstep0 = p.col0 / (kStepVectors * kG);
  const int ksteps = ceil_div(p.col1, kStepVectors * kG) - kstep0;
  const int all_tiles = a.tile0(a.parts);
  grid_dependents_start();
  grid_dependency_wait();
  for (int part = 0; part < a.parts; ++part) {
    const int first = max(a.tile0(part), tile0), end = min(a.tile0(part + 1), tile0 + tiles);
    if (first >= end) continue;
    __syncthreads();
    const uint4* books = reinterpret_cast<const uint4*>(
        static_cast<const T*>(p.codebooks) + size_t(part) * B * entries * kG);
    for (int i = threadIdx.x; i < B * book_bytes / 16; i += kWideWarps * 32)
      reinterpret_cast<uint4*>(smem)[i] = books[i];
    __syncthreads();
    const int row_end = min(p.row1, a.row0[part + 1]), items = (end - first) * ksteps;
    for (int i = blockIdx.x * kWideWarps + threadIdx.x / 32; i < items;
         i += gridDim.x * kWideWarps) {
      const int tile = first + i / ksteps, kstep = kstep0 + i % ksteps;
      const int k = (kstep * kStepVectors + v) * kG + part_of_vector * 8;
      const bool column = k >= p.col0 && k < p.col1;
#pragma unroll 1
      for (int r = first_r; r < 8; r += kRowStep) {
        const int row = a.row0[part] + (tile - a.tile0(part)) * kBlockRows + r;
        auto codes_of = [&](int b) {  // of eight rows, 8 apart
          const int step = kstep * B + b;
          return __ldg(reinterpret_cast<const uint2*>(
              p.packed + (size_t(step / 2) * all_tiles + tile) * kUnitBytes + (r * 4 + v) * 16 +
              step % 2 * 8));
        };
        auto entry_of = [&](int b, uint2 c, int j) {
          const int code = (j < 4 ? c.x : c.y) >> (j % 4 * 8) & 255;
          return *reinterpret_cast<const uint4*>(smem + b * book_bytes + code * (kG * sizeof(T)) +
                                                 part_of_vector * 16);
        };
        float sum[8][8] = {};  // [row / 8][dimension]
        auto add = [&](int j, uint4 e) {
          float w[8];
          unpack8<T>(e, w);
#pragma unroll
          for (int d = 0; d < 8; ++d) sum[j][d] += w[d];
        };
        uint2 next[2] = {codes_of(0), codes_of(B > 1 ? 1 : 0)};
#pragma unroll 1
        for (int b = 0; b < B; b += 2) {
          const uint2 c0 = next[0], c1 = next[1];
          const bool pair = b + 1 < B;
          if (b + 2 < B) {
            next[0] = codes_of(b + 2);
            if (b + 3 < B) next[1] = codes_of(b + 3);
          }
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const uint4 e0 = entry_of(b, c0, j);
            if constexpr (kRound) {
              uint4 e1 = make_uint4(0, 0, 0, 0);
              if (pair) e1 = entry_of(b + 1, c1, j);
              add(j, MmaTraits<T, false>::add(e0, e1));
            } else {
              add(j, e0);
              if (pair) add(j, entry_of(b + 1, c1, j));
            }
          }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int n = row + j * 8;
          if (n < p.row0 || n >= row_end || !column) continue;
          store8(static_cast<T*>(p.out) + (n - p.row0) * p.out_stride + (k - p.col0), sum[j],
                 to_float(__ldg(static_cast<const T*>(p.scales) + n)));
        }
      }
    }
  }
}

}  // namespace aqlm
