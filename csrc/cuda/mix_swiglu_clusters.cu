// Between the fused matmul of gate and up and down's, both rotated: the end of the product's
// rotation, SwiGLU, and the rotation of down's input, in one launch.
//
// The product of 2 n outputs has U = H_F (x) S_Q (x) S_512 and its matmul has done S_512
// (hadamard_mix.cuh); down's input of n has U = H_F (x) S_{Q/2} (x) S_512. Number r * 512 + b of
// the one half and of the other are in rows r and r + F Q / 2 of column b, and what both rotations
// do above bit 8 leaves columns independent. So a block takes 64 columns of a token through that,
// and a cluster of eight blocks exchanges its columns for rows:
//   sum of the slots, S_Q | H_F | SwiGLU, su, S_{Q/2} | H_F^T | to rows | S_512
// H_F is a product on the tensor cores, of signs in registers and sums in two parts of TF32 (22
// bits); a warp makes eight columns: no barrier from H_F on, until the rows are there. Nothing waits
// for a constant before the slots are on their way: of many tokens, blocks begin when those of the
// matmul end. Architectures sm_90+.
#include "mix_swiglu.h"

#include "clusters.cuh"
#include "enqueue.cuh"
#include "mix_columns.cuh"

namespace aqlm {
namespace {

constexpr int kBlocks = 8, kSpan = kRow / kBlocks;   // of a cluster; columns of a block
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSlots = 4;  // partial sums in flight; a row group of 512 rows rarely has more
constexpr int kFactor = 28, kHalf = kFactor / 2;     // F

template <typename T>
__device__ __forceinline__ float rounded(float v) { return to_float(from_float<T>(v)); }

// Where number (a, q) of a column lies, a < F, q < Q. The steps put four a, and four b = 2 a + q /
// (Q / 2), into different banks.
template <int kQ>
__device__ __forceinline__ int place(int a, int q) {
  return a * (kQ == 2 ? 168 : 296) + q * (kQ == 2 ? 80 : 72);
}

// Eight rows of signs, bit k of row i in `masks`, as the A operand of columns 8 step .. 8 step + 7;
// rows g and g + 8 of lane 4 g + t, whose masks are shifted by t.
__device__ __forceinline__ void sign_fragment(const uint32_t (&masks)[2], int step,
                                              uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i] = and_or(masks[i % 2] << (31 - 8 * step - 4 * (i / 2)), 0x80000000u, 0x3F800000u);
}

// out[h] += signs of half h of F rows, times `columns` [F][8] of a warp, whose row k is at
// from + where(k). Lane 4 g + t gets rows h * F / 2 + g and + 8 of columns 2 t, 2 t + 1.
template <typename Where>
__device__ __forceinline__ void mix_factor(const uint32_t (&masks)[2][2], const float* from,
                                           Where where, float (&out)[2][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int step = 0; step < (kFactor + 7) / 8; ++step) {
    float b[2] = {from[where(8 * step + t) + g], 0.f};
    if (8 * step + 4 < kFactor) b[1] = from[where(8 * step + 4 + t) + g];
    uint32_t high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      high[i] = __float_as_uint(b[i]) & 0xFFFFE000u;
      low[i] = __float_as_uint(b[i] - __uint_as_float(high[i]));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t a[4];
      sign_fragment(masks[h], step, a);
      mma_1688(out[h], a, high[0], high[1]);
      mma_1688(out[h], a, low[0], low[1]);
    }
  }
}

// Masks of a lane's rows of `signs` [F].
__device__ __forceinline__ void load_masks(const uint32_t* signs, uint32_t (&masks)[2][2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int i = 0; i < 2; ++i)  // rows past a half are products that nobody uses
      masks[h][i] = signs[h * kHalf + min(g + 8 * i, kHalf - 1)] >> t;
}

// Grid: (8, tokens), clusters of 8.
template <typename T, int kLogQ>
__global__ void __launch_bounds__(kThreads, kLogQ == 1 ? 2 : 1)
mix_swiglu_kernel(const __grid_constant__ MixSwigluParams p,
                  const __grid_constant__ RowSlots slots) {
  constexpr int kQ = 1 << kLogQ, kRows = kHalf * kQ;  // of the result
  constexpr int kMostRows = (kRows + kBlocks - 1) / kBlocks, n = kRows * kRow;
  __shared__ __align__(16) float z[kFactor * (kQ == 2 ? 168 : 296)];
  __shared__ __align__(16) float rows[kMostRows * kRow];
  __shared__ uint32_t product_signs[kFactor], result_signs[kFactor];
  __shared__ uint64_t rows_here;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, own = blockIdx.x, m = blockIdx.y;
  const int own_rows = (kRows - own + kBlocks - 1) / kBlocks;  // own, own + 8, ..
  if (tid == 0) expect_from_cluster(&rows_here, own_rows * kRow * 4);
  cluster_arrive();
  grid_dependents_start();
  // This lane's numbers of the two halves: rows (a, q), a = g and g + 8.
  const int g = lane / 4, t = lane % 4, column = own * kSpan + 8 * warp + 2 * t;
  float2 low_scale[kQ][2], high_scale[kQ][2], su[kQ][2];
  const float* const sv = static_cast<const float*>(p.product.post);
#pragma unroll
  for (int q = 0; q < kQ; ++q)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = (min(g + 8 * i, kHalf - 1) * kQ + q) * kRow + column;
      low_scale[q][i] = load_floats(sv + at);
      high_scale[q][i] = load_floats(sv + n + at);
      su[q][i] = load_floats(p.su + at);
    }
  // The last warp makes the masks; 16 threads of the others have a row's slots.
  constexpr int kLoaders = kHalf * kSpan / 4, kWords = kFactor / 4;
  uint32_t words[kWords], bytes[kFactor];
  if (warp == kWarps - 1) {
    const int row = min(lane, kFactor - 1);
#pragma unroll
    for (int k = 0; k < kWords; ++k) words[k] = load_word(p.product.r.h + row * kFactor + 4 * k);
#pragma unroll
    for (int k = 0; k < kFactor; ++k) bytes[k] = load_byte(p.h + k * kFactor + row);
  }
  static_assert(kLoaders == (kWarps - 1) * 32, "one warp does not load slots");
  const int quad = tid % 16 * 4, loaded = min(tid / 16, kHalf - 1);  // and loaded + kHalf
  RotateSource source[2][kQ];
  int most = 0;
#pragma unroll
  for (int e = 0; e < 2; ++e)
#pragma unroll
    for (int q = 0; q < kQ; ++q) {
      const int row = (loaded + e * kHalf) * kQ + q;
      source[e][q] = row_source(p.product, slots, row, m, own * kSpan + quad);
      most = max(most, source[e][q].slots);
    }
  cluster_wait();  // all blocks have begun
  grid_dependency_wait();

  if (warp == kWarps - 1) {
    uint32_t by_row = 0, by_column = 0;
#pragma unroll
    for (int k = 0; k < kFactor; ++k) {
      by_row |= (words[k / 4] >> (8 * (k % 4) + 7) & 1) << k;
      by_column |= (bytes[k] >> 7) << k;
    }
    if (lane < kFactor) {
      product_signs[lane] = by_row;
      result_signs[lane] = by_column;
    }
  } else {
    constexpr int kEach = kQ == 2 ? 2 : 1;  // of the two a that a thread has, at a time
#pragma unroll
    for (int first = 0; first < 2; first += kEach) {
      float4 v[kEach][kQ] = {};
      for (int k = 0; k < most; k += kSlots) {
        float4 part[kEach][kQ][kSlots];
#pragma unroll
        for (int e = 0; e < kEach; ++e)
#pragma unroll
          for (int q = 0; q < kQ; ++q)
#pragma unroll
            for (int j = 0; j < kSlots; ++j)
              part[e][q][j] =
                  load_slot(source[first + e][q].from + (k + j) * source[first + e][q].stride,
                            k + j < source[first + e][q].slots);
#pragma unroll
        for (int e = 0; e < kEach; ++e)
#pragma unroll
          for (int q = 0; q < kQ; ++q)
#pragma unroll
            for (int j = 0; j < kSlots; ++j) v[e][q] = add4(v[e][q], part[e][q][j]);
      }
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
#pragma unroll
        for (int b = 1; b < kQ; b *= 2)
#pragma unroll
          for (int q = 0; q < kQ; ++q)
            if ((q & b) == 0) {
              const float4 s = v[e][q], d = v[e][q + b];
              v[e][q] = add4(s, d);
              v[e][q + b] = sub4(s, d);
            }
#pragma unroll
        for (int q = 0; q < kQ; ++q)
          *reinterpret_cast<float4*>(z + place<kQ>(loaded + (first + e) * kHalf, q) + quad) =
              v[e][q];
      }
    }
  }
  __syncthreads();

  float* const own_columns = z + 8 * warp;  // this warp's, from here on
  uint32_t masks[2][2];
  load_masks(product_signs, masks);
  float product[kQ][2][4] = {};
#pragma unroll
  for (int q = 0; q < kQ; ++q)
    mix_factor(masks, own_columns, [&](int a) { return place<kQ>(a, q); }, product[q]);
  float y[kQ][4];  // of rows g and g + 8, columns 2 t and 2 t + 1
#pragma unroll
  for (int q = 0; q < kQ; ++q)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto of = [&](const float2& pair) { return i % 2 ? pair.y : pair.x; };
      const float low = rounded<T>(product[q][0][i] * (p.product.gain * of(low_scale[q][i / 2])));
      const float high = rounded<T>(product[q][1][i] * (p.product.gain * of(high_scale[q][i / 2])));
      const float gate = p.up_first ? high : low, up = p.up_first ? low : high;
      const float silu = rounded<T>(__fdividef(gate, 1.f + __expf(-gate)));
      y[q][i] = of(su[q][i / 2]) * rounded<T>(silu * up);
    }
#pragma unroll
  for (int b = 1; b < kQ / 2; b *= 2)
#pragma unroll
    for (int q = 0; q < kQ; ++q)
      if ((q & b) == 0)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float s = y[q][i], d = y[q + b][i];
          y[q][i] = s + d;
          y[q + b][i] = s - d;
        }
  __syncwarp();
#pragma unroll
  for (int q = 0; q < kQ; ++q)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (g + 8 * i < kHalf)
        *reinterpret_cast<float2*>(own_columns + place<kQ>(g + 8 * i, q) + 2 * t) =
            make_float2(y[q][2 * i], y[q][2 * i + 1]);
  __syncwarp();

  load_masks(result_signs, masks);
#pragma unroll
  for (int c = 0; c < kQ / 2; ++c) {
    // Row b * Q / 2 + c of the result is (b / 2, b % 2 * Q / 2 + c).
    float out[2][4] = {};
    mix_factor(masks, own_columns,
               [&](int b) { return place<kQ>(b / 2, b % 2 * (kQ / 2) + c); }, out);
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (g + 8 * i < kHalf) {
          const int row = (h * kHalf + g + 8 * i) * (kQ / 2) + c;
          const float2 v = make_float2(out[h][2 * i] * p.gain, out[h][2 * i + 1] * p.gain);
          send_cluster(reinterpret_cast<float2*>(rows + row / kBlocks * kRow + column),
                       row % kBlocks, v, &rows_here);
        }
  }
  wait_for_cluster(&rows_here);
  // S_512; a warp makes half a row.
  for (int item = warp; item < 2 * own_rows; item += kWarps) {
    const float* const from = rows + item / 2 * kRow + 4 * lane;
    float4 v[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float4 a = *reinterpret_cast<const float4*>(from + 128 * j);
      const float4 b = *reinterpret_cast<const float4*>(from + 128 * j + 256);
      v[j] = item % 2 ? sub4(a, b) : add4(a, b);
    }
    const float4 sums[2] = {add4(v[0], v[1]), sub4(v[0], v[1])};
    const size_t at = size_t(m) * n + (own + item / 2 * kBlocks) * kRow + item % 2 * 256 + 4 * lane;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float4 sum = rotate_lanes(sums[j], 7);
      const T out[4] = {from_float<T>(sum.x), from_float<T>(sum.y), from_float<T>(sum.z),
                        from_float<T>(sum.w)};
      *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + at + 128 * j) =
          *reinterpret_cast<const uint2*>(out);
    }
  }
}

template <typename T, int kLogQ>
cudaError_t mix(const MixSwigluParams& p, cudaStream_t stream) {
  RowSlots slots;
  const cudaError_t e = row_slots(p.product.s, &slots);
  if (e != cudaSuccess) return e;
  return enqueue_clusters(kBlocks, mix_swiglu_kernel<T, kLogQ>, dim3(kBlocks, p.product.tokens),
                          kThreads, 0, stream, p, slots);
}

template <typename T>
cudaError_t mix_any(const MixSwigluParams& p, cudaStream_t stream) {
  return log_q_of(p.product.r) == 1 ? mix<T, 1>(p, stream) : mix<T, 2>(p, stream);
}

}  // namespace

cudaError_t launch_mix_swiglu_clusters(const MixSwigluParams& p, cudaStream_t stream) {
  cudaGetLastError();
  return p.type == DType::kFloat16 ? mix_any<__half>(p, stream) : mix_any<__nv_bfloat16>(p, stream);
}

}  // namespace aqlm
