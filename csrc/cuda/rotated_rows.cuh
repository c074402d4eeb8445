// What the matmul bodies share at their ends: codes in, row scales, place of the partial sums.
#pragma once

#include "numeric.cuh"
#include "ptx.cuh"
#include "rotated.h"
#include "scalar_decode.cuh"

namespace aqlm {

__device__ __forceinline__ uint2 load_stream8(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

// Starts copying 8 bytes to shared memory.
__device__ __forceinline__ void copy_async8(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;"
               :: "r"(smem_address(to)), "l"(from) : "memory");
}

// Scale and zero of the lane's four rows g + 8r of one scale group, converted when used so that the
// loads stay in flight.
struct RowScales {
  uint32_t raw_scale[4] = {}, raw_zero[4] = {};

  static __device__ __forceinline__ uint32_t raw(const RotatedWeight& w, const void* from,
                                                 size_t i) {
    return w.scale_type == DType::kFloat32 ? __ldg(static_cast<const uint32_t*>(from) + i)
                                           : __ldg(static_cast<const uint16_t*>(from) + i);
  }
  static __device__ __forceinline__ float value(const RotatedWeight& w, uint32_t raw) {
    if (w.scale_type == DType::kFloat32) return __uint_as_float(raw);
    if (w.scale_type == DType::kBFloat16) return __uint_as_float(raw << 16);
    return to_float(__ushort_as_half(static_cast<unsigned short>(raw)));
  }
  __device__ __forceinline__ void load(const RotatedWeight& w, int block, int j, int groups) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const size_t i = size_t(min(block * kCellRows + r * 8 + g, w.N - 1)) * groups + j;
      raw_scale[r] = raw(w, w.scales, i);
      if (w.zeros != nullptr) raw_zero[r] = raw(w, w.zeros, i);
    }
  }
  __device__ __forceinline__ float scale(const RotatedWeight& w, int r) const {
    return value(w, raw_scale[r]);
  }
  // What a weight has beyond operand / step, in units of the scale.
  template <int kBits>
  __device__ __forceinline__ float shift(const RotatedWeight& w, int r) const {
    constexpr float kMiddle = 0.5f * ((1 << kBits) - 1);
    return scalar_centre(kBits) - (w.zeros != nullptr ? value(w, raw_zero[r]) : kMiddle);
  }
};

// Moves to scale group j of a row block; the one after is then on its way.
__device__ __forceinline__ void advance_rows(const RotatedWeight& w, int block, int j, bool first,
                                             RowScales* rows, RowScales* ahead) {
  const int groups = w.K / w.group;
  if (first) rows->load(w, block, j, groups);
  else *rows = *ahead;
  ahead->load(w, block, min(j + 1, groups - 1), groups);
}

// Butterflies over the low `bits` (at most 3) bits of rows 8i + g of a warp: v[i] is row 8i + g.
template <int kRows>
__device__ __forceinline__ void transform_lanes(float (&v)[kRows], int bits) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int b = 0; b < 3; ++b) {
    if (b >= bits) break;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float other = __shfl_xor_sync(~0u, v[i], 4 << b);
      v[i] = lane & (4 << b) ? other - v[i] : v[i] + other;
    }
  }
}
// The same up to bit 3, of a row tile of 16 rows.
__device__ __forceinline__ void transform_tile(float (&v)[2], int bits) {
  transform_lanes(v, bits);
  if (bits > 3) {
    const float sum = v[0] + v[1], difference = v[0] - v[1];
    v[0] = sum;
    v[1] = difference;
  }
}
// The same up to bit 4, of a warp's 32 rows.
__device__ __forceinline__ void transform_rows(float (&v)[4], int bits) {
  transform_lanes(v, bits);
  if (bits > 3) {
    const float w[4] = {v[0] + v[1], v[0] - v[1], v[2] + v[3], v[2] - v[3]};
    const bool last = bits > 4;
    v[0] = last ? w[0] + w[2] : w[0];
    v[1] = last ? w[1] + w[3] : w[1];
    v[2] = last ? w[0] - w[2] : w[2];
    v[3] = last ? w[1] - w[3] : w[3];
  }
}

// All five bits, in fewer instructions: for bodies that ask once for all tiles.
__device__ __forceinline__ void transform_all_rows(float (&v)[4]) {
  const int lane = threadIdx.x % 32;
  const float sums[2] = {v[0] + v[1], v[2] + v[3]}, differences[2] = {v[0] - v[1], v[2] - v[3]};
  v[0] = sums[0] + sums[1];
  v[1] = differences[0] + differences[1];
  v[2] = sums[0] - sums[1];
  v[3] = differences[0] - differences[1];
#pragma unroll
  for (int b = 4; b < 32; b *= 2) {
    const float sign = lane & b ? -1.f : 1.f;
#pragma unroll
    for (int r = 0; r < 4; ++r) v[r] = fmaf(sign, v[r], __shfl_xor_sync(~0u, v[r], b));
  }
}

// The next bits of the row, those of the warp's index, by all kWarps warps of the block: `from`
// holds 32 rows of every warp for `tokens` tokens. A warp does one half of one transform of a token,
// eight values a lane at most, which is what registers allow beside accumulators. Blocks from
// `blocks` on are not stored. first: the warp's first item. kPad: floats between two tokens' rows.
template <int kWarps, int kPad = 0>
__device__ __forceinline__ void transform_warps(const float* from, int tokens, int bits, float* to,
                                                int blocks, int first) {
  const int lane = threadIdx.x % 32, size = 1 << bits, parts = kWarps >> bits;
  const int halves = bits > 3 ? 2 : 1;
  for (int item = first; item < tokens * parts * halves; item += kWarps) {
    const int half = item % halves, row = item / halves * size;  // row: of warps, over all tokens
    const float* at = from + row * kCellRows + row / kWarps * kPad + lane;
    float v[8];
#pragma unroll
    for (int w = 0; w < 8; ++w) {
      v[w] = w < size ? at[w * kCellRows] : 0.f;
      if (halves == 2) {
        const float other = at[(w + 8) * kCellRows];
        v[w] = half == 0 ? v[w] + other : v[w] - other;
      }
    }
#pragma unroll
    for (int b = 1; b < 8; b *= 2) {
      if (b >= size) break;
#pragma unroll
      for (int w = 0; w < 8; ++w)
        if ((w & b) == 0) {
          const float sum = v[w], difference = v[w + b];
          v[w] = sum + difference;
          v[w + b] = sum - difference;
        }
    }
#pragma unroll
    for (int w = 0; w < 8; ++w)
      if (w < size && row % kWarps + 8 * half + w < blocks)
        to[(row + 8 * half + w) * kCellRows + lane] = v[w];
  }
}

// The slot of this block's partial sums of its first row group; it begins every later one, slot 0.
__device__ __forceinline__ int first_slot(const RotatedMatmul& p, int group) {
  return blockIdx.x - owner_of(p.s, group * p.s.units);
}
// This block's partial sums of a row group: [tokens][group_rows].
__device__ __forceinline__ float* partials_of(const RotatedMatmul& p, int group, int slot) {
  return p.partials + (size_t(group) * p.s.max_slots + slot) * p.tokens * p.s.group_rows;
}

}  // namespace aqlm
