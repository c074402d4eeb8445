// What kernels share that finish a rotation of few tokens some columns at a time, in rows of 512.
#pragma once

#include "hadamard.cuh"

namespace aqlm {

constexpr int kRow = 512, kLocalBits = 9;

// log2 of n / (factor * kRow): what is left of a rotation's power of two beside its rows.
inline int log_q_of(const Rotation& r) {
  int bits = 0;
  while (r.factor << (bits + 1) <= r.n) ++bits;
  return bits - kLocalBits;
}

// Partial sums of each row group of a matmul, of 512 rows; found out by the host, since a block that
// begins when the matmul ends waits for its divisions.
constexpr int kMostRowGroups = 112;
struct RowSlots {
  uint8_t count[kMostRowGroups];
};
inline cudaError_t row_slots(const RotatedSchedule& s, RowSlots* slots) {
  if (s.groups > kMostRowGroups || s.group_rows != kRow) return cudaErrorInvalidValue;
  for (int g = 0; g < s.groups; ++g) {
    const int cell = g * s.units;
    const int count = owner_of(s, cell + s.units - 1) - owner_of(s, cell) + 1;
    if (count > 255) return cudaErrorInvalidValue;
    slots->count[g] = static_cast<uint8_t>(count);
  }
  return cudaSuccess;
}
// Those of token m from `column` of row group `row` on (as rotate_locate), known where it is called:
// before the wait.
__device__ __forceinline__ RotateSource row_source(const RotateParams& p, const RowSlots& slots,
                                                   int row, int m, int column) {
  RotateSource s = {p.partials + (size_t(row) * p.s.max_slots * p.tokens + m) * kRow + column,
                    size_t(p.tokens) * kRow, slots.count[row]};
  asm volatile("" : "+l"(s.from), "+r"(s.slots));
  return s;
}

// Constants that are loaded where they stand, before the wait.
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

}  // namespace aqlm
