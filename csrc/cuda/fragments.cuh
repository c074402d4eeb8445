// Activations in MMA fragment order for the bodies that cannot read x as it is.
//
// A fragment tile is 32 lanes x 8 bytes, lane = column % 8 * 4 + t:
//   byte storage, int8:  [step][tile]: 8 int8 of vector t of the step; column 2m = high byte of
//                        token m, 2m + 1 = low byte
//   word storage, int8:  [class][unit][tile]: vectors 4t .. 4t+3, dimensions 2c and 2c + 1 of each
//   word storage, exact: [class][unit][tile]: vectors 4t .. 4t+3, dimension c as stored; column m
//   the same for kSplitWgmma: [class][unit][half c][column][t]: word c of those 8 bytes
//
// int8: x = scale * (256 * high + low), scale = max|x| / 32639 per token, so both fit in int8.
// Grid: (padded tokens, chunks of K). Every block of a token recomputes max|x|: it reads x from L2
// and needs no second launch. Columns past M and vectors past K are zero.
#pragma once

#include "launch.h"
#include "numeric.cuh"
#include "ptx.cuh"

namespace aqlm {

constexpr int kFragmentThreads = 256;
constexpr float kActivationMax = 32639.f;  // 127 * 256 + 127

// max over the block of |x|, x of length K (a multiple of 8) with 16-byte aligned rows.
template <typename T>
__device__ __forceinline__ float block_absmax(const T* x, int K) {
  __shared__ float warp_max[kFragmentThreads / 32];
  float v = 0.f;
  for (int k = threadIdx.x * 8; k < K; k += kFragmentThreads * 8) {
    float w[8];
    unpack8<T>(load_cached(x + k), w);
#pragma unroll
    for (int i = 0; i < 8; ++i) v = fmaxf(v, fabsf(w[i]));
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, d));
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = v;
  __syncthreads();
  v = warp_max[0];
#pragma unroll
  for (int i = 1; i < kFragmentThreads / 32; ++i) v = fmaxf(v, warp_max[i]);
  return v;
}

// High and low bytes of eight activations.
__device__ __forceinline__ void split_bytes(const float (&x)[8], float inverse, uint2* high,
                                            uint2* low) {
  split_four(x, inverse, high->x, low->x);
  split_four(x + 4, inverse, high->y, low->y);
}

// kHalves: the layout of kSplitWgmma, `tiles` * 8 columns.
template <typename T, bool kInt8, bool kHalves>
__global__ void __launch_bounds__(kFragmentThreads)
fragments_kernel(const __grid_constant__ MatmulParams p, int tiles) {
  const Additive& a = p.a;
  const bool words = a.storage() == Storage::kWordTiles;
  const int m = blockIdx.x, K = a.in_features(), G = a.in_group;
  const bool valid = m < p.tokens;
  const T* x = static_cast<const T*>(p.x) + (valid ? m : 0) * p.x_stride;
  grid_dependents_start();
  grid_dependency_wait();
  float inverse = 0.f;
  if constexpr (kInt8) {
    const float peak = block_absmax(x, K);
    inverse = peak > 0.f ? kActivationMax / peak : 0.f;
    if (valid && blockIdx.y == 0 && threadIdx.x == 0) p.x_scales[m] = peak / kActivationMax;
  }
  uint2* out = reinterpret_cast<uint2*>(p.x_fragments);
  const int units = kHalves ? p.s.x_steps : p.s.units;  // of words
  const int classes = p.s.classes, quads = units * 4;  // quads of 4 vectors
  const int items = words ? quads * classes : (ceil_div(K, 32) + 1) * 4;  // and a padding step
  const int column = kInt8 ? 2 * m : m;
  const int stride = gridDim.y * kFragmentThreads;
  for (int i = blockIdx.y * kFragmentThreads + threadIdx.x; i < items; i += stride) {
    float v[8] = {};
    uint32_t raw[4] = {};
    size_t tile;
    int t;
    if (words) {
      const int dims = i / quads, quad = i % quads;
      tile = size_t(dims) * units + quad / 4;
      t = quad % 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = (quad * 4 + j) * G + dims * (kInt8 ? 2 : 1);
        if (!valid || k >= K) continue;
        if constexpr (kInt8) {
          v[2 * j] = to_float(x[k]);
          v[2 * j + 1] = to_float(x[k + 1]);
        } else {
          raw[j] = reinterpret_cast<const uint16_t*>(x)[k];
        }
      }
    } else {
      tile = i / 4;
      t = i % 4;
      if (valid && i * 8 < K) unpack8<T>(load_cached(x + i * 8), v);
    }
    uint2 first = make_uint2(raw[0] | raw[1] << 16, raw[2] | raw[3] << 16), second;
    if constexpr (kInt8) split_bytes(v, inverse, &first, &second);
    if constexpr (kHalves) {
      uint32_t* at = reinterpret_cast<uint32_t*>(out) + tile * tiles * 64 + column * 4 + t;
      at[0] = first.x;
      at[tiles * 32] = first.y;
      if constexpr (kInt8) {
        at[4] = second.x;
        at[tiles * 32 + 4] = second.y;
      }
    } else {
      uint2* at = out + ((tile * tiles + column / 8) * 32 + column % 8 * 4 + t);
      at[0] = first;
      if constexpr (kInt8) at[4] = second;
    }
  }
}

}  // namespace aqlm
