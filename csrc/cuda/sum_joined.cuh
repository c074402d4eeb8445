// After an additive matmul of few tokens: its partial sums are added, and what follows it in a
// decode step is done in the same launch, up to the image of x that the next matmul reads.
//
//   sum_norm_kernel    o, down   residual sum and norm; a cluster of blocks has a token
//   sum_swiglu_kernel  gate, up  SwiGLU
//   sum_rows_kernel    q, k, v   the product itself
//
// A block has one group of 512 rows of a token (or of some): slots of it are runs of 2 KB, which
// bulk copies bring to shared memory, all at the same time, whatever the block's registers. So a
// block has 128 threads of 32 registers, four numbers each. That is the room which the warpgroup
// body leaves (640 x 96): the block waits beside the matmul before it, and the block of the next
// matmul (or of attention) begins beside it. Architectures sm_90+.
#pragma once

#include "clusters.cuh"
#include "fragments.cuh"
#include "mbarrier.cuh"
#include "streamk.cuh"
#include "sum_joined.h"

namespace aqlm {

constexpr int kSumThreads = 128, kSumWarps = kSumThreads / 32;
AQLM_HD constexpr int sum_blocks(int each) { return each == 1 ? 16 : 10; }  // 16: 32 registers
constexpr int kGroup = 512, kGroupBytes = kGroup * sizeof(float);
constexpr int kMostBytes = 96 << 10;  // of sums: what matmuls leave
constexpr int kMostCluster = 8, kMostEach = 2;

// The slots of an item from token m on.
struct Slots {
  const float* from;
  int count;
};
AQLM_HD int slots_between(const Schedule& s, int item) {
  auto owner = [&](int cell) { return ((cell + 1) * s.ctas - 1) / s.cells; };
  const int cell = item * s.units;
  return (owner(cell + s.units - 1) - owner(cell) + 1) * s.classes * s.lanes;
}
__device__ __forceinline__ Slots slots_of(const MatmulParams& p, int item, int m) {
  return {p.partials + (size_t(item) * p.s.max_slots * p.s.slot_tokens + m) * kGroup,
          slots_between(p.s, item)};
}

// By warp 0: `tokens` tokens of every slot, one slot behind the other.
__device__ __forceinline__ void copy_slots(const MatmulParams& p, const Slots& slots, int tokens,
                                           float* to, uint64_t* barrier) {
  const size_t stride = size_t(p.s.slot_tokens) * kGroup;
  for (int k = threadIdx.x; k < slots.count; k += 32)
    mbar::bulk_copy(to + k * tokens * kGroup, slots.from + k * stride, tokens * kGroupBytes,
                    barrier);
}

// The thread's four numbers of the sums, in the order of the slots, kTogether at a time.
template <int kTogether>
__device__ __forceinline__ float4 add_slots(const float* sums, int count, int tokens, int token) {
  const float4* at = reinterpret_cast<const float4*>(sums + token * kGroup) + threadIdx.x;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll kTogether
  for (int k = 0; k < count; ++k, at += tokens * (kGroup / 4)) {
    const float4 v = *at;
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return sum;
}

// Maximum over the warp of values that are not negative: their bits are in the same order.
__device__ __forceinline__ float largest_of_warp(float v) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(v)));
}

template <typename T>
__device__ __forceinline__ uint32_t round2(float a, float b) {
  const T pair[2] = {from_float<T>(a), from_float<T>(b)};
  return *reinterpret_cast<const uint32_t*>(pair);
}

// Sums times scales (and those of int8), as pairs of results.
template <typename T>
__device__ __forceinline__ uint2 scaled(float4 v, uint2 scales, float more) {
  const float2 a = unpack2(scales.x, T()), b = unpack2(scales.y, T());
  return make_uint2(round2<T>(v.x * a.x * more, v.y * a.y * more),
                    round2<T>(v.z * b.x * more, v.w * b.y * more));
}
// What int8 multiplies to a token of a part; 1 in exact.
__device__ __forceinline__ float int8_scale(const MatmulParams& p, int part, int token) {
  return p.x_scales == nullptr
             ? 1.f
             : __ldg(reinterpret_cast<const float*>(p.aux) + part) * __ldcg(p.x_scales + token);
}
template <typename T>
__device__ __forceinline__ uint2 load_four(const void* p, int n) {
  return load_cached8(static_cast<const T*>(p) + n);
}

// Numbers n .. n + 3 (n a multiple of 4) of token m.
template <typename T>
__device__ __forceinline__ void store_four(const SumTarget& to, size_t width, int m, int n,
                                           uint2 v) {
  if (to.image == 0) {
    *reinterpret_cast<uint2*>(static_cast<T*>(to.y) + m * width + n) = v;
    return;
  }
  uint32_t* at = static_cast<uint32_t*>(to.y) +
                 ((n / 32 * 4 + n % 8 / 2) * to.image + m) * 4 + n % 32 / 8;
  at[0] = v.x;
  at[4 * to.image] = v.y;
}

__device__ __forceinline__ void begin(uint64_t* barrier) {
  if (threadIdx.x == 0) {
    mbar::init(barrier, 1);
    mbar::init_fence();
  }
  grid_dependents_start();
}

// The same numbers as int8 columns 2 m and 2 m + 1, x = scale * (256 * high + low).
template <typename T>
__device__ __forceinline__ void store_int8(const SumTarget& to, int m, int n, uint2 v,
                                           float inverse) {
  const float2 a = unpack2(v.x, T()), b = unpack2(v.y, T());
  const float y[4] = {a.x, a.y, b.x, b.y};
  uint32_t high = 0, low = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int q = __float2int_rn(fminf(fmaxf(y[i] * inverse, -kActivationMax), kActivationMax));
    const int h = (q + 128) >> 8;
    high |= uint32_t(h & 255) << (8 * i);
    low |= uint32_t((q - 256 * h) & 255) << (8 * i);
  }
  uint32_t* at = static_cast<uint32_t*>(to.y) +
                 ((n / 32 * 2 + n % 8 / 4) * to.image + m) * 8 + n % 32 / 8;
  at[0] = high;
  at[4] = low;
}
template <typename T>
__device__ __forceinline__ float peak_of(uint2 v) {
  const float2 a = unpack2(v.x, T()), b = unpack2(v.y, T());
  return fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y)));
}
// A warp's number to all blocks of the cluster, to [rank][warp]; and when all of them are there. A
// block alone is launched without a cluster, which has no asynchronous stores.
__device__ __forceinline__ void gather(float v, float* to, const uint64_t* barrier) {
  const int lane = threadIdx.x % 32, blocks = gridDim.x;
  float* const at = to + blockIdx.x * kSumWarps + threadIdx.x / 32;
  if (blocks == 1 && lane == 0) *at = v;
  if (blocks > 1 && lane < blocks) send_cluster(at, lane, v, barrier);
}
__device__ __forceinline__ void wait_for_gathered(uint64_t* barrier) {
  if (gridDim.x == 1) __syncthreads();
  else wait_for_cluster(barrier);
}
// Grid: (C, tokens), clusters of C; a block has kEach groups of 512 rows.
template <typename T, int kEach, bool kInt8>
__global__ void __launch_bounds__(kSumThreads, sum_blocks(kInt8 ? 2 : kEach))
sum_norm_kernel(const __grid_constant__ SumNormParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) float sums[];
  __shared__ float squares[kMostCluster * kSumWarps];
  __shared__ float peaks[kInt8 ? kMostCluster * kSumWarps : 1];
  __shared__ uint64_t barrier, gathered;
  const int tid = threadIdx.x, m = blockIdx.y, rank = blockIdx.x, blocks = gridDim.x;
  const MatmulParams& product = p.product;
  if (tid == 0) expect_from_cluster(&gathered, (kInt8 ? 2 : 1) * blocks * kSumWarps * 4);
  begin(&barrier);
  cluster_arrive();
  const int group = rank * kEach, column = group * kGroup + 4 * tid;
  const int n = blocks * kEach * kGroup;
  uint2 scales[kEach], weight[kEach];
  Slots slots[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    scales[e] = load_four<T>(product.scales, column + e * kGroup);
    weight[e] = load_four<T>(p.weight, column + e * kGroup);
    slots[e] = slots_of(product, group + e, m);
  }
  const int second = slots[0].count * kGroup;  // where the sums of another group begin
  cluster_wait();  // all blocks have begun
  __syncthreads();
  grid_dependency_wait();
  if (tid < 32) {
    int count = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) count += slots[e].count;
    if (tid == 0) mbar::expect(&barrier, count * kGroupBytes);
    __syncwarp();
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      copy_slots(product, slots[e], 1, sums + e * second, &barrier);
  }
  const size_t row = size_t(m) * n + column;
  uint2 x[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e)
    x[e] = load_cached8(static_cast<const T*>(p.x) + row + e * kGroup);
  const float more = int8_scale(product, 0, m);
  mbar::wait(&barrier, 0);

  float square = 0.f, peak = 0.f;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const uint2 delta =
        scaled<T>(add_slots<4 / kEach>(sums + e * second, slots[e].count, 1, 0), scales[e], more);
    x[e] = make_uint2(add2(x[e].x, delta.x, T()), add2(x[e].y, delta.y, T()));
    *reinterpret_cast<uint2*>(static_cast<T*>(p.sum) + row + e * kGroup) = x[e];
    const float2 a = unpack2(x[e].x, T()), b = unpack2(x[e].y, T());
    square += a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y;
    if constexpr (kInt8) {
      const float2 c = unpack2(weight[e].x, T()), d = unpack2(weight[e].y, T());
      peak = fmaxf(peak, fmaxf(fmaxf(fabsf(a.x * c.x), fabsf(a.y * c.y)),
                               fmaxf(fabsf(b.x * d.x), fabsf(b.y * d.y))));
    }
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(~0u, square, d);
  gather(square, squares, &gathered);
  if constexpr (kInt8) gather(largest_of_warp(peak), peaks, &gathered);
  wait_for_gathered(&gathered);
  float total = tid % 32 < blocks * kSumWarps ? squares[tid % 32] : 0.f;  // at most 32
#pragma unroll
  for (int d = 16; d > 0; d /= 2) total += __shfl_xor_sync(~0u, total, d);
  const float norm = rsqrtf(total / n + p.eps);
  float inverse = 0.f;
  if constexpr (kInt8) {  // the largest result, or a little more: two roundings follow
    peak = largest_of_warp(tid % 32 < blocks * kSumWarps ? peaks[tid % 32] : 0.f) * norm * 1.008f;
    inverse = peak > 0.f ? kActivationMax / peak : 0.f;
    if (rank == 0 && tid == 0) p.to.scales[m] = peak / kActivationMax;
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const float2 a = unpack2(x[e].x, T()), b = unpack2(x[e].y, T());
    const uint2 y = make_uint2(mul2(weight[e].x, round2<T>(a.x * norm, a.y * norm), T()),
                               mul2(weight[e].y, round2<T>(b.x * norm, b.y * norm), T()));
    if constexpr (kInt8) store_int8<T>(p.to, m, column + e * kGroup, y, inverse);
    else store_four<T>(p.to, n, m, column + e * kGroup, y);
  }
#endif
}

template <typename T>
__device__ __forceinline__ uint32_t swiglu2(uint32_t gate, uint32_t up) {
  const float2 g = unpack2(gate, T());
  return mul2(round2<T>(__fdividef(g.x, 1.f + __expf(-g.x)), __fdividef(g.y, 1.f + __expf(-g.y))),
              up, T());
}

// Grid: (n / 512, tokens / each).
template <typename T>
__global__ void __launch_bounds__(kSumThreads, sum_blocks(1))
sum_swiglu_kernel(const __grid_constant__ SumSwigluParams p, int each) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) float sums[];
  __shared__ uint64_t barrier;
  const int tid = threadIdx.x, groups = gridDim.x, group = blockIdx.x, m0 = blockIdx.y * each;
  const MatmulParams& product = p.product;
  begin(&barrier);
  const int column = group * kGroup + 4 * tid, n = groups * kGroup;
  const int tokens = min(each, product.tokens - m0);
  const uint2 low_scales = load_four<T>(product.scales, column);
  const uint2 high_scales = load_four<T>(product.scales, n + column);
  const Slots low = slots_of(product, group, m0), high = slots_of(product, groups + group, m0);
  float* const high_sums = sums + low.count * tokens * kGroup;
  __syncthreads();
  grid_dependency_wait();
  if (tid < 32) {
    if (tid == 0) mbar::expect(&barrier, (low.count + high.count) * tokens * kGroupBytes);
    __syncwarp();
    copy_slots(product, low, tokens, sums, &barrier);
    copy_slots(product, high, tokens, high_sums, &barrier);
  }
  mbar::wait(&barrier, 0);
  for (int t = 0; t < tokens; ++t) {
    const uint2 a = scaled<T>(add_slots<2>(sums, low.count, tokens, t), low_scales,
                              int8_scale(product, 0, m0 + t));
    const uint2 b = scaled<T>(add_slots<2>(high_sums, high.count, tokens, t), high_scales,
                              int8_scale(product, 1, m0 + t));
    const uint2 gate = p.up_first ? b : a, up = p.up_first ? a : b;
    store_four<T>(p.to, n, m0 + t, column,
                  make_uint2(swiglu2<T>(gate.x, up.x), swiglu2<T>(gate.y, up.y)));
  }
#endif
}

// The same to an int8 image, whose scale is that of a whole token. A block has `each` groups of a
// half. Grid: (C, tokens), clusters of C.
template <typename T>
__global__ void __launch_bounds__(kSumThreads, sum_blocks(2))
sum_swiglu_int8_kernel(const __grid_constant__ SumSwigluParams p, int each) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) float shared[];
  __shared__ float peaks[kMostCluster * kSumWarps];
  __shared__ Slots slots[kSumThreads];
  __shared__ uint64_t barrier, gathered;
  const int tid = threadIdx.x, m = blockIdx.y, rank = blockIdx.x, blocks = gridDim.x;
  const int groups = blocks * each, first = rank * each, n = groups * kGroup;
  const MatmulParams& product = p.product;
  if (tid == 0) expect_from_cluster(&gathered, blocks * kSumWarps * 4);
  begin(&barrier);
  cluster_arrive();
  float* const sums = shared + each * kGroup;
  uint2* const factors = reinterpret_cast<uint2*>(shared) + 2 * tid;  // of this thread
  for (int e = 0; e < 2 * each; ++e)
    factors[e / 2 * 2 * kSumThreads + e % 2] =
        load_four<T>(product.scales, (first + e / 2) * kGroup + e % 2 * n + 4 * tid);
  // Group e / 2, half e % 2 (divisions of 150 cycles: a thread for each, before the wait).
  if (tid < 2 * each) slots[tid] = slots_of(product, first + tid / 2 + tid % 2 * groups, m);
  cluster_wait();
  __syncthreads();
  grid_dependency_wait();
  if (tid < 32) {
    int count = 0;
    for (int e = 0; e < 2 * each; ++e) count += slots[e].count;
    if (tid == 0) mbar::expect(&barrier, count * kGroupBytes);
    __syncwarp();
    float* to = sums;
    for (int e = 0; e < 2 * each; ++e) {
      copy_slots(product, slots[e], 1, to, &barrier);
      to += slots[e].count * kGroup;
    }
  }
  const float low_more = int8_scale(product, 0, m), high_more = int8_scale(product, 1, m);
  mbar::wait(&barrier, 0);
  float peak = 0.f;
  float* from = sums;
  uint2* const made = reinterpret_cast<uint2*>(sums) + 2 * tid;  // over sums that only it has read
  for (int e = 0; e < each; ++e) {
    const int low = slots[2 * e].count, high = slots[2 * e + 1].count;
    const uint2* const scales = factors + e * 2 * kSumThreads;
    const uint2 a = scaled<T>(add_slots<2>(from, low, 1, 0), scales[0], low_more);
    const uint2 b =
        scaled<T>(add_slots<2>(from + low * kGroup, high, 1, 0), scales[1], high_more);
    const uint2 gate = p.up_first ? b : a, up = p.up_first ? a : b;
    const uint2 y = make_uint2(swiglu2<T>(gate.x, up.x), swiglu2<T>(gate.y, up.y));
    peak = fmaxf(peak, peak_of<T>(y));
    made[e * 2 * kSumThreads] = y;
    from += (low + high) * kGroup;
  }
  peak = largest_of_warp(peak);
  gather(peak, peaks, &gathered);
  wait_for_gathered(&gathered);
  peak = largest_of_warp(tid % 32 < blocks * kSumWarps ? peaks[tid % 32] : 0.f);
  const float inverse = peak > 0.f ? kActivationMax / peak : 0.f;
  if (rank == 0 && tid == 0) p.to.scales[m] = peak / kActivationMax;
  for (int e = 0; e < each; ++e)
    store_int8<T>(p.to, m, (first + e) * kGroup + 4 * tid, made[e * 2 * kSumThreads], inverse);
#endif
}

// Grid: (N / 512, tokens / each).
template <typename T>
__global__ void __launch_bounds__(kSumThreads, sum_blocks(1))
sum_rows_kernel(const __grid_constant__ MatmulParams p, int each) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) float sums[];
  __shared__ uint64_t barrier;
  const int tid = threadIdx.x, group = blockIdx.x, m0 = blockIdx.y * each;
  begin(&barrier);
  const int column = group * kGroup + 4 * tid, part = p.a.part_of(group * kGroup);
  const int tokens = min(each, p.tokens - m0);
  const uint2 scales = load_four<T>(p.scales, column);
  uint2 bias = make_uint2(0, 0);
  if (p.bias != nullptr) bias = load_four<T>(p.bias, column);
  const Slots slots = slots_of(p, group, m0);
  __syncthreads();
  grid_dependency_wait();
  if (tid < 32) {
    if (tid == 0) mbar::expect(&barrier, slots.count * tokens * kGroupBytes);
    __syncwarp();
    copy_slots(p, slots, tokens, sums, &barrier);
  }
  mbar::wait(&barrier, 0);
  const float2 s0 = unpack2(scales.x, T()), s1 = unpack2(scales.y, T());
  const float2 b0 = unpack2(bias.x, T()), b1 = unpack2(bias.y, T());
  for (int t = 0; t < tokens; ++t) {
    const float4 v = add_slots<4>(sums, slots.count, tokens, t);
    const float more = int8_scale(p, part, m0 + t);
    const uint2 y = make_uint2(
        round2<T>(v.x * s0.x * more + b0.x, v.y * s0.y * more + b0.y),
        round2<T>(v.z * s1.x * more + b1.x, v.w * s1.y * more + b1.y));
    store_four<T>({p.y, 0}, p.a.out_groups(), m0 + t, column, y);
  }
#endif
}

}  // namespace aqlm
