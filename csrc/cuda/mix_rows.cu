// The second kernel of a matmul whose output is rotated (hadamard_mix.cuh), for few tokens of q, k
// and v or gate and up, in the shape of mix_swiglu.cu: a thread makes one number, its signs of H_F
// are in registers before the matmul ends. Architectures sm_80+.
#include "mix_rows.h"

#include "enqueue.cuh"
#include "mix_columns.cuh"

namespace aqlm {
namespace {

constexpr int kMostTokens = 16;

// Grid: (512 / 8, tokens); F Q * 8 threads.
template <typename T, int F, int kLogQ>
__global__ void __launch_bounds__((F << kLogQ) * kColumns, 1)
mix_rows_kernel(const __grid_constant__ RotateParams p) {
  constexpr int kRows = F << kLogQ, kWords = F / 4;
  __shared__ float z[kRows * kColumns];
  const int tid = threadIdx.x, m = blockIdx.y, column = tid % kColumns, row = tid / kColumns;
  const int a = row >> kLogQ, q = row & ((1 << kLogQ) - 1);
  const int at = row * kRow + blockIdx.x * kColumns + column;
  grid_dependents_start();
  uint32_t signs[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) signs[k] = sign_bytes(load_word(p.r.h + a * F + 4 * k));
  const float scale = p.gain * load_float(static_cast<const float*>(p.post) + at);
  const RotateSource source = rotate_locate(p, m, at);
  prefetch_constant(source.from);
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
  __syncthreads();
  float out = 0.f;
#pragma unroll
  for (int k = 0; k < F; ++k)
    out = fmaf(signed_one(signs[k / 4], k % 4), z[((k << kLogQ) + q) * kColumns + column], out);
  static_cast<T*>(p.y)[size_t(m) * p.r.n + at] = from_float<T>(out * scale);
}

// The same for some tokens, of a slice of columns. Grid: (512 / 64, tokens).
constexpr int kWidth = 64;
AQLM_HD constexpr int slice_bytes(int factor, int log_q, int most) {
  return ((factor << log_q) * (most + 1) * kWidth + factor * factor) * 4;
}
template <typename T, int F, int kLogQ>
__global__ void __launch_bounds__(kSliceThreads, 2)
mix_rows_slice_kernel(const __grid_constant__ RotateParams p, int most) {
#if __CUDA_ARCH__ >= 900
  constexpr int Q = 1 << kLogQ, kRows = F * Q, kGroups = kSliceThreads / kWidth / Q;
  constexpr int kEach = F / kGroups;  // rows of a thread
  static_assert(F % kGroups == 0);
  extern __shared__ __align__(128) float slots[];
  __shared__ Slice<kRows, kWidth> slice;
  float* const z = slots + kRows * most * kWidth;
  float* const signs = z + kRows * kWidth;
  const int tid = threadIdx.x, m = blockIdx.y, first = blockIdx.x * kWidth;
  const int column = tid % kWidth, group = tid / kWidth, q = group % Q, a = group / Q * kEach;
  if (tid == 0) slice.slots = slots, slice.most = most;
  const RotateSource source = slice.begin(p, m, first);
  grid_dependents_start();
  load_signs<F, false>(p.r.h, signs);
  float scale[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    scale[i] = p.gain * load_float(static_cast<const float*>(p.post) + ((a + i) * Q + q) * kRow +
                                   first + column);
  __syncthreads();
  grid_dependency_wait();
  slice.bring(source);
  for (int i = tid; i < kRows * kWidth; i += kSliceThreads) z[i] = slice.sum(i / kWidth, column);
  __syncthreads();
  float out[kEach] = {};
  mix_factor<F>(signs, a, [&](int k) {
    const float* const at = z + k * Q * kWidth + column;
    if constexpr (Q == 1) return at[0];
    return q == 0 ? at[0] + at[kWidth] : at[0] - at[kWidth];
  }, out);
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    static_cast<T*>(p.y)[size_t(m) * p.r.n + ((a + i) * Q + q) * kRow + first + column] =
        from_float<T>(out[i] * scale[i]);
#endif
}

template <typename T, int F, int kLogQ>
cudaError_t mix(const RotateParams& p, cudaStream_t stream) {
  int device = 0;
  DeviceInfo info;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = device_info(device, &info);
  if (e != cudaSuccess) return e;
  const int most = most_slots(p.s), smem = slice_bytes(F, kLogQ, most);
  if (p.tokens >= kSliceFirst && info.arch >= 90 && smem <= kSliceMost) {
    static std::atomic<unsigned long long> done{0};
    auto kernel = mix_rows_slice_kernel<T, F, kLogQ>;
    e = allow_smem(kernel, &done, device, kSliceMost);
    return e == cudaSuccess ? enqueue(kernel, dim3(kRow / kWidth, p.tokens), kSliceThreads, smem,
                                      stream, p, most)
                            : e;
  }
  return enqueue(mix_rows_kernel<T, F, kLogQ>, dim3(kRow / kColumns, p.tokens),
                 (F << kLogQ) * kColumns, 0, stream, p);
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
