// What kernels share that finish a rotation of few tokens some columns at a time, in rows of 512:
// eight columns a block for some tokens, or slices of up to 64 columns, whose partial sums bulk
// copies bring, where there are enough tokens to fill the SMs with blocks.
#pragma once

#include <algorithm>
#include <atomic>

#include "enqueue.cuh"
#include "hadamard.cuh"
#include "mbarrier.cuh"

namespace aqlm {

constexpr int kRow = 512, kLocalBits = 9, kColumns = 8;

// 4 bytes past L1 where `wanted`, else zero (as load_slot).
__device__ __forceinline__ float load_slot1(const float* at, bool wanted) {
  float v = 0.f;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0;\n\t@p ld.global.cg.f32 %0, [%1];}"
               : "+f"(v) : "l"(at), "r"(uint32_t(wanted)) : "memory");
  return v;
}
// A constant that is loaded where it stands, before the wait.
__device__ __forceinline__ float load_float(const float* p) {
  return __uint_as_float(load_word(p));
}
__device__ __forceinline__ float2 load_floats(const float* p) {
  const uint2 w = load_cached8(p);
  return make_float2(__uint_as_float(w.x), __uint_as_float(w.y));
}
__device__ __forceinline__ uint32_t load_byte(const int8_t* p) {
  uint32_t v;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// Bytes of +-1 as `signed_one` takes them.
__device__ __forceinline__ uint32_t sign_bytes(uint32_t h) {
  return and_or(h, 0x80808080u, 0x3F3F3F3Fu);
}

// v over bits kFirst .. kEnd - 1 of the thread's number.
template <int kFirst, int kEnd, int kCount>
__device__ __forceinline__ void butterflies(float (&v)[kCount]) {
#pragma unroll
  for (int b = kFirst; b < kEnd; ++b)
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float other = __shfl_xor_sync(~0u, v[i], 1 << b);
      v[i] = threadIdx.x >> b & 1 ? other - v[i] : v[i] + other;
    }
}

// -- slices ---------------------------------------------------------------------------------------

constexpr int kSliceFirst = 5;     // tokens from which on
constexpr int kSliceThreads = 256;
constexpr int kSliceMost = 112 << 10;  // bytes of a block's sums

// A slice of every row of a product: slots[rows][most][kWidth].
template <int kRows, int kWidth>
struct Slice {
  float* slots;
  int most;
  int counts[kRows];  // slots of a row
  uint64_t barrier;

  // All threads; a thread of each row announces its slots. A __syncthreads must follow.
  __device__ __forceinline__ RotateSource begin(const RotateParams& p, int m, int first) {
    const int row = threadIdx.x;
    if (row == 0) {
      mbar::init(&barrier, kRows);
      mbar::init_fence();
    }
    const RotateSource source = rotate_locate(p, m, (row < kRows ? row : kRows - 1) * kRow + first);
    if (row < kRows) counts[row] = source.slots;
    return source;
  }
  // After grid_dependency_wait.
  __device__ __forceinline__ void bring(const RotateSource& source) {
    const int row = threadIdx.x, bytes = kWidth * int(sizeof(float));
    if (row < kRows) {
      mbar::expect(&barrier, source.slots * bytes);
      for (int k = 0; k < source.slots; ++k)
        mbar::bulk_copy(slots + (row * most + k) * kWidth, source.from + k * source.stride, bytes,
                        &barrier);
    }
    mbar::wait(&barrier, 0);
  }
  __device__ __forceinline__ float sum(int row, int column) const {
    const float* at = slots + row * most * kWidth + column;
    float v = 0.f;
#pragma unroll 4
    for (int k = 0; k < counts[row]; ++k) v += at[k * kWidth];
    return v;
  }
};

// Signs of H_F as floats, [F][F]; a row is read four at a time.
template <int F, bool kTranspose>
__device__ __forceinline__ void load_signs(const int8_t* h, float* signs) {
  for (int i = threadIdx.x; i < F * F; i += kSliceThreads) {
    const int at = kTranspose ? i % F * F + i / F : i;
    signs[at] = int8_t(load_byte(h + i));
  }
}

// out[i] += sum over k of signs[row + i][k] * value(k), i < kCount.
template <int F, int kCount, typename Value>
__device__ __forceinline__ void mix_factor(const float* signs, int row, Value&& value,
                                           float (&out)[kCount]) {
#pragma unroll
  for (int k = 0; k < F; k += 4) {
    const float v[4] = {value(k), value(k + 1), value(k + 2), value(k + 3)};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float4 s = *reinterpret_cast<const float4*>(signs + (row + i) * F + k);
      out[i] = fmaf(s.x, v[0], fmaf(s.y, v[1], fmaf(s.z, v[2], fmaf(s.w, v[3], out[i]))));
    }
  }
}

// Most slots that a row group has.
inline int most_slots(const RotatedSchedule& s) {
  int most = 0;
  for (int g = 0; g < s.groups; ++g) {
    const int cell = g * s.units;
    most = std::max(most, owner_of(s, cell + s.units - 1) - owner_of(s, cell) + 1);
  }
  return most;
}

}  // namespace aqlm
