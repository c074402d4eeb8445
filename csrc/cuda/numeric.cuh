// Conversions between the stored 16-bit types, float32 and pairs of bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace aqlm {

__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(float v) { return v; }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }

// Two 16-bit values of one register.
__device__ __forceinline__ float2 unpack2(uint32_t w, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&w));
}
__device__ __forceinline__ float2 unpack2(uint32_t w, __nv_bfloat16) {
  return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}

// Sum of two pairs, rounded to the stored type.
__device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b, __half) {
  const __half2 s = __hadd2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&s);
}
__device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b, __nv_bfloat16) {
  const __nv_bfloat162 s =
      __hadd2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&s);
}

// Product of two pairs, rounded to the stored type.
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b, __half) {
  const __half2 s = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&s);
}
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b, __nv_bfloat16) {
  const __nv_bfloat162 s =
      __hmul2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&s);
}

// Eight consecutive values of one 16-byte vector.
template <typename T>
__device__ __forceinline__ void unpack8(uint4 v, float (&out)[8]) {
  const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = unpack2(w[i], T());
    out[2 * i] = f.x;
    out[2 * i + 1] = f.y;
  }
}

// Four values times `factor` as 16-bit integers: their high and their low bytes, a word of each.
// 1.5 * 2^23 leaves an integer in the low bits of a float; 128 more, and bits 8 .. 15 are the high
// byte, rounded, the low byte with its top bit flipped.
__device__ __forceinline__ void split_four(const float* v, float factor, uint32_t& high,
                                           uint32_t& low) {
  uint32_t q[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) q[i] = __float_as_uint(fmaf(v[i], factor, 12582912.f + 128.f));
  const uint32_t a = __byte_perm(q[0], q[1], 0x5140), b = __byte_perm(q[2], q[3], 0x5140);
  low = __byte_perm(a, b, 0x5410) ^ 0x80808080u;
  high = __byte_perm(a, b, 0x7632);
}

}  // namespace aqlm
