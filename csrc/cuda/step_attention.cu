// Attention of a decode step over a cache, with the rotary embedding and the cache's update.
//
// A block takes a chunk of positions for the query heads of one key/value head, a warp 16 of them
// at a time. A lane copies the very bytes that it multiplies into slots of its own in shared memory
// (three tiles in flight, 192 KB an SM, no barrier, no bank conflict):
//
//   scores [16 positions, 8 heads] = K q^T     A = K: 16 bytes of a row are half the A registers
//                                              of two MMAs. That permutes K's columns; q's too.
//   y [D, 8 heads] += V^T w^T                  A = V^T: a lane loads 4 positions and pairs them by
//                                              byte permutations. B = w^T: scores transposed
//                                              (movmatrix).
//
// What earlier steps cached was complete before this step began: the first three tiles are on their
// way before the wait for the q/k/v matmul. The new key and value are a position like the others,
// from registers. Warps are added up in shared memory,
// chunks by the block that ends last, both in order, so runs are bitwise equal.
#include <algorithm>

#include "enqueue.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "step_attention.h"

namespace aqlm {
namespace {

constexpr int kWarps = 8;
constexpr int kRows = 16;                // positions of a warp
constexpr int kTile = kWarps * kRows;    // positions of a block
constexpr int kMostStages = 3;           // tiles in flight
constexpr float kLog2e = 1.44269504f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ uint32_t transpose8x8(uint32_t a) {
  uint32_t b;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b) : "r"(a));
  return b;
}
__device__ __forceinline__ uint32_t pack2(float a, float b, __half) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
__device__ __forceinline__ uint32_t pack2(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
__device__ __forceinline__ const uint32_t* words(const uint4& v) {
  return reinterpret_cast<const uint32_t*>(&v);
}

// Largest, or sum, over the lanes that share a column (lane % 4).
template <bool kLargest>
__device__ __forceinline__ float over_rows(float v) {
#pragma unroll
  for (int d = 4; d < 32; d *= 2) {
    const float other = __shfl_xor_sync(~0u, v, d);
    v = kLargest ? fmaxf(v, other) : v + other;
  }
  return v;
}

// x cos + rotate_half(x) sin, each rounded; x[c] is 8 neighbours of the c-th 32 values of a head.
template <typename T, int kParts>
__device__ __forceinline__ void rotate(uint4 (&x)[kParts], const uint4 (&cos)[kParts],
                                       const uint4 (&sin)[kParts]) {
  auto turned = [&](const uint4& own, const uint4& other, uint32_t sign, int c) {
    uint32_t y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      y[i] = add2(mul2(words(own)[i], words(cos[c])[i], T()),
                  mul2(words(other)[i] ^ sign, words(sin[c])[i], T()), T());
    return make_uint4(y[0], y[1], y[2], y[3]);
  };
#pragma unroll
  for (int c = 0; c < kParts / 2; ++c) {
    const uint4 low = turned(x[c], x[c + kParts / 2], 0x80008000u, c);
    x[c + kParts / 2] = turned(x[c + kParts / 2], x[c], 0, c + kParts / 2);
    x[c] = low;
  }
}

// Grid: (chunks, key/value heads, batch).
template <typename T, int D>
__global__ void __launch_bounds__(kWarps * 32, 1)
step_attention_kernel(const __grid_constant__ StepAttentionParams p) {
  constexpr int kParts = D / 32, kHalves = D / 64, kTiles = D / 16, kSlots = 4 * kParts;
  extern __shared__ __align__(16) uint4 ring[];  // [stages][warps][kSlots][32], then sums
  __shared__ float tops[kWarps][8], totals[kWarps][8];
  __shared__ bool last;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int chunk = blockIdx.x, head = blockIdx.y, batch = blockIdx.z, group = p.group;
  grid_dependents_start();
  const int filled = static_cast<int>(*p.filled);  // positions before the new one
  const int begin = chunk * p.chunk, end = min(begin + p.chunk, filled + 1);
  if (begin > filled) return;
  T* keys = static_cast<T*>(p.keys) + batch * p.k_b + head * p.k_h;
  T* values = static_cast<T*>(p.values) + batch * p.v_b + head * p.v_h;
  const uint8_t* mask = p.mask + batch * p.mask_b;

  float* sums = reinterpret_cast<float*>(ring + p.stages * kWarps * kSlots * 32);
  auto slot = [&](int stage, int i) {
    return ring + ((stage * kWarps + warp) * kSlots + i) * 32 + lane;
  };
  auto value_row = [&](int i) { return 2 * t + i % 2 + i / 2 * 8; };
  auto copy = [&](int stage, int first) {
    auto stored = [&](int position) { return size_t(max(min(position, filled - 1), 0)) * D; };
    if (first < end) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < kParts; ++c)
          copy_async(slot(stage, r * kParts + c),
                     keys + stored(first + g + 8 * r) + t * 8 + c * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int c = 0; c < kHalves; ++c)
          copy_async(slot(stage, 2 * kParts + i * kHalves + c),
                     values + stored(first + value_row(i)) + g * 8 + c * 64);
    }
    copy_commit();
  };
  uint32_t seen[2], seen_next[2];
  auto look = [&](int first) {
#pragma unroll
    for (int r = 0; r < 2; ++r) seen_next[r] = mask[min(first + g + 8 * r, filled)];
  };
  int first = begin + warp * kRows, stage = 0;
  for (int i = 0; i < p.stages; ++i) copy(i, first + i * kTile);
  look(first);
  const size_t place = size_t(p.ids[batch * p.ids_b]) * D + t * 8;
  uint4 cos[kParts], sin[kParts];
#pragma unroll
  for (int c = 0; c < kParts; ++c) {
    cos[c] = load_cached(static_cast<const T*>(p.cos) + place + c * 32);
    sin[c] = load_cached(static_cast<const T*>(p.sin) + place + c * 32);
  }
  grid_dependency_wait();

  uint4 q[kParts], key[kParts], value[kHalves];
  const bool newest = filled < begin + p.chunk && (filled - begin) / kRows % kWarps == warp;
#pragma unroll
  for (int c = 0; c < kParts; ++c) {
    q[c] = key[c] = make_uint4(0, 0, 0, 0);
    if (g < group)
      q[c] = load_cached(static_cast<const T*>(p.q) + batch * p.q_b +
                         (head * group + g) * p.q_h + c * 32 + t * 8);
    if (newest)
      key[c] = load_cached(static_cast<const T*>(p.key) + batch * p.key_b + head * p.key_h +
                           c * 32 + t * 8);
  }
#pragma unroll
  for (int c = 0; c < kHalves; ++c) {
    value[c] = make_uint4(0, 0, 0, 0);
    if (newest)
      value[c] = load_cached(static_cast<const T*>(p.value) + batch * p.value_b +
                             head * p.value_h + c * 64 + g * 8);
  }
  rotate<T, kParts>(q, cos, sin);
  if (newest) {
    rotate<T, kParts>(key, cos, sin);
    const size_t at = size_t(filled) * D;
#pragma unroll
    for (int c = 0; c < kParts; ++c)
      if (g == 0) *reinterpret_cast<uint4*>(keys + at + c * 32 + t * 8) = key[c];
#pragma unroll
    for (int c = 0; c < kHalves; ++c)
      if (t == 0) *reinterpret_cast<uint4*>(values + at + c * 64 + g * 8) = value[c];
  }

  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f}, acc[kTiles][4] = {};
  for (; first < end; first += kTile) {
    seen[0] = seen_next[0], seen[1] = seen_next[1];
    look(first + kTile);
    if (p.stages == 1) copy_wait<0>();
    if (p.stages == 2) copy_wait<1>();
    if (p.stages == 3) copy_wait<2>();
    uint4 k[2][kParts], v[4][kHalves];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < kParts; ++c) k[r][c] = *slot(stage, r * kParts + c);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int c = 0; c < kHalves; ++c) v[i][c] = *slot(stage, 2 * kParts + i * kHalves + c);
    copy(stage, first + p.stages * kTile);
    stage = stage + 1 == p.stages ? 0 : stage + 1;
    if (first + kRows > filled) {  // the new token, and what lies after it
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < kParts; ++c)
          if (first + g + 8 * r == filled) k[r][c] = key[c];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int c = 0; c < kHalves; ++c) {
          const int position = first + value_row(i);
          if (position > filled) v[i][c] = make_uint4(0, 0, 0, 0);
          if (position == filled) v[i][c] = value[c];
        }
    }
    float s[4] = {};
#pragma unroll
    for (int c = 0; c < kParts; ++c) {
      const uint32_t low[4] = {k[0][c].x, k[1][c].x, k[0][c].y, k[1][c].y};
      const uint32_t high[4] = {k[0][c].z, k[1][c].z, k[0][c].w, k[1][c].w};
      mma_16816(s, low, q[c].x, q[c].y, T());
      mma_16816(s, high, q[c].z, q[c].w, T());
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool ok = seen[i / 2] != 0 && first + g + i / 2 * 8 <= filled;
      s[i] = ok ? s[i] * (p.scale * kLog2e) : -INFINITY;
    }
    uint32_t w[2];
    float weight[4], shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float higher = fmaxf(top[h], over_rows<true>(fmaxf(s[h], s[2 + h])));
      const float base = higher == -INFINITY ? 0.f : higher;
      shrink[h] = exp2_fast(top[h] - base);
      weight[h] = exp2_fast(s[h] - base);
      weight[2 + h] = exp2_fast(s[2 + h] - base);
      total[h] = total[h] * shrink[h] + (weight[h] + weight[2 + h]);
      top[h] = higher;
    }
    w[0] = transpose8x8(pack2(weight[0], weight[1], T()));
    w[1] = transpose8x8(pack2(weight[2], weight[3], T()));
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      auto pair = [&](int i, int e) {  // element e of positions i and i + 1
        return __byte_perm(words(v[i][e / 8])[e % 8 / 2], words(v[i + 1][e / 8])[e % 8 / 2],
                           e % 2 ? 0x7632 : 0x5410);
      };
      const uint32_t a[4] = {pair(0, j), pair(0, kTiles + j), pair(2, j), pair(2, kTiles + j)};
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[j][i] *= shrink[i % 2];
      mma_16816(acc[j], a, w[0], w[1], T());
    }
  }

  // acc[j][i]: head 2 t + i % 2, element e = i / 2 * kTiles + j of the lane's: D e / 8 * 64 + ...
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = over_rows<false>(total[h]);
    const int query = 2 * t + h;
    if (g == 0) tops[warp][query] = top[h];
    if (g == 0) totals[warp][query] = sum;
    if (query >= group) continue;
    float* row = sums + (warp * group + query) * D + g * 8;
#pragma unroll
    for (int e = 0; e < 2 * kTiles; e += 4) {
      const int i = e / kTiles * 2 + h, j = e % kTiles;
      *reinterpret_cast<float4*>(row + e / 8 * 64 + e % 8) =
          make_float4(acc[j][i], acc[j + 1][i], acc[j + 2][i], acc[j + 3][i]);
    }
  }
  __syncthreads();
  const int active = filled / p.chunk + 1, pair = batch * p.heads + head, size = group * (D + 2);
  float* slots = p.partials + size_t(pair) * p.chunks * size;
  T* out = static_cast<T*>(p.out) + size_t(pair) * group * D;
  for (int i = threadIdx.x; i < group * D; i += kWarps * 32) {
    const int query = i / D;
    float high = -INFINITY, sum = 0.f, y = 0.f;
#pragma unroll
    for (int o = 0; o < kWarps; ++o) high = fmaxf(high, tops[o][query]);
    const float base = high == -INFINITY ? 0.f : high;
#pragma unroll
    for (int o = 0; o < kWarps; ++o) {
      const float weight = exp2_fast(tops[o][query] - base);
      sum += weight * totals[o][query];
      y += weight * sums[o * group * D + i];
    }
    if (active == 1) {
      out[i] = from_float<T>(sum > 0.f ? y / sum : 0.f);
      continue;
    }
    float* slot = slots + size_t(chunk) * size;
    slot[i] = y;
    if (i % D == 0) slot[group * D + query] = high;
    if (i % D == 0) slot[group * (D + 1) + query] = sum;
  }
  if (active == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(p.counts + pair, 1) == active - 1;
  __syncthreads();
  if (!last) return;
  if (threadIdx.x == 0) p.counts[pair] = 0;
  __threadfence();
  for (int i = threadIdx.x; i < group * D; i += kWarps * 32) {
    const int query = i / D;
    float high = -INFINITY, sum = 0.f, y = 0.f;
    for (int o = 0; o < active; ++o)
      high = fmaxf(high, __ldcg(slots + size_t(o) * size + group * D + query));
    const float base = high == -INFINITY ? 0.f : high;
    for (int o = 0; o < active; ++o) {
      const float* slot = slots + size_t(o) * size;
      const float weight = exp2_fast(__ldcg(slot + group * D + query) - base);
      sum += weight * __ldcg(slot + group * (D + 1) + query);
      y += weight * __ldcg(slot + i);
    }
    out[i] = from_float<T>(sum > 0.f ? y / sum : 0.f);
  }
}

template <typename T>
auto kernel_of(int head_dim) {
  return head_dim == 128 ? step_attention_kernel<T, 128> : step_attention_kernel<T, 64>;
}

// Bytes of shared memory for the sums of the warps.
int sums_bytes(const StepAttentionParams& p) {
  return kWarps * p.group * p.head_dim * static_cast<int>(sizeof(float));
}

}  // namespace

// One block an SM, and no more chunks than keep three tiles each: a further chunk is a partial
// result through L2, while three tiles are loaded before the wait.
void cut_step_attention(const DeviceInfo& device, StepAttentionParams* p) {
  const int pairs = std::max(1, p->batch * p->heads), tiles = (p->length + kTile - 1) / kTile;
  const int most = (tiles + kMostStages - 1) / kMostStages;
  const int chunks = std::max(1, std::min(device.sms / pairs, most));
  p->chunk = (tiles + chunks - 1) / chunks * kTile;
  p->chunks = (p->length + p->chunk - 1) / p->chunk;
  const int tile_bytes = kTile * p->head_dim * 4, room = device.max_smem - 1024 - sums_bytes(*p);
  p->stages = std::max(1, std::min({kMostStages, p->chunk / kTile, room / tile_bytes}));
}

size_t step_attention_floats(const StepAttentionParams& p) {
  return p.chunks == 1 ? 0 : size_t(p.batch) * p.heads * p.chunks * p.group * (p.head_dim + 2);
}

cudaError_t launch_step_attention(const StepAttentionParams& p, cudaStream_t stream) {
  cudaGetLastError();
  const auto kernel = p.type == DType::kFloat16 ? kernel_of<__half>(p.head_dim)
                                                : kernel_of<__nv_bfloat16>(p.head_dim);
  static std::atomic<unsigned long long> done[2][2];
  int device = 0;
  DeviceInfo info;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = device_info(device, &info);
  if (e == cudaSuccess)
    e = allow_smem(kernel, &done[p.type == DType::kFloat16][p.head_dim == 128], device,
                   info.max_smem - 1024);
  if (e != cudaSuccess) return e;
  const int smem = p.stages * kTile * p.head_dim * 4 + sums_bytes(p);
  return enqueue(kernel, dim3(p.chunks, p.heads, p.batch), kWarps * 32, smem, stream, p);
}

}  // namespace aqlm
