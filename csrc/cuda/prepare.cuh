// One-time work on a layer: pack and unpack of codes, rearranged codebooks. Not tuned.
#pragma once

#include "launch.h"
#include "numeric.cuh"

namespace aqlm {

// One thread per canonical code [out group][in group][codebook]; Code is int8_t or int16_t.
template <typename Code>
__global__ void pack_kernel(const __grid_constant__ Additive a, const Code* codes,
                            uint8_t* packed) {
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size_t(a.out_groups()) * a.in_groups * a.codebooks) return;
  const int b = i % a.codebooks, v = i / a.codebooks % a.in_groups;
  const int row = i / (size_t(a.codebooks) * a.in_groups);
  const int code = codes[i] & (a.entries() - 1);
  uint8_t* to = packed + a.offset(row, v, b);
  if (a.code_bytes() == 1) *to = code;
  else *reinterpret_cast<uint16_t*>(to) = code;
}

// The inverse; restores the sign extension of the canonical container.
template <typename Code>
__global__ void unpack_kernel(const __grid_constant__ Additive a, const uint8_t* packed,
                              Code* codes) {
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size_t(a.out_groups()) * a.in_groups * a.codebooks) return;
  const int b = i % a.codebooks, v = i / a.codebooks % a.in_groups;
  const int row = i / (size_t(a.codebooks) * a.in_groups);
  const uint8_t* from = packed + a.offset(row, v, b);
  const int code = a.code_bytes() == 1 ? *from : *reinterpret_cast<const uint16_t*>(from);
  codes[i] = static_cast<Code>(code >= a.entries() / 2 ? code - a.entries() : code);
}

// Block `part`: scale = max|entry| / 127 over all codebooks of the part (one scale, so that the
// integer accumulators of the codebooks add up), then the int8 entries.
template <typename T>
__global__ void __launch_bounds__(1024)
prepare_int8_kernel(const __grid_constant__ Additive a, const T* codebooks, uint8_t* aux) {
  __shared__ float warp_max[32];
  const int part = blockIdx.x, G = a.in_group, n = a.codebooks * a.entries() * G;
  const bool words = a.storage() == Storage::kWordTiles;
  const T* from = codebooks + size_t(part) * n;
  float peak = 0.f;
  for (int i = threadIdx.x; i < n; i += 1024) peak = fmaxf(peak, fabsf(to_float(from[i])));
  for (int d = 16; d > 0; d /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, d));
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = peak;
  __syncthreads();
  for (int i = 0; i < 32; ++i) peak = fmaxf(peak, warp_max[i]);
  const float inverse = peak > 0.f ? 127.f / peak : 0.f;
  if (threadIdx.x == 0) reinterpret_cast<float*>(aux)[part] = peak / 127.f;
  int8_t* to = reinterpret_cast<int8_t*>(aux + kAuxHeader) + size_t(part) * n;
  for (int i = threadIdx.x; i < n; i += 1024) {
    const int e = i / G, c = i % G;
    to[words ? (c / 2 * a.entries() + e) * 2 + c % 2 : i] =
        static_cast<int8_t>(__float2int_rn(to_float(from[i]) * inverse));
  }
}

// [entry][dimension] -> [dimension][entry], 16-bit values.
__global__ void __launch_bounds__(256)
prepare_split_kernel(const __grid_constant__ Additive a, const uint16_t* codebooks,
                     uint16_t* to) {
  const int i = blockIdx.x * 256 + threadIdx.x, G = a.in_group, n = a.entries() * G;
  if (i < n)
    to[size_t(blockIdx.y) * n + i % G * a.entries() + i / G] =
        codebooks[size_t(blockIdx.y) * n + i];
}

template <typename T>
__global__ void __launch_bounds__(256)
add_bias_kernel(T* y, const T* bias, int features) {
  const int n = blockIdx.x * 256 + threadIdx.x;
  T* row = y + size_t(blockIdx.y) * features;
  if (n < features) row[n] = from_float<T>(to_float(row[n]) + to_float(bias[n]));
}

}  // namespace aqlm
