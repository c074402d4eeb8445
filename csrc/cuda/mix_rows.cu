// The second kernel of a matmul whose output is rotated (hadamard_mix.cuh), for few tokens of q, k
// and v or gate and up: a thread makes two numbers, its signs of H_F are on their way before the
// matmul ends. Nothing waits for a constant before the sums are on their way too: of many tokens,
// blocks begin when those of the matmul end. Architectures sm_80+.
#include "mix_rows.h"

#include "enqueue.cuh"
#include "mix_columns.cuh"

namespace aqlm {
namespace {

constexpr int kMostTokens = 16, kPairs = 8;

// Grid: (512 / 16, tokens); F Q * 8 threads, two neighbouring columns of a row each.
template <typename T, int F, int kLogQ>
__global__ void __launch_bounds__((F << kLogQ) * kPairs, 1)
mix_rows_kernel(const __grid_constant__ RotateParams p, const __grid_constant__ RowSlots slots) {
  constexpr int kRows = F << kLogQ, kWords = F / 4, kSlots = 12;
  __shared__ float2 z[kRows * kPairs];
  const int tid = threadIdx.x, m = blockIdx.y, pair = tid % kPairs, row = tid / kPairs;
  const int a = row >> kLogQ, q = row & ((1 << kLogQ) - 1);
  const int column = 2 * (blockIdx.x * kPairs + pair), at = row * kRow + column;
  grid_dependents_start();
  uint32_t signs[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) signs[k] = load_word(p.r.h + a * F + 4 * k);
  const float2 scale = load_floats(static_cast<const float*>(p.post) + at);
  const RotateSource source = row_source(p, slots, row, m, column);
  grid_dependency_wait();

  float sum[2] = {};
  add_slots2<kSlots>(source, sum[0], sum[1]);
  butterflies<3, 3 + kLogQ>(sum);
  z[tid] = make_float2(sum[0], sum[1]);
#pragma unroll
  for (int k = 0; k < kWords; ++k) signs[k] = sign_bytes(signs[k]);
  __syncthreads();
  float2 out = make_float2(0.f, 0.f);
#pragma unroll
  for (int k = 0; k < F; ++k) {
    const float sign = signed_one(signs[k / 4], k % 4);
    const float2 v = z[((k << kLogQ) + q) * kPairs + pair];
    out = make_float2(fmaf(sign, v.x, out.x), fmaf(sign, v.y, out.y));
  }
  const T y[2] = {from_float<T>(out.x * (p.gain * scale.x)),
                  from_float<T>(out.y * (p.gain * scale.y))};
  *reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + size_t(m) * p.r.n + at) =
      *reinterpret_cast<const uint32_t*>(y);
}

template <typename T, int F, int kLogQ>
cudaError_t mix(const RotateParams& p, cudaStream_t stream) {
  RowSlots slots;
  const cudaError_t e = row_slots(p.s, &slots);
  if (e != cudaSuccess) return e;
  return enqueue(mix_rows_kernel<T, F, kLogQ>, dim3(kRow / 2 / kPairs, p.tokens),
                 (F << kLogQ) * kPairs, 0, stream, p, slots);
}

template <typename T>
cudaError_t mix_any(const RotateParams& p, cudaStream_t stream) {
  const int rows = p.r.n / kRow;
  switch (p.r.factor) {
    case 12: return rows == 12 ? mix<T, 12, 0>(p, stream) : mix<T, 12, 1>(p, stream);
    case 20: return rows == 20 ? mix<T, 20, 0>(p, stream) : mix<T, 20, 1>(p, stream);
    case 28: return rows == 28 ? mix<T, 28, 0>(p, stream) : mix<T, 28, 1>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool takes_mix_rows(const RotateParams& p) {
  const int F = p.r.factor, rows = p.r.n / kRow;
  return p.partials != nullptr && p.local_bits == kLocalBits && p.r.block == 0 &&
         !p.r.transpose && (F == 12 || F == 20 || F == 28) && (rows == F || rows == 2 * F) &&
         p.tokens <= kMostTokens && p.y_type != DType::kFloat32 && p.bias == nullptr &&
         p.post != nullptr && p.post_type == DType::kFloat32;
}

cudaError_t launch_mix_rows(const RotateParams& p, cudaStream_t stream) {
  return p.y_type == DType::kFloat16 ? mix_any<__half>(p, stream)
                                     : mix_any<__nv_bfloat16>(p, stream);
}

}  // namespace aqlm
