// y = gain * post * U (pre * x) + bias for rows of x, or for the partial sums of a matmul: then
// this is its second kernel, which adds the slots of a row group in order, rotates and finishes.
//
// Float32 throughout. Four neighbouring elements a thread: bits 0, 1 of the index in registers,
// bits 2 .. 6 by shuffles, the rest in shared memory, H_F as +-1 multiply-adds. A vector is spread
// over a cluster of C blocks by the top bits of the Sylvester index b, so that H_F is local to a
// block; the last log2(C) bits are one exchange through distributed shared memory.
//   full width: vector index a * P + b, a < F; block c of the cluster holds b / (P / C) = c, all a
//   block-128 and no rotation: nothing leaves a warp, one thread per four elements (flat kernel)
// Architectures sm_80+ (C = 1 below sm_90).
#pragma once

#include "numeric.cuh"
#include "ptx.cuh"
#include "rotated.h"

namespace aqlm {

constexpr int kRotateThreads = 512;
constexpr int kFlatThreads = 256;

__device__ __forceinline__ float4 add4(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 sub4(float4 a, float4 b) {
  return make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w);
}

// Four floats, loaded where it stands: the compiler sinks constant loads below the wait.
__device__ __forceinline__ float4 load_quad(const float* p) {
  const uint4 w = load_cached(p);
  return make_float4(__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z),
                     __uint_as_float(w.w));
}

__device__ __forceinline__ float load_one(const void* x, DType type, size_t i) {
  if (type == DType::kFloat16) return to_float(static_cast<const __half*>(x)[i]);
  if (type == DType::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(x)[i]);
  return static_cast<const float*>(x)[i];
}

// Elements i .. i + 3 of a row of `type`; zeros past n.
__device__ __forceinline__ float4 load_four(const void* x, DType type, long long row, int i,
                                            int n) {
  float v[4] = {};
  const size_t bytes = type == DType::kFloat32 ? 4 : 2;
  const char* at = static_cast<const char*>(x) + (row + i) * bytes;
  if (i + 4 <= n && reinterpret_cast<uintptr_t>(at) % (4 * bytes) == 0) {
    if (type == DType::kFloat32) {
      const uint4 w = load_cached(at);
      return make_float4(__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z),
                         __uint_as_float(w.w));
    }
    const uint2 w = load_cached8(at);
    const bool half = type == DType::kFloat16;
    const float2 a = half ? unpack2(w.x, __half()) : unpack2(w.x, __nv_bfloat16());
    const float2 b = half ? unpack2(w.y, __half()) : unpack2(w.y, __nv_bfloat16());
    return make_float4(a.x, a.y, b.x, b.y);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (i + j < n) v[j] = load_one(x, type, row + i + j);
  }
  return make_float4(v[0], v[1], v[2], v[3]);
}

// Where the partial sums of elements i .. i + 3 of token m lie: `slots` vectors, `stride` apart.
struct RotateSource {
  const float* from;
  size_t stride;
  int slots;
};
__device__ __forceinline__ RotateSource rotate_locate(const RotateParams& p, int m, int i) {
  const RotatedSchedule& s = p.s;
  const int group = i / s.group_rows, cell = group * s.units;
  return {p.partials + (size_t(group) * s.max_slots * p.tokens + m) * s.group_rows +
              i % s.group_rows,
          size_t(p.tokens) * s.group_rows,
          owner_of(s, cell + s.units - 1) - owner_of(s, cell) + 1};
}
// 16 bytes past L1 where `wanted`, else zeros. Written so because a conditional load in C++ became
// a chain in which every load waits for the one before.
__device__ __forceinline__ float4 load_slot(const float* at, bool wanted) {
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0;\n\t"
               "@p ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];}"
               : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w) : "l"(at), "r"(uint32_t(wanted))
               : "memory");
  return v;
}
// The same of 8 bytes.
__device__ __forceinline__ float2 load_slot2(const float* at, bool wanted) {
  float2 v = make_float2(0.f, 0.f);
  asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0;\n\t@p ld.global.cg.v2.f32 {%0,%1}, [%2];}"
               : "+f"(v.x), "+f"(v.y) : "l"(at), "r"(uint32_t(wanted)) : "memory");
  return v;
}
// Their sum, kInFlight loaded together.
template <int kInFlight>
__device__ __forceinline__ float4 rotate_sum(const RotateSource& s) {
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int k = 0; k < s.slots; k += kInFlight) {
    float4 part[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      part[j] = load_slot(s.from + (k + j) * s.stride, k + j < s.slots);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) v = add4(v, part[j]);
  }
  return v;
}
// The same of two neighbours, added to x and y. (One template for this, rotate_sum and mix_rows.cu
// is unrolled otherwise: E8P at batch 16 made 5161 tokens/s with it, 5276 without; H200, 2026-11-29.)
template <int kInFlight>
__device__ __forceinline__ void add_slots2(const RotateSource& s, float& x, float& y) {
  for (int k = 0; k < s.slots; k += kInFlight) {
    float2 part[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      part[j] = load_slot2(s.from + (k + j) * s.stride, k + j < s.slots);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) x += part[j].x, y += part[j].y;
  }
}

// Elements i .. i + 3 of row m of x, times `pre`.
__device__ __forceinline__ float4 rotate_input(const RotateParams& p, int m, int i) {
  const float4 v = load_four(p.x, p.x_type, m * p.x_stride, i, p.r.n);
  if (p.pre == nullptr) return v;
  const float4 w = load_four(p.pre, p.pre_type, 0, i, p.r.n);
  return make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w);
}

// What the end of a rotation multiplies and adds to elements i .. i + 3.
struct RotateFinish {
  float4 scale, bias;
};
__device__ __forceinline__ RotateFinish rotate_finish(const RotateParams& p, int i, float gain) {
  RotateFinish f = {make_float4(gain, gain, gain, gain), make_float4(0.f, 0.f, 0.f, 0.f)};
  if (p.post != nullptr) {
    const float4 w = load_four(p.post, p.post_type, 0, i, p.r.n);
    f.scale = make_float4(gain * w.x, gain * w.y, gain * w.z, gain * w.w);
  }
  if (p.bias != nullptr) f.bias = load_four(p.bias, p.y_type, 0, i, p.r.n);
  return f;
}

// Stores elements i .. i + 3 of token m, finished.
__device__ __forceinline__ void rotate_store(const RotateParams& p, int m, int i, float4 v,
                                             const RotateFinish& f) {
  const int n = p.r.n;
  if (i >= n) return;
  const float out[4] = {v.x * f.scale.x + f.bias.x, v.y * f.scale.y + f.bias.y,
                        v.z * f.scale.z + f.bias.z, v.w * f.scale.w + f.bias.w};
  const size_t at = size_t(m) * n + i;
  const bool whole = n % 4 == 0;
  if (p.y_type == DType::kFloat32) {
    float* y = static_cast<float*>(p.y) + at;
    if (whole) *reinterpret_cast<float4*>(y) = make_float4(out[0], out[1], out[2], out[3]);
    else
      for (int j = 0; j < 4 && i + j < n; ++j) y[j] = out[j];
    return;
  }
  uint16_t bits[4];
#pragma unroll
  for (int j = 0; j < 4; ++j)
    bits[j] = p.y_type == DType::kFloat16 ? __half_as_ushort(__float2half_rn(out[j]))
                                          : __bfloat16_as_ushort(__float2bfloat16_rn(out[j]));
  uint16_t* y = static_cast<uint16_t*>(p.y) + at;
  if (whole)
    *reinterpret_cast<uint2*>(y) =
        make_uint2(bits[0] | uint32_t(bits[1]) << 16, bits[2] | uint32_t(bits[3]) << 16);
  else
    for (int j = 0; j < 4 && i + j < n; ++j) y[j] = bits[j];
}

__device__ __forceinline__ void rotate_store(const RotateParams& p, int m, int i, float4 v,
                                             float gain) {
  if (i < p.r.n) rotate_store(p, m, i, v, rotate_finish(p, i, gain));
}

// One element; the H_F stage of a single block ends with columns, not rows.
struct RotateFinishOne {
  float scale, bias;
};
__device__ __forceinline__ RotateFinishOne rotate_finish_one(const RotateParams& p, int i,
                                                             float gain) {
  return {p.post != nullptr ? gain * load_one(p.post, p.post_type, i) : gain,
          p.bias != nullptr ? load_one(p.bias, p.y_type, i) : 0.f};
}
__device__ __forceinline__ void rotate_store_one(const RotateParams& p, int m, int i, float v,
                                                 const RotateFinishOne& f) {
  v = v * f.scale + f.bias;
  const size_t at = size_t(m) * p.r.n + i;
  if (p.y_type == DType::kFloat32) static_cast<float*>(p.y)[at] = v;
  else if (p.y_type == DType::kFloat16) static_cast<__half*>(p.y)[at] = from_float<__half>(v);
  else static_cast<__nv_bfloat16*>(p.y)[at] = from_float<__nv_bfloat16>(v);
}

// Butterflies over bits 0 .. bits - 1 (at most 7) of the index 4 * lane + j.
__device__ __forceinline__ float4 rotate_lanes(float4 v, int bits) {
  if (bits > 0) v = make_float4(v.x + v.y, v.x - v.y, v.z + v.w, v.z - v.w);
  if (bits > 1) v = make_float4(v.x + v.z, v.y + v.w, v.x - v.z, v.y - v.w);
#pragma unroll
  for (int b = 2; b < 7; ++b) {
    if (b >= bits) break;
    const int d = 1 << (b - 2);
    const float4 o = make_float4(__shfl_xor_sync(~0u, v.x, d), __shfl_xor_sync(~0u, v.y, d),
                                 __shfl_xor_sync(~0u, v.z, d), __shfl_xor_sync(~0u, v.w, d));
    v = threadIdx.x & d ? sub4(o, v) : add4(v, o);
  }
  return v;
}

// Starts bringing a line of constant data to L2 while the previous kernel ends.
__device__ __forceinline__ void prefetch_constant(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" :: "l"(p));
}

// Partial sums in flight per thread: few tokens have many slots and want the latency of one load,
// many tokens want threads. The second number of __launch_bounds__ matters: without it ptxas took
// 40 registers and every load waited for the one before (4096 x 4096, M = 1: 9.1 against 6.2 us).
constexpr int kFewSlots = 16, kManySlots = 4, kFewTokens = 4;

// Grid: (chunks of a row, tokens). What is known before the matmul ends is found out before.
template <int kSlots>
__global__ void __launch_bounds__(kFlatThreads, kSlots == kFewSlots ? 2 : 6)
rotate_flat_kernel(const __grid_constant__ RotateParams p) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4, m = blockIdx.y;
  const bool inside = i < p.r.n, sums = p.partials != nullptr;
  grid_dependents_start();
  RotateFinish finish = {};
  RotateSource source = {};
  if (inside) finish = rotate_finish(p, i, p.gain);
  if (inside && sums) {
    source = rotate_locate(p, m, i);
    prefetch_constant(source.from);
  }
  grid_dependency_wait();
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
  if (inside) v = sums ? rotate_sum<kSlots>(source) : rotate_input(p, m, i);
  if (p.r.block) v = rotate_lanes(v, 7);
  rotate_store(p, m, i, v, finish);
}

// One radix-2^kBits pass over bit `bit` .. of the local index, in place. Ends with a barrier.
template <int kBits>
__device__ __forceinline__ void rotate_pass(float* z, int length, int bit) {
  constexpr int kRadix = 1 << kBits;
  for (int i = threadIdx.x; i < length >> kBits; i += int(blockDim.x)) {
    const int low = i & ((1 << bit) - 1), base = (i >> bit << (bit + kBits)) + low;
    float v[kRadix];
#pragma unroll
    for (int j = 0; j < kRadix; ++j) v[j] = z[base + (j << bit)];
#pragma unroll
    for (int b = 1; b < kRadix; b *= 2)
#pragma unroll
      for (int j = 0; j < kRadix; ++j)
        if ((j & b) == 0) {
          const float s = v[j], d = v[j + b];
          v[j] = s + d;
          v[j + b] = s - d;
        }
#pragma unroll
    for (int j = 0; j < kRadix; ++j) z[base + (j << bit)] = v[j];
  }
  __syncthreads();
}

// +1.f or -1.f from byte i of w, whose bytes are 0x3F or 0xBF.
__device__ __forceinline__ float signed_one(uint32_t w, int i) {
  return __uint_as_float(__byte_perm(w, 0x80u, 0x0455 | i << 12));
}

// Rows a .. a + 3 of H_F (or its transpose; in shared or global memory) times columns b and
// b + half of z [F][1 << log_p].
template <int kColumns, bool kTranspose>
__device__ __forceinline__ void mix_rows(const int8_t* h, int F, const float* z, int log_p, int a,
                                         int b, int half, float (&out)[4][2]) {
#pragma unroll 2
  for (int k = 0; k < F; k += 4) {
    uint32_t w[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int8_t* at = kTranspose ? h + (k + j) * F + a : h + (a + j) * F + k;
      w[j] = and_or(*reinterpret_cast<const uint32_t*>(at), 0x80808080u, 0x3F3F3F3Fu);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float v[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) v[c] = z[((k + j) << log_p) + b + c * half];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float sign = kTranspose ? signed_one(w[j], r) : signed_one(w[r], j);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) out[r][c] += sign * v[c];
      }
    }
  }
}

__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}
// 16 bytes of block `rank`'s shared memory at the address that `p` has in this block.
__device__ __forceinline__ float4 load_cluster(const float* p, int rank) {
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#if __CUDA_ARCH__ >= 900
  uint32_t at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(smem_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at) : "memory");
#endif
  return v;
}

// Grid: (C, tokens), clusters of C. log_p: log2(P / C), the Sylvester bits local to a block. Shared
// memory: n / C floats, twice where H_F and an exchange follow each other.
template <int C>
__global__ void __launch_bounds__(kRotateThreads, 2)
rotate_kernel(const __grid_constant__ RotateParams p, int log_p) {
  extern __shared__ __align__(16) float rotate_smem[];
  const int F = p.r.factor, length = F << log_p, m = blockIdx.y, rank = blockIdx.x;
  const int tid = threadIdx.x;
  const float gain = p.gain;
  float* z = rotate_smem;
  // Element i of this block in the vector.
  auto place = [&](int i, int c) {
    return C == 1 ? i : ((i >> log_p) * C + c << log_p) + (i & ((1 << log_p) - 1));
  };
  grid_dependents_start();
  for (int i = 8 * tid; i < p.r.n / C; i += 8 * blockDim.x) {
    const long long at = rank * (p.r.n / C) + i;
    if (p.post != nullptr)
      prefetch_constant(static_cast<const char*>(p.post) +
                        at * (p.post_type == DType::kFloat32 ? 4 : 2));
    if (p.pre != nullptr)
      prefetch_constant(static_cast<const char*>(p.pre) +
                        at * (p.pre_type == DType::kFloat32 ? 4 : 2));
  }
  grid_dependency_wait();
  for (int base = 0; base < length; base += 4 * int(blockDim.x)) {
    const int i = base + 4 * tid;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (i < length) {
      const int at = place(i, rank);
      v = p.partials != nullptr ? rotate_sum<8>(rotate_locate(p, m, at)) : rotate_input(p, m, at);
    }
    v = rotate_lanes(v, log_p);
    if (i < length) *reinterpret_cast<float4*>(z + i) = v;
  }
  __syncthreads();
  int bit = 7;
  for (; bit + 3 <= log_p; bit += 3) rotate_pass<3>(z, length, bit);
  if (bit + 2 <= log_p) rotate_pass<2>(z, length, bit);
  else if (bit + 1 <= log_p) rotate_pass<1>(z, length, bit);

  if (F > 1) {
    float* mixed = z + length;
    const int columns = log_p > 0 ? 2 : 1, half = (1 << log_p) / columns;
    for (int i = tid; i < F / 4 * half; i += blockDim.x) {
      const int a = i / half * 4, b = i % half;
      float out[4][2] = {};
      if (columns == 1) {
        if (p.r.transpose) mix_rows<1, true>(p.r.h, F, z, log_p, a, b, half, out);
        else mix_rows<1, false>(p.r.h, F, z, log_p, a, b, half, out);
      } else {
        if (p.r.transpose) mix_rows<2, true>(p.r.h, F, z, log_p, a, b, half, out);
        else mix_rows<2, false>(p.r.h, F, z, log_p, a, b, half, out);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (c >= columns) continue;
          const int at = ((a + r) << log_p) + b + c * half;
          if constexpr (C > 1) mixed[at] = out[r][c];
          else rotate_store_one(p, m, at, out[r][c], rotate_finish_one(p, at, gain));
        }
    }
    if constexpr (C == 1) return;
    z = mixed;
  }
  if constexpr (C == 1) {
    for (int i = 4 * tid; i < length; i += 4 * int(blockDim.x))
      rotate_store(p, m, i, *reinterpret_cast<const float4*>(z + i), gain);
  } else {
    cluster_barrier();
    const int items = length / 4;
    for (int item = items * rank / C + tid; item < items * (rank + 1) / C;
         item += int(blockDim.x)) {
      float4 v[C];
#pragma unroll
      for (int c = 0; c < C; ++c) v[c] = load_cluster(z + 4 * item, c);
#pragma unroll
      for (int b = 1; b < C; b *= 2)
#pragma unroll
        for (int c = 0; c < C; ++c)
          if ((c & b) == 0) {
            const float4 s = v[c], d = v[c + b];
            v[c] = add4(s, d);
            v[c + b] = sub4(s, d);
          }
#pragma unroll
      for (int c = 0; c < C; ++c) rotate_store(p, m, place(4 * item, c), v[c], gain);
    }
    cluster_barrier();  // nobody leaves while its shared memory is read
  }
}

}  // namespace aqlm
