// Activations as int8 MMA columns: x = scale * (256 * high + low), 16 bits a value.
//
// A cell of x is 64 columns of K of every token: column 2m the high bytes of token m, column 2m + 1
// the low bytes, 64 bytes each, in the order of the MMA's operand. The
// scale is max|x| / 32639 over the columns that share it: all that the caller names, or for grouped
// weights those of the cell's scale group, so that outliers cost only their own group precision.
//
// Per cell and token (wgmma: all tokens of the tiles) a float2: .x the sum of the integers, .y that
// of every second four (E8P: low nibbles) or the cell's scale (grouped). The bodies add constants
// of the codes through them.
#pragma once

#include "numeric.cuh"
#include "ptx.cuh"
#include "rotated.h"

namespace aqlm {

constexpr float kStageMax = 32639.f;  // 127 * 256 + 127
constexpr int kStageColumn = 64;      // bytes of one column of a cell

// Eight values from x[offset], zeros past `valid`.
__device__ __forceinline__ void load_eight(const RotatedMatmul& p, long long offset, int valid,
                                           float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = 0.f;
  if (valid <= 0) return;
  const size_t bytes = p.x_type == DType::kFloat32 ? 4 : 2;
  const char* at = static_cast<const char*>(p.x) + offset * bytes;
  if (valid >= 8 && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
    const uint4 a = load_cached(at);
    if (p.x_type == DType::kFloat16) {
      unpack8<__half>(a, v);
    } else if (p.x_type == DType::kBFloat16) {
      unpack8<__nv_bfloat16>(a, v);
    } else {
      const uint4 b = load_cached(at + 16);
      const uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(w[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= valid) break;
    if (p.x_type == DType::kFloat16) v[i] = to_float(static_cast<const __half*>(p.x)[offset + i]);
    else if (p.x_type == DType::kBFloat16)
      v[i] = to_float(static_cast<const __nv_bfloat16*>(p.x)[offset + i]);
    else v[i] = static_cast<const float*>(p.x)[offset + i];
  }
}

// Word i of a column of a cell (K columns 4i .. 4i + 3) is what lane t of the MMA multiplies in
// register `chunk` of its four B registers.
template <bool kE8p>
__device__ __forceinline__ int stage_lane(int i) { return kE8p ? i / 2 % 4 : i % 4; }
template <bool kE8p>
__device__ __forceinline__ int stage_chunk(int i) { return kE8p ? i % 2 * 2 + i / 8 : i / 4; }

// Bytes between the columns, lanes and chunks of a cell.
struct StageLayout {
  int column, lane, chunk;
};
// mma.sync: a lane reads the 16 bytes of its column.
__device__ __forceinline__ StageLayout mma_layout() { return {64, 16, 4}; }
// wgmma: 8 x 16-byte core matrices without swizzle, [chunk][column][16].
__device__ __forceinline__ StageLayout wgmma_layout(int columns) { return {16, 4, 16 * columns}; }

// What one block stages of one token. Slot i is unit (first + i) % units, for i < count.
struct StageRange {
  int first, count;      // units that share the scale
  int from, to;          // slots to write
  uint8_t* cells;        // of slot 0, from this token's column 2m on
  size_t cell_stride;    // of all planes
  int planes;            // 2: a second copy times the weight's residual factor
  StageLayout layout;
  float2* sums;          // of slot 0
  int sums_stride;
  float* peaks;          // shared memory: a float a warp; grouped: a cell
};

// What the thread's first load of `stage_token` reads.
__device__ __forceinline__ void prefetch_token(const RotatedMatmul& p, int first, int count) {
  const int slot = threadIdx.x / 8, units = p.s.units;
  if (slot >= count) return;
  const int unit = first + slot < units ? first + slot : first + slot - units;
  const int k = unit * kCellColumns + threadIdx.x % 8 * 8;
  if (k < p.w.K)
    prefetch_line(static_cast<const char*>(p.x) + k * (p.x_type == DType::kFloat32 ? 4ll : 2ll));
}

// Integers of eight values, high and low bytes, to their places in a cell's column pair.
template <bool kE8p>
__device__ __forceinline__ void stage_eight(const float (&v)[8], float factor, uint8_t* cell,
                                            int eighth, const StageLayout& layout, int (&sum)[2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    uint32_t high, low;
    split_four(v + 4 * j, factor, high, low);
    sum[j] = 256 * __dp4a(static_cast<int>(high), 0x01010101, 0) +
             __dp4a(static_cast<int>(low), 0x01010101, 0);
    const int word = eighth * 2 + j;
    uint8_t* at = cell + stage_lane<kE8p>(word) * layout.lane +
                  stage_chunk<kE8p>(word) * layout.chunk;
    *reinterpret_cast<uint32_t*>(at) = high;
    *reinterpret_cast<uint32_t*>(at + layout.column) = low;
  }
}

// Maximum over the warp of values that are not negative: their bits are in the same order.
__device__ __forceinline__ float warp_peak(float v) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(v)));
}

// All threads of the block; returns the scale (of the last cell, when grouped).
template <bool kE8p, bool kGrouped>
__device__ __forceinline__ float stage_token(const RotatedMatmul& p, int token,
                                             const StageRange& r) {
  const int units = p.s.units * p.s.cells, tid = threadIdx.x, threads = blockDim.x;
  const unsigned eight = 0xffu << (tid & 24);  // the lanes of one cell
  const long long row = token * p.x_stride;
  auto wrapped = [&](int unit) { return unit < units ? unit : unit - units; };
  auto load = [&](int slot, int eighth, float (&v)[8]) {
    const int unit = wrapped(r.first + slot), k = unit * kCellColumns + eighth * 8;
    load_eight(p, row + k, p.w.K - k, v);
  };
  float kept[8];  // the thread's first item stays in registers for the second pass
  float most = 0.f;
  for (int i = tid; i < r.count * 8; i += threads) {
    float v[8];
    load(i / 8, i % 8, v);
    float peak = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) peak = fmaxf(peak, fabsf(v[j]));
    if (i == tid) {
#pragma unroll
      for (int j = 0; j < 8; ++j) kept[j] = v[j];
    }
    if constexpr (kGrouped) {
#pragma unroll
      for (int d = 4; d > 0; d /= 2) peak = fmaxf(peak, __shfl_xor_sync(eight, peak, d));
      if (i % 8 == 0) r.peaks[i / 8] = peak;
    }
    most = fmaxf(most, peak);
  }
  if constexpr (!kGrouped) {
    most = warp_peak(most);
    if (tid % 32 == 0) r.peaks[tid / 32] = most;
  }
  __syncthreads();
  float peak = 0.f;
  if constexpr (!kGrouped)
    peak = warp_peak(tid % 32 < threads / 32 ? r.peaks[tid % 32] : 0.f);
  for (int i = r.from * 8 + tid; i < r.to * 8; i += threads) {
    const int slot = i / 8, eighth = i % 8;
    float v[8];
    if (i == tid) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = kept[j];
    } else {
      load(slot, eighth, v);
    }
    if constexpr (kGrouped) {
      const int span = p.w.group / kCellColumns, unit = wrapped(r.first + slot);
      const int begin = unit / span * span;
      peak = 0.f;
      for (int u = begin; u < begin + span; ++u) {
        const int other = u >= r.first ? u - r.first : u - r.first + units;
        if (other < r.count) peak = fmaxf(peak, r.peaks[other]);
      }
    }
    const float inverse = peak > 0.f ? __fdividef(kStageMax, peak) : 0.f;
    int sum[2];
    for (int plane = r.planes - 1; plane >= 0; --plane)
      stage_eight<kE8p>(v, plane == 0 ? inverse : inverse * p.w.residual,
                        r.cells + slot * r.cell_stride + plane * (r.cell_stride / r.planes),
                        eighth, r.layout, sum);
    int all = sum[0] + sum[1], second = sum[1];
#pragma unroll
    for (int d = 4; d > 0; d /= 2) {
      all += __shfl_xor_sync(eight, all, d);
      if constexpr (!kGrouped) second += __shfl_xor_sync(eight, second, d);
    }
    if (eighth == 0)
      r.sums[slot * r.sums_stride] =
          make_float2(all, kGrouped ? peak / kStageMax : static_cast<float>(second));
  }
  return peak / kStageMax;
}

// Eight 16-bit values from x[offset], zeros past `valid`.
__device__ __forceinline__ uint4 load_eight_raw(const RotatedMatmul& p, long long offset,
                                                int valid) {
  const uint16_t* const at = static_cast<const uint16_t*>(p.x) + offset;
  if (valid >= 8 && reinterpret_cast<uintptr_t>(at) % 16 == 0) return load_cached(at);
  uint32_t w[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < valid) w[i / 2] |= static_cast<uint32_t>(at[i]) << (i % 2 * 16);
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// The units [first, first + count) of 2 .. kWarps tokens, by all warps: those of a token share its
// units, kBatch loads of a thread in flight at once. 16-bit values wait in their own cell,
// which has just the room.
template <bool kE8p, int kWarps, int kBatch>
__device__ __forceinline__ void stage_tokens(const RotatedMatmul& p, int first, int count,
                                             uint8_t* cells, int cell_stride, float2* sums,
                                             float* peaks, float* scales) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tokens = p.tokens;
  int parts = kWarps;  // warps of a token
  while (parts * tokens > kWarps) parts /= 2;
  const int m = warp / parts, part = warp % parts, eighth = lane % 8;
  const bool busy = m < tokens, wide = p.x_type == DType::kFloat32;
  const unsigned eight = 0xffu << (lane & 24);
  auto offset_of = [&](int slot, int* valid) {
    int unit = first + slot;
    if (unit >= p.s.units) unit -= p.s.units;
    const int k = unit * kCellColumns + eighth * 8;
    *valid = p.w.K - k;
    return m * p.x_stride + k;
  };
  auto unpack = [&](const uint4& raw, float (&v)[8]) {
    if (p.x_type == DType::kFloat16) unpack8<__half>(raw, v);
    else unpack8<__nv_bfloat16>(raw, v);
  };
  auto cell_of = [&](int slot) { return cells + slot * cell_stride + 2 * m * kStageColumn; };
  float peak = 0.f;
  for (int slot = part * 4 + lane / 8; busy && slot < count; slot += kBatch * parts * 4) {
    float v[kBatch][8];
    int valid;
    if (wide) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int at = slot + b * parts * 4;
        const long long offset = offset_of(at, &valid);
        load_eight(p, offset, at < count ? valid : 0, v[b]);
      }
    } else {
      uint4 raw[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int at = slot + b * parts * 4;
        const long long offset = offset_of(at, &valid);
        raw[b] = at < count ? load_eight_raw(p, offset, valid) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int at = slot + b * parts * 4;
        if (at < count) *reinterpret_cast<uint4*>(cell_of(at) + eighth * 16) = raw[b];
        unpack(raw[b], v[b]);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
#pragma unroll
      for (int j = 0; j < 8; ++j) peak = fmaxf(peak, fabsf(v[b][j]));
  }
  peak = warp_peak(peak);
  if (lane == 0) peaks[warp] = peak;
  __syncthreads();
  for (int i = 0; i < parts; ++i) peak = fmaxf(peak, peaks[m * parts + i]);
  if (busy && part == 0 && lane == 0) scales[m] = peak / kStageMax;
  const float inverse = peak > 0.f ? __fdividef(kStageMax, peak) : 0.f;
  for (int slot = part * 4 + lane / 8; busy && slot < count; slot += parts * 4) {
    float v[8];
    if (wide) {
      int valid;
      const long long offset = offset_of(slot, &valid);
      load_eight(p, offset, valid, v);
    } else {
      unpack(*reinterpret_cast<const uint4*>(cell_of(slot) + eighth * 16), v);
      __syncwarp(eight);
    }
    int sum[2];
    stage_eight<kE8p>(v, inverse, cell_of(slot), eighth, mma_layout(), sum);
    int all = sum[0] + sum[1], second = sum[1];
#pragma unroll
    for (int d = 4; d > 0; d /= 2) {
      all += __shfl_xor_sync(eight, all, d);
      second += __shfl_xor_sync(eight, second, d);
    }
    if (eighth == 0) sums[slot * tokens + m] = make_float2(all, second);
  }
  __syncthreads();
}

// Separate kernel for more tokens than one MMA tile holds. Grid: (tokens, ranges of units). Every
// block of a token recomputes the peaks: it reads x from L2 and needs no second launch.
constexpr int kStageThreads = 1024;  // an item each up to K = 8192

template <bool kE8p, bool kGrouped>
__global__ void __launch_bounds__(kStageThreads, 1)
stage_kernel(const __grid_constant__ RotatedMatmul p, int columns, int planes, bool wgmma) {
  extern __shared__ float stage_peaks[];
  const int token = blockIdx.x, units = p.s.units * p.s.cells;
  const int from = units * blockIdx.y / gridDim.y, to = units * (blockIdx.y + 1) / gridDim.y;
  grid_dependents_start();
  grid_dependency_wait();
  const StageLayout layout = wgmma ? wgmma_layout(columns) : mma_layout();
  const StageRange r = {0, units, from, to, p.x_cells + 2 * token * layout.column,
                        size_t(planes) * columns * kStageColumn, planes, layout,
                        p.x_sums + token, wgmma ? columns / 2 : p.tokens, stage_peaks};
  const float scale = stage_token<kE8p, kGrouped>(p, token, r);
  if (blockIdx.y == 0 && threadIdx.x == 0) p.x_scales[token] = scale;
}

}  // namespace aqlm
