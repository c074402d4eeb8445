// The second kernel of a matmul whose output is rotated (hadamard_mix.cuh), for few tokens of q, k
// and v or gate and up, in the shape of mix_swiglu.cu: a thread makes one number, its signs of H_F
// are on their way before the matmul ends. Nothing waits for a constant before the sums are on their
// way too: in a step of many tokens the blocks begin when those of the matmul end. Architectures sm_80+.
#include "mix_rows.h"

#include "enqueue.cuh"
#include "mix_columns.cuh"

namespace aqlm {
namespace {

constexpr int kMostTokens = 16;

// Grid: (512 / 8, tokens); F Q * 8 threads.
template <typename T, int F, int kLogQ>
__global__ void __launch_bounds__((F << kLogQ) * kColumns, 1)
mix_rows_kernel(const __grid_constant__ RotateParams p, const __grid_constant__ RowSlots slots) {
  constexpr int kRows = F << kLogQ, kWords = F / 4;
  __shared__ float z[kRows * kColumns];
  const int tid = threadIdx.x, m = blockIdx.y, column = tid % kColumns, row = tid / kColumns;
  const int a = row >> kLogQ, q = row & ((1 << kLogQ) - 1);
  const int at = row * kRow + blockIdx.x * kColumns + column;
  grid_dependents_start();
  uint32_t signs[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) signs[k] = load_word(p.r.h + a * F + 4 * k);
  const float scale = load_float(static_cast<const float*>(p.post) + at);
  const RotateSource source = row_source(p, slots, row, m, blockIdx.x * kColumns + column);
  grid_dependency_wait();

  constexpr int kSlots = 12;
  float sum[1] = {0.f};
  for (int k = 0; k < source.slots; k += kSlots) {
    float part[kSlots];
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
      part[j] = load_slot1(source.from + (k + j) * source.stride, k + j < source.slots);
#pragma unroll
    for (int j = 0; j < kSlots; ++j) sum[0] += part[j];
  }
  butterflies<3, 3 + kLogQ>(sum);
  z[tid] = sum[0];
#pragma unroll
  for (int k = 0; k < kWords; ++k) signs[k] = sign_bytes(signs[k]);
  __syncthreads();
  float out = 0.f;
#pragma unroll
  for (int k = 0; k < F; ++k)
    out = fmaf(signed_one(signs[k / 4], k % 4), z[((k << kLogQ) + q) * kColumns + column], out);
  static_cast<T*>(p.y)[size_t(m) * p.r.n + at] = from_float<T>(out * (p.gain * scale));
}

template <typename T, int F, int kLogQ>
cudaError_t mix(const RotateParams& p, cudaStream_t stream) {
  RowSlots slots;
  const cudaError_t e = row_slots(p.s, &slots);
  if (e != cudaSuccess) return e;
  return enqueue(mix_rows_kernel<T, F, kLogQ>, dim3(kRow / kColumns, p.tokens),
                 (F << kLogQ) * kColumns, 0, stream, p, slots);
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
