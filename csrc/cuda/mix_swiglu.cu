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

#include <cstdlib>

#include "clusters.cuh"
#include "enqueue.cuh"
#include "mix_columns.cuh"

namespace aqlm {
namespace {

constexpr int kBlocks = 8, kSpan = kRow / kBlocks;   // of a cluster; columns of a block
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

// out[h] += signs of half first + h of F rows, times `columns` [F][8] of a warp, whose row k is at
// from + where(k). Lane 4 g + t gets rows (first + h) * F / 2 + g and + 8 of columns 2 t, 2 t + 1.
template <int kHalves, typename Where>
__device__ __forceinline__ void mix_factor(const uint32_t (&masks)[kHalves][2], const float* from,
                                           Where where, float (&out)[kHalves][4]) {
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
    for (int h = 0; h < kHalves; ++h) {
      uint32_t a[4];
      sign_fragment(masks[h], step, a);
      mma_1688(out[h], a, high[0], high[1]);
      mma_1688(out[h], a, low[0], low[1]);
    }
  }
}

// Masks of a lane's rows of `signs` [F], from half `first` on.
template <int kHalves>
__device__ __forceinline__ void load_masks(const uint32_t* signs, int first,
                                           uint32_t (&masks)[kHalves][2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < kHalves; ++h)
#pragma unroll
    for (int i = 0; i < 2; ++i)  // rows past a half are products that nobody uses
      masks[h][i] = signs[(first + h) * kHalf + min(g + 8 * i, kHalf - 1)] >> t;
}

// Grid: (8, tokens), clusters of 8; 256 * kSplit threads. kSplit warps share eight columns: by q up
// to SwiGLU, then by halves of the result's rows.
template <typename T, int kLogQ, int kSplit>
__global__ void __launch_bounds__(256 * kSplit, (kLogQ == 1 ? 4 : 2) / kSplit)
mix_swiglu_kernel(const __grid_constant__ MixSwigluParams p,
                  const __grid_constant__ RowSlots slots) {
  constexpr int kQ = 1 << kLogQ, kRows = kHalf * kQ;  // of the result
  constexpr int kOwnQ = kQ / kSplit, kHalves = 2 / kSplit, kWarps = 8 * kSplit;
  constexpr int kMostRows = (kRows + kBlocks - 1) / kBlocks, n = kRows * kRow;
  constexpr bool kLate = kLogQ == 1;  // 64 registers: su is loaded when there is room
  __shared__ __align__(16) float z[kFactor * (kQ == 2 ? 168 : 296)];
  __shared__ __align__(16) float rows[kMostRows * kRow];
  __shared__ uint32_t product_signs[kFactor], result_signs[kFactor];
  __shared__ uint64_t rows_here;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, own = blockIdx.x, m = blockIdx.y;
  const int own_rows = (kRows - own + kBlocks - 1) / kBlocks;  // own, own + 8, ..
  const int part = warp / 8, first_q = part * kOwnQ;
  if (tid == 0) expect_from_cluster(&rows_here, own_rows * kRow * 4);
  cluster_arrive();
  grid_dependents_start();
  // This lane's numbers of the two halves: rows (a, q), a = g and g + 8.
  const int g = lane / 4, t = lane % 4, column = own * kSpan + warp % 8 * 8 + 2 * t;
  const float* const sv = static_cast<const float*>(p.product.post);
  auto place_of = [&](int q, int i) {
    return (min(g + 8 * i, kHalf - 1) * kQ + first_q + q) * kRow + column;
  };
  float2 low_scale[kOwnQ][2], high_scale[kOwnQ][2], su[kOwnQ][2];
#pragma unroll
  for (int q = 0; q < kOwnQ; ++q)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      low_scale[q][i] = load_floats(sv + place_of(q, i));
      high_scale[q][i] = load_floats(sv + n + place_of(q, i));
      if (!kLate) su[q][i] = load_floats(p.su + place_of(q, i));
    }
  if (kLate)  // bring them to L2 (prefetches of scattered lanes cost 3 us)
    for (int i = tid; i < kRows * kSpan / 4; i += 32 * kWarps)
      load_cached(p.su + i / (kSpan / 4) * kRow + own * kSpan + i % (kSpan / 4) * 4);
  // The last warp makes the masks; of the others 16 threads have a row's slots.
  constexpr int kLoaded = kFactor / kHalves, kWords = kFactor / 4;  // a, at a time
  static_assert(kLoaded * kSpan / 4 <= (kWarps - 1) * 32, "one warp does not load slots");
  uint32_t product_h[kWords], result_h[kWords];  // row `lane`
  if (warp == kWarps - 1) {
    const int at = min(lane, kFactor - 1) * kFactor;
#pragma unroll
    for (int k = 0; k < kWords; ++k) product_h[k] = load_word(p.product.r.h + at + 4 * k);
#pragma unroll
    for (int k = 0; k < kWords; ++k) result_h[k] = load_word(p.h + at + 4 * k);
  }
  const int quad = tid % 16 * 4, loaded = min(tid / 16, kLoaded - 1);
  RotateSource source[kQ];
  auto locate = [&](int a) {
#pragma unroll
    for (int q = 0; q < kQ; ++q)
      source[q] = row_source(p.product, slots, a * kQ + q, m, own * kSpan + quad);
  };
  locate(loaded);
  cluster_wait();  // all blocks have begun
  grid_dependency_wait();

  if (warp == kWarps - 1) {
    uint32_t by_row = 0, by_column = 0;
#pragma unroll
    for (int k = 0; k < kFactor; ++k) {
      by_row |= (product_h[k / 4] >> (8 * (k % 4) + 7) & 1) << k;
      const uint32_t column = __ballot_sync(~0u, result_h[k / 4] >> (8 * (k % 4) + 7) & 1);
      if (lane == k) by_column = column;
    }
    if (lane < kFactor) {
      product_signs[lane] = by_row;
      result_signs[lane] = by_column;
    }
  } else if (tid / 16 < kLoaded) {
#pragma unroll
    for (int a = loaded; a < loaded + kFactor; a += kLoaded) {
      float4 v[kQ] = {};
      int most = source[0].slots;
#pragma unroll
      for (int q = 1; q < kQ; ++q) most = max(most, source[q].slots);
      for (int k = 0; k < most; k += kSlots) {
        float4 part[kQ][kSlots];
#pragma unroll
        for (int q = 0; q < kQ; ++q)
#pragma unroll
          for (int j = 0; j < kSlots; ++j)
            part[q][j] = load_slot(source[q].from + (k + j) * source[q].stride,
                                   k + j < source[q].slots);
#pragma unroll
        for (int q = 0; q < kQ; ++q)
#pragma unroll
          for (int j = 0; j < kSlots; ++j) v[q] = add4(v[q], part[q][j]);
      }
      if (a + kLoaded < kFactor) locate(a + kLoaded);
#pragma unroll
      for (int b = 1; b < kQ; b *= 2)
#pragma unroll
        for (int q = 0; q < kQ; ++q)
          if ((q & b) == 0) {
            const float4 s = v[q], d = v[q + b];
            v[q] = add4(s, d);
            v[q + b] = sub4(s, d);
          }
#pragma unroll
      for (int q = 0; q < kQ; ++q)
        *reinterpret_cast<float4*>(z + place<kQ>(a, q) + quad) = v[q];
    }
  }
  __syncthreads();

  float* const columns = z + warp % 8 * 8;
  uint32_t masks[2][2];
  load_masks(product_signs, 0, masks);
  float product[kOwnQ][2][4] = {};
#pragma unroll
  for (int q = 0; q < kOwnQ; ++q) {
    mix_factor(masks, columns, [&](int a) { return place<kQ>(a, first_q + q); }, product[q]);
#pragma unroll
    for (int i = 0; kLate && i < 2; ++i) su[q][i] = load_floats(p.su + place_of(q, i));
  }
  float y[kOwnQ][4];  // of rows g and g + 8, columns 2 t and 2 t + 1
#pragma unroll
  for (int q = 0; q < kOwnQ; ++q)
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
    for (int q = 0; q < kOwnQ; ++q)
      if ((q & b) == 0)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float s = y[q][i], d = y[q + b][i];
          y[q][i] = s + d;
          y[q + b][i] = s - d;
        }
  __syncwarp();
#pragma unroll
  for (int q = 0; q < kOwnQ; ++q)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (g + 8 * i < kHalf)
        *reinterpret_cast<float2*>(columns + place<kQ>(g + 8 * i, first_q + q) + 2 * t) =
            make_float2(y[q][2 * i], y[q][2 * i + 1]);
  if constexpr (kSplit == 1) __syncwarp();
  else __syncthreads();

  uint32_t result_masks[kHalves][2];
  load_masks(result_signs, part, result_masks);
#pragma unroll
  for (int c = 0; c < kQ / 2; ++c) {
    // Row b * Q / 2 + c of the result is (b / 2, b % 2 * Q / 2 + c).
    float out[kHalves][4] = {};
    mix_factor(result_masks, columns,
               [&](int b) { return place<kQ>(b / 2, b % 2 * (kQ / 2) + c); }, out);
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (g + 8 * i < kHalf) {
          const int row = ((part + h) * kHalf + g + 8 * i) * (kQ / 2) + c;
          const float2 v = make_float2(out[h][2 * i] * p.gain, out[h][2 * i + 1] * p.gain);
          send_cluster(reinterpret_cast<float2*>(rows + row / kBlocks * kRow + column),
                       row % kBlocks, v, &rows_here);
        }
  }
  wait_for_cluster(&rows_here);
  // S_512; a warp makes 256 or 128 numbers of a row: bits 7 and 8 as `item` has them.
  constexpr int kPieces = 2 * kSplit;
  for (int item = warp; item < kPieces * own_rows; item += kWarps) {
    const int row = item / kPieces, piece = item % kPieces;
    float4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      v[j] = *reinterpret_cast<const float4*>(rows + row * kRow + 128 * j + 4 * lane);
    const bool upper = piece * 2 / kPieces;
#pragma unroll
    for (int j = 0; j < 2; ++j) v[j] = upper ? sub4(v[j], v[j + 2]) : add4(v[j], v[j + 2]);
    T* const to = static_cast<T*>(p.y) + size_t(m) * n + (own + row * kBlocks) * kRow + 4 * lane;
#pragma unroll
    for (int j = 0; j < 2 / kSplit; ++j) {
      const int bit = kSplit == 1 ? j : piece % 2;
      const float4 sum = rotate_lanes(bit ? sub4(v[0], v[1]) : add4(v[0], v[1]), 7);
      const T out[4] = {from_float<T>(sum.x), from_float<T>(sum.y), from_float<T>(sum.z),
                        from_float<T>(sum.w)};
      *reinterpret_cast<uint2*>(to + 256 * upper + 128 * bit) =
          *reinterpret_cast<const uint2*>(out);
    }
  }
}

int log_q_of(const Rotation& r) {
  int bits = 0;
  while (r.factor << (bits + 1) <= r.n) ++bits;
  return bits - kLocalBits;
}

template <typename T, int kLogQ, int kSplit>
cudaError_t mix(const MixSwigluParams& p, cudaStream_t stream) {
  RowSlots slots;
  const cudaError_t e = row_slots(p.product.s, &slots);
  if (e != cudaSuccess) return e;
  return enqueue_clusters(kBlocks, mix_swiglu_kernel<T, kLogQ, kSplit>,
                          dim3(kBlocks, p.product.tokens), 256 * kSplit, 0, stream, p, slots);
}
template <typename T, int kLogQ>
cudaError_t mix(const MixSwigluParams& p, cudaStream_t stream) {
  static const char* knob = getenv("AQLM_SPLIT");
  const int few = knob ? atoi(knob) : kFewTokens;
  return p.product.tokens <= few ? mix<T, kLogQ, 1>(p, stream) : mix<T, kLogQ, 2>(p, stream);
}

template <typename T>
cudaError_t mix_any(const MixSwigluParams& p, cudaStream_t stream) {
  return log_q_of(p.product.r) == 1 ? mix<T, 1>(p, stream) : mix<T, 2>(p, stream);
}

}  // namespace

// The sizes of Llama 3 and Mistral: 14336 and 28672 after SwiGLU.
bool takes_mix_swiglu(const Rotation& r, int local_bits) {
  const int q = r.factor == kFactor && r.block == 0 ? log_q_of(r) : 0;
  return local_bits == kLocalBits && (q == 1 || q == 2);
}

cudaError_t launch_mix_swiglu(const MixSwigluParams& p, cudaStream_t stream) {
  cudaGetLastError();
  return p.type == DType::kFloat16 ? mix_any<__half>(p, stream) : mix_any<__nv_bfloat16>(p, stream);
}

}  // namespace aqlm
