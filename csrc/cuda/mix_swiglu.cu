// Between the fused matmul of gate and up and down's, both rotated: the end of the product's
// rotation, SwiGLU, and the rotation of down's input. Two launches instead of three, for few tokens
// (of more: mix_swiglu_clusters.cu) and devices without clusters.
//
// The product of 2 n outputs has U = H_F (x) S_Q (x) S_512 and its matmul has done S_512
// (hadamard_mix.cuh); down's input of n has U = H_F (x) S_{Q/2} (x) S_512. Number r * 512 + b of
// the one half and of the other are in rows r and r + F Q / 2 of column b, and what both rotations
// do above bit 8 leaves columns independent. So a block takes eight columns through all of it:
//   sum of the slots | S_Q by shuffles | H_F: a thread makes the gate and the up of one number
//   | SwiGLU, su | S_{Q/2} by shuffles | H_F^T
// and the second kernel does S_512 of rows. Threads are few and registers too (72 for 224 of them),
// so that a block has room beside a block of the matmul, and the constants that it reads are there
// when the matmul ends. Architectures sm_80+.
#include "mix_swiglu.h"

#include "enqueue.cuh"
#include "mix_columns.cuh"

namespace aqlm {
namespace {

constexpr int kColumns = 8;
constexpr int kSlots = 4;  // partial sums in flight; a row group of 512 rows rarely has more

template <typename T>
__device__ __forceinline__ float rounded(float v) { return to_float(from_float<T>(v)); }

// Grid: (512 / 8, tokens); F Q / 2 * 8 threads, one for each of the block's numbers of the result.
template <typename T, int F, int kLogQ>
__global__ void __launch_bounds__((F << kLogQ) * 4, 1)
mix_swiglu_kernel(const __grid_constant__ MixSwigluParams p) {
  constexpr int kRows = F << kLogQ, kHalf = kRows / 2, kWords = F / 4;
  __shared__ __align__(16) float z[kRows * kColumns];
  __shared__ __align__(16) float s[kHalf * kColumns];
  const int tid = threadIdx.x, m = blockIdx.y, column = tid % kColumns, row = tid / kColumns;
  const int first = blockIdx.x * kColumns;
  grid_dependents_start();
  // Row `row` of the first half is (a, q), the same of the second (a + F / 2, q).
  const int a = row >> kLogQ, q = row & ((1 << kLogQ) - 1);
  // As a row of the result's rotation it is (b, c).
  const int b = row >> (kLogQ - 1), c = row & ((1 << (kLogQ - 1)) - 1);
  uint32_t low_signs[kWords], high_signs[kWords], signs[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    low_signs[k] = sign_bytes(load_word(p.product.r.h + a * F + 4 * k));
    high_signs[k] = sign_bytes(load_word(p.product.r.h + (a + F / 2) * F + 4 * k));
    uint32_t w = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) w |= load_byte(p.h + (4 * k + j) * F + b) << (8 * j);
    signs[k] = sign_bytes(w);
  }
  const int n = kHalf * kRow, at = row * kRow + first + column;
  const float* sv = static_cast<const float*>(p.product.post);
  const float low_scale = p.product.gain * load_float(sv + at);
  const float high_scale = p.product.gain * load_float(sv + n + at);
  const float su = load_float(p.su + at);
  // Two neighbouring columns of one row of the product.
  const int source_row = tid / 4, pair = tid % 4 * 2;
  const RotateSource source = rotate_locate(p.product, m, source_row * kRow + first + pair);
  prefetch_constant(source.from);
  grid_dependency_wait();

  float sum[2] = {0.f, 0.f};
  add_slots2<kSlots>(source, sum[0], sum[1]);
  butterflies<2, 2 + kLogQ>(sum);
  *reinterpret_cast<float2*>(z + source_row * kColumns + pair) = make_float2(sum[0], sum[1]);
  __syncthreads();

  float low = 0.f, high = 0.f;
#pragma unroll
  for (int k = 0; k < F; ++k) {
    const float v = z[((k << kLogQ) + q) * kColumns + column];
    low = fmaf(signed_one(low_signs[k / 4], k % 4), v, low);
    high = fmaf(signed_one(high_signs[k / 4], k % 4), v, high);
  }
  low = rounded<T>(low * low_scale);
  high = rounded<T>(high * high_scale);
  const float gate = p.up_first ? high : low, up = p.up_first ? low : high;
  const float silu = rounded<T>(__fdividef(gate, 1.f + __expf(-gate)));
  float y[1] = {su * rounded<T>(silu * up)};
  butterflies<3, 2 + kLogQ>(y);
  s[tid] = y[0];
  __syncthreads();

  float out = 0.f;
#pragma unroll
  for (int k = 0; k < F; ++k)
    out = fmaf(signed_one(signs[k / 4], k % 4), s[((k << (kLogQ - 1)) + c) * kColumns + column],
               out);
  p.columns[size_t(m) * n + at] = out * p.gain;
}

// S_512 of rows. Grid: (n / 512, tokens); 128 threads, four neighbours each.
constexpr int kRowThreads = kRow / 4;
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4)
rotate_rows_kernel(const float* __restrict__ from, T* __restrict__ to) {
  __shared__ __align__(16) float4 sums[kRowThreads];
  const int tid = threadIdx.x, warp = tid / 32;
  const size_t at = (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * kRow + 4 * tid;
  grid_dependents_start();
  grid_dependency_wait();
  sums[tid] = rotate_lanes(load_quad(from + at), 7);
  __syncthreads();
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int w = 0; w < kRowThreads / 32; ++w) {
    const float4 v = sums[w * 32 + tid % 32];
    sum = __popc(w & warp) & 1 ? sub4(sum, v) : add4(sum, v);
  }
  const T y[4] = {from_float<T>(sum.x), from_float<T>(sum.y), from_float<T>(sum.z),
                  from_float<T>(sum.w)};
  *reinterpret_cast<uint2*>(to + at) = *reinterpret_cast<const uint2*>(y);
}

template <typename T, int F, int kLogQ>
cudaError_t mix(const MixSwigluParams& p, cudaStream_t stream) {
  const dim3 grid(kRow / kColumns, p.product.tokens);
  const dim3 rows((F << kLogQ) / 2, p.product.tokens);
  cudaError_t e =
      enqueue(mix_swiglu_kernel<T, F, kLogQ>, grid, (F << kLogQ) * 4, 0, stream, p);
  if (e == cudaSuccess)
    e = enqueue(rotate_rows_kernel<T>, rows, kRowThreads, 0, stream,
                static_cast<const float*>(p.columns), static_cast<T*>(p.y));
  return e;
}

template <typename T>
cudaError_t mix_any(const MixSwigluParams& p, cudaStream_t stream) {
  return log_q_of(p.product.r) == 1 ? mix<T, 28, 1>(p, stream) : mix<T, 28, 2>(p, stream);
}

}  // namespace

// The sizes of Llama 3 and Mistral: 14336 and 28672 after SwiGLU.
bool takes_mix_swiglu(const Rotation& r, int local_bits) {
  const int q = r.factor == 28 && r.block == 0 ? log_q_of(r) : 0;
  return local_bits == kLocalBits && (q == 1 || q == 2);
}

cudaError_t launch_mix_swiglu(const MixSwigluParams& p, cudaStream_t stream) {
  cudaGetLastError();
  return p.type == DType::kFloat16 ? mix_any<__half>(p, stream) : mix_any<__nv_bfloat16>(p, stream);
}

}  // namespace aqlm
