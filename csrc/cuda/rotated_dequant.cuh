// A block of rows and columns of gain * Wq, for prefill, the input gradient and the dequantize ops.
//
// A warp decodes a cell of 32 x 64 as it lies: E8P stores 8 neighbouring weights a lane, scalar 4.
// Float32 arithmetic, one rounding. Persistent blocks, because E8P fills 64 KB of tables first.
#pragma once

#include "e8p_decode.cuh"
#include "numeric.cuh"
#include "rotated.h"
#include "scalar_decode.cuh"

namespace aqlm {

constexpr int kRotatedDequantWarps = 8;

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float a, float b);
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float a, float b) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float a, float b) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}

// kCount (4 or 8) values to row n, columns k ..; bounds of the block are checked.
template <typename T, int kCount>
__device__ __forceinline__ void store_values(const RotatedDequant& p, int n, int k,
                                             const float (&v)[kCount]) {
  if (n < p.row0 || n >= p.row1 || k >= p.col1) return;
  T* to = static_cast<T*>(p.out) + (n - p.row0) * p.out_stride + (k - p.col0);
  constexpr int kBytes = kCount * sizeof(T) > 16 ? 16 : kCount * sizeof(T);
  if (k + kCount > p.col1 || reinterpret_cast<uintptr_t>(to) % kBytes != 0) {
    for (int i = 0; i < kCount && k + i < p.col1; ++i) to[i] = from_float<T>(v[i]);
    return;
  }
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4)
      *reinterpret_cast<float4*>(to + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
  } else if constexpr (kCount == 8) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};"
                 :: "l"(to), "r"(pack_pair<T>(v[0], v[1])), "r"(pack_pair<T>(v[2], v[3])),
                    "r"(pack_pair<T>(v[4], v[5])), "r"(pack_pair<T>(v[6], v[7])) : "memory");
  } else {
    asm volatile("st.global.v2.u32 [%0], {%1,%2};"
                 :: "l"(to), "r"(pack_pair<T>(v[0], v[1])), "r"(pack_pair<T>(v[2], v[3]))
                 : "memory");
  }
}

// v[e] += factor * weight e of a table word; `offset` is what a weight has beyond half its nibble.
__device__ __forceinline__ void add_e8p(uint32_t w, float factor, float offset, float (&v)[8]) {
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int nibble = e < 4 ? static_cast<int>(w << (24 - 8 * e)) >> 28
                             : static_cast<int>(w >> (8 * (e - 4)) & 15) - 8;
    v[e] += factor * (0.5f * nibble + offset);
  }
}

template <typename T, Coding kCoding, int kBits>
__global__ void __launch_bounds__(kRotatedDequantWarps * 32)
rotated_dequant_kernel(const __grid_constant__ RotatedDequant p) {
  constexpr bool kE8p = kCoding == Coding::kE8p;
  constexpr int kThreads = kRotatedDequantWarps * 32;
  extern __shared__ __align__(1024) unsigned char dequant_smem[];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t lane_offset = lane * 4;
  grid_dependents_start();
  if constexpr (kE8p) {
    fill_e8p_tables<2>(dequant_smem, kThreads);  // residual bytes read their table through L1
    __syncthreads();
  }
  grid_dependency_wait();
  const int units = p.w.units(), unit0 = p.col0 / kCellColumns;
  const int across = (p.col1 + kCellColumns - 1) / kCellColumns - unit0;
  const int block0 = p.row0 / kCellRows, down = (p.row1 + kCellRows - 1) / kCellRows - block0;
  const int warps = gridDim.x * kRotatedDequantWarps, cells = down * across;
  for (int i = blockIdx.x * kRotatedDequantWarps + threadIdx.x / 32; i < cells; i += warps) {
    const int block = block0 + i / across, unit = unit0 + i % across;
    const uint8_t* from = p.w.packed + (size_t(block) * units + unit) * p.w.cell_bytes();
    ScalarCodes<kBits> c;
#pragma unroll
    for (int a = 0; a < int(sizeof(c.a) / 16); ++a)
      c.a[a] = load_stream(from + a * 512 + lane * 16);
    if constexpr (kBits == 3) c.b = *reinterpret_cast<const uint2*>(from + 512 + lane * 8);
    const int row = block * kCellRows + g, column = unit * kCellColumns;
    if constexpr (kE8p) {
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int j = b * 2 + r % 2;
          float v[8] = {};
          auto word = [&](const uint4& codes) {
            return e8p_magnitude(word_of(codes, r / 2 * 2), j, lane_offset) ^
                   e8p_sign(word_of(codes, r / 2 * 2 + 1), j, lane_offset);
          };
          add_e8p(word(c.a[0]), 1.f, 0.25f, v);
          if constexpr (kBits == 4) add_e8p(word(c.a[1]), p.w.residual, 0.25f, v);
          if constexpr (kBits == 3)
            add_e8p(kE8pTables.residual[(r < 2 ? c.b.x : c.b.y) >> 8 * j & 255], p.w.residual, 0.f,
                    v);
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] *= p.gain;
          store_values<T, 8>(p, row + r * 8, column + b * 32 + t * 8, v);
        }
    } else {
      const int groups = p.w.K / p.w.group;
      auto load = [&](const void* values, size_t at) {
        if (p.w.scale_type == DType::kFloat16)
          return to_float(static_cast<const __half*>(values)[at]);
        if (p.w.scale_type == DType::kBFloat16)
          return to_float(static_cast<const __nv_bfloat16*>(values)[at]);
        return static_cast<const float*>(values)[at];
      };
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int f = 0; f < 4; ++f) {
          const int n = row + r * 8, k = column + f * 16 + t * 4;
          if (n >= p.row1 || k >= p.col1) continue;
          const uint32_t word = scalar_operand<kBits>(c, r, f);
          float v[4], scale = 0.f, zero = 0.5f * ((1 << kBits) - 1);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if ((j == 0 || p.w.group % 4 != 0) && k + j < p.w.K) {
              const size_t at = size_t(n) * groups + (k + j) / p.w.group;
              scale = load(p.w.scales, at);
              if (p.w.zeros != nullptr) zero = load(p.w.zeros, at);
            }
            const int byte = static_cast<int>(word << (24 - 8 * j)) >> 24;
            const float q = byte * (1.f / scalar_step(kBits)) + scalar_centre(kBits);
            v[j] = scale * (q - zero) * p.gain;
          }
          store_values<T, 4>(p, n, k, v);
        }
    }
  }
}

}  // namespace aqlm
