// RMSNorm of a sum, rotated for the layers that read it: one launch of a decode step for the two.
//
// As in hadamard_spread.cuh a block makes the L outputs of one row r = a * C + c of the vector and
// needs nothing from the others: y[r, :] = S_L sum_r' H[a', a] (-1)^<c, c'> (su w v)[r', :], where
// v = x + delta. It reads the whole of v for that, so it has the norm's sum of squares as well, and
// 1 / rms multiplies the result. The norm is not rounded before the rotation.
#include <algorithm>

#include "enqueue.cuh"
#include "hadamard.cuh"
#include "norm_rotate.h"

namespace aqlm {
namespace {

constexpr int kMostThreads = 256;
constexpr int kLoads = 8;  // rows whose loads are in flight together

// Four neighbouring elements: 8 or 16 bytes.
template <typename T>
struct Four {
  uint2 bits;
  __device__ __forceinline__ void load(const void* at) { bits = load_cached8(at); }
  __device__ __forceinline__ float4 values() const {
    const float2 low = unpack2(bits.x, T()), high = unpack2(bits.y, T());
    return make_float4(low.x, low.y, high.x, high.y);
  }
  __device__ __forceinline__ void add(const Four& o) {
    bits = make_uint2(add2(bits.x, o.bits.x, T()), add2(bits.y, o.bits.y, T()));
  }
  __device__ __forceinline__ void set(float4 v) {
    const T low[2] = {from_float<T>(v.x), from_float<T>(v.y)};
    const T high[2] = {from_float<T>(v.z), from_float<T>(v.w)};
    bits = make_uint2(*reinterpret_cast<const uint32_t*>(low),
                      *reinterpret_cast<const uint32_t*>(high));
  }
  __device__ __forceinline__ void store(void* at) const { *static_cast<uint2*>(at) = bits; }
};
template <>
struct Four<float> {
  float4 v;
  __device__ __forceinline__ void load(const void* at) {
    const uint4 w = load_cached(at);
    v = make_float4(__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z),
                    __uint_as_float(w.w));
  }
  __device__ __forceinline__ float4 values() const { return v; }
  __device__ __forceinline__ void add(const Four& o) { v = add4(v, o.v); }
  __device__ __forceinline__ void set(float4 w) { v = w; }
  __device__ __forceinline__ void store(void* at) const { *static_cast<float4*>(at) = v; }
};

// Grid: (F * C, tokens); splits * L / 4 threads, `splits` warpsets sharing the rows r'.
template <typename T>
__global__ void __launch_bounds__(kMostThreads, 1)
norm_rotate_kernel(const __grid_constant__ NormRotateParams p, int log_l, int log_c, int splits) {
  __shared__ __align__(16) float4 sums[kMostThreads];
  __shared__ float warp_squares[kMostThreads / 32];
  const int tid = threadIdx.x, lanes = 1 << (log_l - 2), column = tid % lanes * 4;
  const int F = p.factor, rows = F << log_c, m = blockIdx.y, row = blockIdx.x;
  const int a = row >> log_c, c = row & ((1 << log_c) - 1);
  const int split = tid / lanes, from = rows * split / splits, to = rows * (split + 1) / splits;
  const T* x = static_cast<const T*>(p.x) + m * p.x_stride;
  const T* delta = static_cast<const T*>(p.delta) + m * p.delta_stride;
  const T* weight = static_cast<const T*>(p.weight);
  grid_dependents_start();
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  float squares = 0.f;
  for (int base = from; base < to; base += kLoads) {
    float4 factor[kLoads];
    auto index = [&](int j) { return (min(base + j, to - 1) << log_l) + column; };
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int other = min(base + j, to - 1) >> log_c;
      const bool minus = (__popc(c & (base + j)) & 1) != (F > 1 && __ldg(p.h + other * F + a) < 0);
      const float4 su = load_quad(p.su + index(j));
      Four<T> w;
      w.load(weight + index(j));
      const float4 v = w.values();
      const float sign = base + j >= to ? 0.f : minus ? -1.f : 1.f;
      factor[j] = make_float4(sign * su.x * v.x, sign * su.y * v.y, sign * su.z * v.z,
                              sign * su.w * v.w);
    }
    if (base == from) grid_dependency_wait();
    Four<T> v[kLoads], d[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      v[j].load(x + index(j));
      d[j].load(delta + index(j));
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      v[j].add(d[j]);
      if (base + j == row) v[j].store(static_cast<T*>(p.sum) + size_t(m) * p.n + index(j));
      const float4 t = v[j].values(), f = factor[j];
      sum = add4(sum, make_float4(t.x * f.x, t.y * f.y, t.z * f.z, t.w * f.w));
      if (base + j < to) squares += t.x * t.x + t.y * t.y + t.z * t.z + t.w * t.w;
    }
  }
  sum = rotate_lanes(sum, min(log_l, 7));
#pragma unroll
  for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(~0u, squares, d);
  // What is left are the bits of the warp's index in a split, and the sums over the splits.
  sums[tid] = sum;
  if (tid % 32 == 0) warp_squares[tid / 32] = squares;
  __syncthreads();
  if (split > 0) return;
  const int warps = lanes / 32, warp = tid / 32;
  float total = 0.f;
  sum = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int s = 0; s < splits; ++s)
    for (int w = 0; w < warps; ++w) {
      const float4 v = sums[s * lanes + w * 32 + tid % 32];
      sum = __popc(w & warp) & 1 ? sub4(sum, v) : add4(sum, v);
      total += warp_squares[s * warps + w];
    }
  const float scale = p.gain * rsqrtf(total / p.n + p.eps);
  Four<T> y;
  y.set(make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale));
  y.store(static_cast<T*>(p.y) + size_t(m) * p.n + (row << log_l) + column);
}

}  // namespace

cudaError_t launch_norm_rotate(const NormRotateParams& p, cudaStream_t stream) {
  cudaGetLastError();
  int log_p = 0;
  while (p.factor << (log_p + 1) <= p.n) ++log_p;
  const int log_l = std::min(log_p, 9), log_c = log_p - log_l;
  const int rows = p.factor << log_c, lanes = 1 << (log_l - 2);
  int splits = 1;
  while (splits * kLoads < rows && 2 * splits * lanes <= kMostThreads) splits *= 2;
  const auto kernel = p.type == DType::kFloat16    ? norm_rotate_kernel<__half>
                      : p.type == DType::kBFloat16 ? norm_rotate_kernel<__nv_bfloat16>
                                                   : norm_rotate_kernel<float>;
  return enqueue(kernel, dim3(rows, p.tokens), splits * lanes, 0, stream, p, log_l, log_c, splits);
}

}  // namespace aqlm
