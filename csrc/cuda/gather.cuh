// cuda.additive.gather: y = x W^T for every format the faster bodies do not cover.
//
// Any B, nbits 1..16, any out group, any G that is a multiple of 4. Storage kRows. One warp per
// output row; lanes walk the row's vectors, sum the B entries in float32 (L1 / L2 gathers) and use
// them for up to kGatherTokens tokens. Float32 throughout, fixed order: deterministic.
// Bytes per weight vector and codebook: code + 2 G of codebook reads. Architectures sm_80+.
#pragma once

#include "launch.h"
#include "numeric.cuh"
#include "ptx.cuh"

namespace aqlm {

constexpr int kGatherTokens = 8;
constexpr int kGatherWarps = 8;

// A code of storage kRows.
__device__ __forceinline__ int row_code(const Additive& a, const uint8_t* packed, size_t index) {
  return a.nbits <= 8 ? packed[index] : reinterpret_cast<const uint16_t*>(packed)[index];
}

template <typename T>
__global__ void __launch_bounds__(kGatherWarps * 32)
gather_kernel(const __grid_constant__ MatmulParams p) {
  const Additive& a = p.a;
  const int n = blockIdx.x * kGatherWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int G = a.in_group, B = a.codebooks, O = a.out_group;
  grid_dependents_start();
  grid_dependency_wait();
  if (n >= a.out_features()) return;
  const int row = n / O, inner = n % O;
  const T* books = static_cast<const T*>(p.codebooks) +
                   size_t(a.part_of(row)) * B * a.entries() * O * G;
  const T* x = static_cast<const T*>(p.x);
  float acc[kGatherTokens] = {};
  for (int v = lane; v < a.in_groups; v += 32) {
    const size_t first = (size_t(row) * a.in_groups + v) * B;
    for (int c = 0; c < G; c += 4) {
      float w[4] = {};
      for (int b = 0; b < B; ++b) {
        const int code = row_code(a, p.packed, first + b);
        const T* entry = books + ((size_t(b) * a.entries() + code) * O + inner) * G + c;
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] += to_float(entry[i]);
      }
#pragma unroll
      for (int m = 0; m < kGatherTokens; ++m)
        if (m < p.tokens) {
          const T* xv = x + m * p.x_stride + size_t(v) * G + c;
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m] += w[i] * to_float(xv[i]);
        }
    }
  }
#pragma unroll
  for (int m = 0; m < kGatherTokens; ++m) {
    if (m >= p.tokens) break;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) acc[m] += __shfl_xor_sync(~0u, acc[m], d);
    if (lane == 0) {
      float v = acc[m] * to_float(static_cast<const T*>(p.scales)[row]);
      if (p.bias != nullptr) v += to_float(static_cast<const T*>(p.bias)[n]);
      static_cast<T*>(p.y)[size_t(m) * a.out_features() + n] = from_float<T>(v);
    }
  }
}

}  // namespace aqlm
