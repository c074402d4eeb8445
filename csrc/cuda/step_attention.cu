// Attention of a decode step: one new token a sequence, on the tensor cores.
//
// A cluster of C blocks has one key/value head of one sequence and all query heads of it; block r has
// tiles r, r + C, .. of 64 positions, a warp 16 of them, which it brings to shared memory itself
// (the first before the wait: earlier steps wrote them):
//   scores [16][8 heads] = K q^T | weights | O^T [D][8 heads] += V^T weights
//   the block's four warps are added | the cluster exchanges blocks for dimensions | added, stored
// Nothing goes through global memory between blocks: the chunks that Triton's kernel (decode.py)
// writes, counts and reads cost it three round trips to L2. Architectures sm_90+.
#include "step_attention.h"

#include <algorithm>

#include "clusters.cuh"
#include "enqueue.cuh"
#include "numeric.cuh"

namespace aqlm {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kTile = 64, kRows = kTile / kWarps;
constexpr int kMostBlocks = 8;
// Blocks that registers leave room for, of one tile and of many: 85 and 128 each, so that those of
// one tile begin beside the kernel before. (For devices without clusters it is only compiled.)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kResident[2] = {2, 2};
#else
constexpr int kResident[2] = {5, 4};
#endif

template <typename T>
__device__ __forceinline__ uint32_t round2(float a, float b) {
  const T pair[2] = {from_float<T>(a), from_float<T>(b)};
  return *reinterpret_cast<const uint32_t*>(pair);
}

// Two values of x cos + y sin; products and sum are rounded. `minus`: y is subtracted.
template <typename T>
__device__ __forceinline__ uint32_t turned2(uint32_t x, uint32_t y, uint32_t cos, uint32_t sin,
                                            bool minus) {
  const float2 a = unpack2(x, T()), b = unpack2(y, T()), c = unpack2(cos, T()),
               s = unpack2(sin, T());
  const float2 p = unpack2(round2<T>(a.x * c.x, a.y * c.y), T());
  const float2 q = unpack2(round2<T>(b.x * s.x, b.y * s.y), T());
  return minus ? round2<T>(p.x - q.x, p.y - q.y) : round2<T>(p.x + q.x, p.y + q.y);
}
template <typename T>
__device__ __forceinline__ uint4 turned8(uint4 x, uint4 y, uint4 cos, uint4 sin, bool minus) {
  return make_uint4(turned2<T>(x.x, y.x, cos.x, sin.x, minus),
                    turned2<T>(x.y, y.y, cos.y, sin.y, minus),
                    turned2<T>(x.z, y.z, cos.z, sin.z, minus),
                    turned2<T>(x.w, y.w, cos.w, sin.w, minus));
}

// Over the lanes of one t = lane % 4.
__device__ __forceinline__ float most_over_rows(float v) {
#pragma unroll
  for (int d = 4; d < 32; d *= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, d));
  return v;
}
__device__ __forceinline__ float sum_over_rows(float v) {
#pragma unroll
  for (int d = 4; d < 32; d *= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}
__device__ __forceinline__ uint32_t load_byte(const uint8_t* p) {
  uint32_t v;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// exp(v - top); of nothing seen (both -inf) zero.
__device__ __forceinline__ float weight_of(float v, float top) {
  return __expf(v - (top == -INFINITY ? 0.f : top));
}

// Grid: (C, heads, batch), clusters of C: 4 or 8. kGroup: query heads, rounded up to a power of two from 2.
// kMany: a block may have more than one tile, and two stages for them.
// Dynamic shared memory: stages of [keys 64][D], [values 64][D].
template <typename T, int D, int kGroup, int C, bool kMany>
__global__ void __launch_bounds__(kThreads, kResident[kMany])
step_attention_kernel(const __grid_constant__ StepAttentionParams p) {
  constexpr int kChunks = D / 8, kRowBytes = 2 * D, kWarpBytes = kRows * kRowBytes;
  constexpr int kTileBytes = kTile * kRowBytes, kOwn = D / C;  // dimensions that a block ends with
  constexpr int kParts = D / 32;                               // of a row, 4 chunks each
  static_assert(D * kGroup * 4 <= kWarpBytes, "sums of a warp take the place of its keys");
  extern __shared__ __align__(128) uint8_t tiles[];
  __shared__ float2 warp_stats[kWarps][kGroup];                 // largest score, sum of weights
  __shared__ float2 block_stats[C][kGroup];
  __shared__ __align__(16) float sums[C][kOwn][kGroup];
  __shared__ __align__(16) T turns[kWarps][2][D];  // cos and sin of the new position
  __shared__ uint64_t sums_here;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
  const int rank = blockIdx.x, head = blockIdx.y;
  const long long b = blockIdx.z;
  if (tid == 0) expect_from_cluster(&sums_here, (D * 4 + C * 8) * kGroup);
  cluster_arrive();
  grid_dependents_start();
  const int filled = static_cast<int>(load_early(p.filled));
  const size_t place = size_t(load_early(p.ids + b * p.ids_b)) * D;
  const int last = filled / kTile, count = last < rank ? 0 : (last - rank) / C + 1;
  T* const keys = static_cast<T*>(p.keys) + b * p.k_b + head * p.k_h;
  T* const values = static_cast<T*>(p.values) + b * p.v_b + head * p.v_h;
  const uint8_t* const mask = p.mask + b * p.mask_b;
  // Where chunk c of this warp's row lies. Readers of keys take two rows at a time, of values eight.
  auto key_place = [&](int stage, int row, int c) {
    return tiles + stage * 2 * kTileBytes + warp * kWarpBytes + row * kRowBytes +
           (c ^ (row & 1) * 4) * 16;
  };
  auto value_place = [&](int stage, int row, int c) {
    return tiles + (stage * 2 + 1) * kTileBytes + warp * kWarpBytes + row * kRowBytes +
           (c ^ (row & 7)) * 16;
  };
  auto first_of = [&](int n) { return (rank + n * C) * kTile + warp * kRows; };
  // This warp's rows of the block's tile n: zeros past the new token's, which is left out.
  auto load_rows = [&](const T* from, long long stride, int first, auto place_of) {
    const int row = lane / kChunks, c = lane % kChunks;
    from += (first + row) * stride + 8 * c;
#pragma unroll
    for (int i = 0; i < kRows; i += 32 / kChunks, from += 32 / kChunks * stride)
      if (first + row + i != filled)
        copy_async_or_zero(place_of(row + i, c), from, first + row + i < filled);
    copy_commit();
  };
  auto load = [&](int n) {
    const int stage = kMany ? n % 2 : 0, first = first_of(n);
    load_rows(keys, p.k_l, first, [&](int row, int c) { return key_place(stage, row, c); });
    load_rows(values, p.v_l, first, [&](int row, int c) { return value_place(stage, row, c); });
  };
  // Bit i: whether position g + 8 i of the tile is seen; the new one is.
  auto seen_of = [&](int n) {
    uint32_t seen = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = first_of(n) + g + 8 * i;
      if (at == filled || (at < filled && load_byte(mask + at) != 0)) seen |= 1u << i;
    }
    return seen;
  };
  if (lane < 2 * kChunks) {
    const T* from = static_cast<const T*>(lane < kChunks ? p.cos : p.sin) + place;
    copy_async(turns[warp][lane / kChunks] + lane % kChunks * 8, from + lane % kChunks * 8);
  }
  copy_commit();
  uint32_t seen = 0, seen_next = 0;
  if (count > 0) {
    load(0);
    seen_next = seen_of(0);
  }
  // The warp that has position `filled`: lanes of a chunk of the key, then of the value.
  const bool owner = last % C == rank && filled % kTile / kRows == warp;
  const int own_chunk = lane % kChunks;
  cluster_wait();  // all blocks have begun
  grid_dependency_wait();

  // q of head g as the B operand: word w of chunk 4 j + t is column pair (j, w, t) of the product.
  uint4 q[kParts] = {};
  if (g < p.group) {
    const T* from = static_cast<const T*>(p.q) + b * p.q_b + (head * p.group + g) * p.q_h;
#pragma unroll
    for (int j = 0; j < kParts; ++j) q[j] = load_cached(from + (4 * j + t) * 8);
  }
  uint4 own_new = {}, own_other = {};
  if (owner && lane < 2 * kChunks) {
    const T* from = lane < kChunks
                        ? static_cast<const T*>(p.key) + b * p.key_b + head * p.key_h
                        : static_cast<const T*>(p.value) + b * p.value_b + head * p.value_h;
    own_new = load_cached(from + own_chunk * 8);
    if (lane < kChunks) own_other = load_cached(from + (own_chunk ^ kChunks / 2) * 8);
  }
  if (count > 0) copy_wait<2>();
  else copy_wait<0>();
  __syncwarp();
  const T* const cos = turns[warp][0];
  const T* const sin = turns[warp][1];
  auto chunk = [](const T* from, int i) {
    return *reinterpret_cast<const uint4*>(from + 8 * i);
  };
#pragma unroll
  for (int j = 0; j < kParts / 2; ++j) {
    const int low_at = 4 * j + t, high_at = low_at + kChunks / 2;
    const uint4 low = q[j], high = q[j + kParts / 2];
    q[j] = turned8<T>(low, high, chunk(cos, low_at), chunk(sin, low_at), true);
    q[j + kParts / 2] = turned8<T>(high, low, chunk(cos, high_at), chunk(sin, high_at), false);
  }
  if (owner && lane < 2 * kChunks) {
    if (lane < kChunks)
      own_new = turned8<T>(own_new, own_other, chunk(cos, own_chunk), chunk(sin, own_chunk),
                           own_chunk < kChunks / 2);
    T* const to = lane < kChunks ? keys + filled * p.k_l : values + filled * p.v_l;
    *reinterpret_cast<uint4*>(to + own_chunk * 8) = own_new;
  }

  float out[D / 16][4] = {};       // dimensions g, g + 8 of a part, heads 2 t, 2 t + 1
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  for (int n = 0; n < (kMany ? count : min(count, 1)); ++n) {
    const int stage = kMany ? n % 2 : 0;
    const bool more = kMany && n + 1 < count;
    seen = seen_next;
    if (more) {
      load(n + 1);
      seen_next = seen_of(n + 1);
      copy_wait<3>();
    } else {
      copy_wait<1>();
    }
    if (owner && !more && lane < 2 * kChunks)
      *reinterpret_cast<uint4*>(lane < kChunks ? key_place(stage, filled % kRows, own_chunk)
                                               : value_place(stage, filled % kRows, own_chunk)) =
          own_new;
    __syncwarp();
    float scores[2][4] = {};
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      const uint4 low = *reinterpret_cast<const uint4*>(key_place(stage, g, 4 * j + t));
      const uint4 high = *reinterpret_cast<const uint4*>(key_place(stage, g + 8, 4 * j + t));
      mma_16816(scores[0], {low.x, high.x, low.y, high.y}, q[j].x, q[j].y, T());
      mma_16816(scores[1], {low.z, high.z, low.w, high.w}, q[j].z, q[j].w, T());
    }
    float weights[4];  // rows g, g + 8, heads 2 t, 2 t + 1
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float v[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float score = (scores[0][2 * i + h] + scores[1][2 * i + h]) * p.scale;
        v[i] = seen >> i & 1 ? score : -INFINITY;
      }
      const float high = fmaxf(top[h], most_over_rows(fmaxf(v[0], v[1])));
      if constexpr (kMany) {
        const float shrink = weight_of(top[h], high);
        total[h] *= shrink;
#pragma unroll
        for (int m = 0; m < D / 16; ++m) out[m][h] *= shrink, out[m][2 + h] *= shrink;
      }
      top[h] = high;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weights[2 * i + h] = weight_of(v[i], high);
        total[h] += weights[2 * i + h];
      }
    }
    const uint32_t b0 = transpose_8x8(round2<T>(weights[0], weights[1]));
    const uint32_t b1 = transpose_8x8(round2<T>(weights[2], weights[3]));
    if (more) copy_wait<2>();
    else copy_wait<0>();
    __syncwarp();
#pragma unroll
    for (int m = 0; m < D / 16; ++m) {
      uint32_t a[4];
      load_matrices_transposed(value_place(stage, lane % 8 + lane / 16 * 8, 2 * m + lane / 8 % 2),
                               a);
      mma_16816(out[m], a, b0, b1, T());
    }
    __syncwarp();  // the next tile but one comes to the same place
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) total[h] = sum_over_rows(total[h]);

  // The block's sums, over the warp's own keys.
  float* const own = reinterpret_cast<float*>(tiles + warp * kWarpBytes);
  if (2 * t < kGroup) {
#pragma unroll
    for (int m = 0; m < D / 16; ++m) {
      *reinterpret_cast<float2*>(own + (16 * m + g) * kGroup + 2 * t) =
          make_float2(out[m][0], out[m][1]);
      *reinterpret_cast<float2*>(own + (16 * m + g + 8) * kGroup + 2 * t) =
          make_float2(out[m][2], out[m][3]);
    }
    if (g == 0) {
      warp_stats[warp][2 * t] = make_float2(top[0], total[0]);
      warp_stats[warp][2 * t + 1] = make_float2(top[1], total[1]);
    }
  }
  __syncthreads();
  auto block_top = [&](int h) {
    float high = warp_stats[0][h].x;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) high = fmaxf(high, warp_stats[w][h].x);
    return high;
  };
  if (tid < C * kGroup) {  // to block tid / kGroup
    const int h = tid % kGroup;
    const float high = block_top(h);
    float under = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      under += weight_of(warp_stats[w][h].x, high) * warp_stats[w][h].y;
    send_cluster(&block_stats[rank][h], tid / kGroup, make_float2(high, under), &sums_here);
  }
  if (tid < D) {  // dimension tid, to block tid / kOwn
#pragma unroll
    for (int h = 0; h < kGroup; h += 2) {
      float2 v = make_float2(0.f, 0.f);
      const float high[2] = {block_top(h), block_top(h + 1)};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 o = *reinterpret_cast<const float2*>(
            reinterpret_cast<const float*>(tiles + w * kWarpBytes) + tid * kGroup + h);
        v.x += weight_of(warp_stats[w][h].x, high[0]) * o.x;
        v.y += weight_of(warp_stats[w][h + 1].x, high[1]) * o.y;
      }
      send_cluster(reinterpret_cast<float2*>(&sums[rank][tid % kOwn][h]), tid / kOwn, v,
                   &sums_here);
    }
  }
  wait_for_cluster(&sums_here);
  for (int i = tid; i < kOwn * p.group; i += kThreads) {
    const int h = i / kOwn, d = i % kOwn;
    float high = block_stats[0][h].x;
#pragma unroll
    for (int r = 1; r < C; ++r) high = fmaxf(high, block_stats[r][h].x);
    float over = 0.f, under = 0.f;
#pragma unroll
    for (int r = 0; r < C; ++r) {
      const float w = weight_of(block_stats[r][h].x, high);
      over = fmaf(w, sums[r][d][h], over);
      under = fmaf(w, block_stats[r][h].y, under);
    }
    const int k = (head * p.group + h) * D + rank * kOwn + d;
    const size_t at = p.image == 0 ? b * (p.heads * p.group * D) + k
                                   : (size_t(k / 32 * 4 + k % 8 / 2) * p.image + b) * 8 +
                                         k % 32 / 8 * 2 + k % 2;
    static_cast<T*>(p.out)[at] = from_float<T>(over / (under > 0.f ? under : 1.f));
  }
}

template <typename T, int D, int kGroup, int C, bool kMany>
cudaError_t attend(const StepAttentionParams& p, cudaStream_t stream) {
  const auto kernel = step_attention_kernel<T, D, kGroup, C, kMany>;
  constexpr int kBytes = (kMany ? 2 : 1) * 2 * kTile * 2 * D;
  static std::atomic<unsigned long long> done{0};
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = allow_smem(kernel, &done, device, kBytes);
  if (e != cudaSuccess) return e;
  return enqueue_clusters(C, kernel, dim3(C, p.heads, p.batch), kThreads, kBytes, stream, p);
}

template <typename T, int D, int kGroup>
cudaError_t attend(const StepAttentionParams& p, cudaStream_t stream) {
  const int tiles = (p.length + kTile - 1) / kTile;
  if (tiles <= 4) return attend<T, D, kGroup, 4, false>(p, stream);
  return tiles <= kMostBlocks ? attend<T, D, kGroup, kMostBlocks, false>(p, stream)
                              : attend<T, D, kGroup, kMostBlocks, true>(p, stream);
}

template <typename T, int D>
cudaError_t attend(const StepAttentionParams& p, cudaStream_t stream) {
  if (p.group <= 2) return attend<T, D, 2>(p, stream);
  return p.group <= 4 ? attend<T, D, 4>(p, stream) : attend<T, D, kMostGroup>(p, stream);
}

template <typename T>
cudaError_t attend(const StepAttentionParams& p, cudaStream_t stream) {
  if (p.head_dim == 64) return attend<T, 64>(p, stream);
  return p.head_dim == 128 ? attend<T, 128>(p, stream) : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_step_attention(const StepAttentionParams& p, cudaStream_t stream) {
  cudaGetLastError();
  return p.type == DType::kFloat16 ? attend<__half>(p, stream) : attend<__nv_bfloat16>(p, stream);
}

}  // namespace aqlm
