// cuda.e8p, cuda.scalar for 1 .. 4 tokens and a matrix of few rows: a block has 32 rows and all of
// K, which its 16 warps share out. Nothing is left to add, and without a rotation of the outputs
// there is no second kernel.
//
// A warp is alone until its sums are added to those of the others:
//   before the wait  loads its codes and looks up the first kAhead cells, so that what depends on
//                    the kernel before is x alone
//   after it         quantizes its own columns of x (rotated_stage.cuh) with a scale of their own
//
// x has 16 bits. The MMAs are those of rotated_mma.cuh. Up to four cells a warp, 2 bits take 64
// registers and two blocks fit an SM: this kernel's prologue runs beside the one before.
// Architectures sm_80+.
#pragma once

#include "e8p_decode.cuh"
#include "hadamard.cuh"
#include "rotated_codes.cuh"
#include "rotated_stage.cuh"
#include "rotated_tune.h"
#include "scalar_decode.cuh"

namespace aqlm {

// A cell as it waits for x: E8P looked up, as nibbles; scalar codes as they are.
template <Coding kCoding, int kBits>
struct OwnedCell {
  static constexpr bool kE8p = kCoding == Coding::kE8p;
  static constexpr int kPlanes = tune::rotated_planes(kCoding, kBits);
  using Codes = ScalarCodes<kBits>;
  uint32_t words[kE8p ? kPlanes : 1][2][4];  // [plane][row tile]
  Codes codes;

  __device__ __forceinline__ void set(const Codes& c, uint32_t lane_offset) {
    if constexpr (kE8p) {
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          e8p_words<kBits>(c.a[0], c.a[kBits == 4 ? 1 : 0], c.b, plane, i, lane_offset,
                           words[plane][i]);
    } else {
      codes = c;
    }
  }
  __device__ __forceinline__ void operands(int plane, int i, uint32_t (&a)[2][4]) const {
    if constexpr (kE8p) e8p_expand<kBits>(words[plane][i], plane, a);
    else scalar_operands<kBits>(codes, i, a);
  }
};

template <Coding kCoding, int kBits, bool kLong>
__global__ void __launch_bounds__(tune::rotated_owned_bound(kCoding, kBits, kLong),
                                  tune::rotated_owned_blocks(kCoding, kBits, kLong))
rotated_owned_kernel(const __grid_constant__ RotatedMatmul p) {
  using Cell = OwnedCell<kCoding, kBits>;
  using Codes = ScalarCodes<kBits>;
  constexpr bool kE8p = kCoding == Coding::kE8p;
  constexpr int kWarps = tune::kOwnedThreads / 32, kAhead = tune::kOwnedAhead;
  constexpr int kBytes = kCellRows * kCellColumns / 8 * kBits, kPlanes = Cell::kPlanes;
  constexpr int kItems = kLong ? 4 : 1;  // eights of x of a lane: four cells a warp have 32
  extern __shared__ __align__(1024) unsigned char smem[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const uint32_t lane_offset = lane * 4;
  const int units = p.s.units, tokens = p.tokens, columns = 2 * tokens;
  const int share = warp * units / kWarps, count = (warp + 1) * units / kWarps - share;
  const int cell_stride = columns * kStageColumn;
  unsigned char* const cells = smem + tune::rotated_tables(kCoding, kBits) + share * cell_stride;
  float* const exchange = reinterpret_cast<float*>(
      smem + tune::rotated_tables(kCoding, kBits) + units * cell_stride);  // [token][warp][row]

  const uint8_t* const from =
      p.w.packed + (size_t(blockIdx.x) * units + share) * kBytes + lane * 16;
  auto fetch = [&](int cell) {
    Codes c = {};
    if (cell < count) {
      const uint8_t* const at = from + cell * kBytes;
#pragma unroll
      for (int i = 0; i < int(sizeof(c.a) / 16); ++i) c.a[i] = load_stream(at + i * 512);
      if constexpr (kBits == 3) c.b = load_stream8(at - lane * 8 + 512);
    }
    return c;
  };
  grid_dependents_start();
  Codes ring[kAhead];
  Cell ready[kAhead];
#pragma unroll
  for (int d = 0; d < kAhead; ++d) ring[d] = fetch(d);
  if constexpr (kE8p) {
    fill_e8p_tables<kBits>(smem, kWarps * 32);
    __syncthreads();
  }
  if constexpr (kLong)  // the rest to L2, 4 KB at most
    if (lane * 128 < (count - kAhead) * kBytes)
      prefetch_line(from + kAhead * kBytes + lane * (128 - 16));
  const int own_row = blockIdx.x * kCellRows + lane;  // the thread's of token `warp`, at the end
  RotateFinishOne finish = {};
  if (p.finish.y != nullptr && warp < tokens && own_row < p.w.N)
    finish = rotate_finish_one(p.finish, own_row, 1.f);
  const int column = share * kCellColumns + lane * 8;  // of x, the lane's first
  if (column < p.w.K) prefetch_line(static_cast<const uint16_t*>(p.x) + column);
#pragma unroll
  for (int d = 0; d < kAhead; ++d) {
    ready[d].set(ring[d], lane_offset);
    if constexpr (kLong) ring[d] = fetch(d + kAhead);
  }
  grid_dependency_wait();

  const bool half = p.x_type == DType::kFloat16;
  float x_scale = 0.f, x_sum = 0.f;  // of token t
  for (int m = 0; m < tokens; ++m) {
    uint4 raw[kItems];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int k = column + 256 * j;
      raw[j] = load_eight_raw(p, m * p.x_stride + k, lane + 32 * j < count * 8 ? p.w.K - k : 0);
    }
    uint32_t pair = 0;  // the bits of |x| are in its order
#pragma unroll
    for (int j = 0; j < kItems; ++j)
      pair = __vmaxu2(__vmaxu2(__vmaxu2(pair, raw[j].x & 0x7fff7fffu),
                               __vmaxu2(raw[j].y & 0x7fff7fffu, raw[j].z & 0x7fff7fffu)),
                      raw[j].w & 0x7fff7fffu);
    const uint32_t most = __reduce_max_sync(~0u, max(pair & 0xffffu, pair >> 16));
    const float peak = half ? to_float(__ushort_as_half(static_cast<unsigned short>(most)))
                            : __uint_as_float(most << 16);
    const float inverse = peak > 0.f ? __fdividef(kStageMax, peak) : 0.f;
    int sum = 0;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int item = lane + 32 * j;
      if (item >= count * 8) break;
      float v[8];
      int sums[2];
      if (half) unpack8<__half>(raw[j], v);
      else unpack8<__nv_bfloat16>(raw[j], v);
      stage_eight<kE8p>(v, inverse, cells + item / 8 * cell_stride + 2 * m * kStageColumn, item % 8,
                        mma_layout(), sums);
      sum += sums[0] + sums[1];
    }
    if constexpr (!kE8p) sum = __reduce_add_sync(~0u, sum);
    if (m == t) {
      x_scale = peak / kStageMax;
      x_sum = sum;
    }
  }
  __syncwarp();

  int acc[kPlanes][2][2][4] = {};  // [row tile][half of a cell's columns]: shorter chains
  const uint32_t x_lane = smem_address(cells) + min(g, columns - 1) * kStageColumn + t * 16;
  auto multiply = [&](const Cell& cell, int c) {
    const uint4 v = load_shared(x_lane + c * cell_stride);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t a[2][4];
        cell.operands(plane, i, a);
        mma_16832(acc[plane][i][0], a[0], v.x, v.y);
        mma_16832(acc[plane][i][1], a[1], v.z, v.w);
      }
  };
  for (int c = 0; c < count; c += kAhead) {
#pragma unroll
    for (int d = 0; d < kAhead; ++d) {
      if (c + d >= count) break;
      multiply(ready[d], c + d);
      if constexpr (kLong)
        if (c + d + kAhead < count) {
          ready[d].set(ring[d], lane_offset);
          ring[d] = fetch(c + d + 2 * kAhead);
        }
    }
    if constexpr (!kLong) break;  // else operands are made before the loop, and spilled
  }

  constexpr float kStep = 1.f / scalar_step(kBits);
  RowScales rows;
  if constexpr (!kE8p) rows.load(p.w, blockIdx.x, 0, 1);
  // 256 * high + low of row g + 8 r.
  auto combined = [&](int plane, int r) {
    const int i = r / 2, h = r % 2 * 2;
    return 256.f * (acc[plane][i][0][h] + acc[plane][i][1][h]) +
           (acc[plane][i][0][h + 1] + acc[plane][i][1][h + 1]);
  };
  float v[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    v[r] = combined(0, r);
    if constexpr (kE8p) {
      if constexpr (kPlanes == 2) v[r] += p.w.residual * combined(1, r);
      v[r] *= x_scale * (1.f / 32.f);
    } else {
      v[r] = kStep * v[r] + rows.template shift<kBits>(p.w, r) * x_sum;
      v[r] *= x_scale * rows.scale(p.w, r);
    }
  }
  if (p.local_bits > 0) transform_rows(v, p.local_bits);
  if (t < tokens) {
#pragma unroll
    for (int r = 0; r < 4; ++r) exchange[(t * kWarps + warp) * kCellRows + r * 8 + g] = v[r];
  }
  __syncthreads();
  if (warp >= tokens) return;
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += exchange[(warp * kWarps + w) * kCellRows + lane];
  if (p.finish.y == nullptr) partials_of(p, blockIdx.x, 0)[warp * kCellRows + lane] = sum;
  else if (own_row < p.w.N) rotate_store_one(p.finish, warp, own_row, sum, finish);
}

}  // namespace aqlm
