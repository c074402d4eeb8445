// Rotation of few tokens by many blocks that need nothing from each other: the latency of one load,
// one exchange between warps and one store.
//
// Index of a vector: r * L + b, r = a * C + c with a < F and c the top bits of the Sylvester index.
// Blocks read the whole vector (from L2, 8 to 57 KB) for the L outputs of one r, because in
//   U = (H_F x S_C) x S_L:   y[r, :] = S_L sum_r' H[a, a'] (-1)^<c, c'> x[r', :]
// the sum needs no exchange: a thread adds its own four columns. `splits` warpsets share the r'.
// A warp holds 128 elements: where L = 64, two rows r (and C = 1). Architectures sm_80+.
#pragma once

#include "hadamard.cuh"

namespace aqlm {

constexpr int kSpreadThreads = 512;
constexpr int kSpreadLoads = 8;  // 4 columns of x and of `pre` each, in flight per thread

// What kPlain takes: x of 16 bits, in eights of bytes, `pre` in float32, F = 1, kSpreadLoads rows a
// split, and nothing after the rotation (4096 and 8192 elements of a layer's input). 64 registers
// instead of 106, so that a block of the matmul after it (96 registers for 512 threads) fits beside
// one of this (256 threads): it would begin only when this one ends.
inline bool spreads_plain(const RotateParams& p, int rows, int splits) {
  auto aligned = [](const void* at, int bytes) {
    return reinterpret_cast<uintptr_t>(at) % bytes == 0;
  };
  return p.x_type != DType::kFloat32 && aligned(p.x, 8) && p.x_stride % 4 == 0 &&
         p.pre != nullptr && p.pre_type == DType::kFloat32 && aligned(p.pre, 16) &&
         p.r.factor == 1 && rows == splits * kSpreadLoads && p.post == nullptr &&
         p.bias == nullptr;
}

// Grid: (F * C * L / max(L, 128), tokens); splits * max(L, 128) / 4 threads; shared memory: one
// float4 a thread.
template <bool kPlain>
__global__ void __launch_bounds__(kSpreadThreads, kPlain ? 2 : 1)
rotate_spread_kernel(const __grid_constant__ RotateParams p, int log_l, int log_c, int splits) {
  extern __shared__ __align__(16) float4 spread_sums[];
  const int tid = threadIdx.x, lanes = max(32, 1 << (log_l - 2)), at = tid % lanes * 4;
  const int column = at & ((1 << log_l) - 1);
  const int F = p.r.factor, rows = F << log_c, m = blockIdx.y;
  const int row = (blockIdx.x * lanes * 4 + at) >> log_l;  // r, the thread's own
  const int a = row >> log_c, c = row & ((1 << log_c) - 1);
  const int split = tid / lanes, from = rows * split / splits, to = rows * (split + 1) / splits;
  const bool wide = p.x_type == DType::kFloat32;
  const char* x = static_cast<const char*>(p.x) + m * p.x_stride * (wide ? 4 : 2);
  const bool halves = !wide && reinterpret_cast<uintptr_t>(x) % 8 == 0;
  const bool words = p.pre_type == DType::kFloat32 && reinterpret_cast<uintptr_t>(p.pre) % 16 == 0;
  grid_dependents_start();
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  if constexpr (kPlain) {
    const int first = (from << log_l) + column;
    const char* const w_at = static_cast<const char*>(p.pre) + 4ll * first;
    const char* const x_at = x + 2ll * first;
    float4 w[kSpreadLoads];
    uint2 raw[kSpreadLoads];
#pragma unroll
    for (int j = 0; j < kSpreadLoads; ++j)
      w[j] = load_quad(reinterpret_cast<const float*>(w_at + (j * 4ll << log_l)));
    prefetch_constant(x_at);
    grid_dependency_wait();
#pragma unroll
    for (int j = 0; j < kSpreadLoads; ++j) raw[j] = load_cached8(x_at + (j * 2ll << log_l));
#pragma unroll
    for (int j = 0; j < kSpreadLoads; ++j) {
      const bool half = p.x_type == DType::kFloat16;
      const float2 low = half ? unpack2(raw[j].x, __half()) : unpack2(raw[j].x, __nv_bfloat16());
      const float2 high = half ? unpack2(raw[j].y, __half()) : unpack2(raw[j].y, __nv_bfloat16());
      const float sign = __popc(c & (from + j)) & 1 ? -1.f : 1.f;
      sum = make_float4(fmaf(sign * low.x, w[j].x, sum.x), fmaf(sign * low.y, w[j].y, sum.y),
                        fmaf(sign * high.x, w[j].z, sum.z), fmaf(sign * high.y, w[j].w, sum.w));
    }
  }
  for (int base = from; !kPlain && base < to; base += kSpreadLoads) {
    float4 w[kSpreadLoads];
    int8_t h[kSpreadLoads];
    auto index = [&](int j) { return min(base + j, to - 1); };
#pragma unroll
    for (int j = 0; j < kSpreadLoads; ++j) {
      const int other = index(j) >> log_c;
      h[j] = F > 1 ? __ldg(p.r.h + (p.r.transpose ? other * F + a : a * F + other)) : 1;
    }
    if (p.pre == nullptr) {
#pragma unroll
      for (int j = 0; j < kSpreadLoads; ++j) w[j] = make_float4(1.f, 1.f, 1.f, 1.f);
    } else if (words) {
#pragma unroll
      for (int j = 0; j < kSpreadLoads; ++j)
        w[j] = __ldg(reinterpret_cast<const float4*>(p.pre) + ((index(j) << log_l) + column) / 4);
    } else {
#pragma unroll
      for (int j = 0; j < kSpreadLoads; ++j)
        w[j] = load_four(p.pre, p.pre_type, 0, (index(j) << log_l) + column, p.r.n);
    }
    if (base == from) {
      prefetch_constant(x + (wide ? 4ll : 2ll) * ((from << log_l) + column));
      grid_dependency_wait();
    }
    float4 v[kSpreadLoads];
    if (halves) {
      uint2 raw[kSpreadLoads];
#pragma unroll
      for (int j = 0; j < kSpreadLoads; ++j)
        raw[j] = load_cached8(x + 2ll * ((index(j) << log_l) + column));
#pragma unroll
      for (int j = 0; j < kSpreadLoads; ++j) {
        const bool half = p.x_type == DType::kFloat16;
        const float2 low = half ? unpack2(raw[j].x, __half()) : unpack2(raw[j].x, __nv_bfloat16());
        const float2 high = half ? unpack2(raw[j].y, __half()) : unpack2(raw[j].y, __nv_bfloat16());
        v[j] = make_float4(low.x, low.y, high.x, high.y);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kSpreadLoads; ++j)
        v[j] = load_four(x, p.x_type, 0, (index(j) << log_l) + column, p.r.n);
    }
#pragma unroll
    for (int j = 0; j < kSpreadLoads; ++j) {
      if (base + j >= to) break;
      const bool minus = (__popc(c & (base + j)) & 1) != (h[j] < 0);  // r's low bits are c'
      const float4 t = make_float4(v[j].x * w[j].x, v[j].y * w[j].y, v[j].z * w[j].z,
                                   v[j].w * w[j].w);
      sum = minus ? sub4(sum, t) : add4(sum, t);
    }
  }
  sum = rotate_lanes(sum, min(log_l, 7));
  // What is left are the bits of the warp's index in a split, and the sum over the splits.
  const int warps = lanes / 32, warp = tid / 32;
  if (warps * splits > 1) {
    spread_sums[tid] = sum;
    __syncthreads();
    if (split > 0) return;
    sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int s = 0; s < splits; ++s)
      for (int w = 0; w < warps; ++w) {
        const float4 v = spread_sums[s * lanes + w * 32 + tid % 32];
        sum = __popc(w & warp) & 1 ? sub4(sum, v) : add4(sum, v);
      }
  }
  const int i = blockIdx.x * lanes * 4 + at;
  const RotateFinish gain = {make_float4(p.gain, p.gain, p.gain, p.gain),
                             make_float4(0.f, 0.f, 0.f, 0.f)};
  if constexpr (kPlain) rotate_store(p, m, i, sum, gain);
  else rotate_store(p, m, i, sum, p.gain);
}

}  // namespace aqlm
