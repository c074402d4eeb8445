// The product of one token with a matrix of very many rows on a scalar grid: an output head. One
// launch, codes at the memory's rate, the first of them in flight before the kernel in front ends.
//
// A block takes a row block (32 rows, rotated.h) at a time, its warps an eighth of K each: a lane
// has 4 rows and 16 columns of a cell, 16 products of four by dp4a against the upper and the lower
// byte of x, which is quantized to 16 bits by scale group, as in the other bodies. A group's end
// multiplies by the scale and subtracts the zero point's share. Codes are kCells cells ahead in
// registers, scales and zeros a row block. Architectures sm_80+.
#include "grid_rows.h"

#include "enqueue.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace aqlm {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kBlocks = 2;  // blocks an SM
constexpr int kGroup = 128, kGroupUnits = kGroup / kCellColumns;
constexpr int kCells = 4;      // in flight
constexpr int kLeastRows = 32768;

// What is kept of x in shared memory.
struct StagedX {
  uint2* words;   // [K / 4]: upper and lower bytes of four columns
  float* scales;  // [K / 128]
  float* sums;    // [K / 128][4]: of the columns of lane t of every cell
};

template <typename T>
__device__ __forceinline__ void stage(const StagedX& staged, const T* x, int groups) {
  const int lane = threadIdx.x % 32;
  for (int group = threadIdx.x / 32; group < groups; group += kWarps) {
    const uint2 raw = load_cached8(x + group * kGroup + 4 * lane);
    const float2 low = unpack2(raw.x, T()), high = unpack2(raw.y, T());
    const float v[4] = {low.x, low.y, high.x, high.y};
    float peak = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
#pragma unroll
    for (int d = 16; d > 0; d /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, d));
    const float to = peak > 0.f ? 32512.f / peak : 0.f;  // 127 * 256: upper bytes stay in range
    uint32_t upper = 0, lower = 0;
    int sum = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int q = __float2int_rn(v[j] * to), up = (q + 128) >> 8;
      upper |= uint32_t(up & 255) << (8 * j);
      lower |= uint32_t(q - 256 * up & 255) << (8 * j);
      sum += q;
    }
#pragma unroll
    for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    staged.words[group * 32 + lane] = make_uint2(upper, lower);
    const float scale = peak * (1.f / 32512.f);
    if (lane < 4) staged.sums[group * 4 + lane] = scale * static_cast<float>(sum);
    if (lane == 0) staged.scales[group] = scale;
  }
}

template <int kBits>
struct Cell {
  uint4 plane[kBits / 2];
  __device__ __forceinline__ void load(const uint8_t* at) {
#pragma unroll
    for (int i = 0; i < kBits / 2; ++i) plane[i] = load_stream(at + i * 512);
  }
  // Four columns from 16 f of the lane's row r, less half the range, times kStep.
  static constexpr int kStep = kBits == 8 ? 1 : 16;
  __device__ __forceinline__ int word(int f, int r) const {
    const uint4& v = plane[kBits == 8 ? f : f / 2];
    const uint32_t w = r == 0 ? v.x : r == 1 ? v.y : r == 2 ? v.z : v.w;
    return static_cast<int>(kBits == 8 ? w : (f % 2 ? w : w << 4) & 0xF0F0F0F0u);
  }
};

// Grid: kBlocks blocks an SM. Shared memory: StagedX.
template <typename T, int kBits, int kGroups>
__global__ void __launch_bounds__(kThreads, kBlocks)
grid_rows_kernel(const __grid_constant__ GridRowsParams p) {
  extern __shared__ __align__(16) uint2 grid_rows_x[];
  __shared__ float sums[2][kWarps][kCellRows];
  constexpr int kUnits = kGroups * kGroupUnits, kCellBytes = 256 * kBits;
  constexpr int kAllGroups = kGroups * kWarps;
  StagedX staged = {grid_rows_x, reinterpret_cast<float*>(grid_rows_x + kAllGroups * 32), nullptr};
  staged.sums = staged.scales + kAllGroups;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
  const int blocks = p.w.blocks();
  const uint8_t* const from = p.w.packed + size_t(warp) * kUnits * kCellBytes + lane * 16;
  constexpr size_t kBlockBytes = size_t(kUnits) * kWarps * kCellBytes;
  const uint32_t* const scales = static_cast<const uint32_t*>(p.w.scales);
  const uint32_t* const zeros = static_cast<const uint32_t*>(p.w.zeros);
  int block = blockIdx.x;

  Cell<kBits> ring[kCells];
  uint32_t scale[kGroups / 2], zero[kGroups / 2];  // two groups each, of row `lane`
  auto load_scales = [&](int b) {
    const size_t row = size_t(min(b, blocks - 1)) * kCellRows + lane;
#pragma unroll
    for (int i = 0; i < kGroups / 2; ++i) {
      scale[i] = load_word(scales + (row * kAllGroups + warp * kGroups) / 2 + i);
      zero[i] = load_word(zeros + (row * kAllGroups + warp * kGroups) / 2 + i);
    }
  };
  auto load_cell = [&](int slot, int b, int unit) {  // past the end: not used
    ring[slot].load(from + size_t(min(b, blocks - 1)) * kBlockBytes + unit * kCellBytes);
  };
  grid_dependents_start();
#pragma unroll
  for (int slot = 0; slot < kCells; ++slot) load_cell(slot, block, slot);
  load_scales(block);
  grid_dependency_wait();
  stage<T>(staged, static_cast<const T*>(p.x), kAllGroups);
  __syncthreads();

  for (int turn = 0; block < blocks; block += gridDim.x, turn ^= 1) {
    float row_sum[4] = {};
    uint32_t own_scale[kGroups / 2], own_zero[kGroups / 2];
#pragma unroll
    for (int i = 0; i < kGroups / 2; ++i) own_scale[i] = scale[i], own_zero[i] = zero[i];
    load_scales(block + gridDim.x);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int at = warp * kGroups + group;
      int upper[4] = {}, lower[4] = {};
#pragma unroll
      for (int i = 0; i < kGroupUnits; ++i) {
        const int unit = group * kGroupUnits + i, slot = unit % kCells;
#pragma unroll
        for (int f = 0; f < 4; ++f) {
          const uint2 x = staged.words[(at * kGroupUnits + i) * 16 + f * 4 + t];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int w = ring[slot].word(f, r);
            upper[r] = __dp4a(w, static_cast<int>(x.x), upper[r]);
            lower[r] = __dp4a(w, static_cast<int>(x.y), lower[r]);
          }
        }
        const bool next = unit + kCells >= kUnits;
        load_cell(slot, next ? block + gridDim.x : block, (unit + kCells) % kUnits);
      }
      const float x_scale = staged.scales[at] * (1.f / Cell<kBits>::kStep);
      const float x_sum = staged.sums[at * 4 + t];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + 8 * r;
        const float2 s = unpack2(__shfl_sync(~0u, own_scale[group / 2], row), T());
        const float2 z = unpack2(__shfl_sync(~0u, own_zero[group / 2], row), T());
        const float product = static_cast<float>(upper[r] * 256 + lower[r]) * x_scale;
        const float centre = (group % 2 ? z.y : z.x) - (1 << (kBits - 1));
        row_sum[r] += (group % 2 ? s.y : s.x) * (product - centre * x_sum);
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 2);
      if (t == r) sums[turn][warp][lane / 4 + 8 * r] = row_sum[r];
    }
    // The other buffer is written by warps that have passed this, so no second barrier is needed.
    __syncthreads();
    if (warp == 0) {
      const int row = block * kCellRows + lane;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += sums[turn][w][lane];
      if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[row]);
      static_cast<T*>(p.y)[row] = from_float<T>(sum);
    }
  }
}

template <typename T, int kBits>
cudaError_t grid_rows(const GridRowsParams& p, const dim3& grid, cudaStream_t stream) {
  const int groups = p.w.K / kGroup, smem = groups * (32 * 8 + 5 * 4);
  switch (groups / kWarps) {
    case 2: return enqueue(grid_rows_kernel<T, kBits, 2>, grid, kThreads, smem, stream, p);
    case 4: return enqueue(grid_rows_kernel<T, kBits, 4>, grid, kThreads, smem, stream, p);
    case 8: return enqueue(grid_rows_kernel<T, kBits, 8>, grid, kThreads, smem, stream, p);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t grid_rows(const GridRowsParams& p, const dim3& grid, cudaStream_t stream) {
  return p.w.bits == 8 ? grid_rows<T, 8>(p, grid, stream) : grid_rows<T, 4>(p, grid, stream);
}

}  // namespace

bool takes_grid_rows(const RotatedWeight& w, DType x_type) {
  auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 4 == 0; };
  return w.coding == Coding::kScalar && (w.bits == 4 || w.bits == 8) && w.group == kGroup &&
         (w.K == 2048 || w.K == 4096 || w.K == 8192) && w.N >= kLeastRows &&
         w.N % kCellRows == 0 && w.zeros != nullptr && w.scale_type == x_type &&
         x_type != DType::kFloat32 && aligned(w.scales) && aligned(w.zeros);
}

cudaError_t launch_grid_rows(const GridRowsParams& p, cudaStream_t stream) {
  cudaGetLastError();
  int device = 0;
  DeviceInfo info;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = device_info(device, &info);
  if (e != cudaSuccess) return e;
  const dim3 grid(kBlocks * info.sms);
  return p.type == DType::kFloat16 ? grid_rows<__half>(p, grid, stream)
                                   : grid_rows<__nv_bfloat16>(p, grid, stream);
}

}  // namespace aqlm
