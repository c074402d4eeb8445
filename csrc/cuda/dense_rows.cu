// The output head's product of one token: weights are read once, at the memory's rate, from before
// the kernel in front of it has ended.
//
// A warp computes two rows at a time, 256 columns a load and row. Eight 16-byte loads a lane are in
// flight always: a register is loaded again as soon as its value is used, with the next columns or
// the next two rows. x is in shared memory as float32, halves of a lane's eight columns apart, so
// that reads do not conflict. Architectures sm_80+.
#include "dense_rows.h"
#include "enqueue.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace aqlm {
namespace {

constexpr int kThreads = 384, kWarps = kThreads / 32;
constexpr int kBlocks = 2;      // an SM
constexpr int kColumns = 256;   // of a warp's load
constexpr int kRows = 2, kAhead = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
dense_rows_kernel(const __grid_constant__ DenseRowsParams p) {
  extern __shared__ __align__(16) float4 dense_x[];  // [k / 256][2][32]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunks = p.k / kColumns;
  const int warps = gridDim.x * kWarps;
  const T* weight = static_cast<const T*>(p.weight);
  // Where the next load of a ring register goes: `ahead` is a chunk of the rows from `next` on.
  int next = (warp * gridDim.x + blockIdx.x) * kRows, ahead = 0;
  uint4 ring[kAhead][kRows];
  auto load = [&](int slot) {
    const int first = min(next, p.n - kRows);  // past the end: not used
    const T* at = weight + size_t(first) * p.k + ahead * kColumns + lane * 8;
#pragma unroll
    for (int r = 0; r < kRows; ++r) ring[slot][r] = load_stream(at + r * p.k);
    if (++ahead == chunks) ahead = 0, next += warps * kRows;
  };
  int row = next;
  grid_dependents_start();
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) load(slot);
  grid_dependency_wait();
  for (int i = threadIdx.x; i < p.k / 8; i += kThreads) {
    float v[8];
    unpack8<T>(load_cached(static_cast<const T*>(p.x) + 8 * i), v);
    float4* at = dense_x + i / 32 * 64 + i % 32;
    at[0] = make_float4(v[0], v[1], v[2], v[3]);
    at[32] = make_float4(v[4], v[5], v[6], v[7]);
  }
  __syncthreads();

  float sum[kRows] = {};
  int chunk = 0;
  while (row < p.n) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) {
      const float4 a = dense_x[chunk * 64 + lane], b = dense_x[chunk * 64 + 32 + lane];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float w[8];
        unpack8<T>(ring[slot][r], w);
        sum[r] += a.x * w[0] + a.y * w[1] + a.z * w[2] + a.w * w[3];
        sum[r] += b.x * w[4] + b.y * w[5] + b.z * w[6] + b.w * w[7];
      }
      load(slot);
      if (++chunk < chunks) continue;
      chunk = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int d = 16; d > 0; d /= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], d);
        if (lane == r && row < p.n) {
          const T* bias = static_cast<const T*>(p.bias);
          static_cast<T*>(p.y)[row + r] =
              from_float<T>(sum[r] + (bias != nullptr ? to_float(bias[row + r]) : 0.f));
        }
        sum[r] = 0.f;
      }
      row += warps * kRows;
    }
  }
}

}  // namespace

cudaError_t launch_dense_rows(const DenseRowsParams& p, cudaStream_t stream) {
  cudaGetLastError();
  int device = 0;
  DeviceInfo info;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = device_info(device, &info);
  if (e != cudaSuccess) return e;
  const auto kernel =
      p.type == DType::kFloat16 ? dense_rows_kernel<__half> : dense_rows_kernel<__nv_bfloat16>;
  return enqueue(kernel, dim3(kBlocks * info.sms), kThreads, p.k * 4, stream, p);
}

}  // namespace aqlm
