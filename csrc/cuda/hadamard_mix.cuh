// The second kernel of a matmul whose output is rotated: adds the slots, finishes the rotation.
//
// The matmul has transformed its rows over the low Sylvester bits (L = 2^local_bits rows), so that
//   y[(a, q), b] = sum_{a', q'} H[a, a'] (-1)^<q, q'> z[(a', q'), b],   b < L
// has independent columns b: a block takes eight of them (a 32-byte sector of every row) and needs
// nothing from other blocks. Architectures sm_80+.
#pragma once

#include "hadamard.cuh"

namespace aqlm {

constexpr int kMixThreads = 512;
constexpr int kMixColumns = 8;
constexpr int kSumTokens = 4;
constexpr int kMixMaxFactor = 180;  // H_F is copied to shared memory up to this F (32 KB)

// Grid: (L / 8, tokens). Shared memory: F * Q * 8 floats, twice where F > 1, and H_F.
template <int kSlots>
__global__ void __launch_bounds__(kMixThreads, kSlots == kFewSlots ? 1 : 2)
rotate_mix_kernel(const __grid_constant__ RotateParams p, int log_q) {
  extern __shared__ __align__(16) float mix_smem[];
  const int F = p.r.factor, length = (F << log_q) * kMixColumns, m = blockIdx.y;
  const int tid = threadIdx.x, threads = blockDim.x;
  float* z = mix_smem;
  // Element i of this block in the vector.
  auto place = [&](int i) {
    return (i / kMixColumns << p.local_bits) + blockIdx.x * kMixColumns + i % kMixColumns;
  };
  grid_dependents_start();
  uint32_t* const h_words = reinterpret_cast<uint32_t*>(mix_smem + 2 * length);
  const bool staged = F > 1 && F <= kMixMaxFactor;
  for (int i = tid; staged && i < F * F / 4; i += threads)
    h_words[i] = reinterpret_cast<const uint32_t*>(p.r.h)[i];
  const bool few = length <= 4 * threads;  // one item a thread: everything known is loaded early
  RotateFinish finish = {};
  if (few && 4 * tid < length) finish = rotate_finish(p, place(4 * tid), p.gain);
  RotateSource source = rotate_locate(p, m, place(min(4 * tid, length - 4)));
  prefetch_constant(source.from);
  grid_dependency_wait();
  for (int i = 4 * tid; i < length; i += 4 * threads) {
    if (i >= 4 * threads) source = rotate_locate(p, m, place(i));
    *reinterpret_cast<float4*>(z + i) = rotate_sum<kSlots>(source);
  }
  __syncthreads();
  int bit = 3;
  for (; bit + 3 <= log_q + 3; bit += 3) rotate_pass<3>(z, length, bit);
  if (bit + 2 <= log_q + 3) rotate_pass<2>(z, length, bit);
  else if (bit + 1 <= log_q + 3) rotate_pass<1>(z, length, bit);
  if (F > 1) {
    float* mixed = z + length;
    const int log_p = log_q + 3, all = 1 << log_p, columns = F / 4 * all > threads ? 2 : 1;
    const int part = all / columns;
    for (int i = tid; i < F / 4 * part; i += threads) {
      const int a = i / part * 4, b = i % part;
      float out[4][2] = {};
      auto mix = [&](const int8_t* h) {
        if (columns == 1) mix_rows<1, false>(h, F, z, log_p, a, b, part, out);
        else mix_rows<2, false>(h, F, z, log_p, a, b, part, out);
      };
      if (staged) mix(reinterpret_cast<const int8_t*>(mix_smem + 2 * length));
      else mix(p.r.h);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        mixed[((a + r) << log_p) + b] = out[r][0];
        if (columns == 2) mixed[((a + r) << log_p) + b + part] = out[r][1];
      }
    }
    __syncthreads();
    z = mixed;
  }
  for (int i = 4 * tid; i < length; i += 4 * threads) {
    if (!few) finish = rotate_finish(p, place(i), p.gain);
    rotate_store(p, m, place(i), *reinterpret_cast<const float4*>(z + i), finish);
  }
}

// rotate_flat_kernel for the partial sums of many tokens, kSumTokens a thread: where their slots
// lie is found out once. Grid: (chunks of a row, tokens / kSumTokens).
__global__ void __launch_bounds__(kFlatThreads, 3)
rotate_sums_kernel(const __grid_constant__ RotateParams p) {
  constexpr int kSlots = 2, kTokens = kSumTokens;  // in flight
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4, first = blockIdx.y * kTokens;
  const bool inside = i < p.r.n;
  grid_dependents_start();
  RotateFinish finish = {};
  RotateSource source = {};
  if (inside) {
    finish = rotate_finish(p, i, p.gain);
    source = rotate_locate(p, first, i);
    prefetch_constant(source.from);
  }
  grid_dependency_wait();
  float4 v[kTokens] = {};
  for (int k = 0; k < source.slots; k += kSlots) {
    float4 part[kTokens][kSlots];
#pragma unroll
    for (int m = 0; m < kTokens; ++m)
#pragma unroll
      for (int j = 0; j < kSlots; ++j)
        part[m][j] = load_slot(source.from + (k + j) * source.stride + m * p.s.group_rows,
                               k + j < source.slots && first + m < p.tokens);
#pragma unroll
    for (int m = 0; m < kTokens; ++m)
#pragma unroll
      for (int j = 0; j < kSlots; ++j) v[m] = add4(v[m], part[m][j]);
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    if (p.r.block) v[m] = rotate_lanes(v[m], 7);
    if (first + m < p.tokens) rotate_store(p, first + m, i, v[m], finish);
  }
}

}  // namespace aqlm
