// cuda.scalar with scale groups along K, for 1 .. 4 tokens: partial sums of x W^T.
//
// As rotated_mma.cuh with one tile, but what happens at the end of every scale group is shared by
// the four lanes of a row quartet: with kTokens = 1 all column pairs of B hold the one token, and
// lane (g, t) finishes row 8t + g alone. Accumulators are never cleared: a group is the difference
// of two sums modulo 2^32 (of at most 512 columns, so that it fits).
// Architectures sm_80+.
#pragma once

#include "rotated_codes.cuh"
#include "rotated_scales.cuh"
#include "rotated_stage.cuh"
#include "rotated_tune.h"

namespace aqlm {

// kTokens: 1 or 4.
template <int kBits, int kTokens>
__global__ void __launch_bounds__(tune::kGroupWarps * 32, 1)
rotated_groups_kernel(const __grid_constant__ RotatedMatmul p) {
  constexpr int kWarps = tune::kGroupWarps;
  constexpr int kDepth = tune::rotated_group_depth(kBits), kCell = 2 * kTokens * kStageColumn;
  constexpr float kStep = 1.f / scalar_step(kBits);
  extern __shared__ __align__(1024) unsigned char smem[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const RotatedSchedule& s = p.s;
  const int units = s.units, blocks = p.w.blocks(), tokens = p.tokens;
  const long long all_cells = static_cast<long long>(s.groups) * units;
  const int first = static_cast<int>(blockIdx.x * all_cells / s.ctas);
  const int count = static_cast<int>((blockIdx.x + 1) * all_cells / s.ctas) - first;
  const int unit0 = first % units, slots = min(count, units);
  const int span = p.w.group / kCellColumns;

  CodeStream<kBits, kWarps> codes(p, first, count, warp);
  ScalarCodes<kBits> ring[kDepth] = {};
  grid_dependents_start();
#pragma unroll
  for (int d = 0; d < kDepth; ++d) codes.fetch(ring[d]);

  const GroupScales scales(p.w, smem + warp * kGroupBytes);
  // Chunk c of a row block into buffer c % 2. Always one group of copies.
  auto copy_chunk = [&](int block, int c) {
    scales.copy(block, c, c % 2);
    copy_commit();
  };
  auto start_groups = [&](int block, int j) {
    copy_chunk(block, j / kGroupChunk);
    copy_chunk(block, j / kGroupChunk + 1);
    copy_wait<1>();
    __syncwarp();
  };
  const int row0 = (kTokens == 1 ? 8 * t : 0) + g;  // the lane's rows: row0 + 8r, r < kTokens
  // Value of group j of the lane's row r in plane 0 (scale) or 1 (zero).
  auto value = [&](uint32_t j, int plane, int r) {
    return scales.value(j, plane, row0 + 8 * r, j / kGroupChunk % 2);
  };
  const int group0 = first / units, slot0 = first_slot(p, group0);
  start_groups(group0 * kWarps + warp, unit0 / span);
  prefetch_token(p, unit0, slots);
  grid_dependency_wait();

  unsigned char* const cells = smem + kWarps * kGroupBytes;
  float2* const sums = reinterpret_cast<float2*>(cells + slots * kCell);
  float* const peaks = reinterpret_cast<float*>(sums + slots * kTokens);
  for (int m = 0; m < kTokens; ++m) {
    const StageRange r = {unit0, slots, 0, slots, cells + 2 * m * kStageColumn, size_t(kCell), 1,
                          mma_layout(), sums + m, kTokens, peaks};
    stage_token<false, true>(p, min(m, tokens - 1), r);
    __syncthreads();
  }

  int acc[2][4] = {};
  uint32_t last[kTokens] = {};
  float total[kTokens] = {}, group_sum = 0.f;
  const uint32_t x_begin =
      smem_address(cells) + g % (2 * kTokens) * kStageColumn + t * 16;
  const uint32_t x_end = x_begin + slots * kCell;
  const float2* const own_sums = sums + t % kTokens;
  uint32_t x_at = x_begin;
  // 256 * high + low of a tile's row half.
  auto both = [](const int (&c)[4], int row_half) {
    return static_cast<uint32_t>(c[2 * row_half]) * 256 + c[2 * row_half + 1];
  };
  int slot = 0, begin = 0, group = group0, unit = unit0;
  for (;;) {  // row groups
    const int end = min(count, begin + units - unit);
    const int block = group * kWarps + warp;
    int rest = end - begin, phase = -1, until = span - unit % span;
    uint32_t j = unit / span;
    while (phase < 0) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        if (rest == 0) {
          phase = d;
          break;
        }
        --rest;
        const float2 about = own_sums[slot * kTokens];
        if (++slot == slots) slot = 0;
        group_sum += about.x;
        uint32_t a[2][2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) scalar_operands<kBits>(ring[d], i, a[i]);
        const uint4 v = load_shared(x_at);
        x_at += kCell;
        if (x_at == x_end) x_at = x_begin;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_16832(acc[i], a[i][0], v.x, v.y);
          mma_16832(acc[i], a[i][1], v.z, v.w);
        }
        codes.fetch(ring[d]);
        if (--until == 0 || rest == 0) {  // a scale group ends
#pragma unroll
          for (int r = 0; r < kTokens; ++r) {
            uint32_t now;
            if constexpr (kTokens == 1) {
              const uint32_t even = t < 2 ? both(acc[0], 0) : both(acc[1], 0);
              const uint32_t odd = t < 2 ? both(acc[0], 1) : both(acc[1], 1);
              now = t % 2 ? odd : even;
            } else {
              now = both(acc[r / 2], r % 2);
            }
            const float sum = static_cast<float>(static_cast<int>(now - last[r]));
            last[r] = now;
            const float shift = scalar_centre(kBits) - value(j, 1, r);
            total[r] = fmaf(fmaf(shift, group_sum, kStep * sum), value(j, 0, r) * about.y,
                            total[r]);
          }
          group_sum = 0.f;
          until = span;
          if (++j % kGroupChunk == 0) {  // the next chunk has come; the one after replaces this
            copy_wait<0>();
            __syncwarp();
            copy_chunk(block, j / kGroupChunk + 1);
          }
        }
      }
    }
    if (block < blocks) {
      const int m = t % kTokens;
      float* out = partials_of(p, group, begin == 0 ? slot0 : 0) + m * s.group_rows +
                   warp * kCellRows + row0;
#pragma unroll
      for (int r = 0; r < kTokens; ++r)
        if (m < tokens) out[8 * r] = total[r];
    }
    if (end == count) break;
    for (int i = 0; i < phase; ++i) {  // the next row group begins with the ring's first register
      const ScalarCodes<kBits> head = ring[0];
#pragma unroll
      for (int d = 0; d + 1 < kDepth; ++d) ring[d] = ring[d + 1];
      ring[kDepth - 1] = head;
    }
#pragma unroll
    for (int r = 0; r < kTokens; ++r) total[r] = 0.f;
    begin = end;
    unit = 0;
    ++group;
    copy_wait<0>();  // into what the next copies overwrite
    __syncwarp();
    start_groups(group * kWarps + warp, 0);
  }
}

}  // namespace aqlm
