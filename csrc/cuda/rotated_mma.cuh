// cuda.e8p, cuda.scalar: partial sums of z = x Wq^T for up to 64 tokens on the int8 tensor cores.
//
// m16n8k32 with weights as A, decoded once into registers for all tokens, and activations as B: the
// high and low bytes of 16-bit integers, two columns a token (rotated_stage.cuh), so that products
// and sums are exact in int32. A warp owns 32 rows and walks cells of 64 columns; all warps of a
// CTA read the same activations from shared memory.
//
//   Share::kLocal  the CTA quantizes its own range of x into shared memory; one kernel
//   Share::kRing   stage_kernel has done so; chunks of cells are copied through a ring
//
// A block has 32 rows a warp and a range of K. Matrices of few rows: rotated_owned.cuh.
//
// E8P with few tiles keeps high and low nibbles in accumulators of their own (no shift; 2 LOP3 for
// 8 weights), and corrects by the sums of the activations. Scalar weights with groups along K are
// scaled into float accumulators at the end of every group.
//
// Bytes of codes in flight per SM: warps * depth * 512 * planes. Architectures sm_80+.
#pragma once

#include "e8p_decode.cuh"
#include "rotated_codes.cuh"
#include "rotated_stage.cuh"
#include "rotated_tune.h"
#include "scalar_decode.cuh"

namespace aqlm {

template <Coding kCoding, int kBits, int kTiles, bool kGrouped, int kWarps, Share kShare>
__global__ void __launch_bounds__(
    tune::rotated_bound(kCoding, kBits, kTiles, kGrouped, kWarps, kShare), 1)
rotated_mma_kernel(const __grid_constant__ RotatedMatmul p) {
  using Shape = tune::RotatedShape<kCoding, kBits, kTiles>;
  constexpr bool kE8p = kCoding == Coding::kE8p;
  constexpr bool kLocal = kShare != Share::kRing;
  constexpr int kDepth = kWarps == tune::kWideWarps ? tune::kWideDepth : Shape::kDepth;
  constexpr int kPlanes = Shape::kPlanes, kSets = Shape::kSets;
  constexpr bool kSplit = Shape::kSplit;
  constexpr int kCellBytes = kTiles * 8 * kStageColumn;  // of staged activations
  constexpr int kChunk = tune::rotated_chunk(kTiles), kSlots = kChunk * tune::kRotatedStages;
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const cells = smem + Shape::kTables;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const uint32_t lane_offset = lane * 4;
  const RotatedSchedule& s = p.s;
  const int units = s.units, blocks = p.w.blocks(), tokens = p.tokens;
  const long long all_cells = static_cast<long long>(s.groups) * units;
  const int first = static_cast<int>(blockIdx.x * all_cells / s.ctas);
  const int count = static_cast<int>((blockIdx.x + 1) * all_cells / s.ctas) - first;

  // Codes: a register ring, filled ahead of the activations.
  using Codes = ScalarCodes<kBits>;
  CodeStream<kBits, kWarps> codes(p, first, count, warp);
  Codes ring[kDepth] = {};
  grid_dependents_start();
#pragma unroll
  for (int d = 0; d < kDepth; ++d) codes.fetch(ring[d]);
  if constexpr (kE8p) fill_e8p_tables<kBits>(smem, kWarps * 32);
  if constexpr (kLocal) codes.prefetch(lane);  // after the tables' loads, which would wait for it
  const int unit0 = first % units, group0 = first / units;
  // The first cells are looked up before x comes, as in rotated_owned.cuh, if all are of one row.
  constexpr bool kAhead = kE8p && kLocal && kTiles == 1 && kPlanes == 1;
  constexpr int kReady = kDepth > 1 ? kDepth - 1 : 1;  // all: spills
  const bool looked_up = kAhead && min(count, units - unit0) >= kReady;
  uint32_t ready[kReady][2][4];
  if constexpr (kAhead) {
    __syncthreads();
    if (looked_up) {
#pragma unroll
      for (int d = 0; d < kReady; ++d)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          e8p_words<kBits>(ring[d].a[0], ring[d].a[0], ring[d].b, 0, i, lane_offset, ready[d][i]);
      ring[0] = ring[kDepth - 1];
#pragma unroll
      for (int d = 1; d < kDepth; ++d) codes.fetch(ring[d]);
    }
  }
  const int slot0 = kLocal ? first_slot(p, group0) : 0;
  const int slots = kLocal ? min(count, units) : kSlots;
  if constexpr (kLocal) prefetch_token(p, unit0, slots);
  if (p.local_bits < 0) __trap();  // touches the last line of the parameters
  grid_dependency_wait();

  // Activations.
  const int columns = kTiles == 1 ? 2 * tokens : 8 * kTiles;
  const int cell_stride = kLocal ? columns * kStageColumn : kCellBytes;
  float2* const sums = reinterpret_cast<float2*>(cells + slots * cell_stride);  // kLocal
  float* const peaks = reinterpret_cast<float*>(sums + slots * tokens);
  float* const scales = peaks + max(slots, kWarps);
  float* const exchange = scales + tokens;  // row groups of [tokens][warp][32 rows]
  auto copy_chunk = [&](int chunk) {
    if constexpr (!kLocal) {
      const int base = chunk * kChunk, n = min(kChunk, count - base);
      for (int i = threadIdx.x; i < n * (kCellBytes / 16); i += kWarps * 32) {
        const int c = i / (kCellBytes / 16), at = i % (kCellBytes / 16) * 16;
        copy_async(cells + (base + c) % kSlots * kCellBytes + at,
                   p.x_cells + size_t((unit0 + base + c) % units) * kCellBytes + at);
      }
      copy_commit();
    }
  };
  if constexpr (kLocal) {
    if (kTiles > 1 || (!kGrouped && tokens > 1)) {
      stage_tokens<kE8p, kWarps, kTiles == 1 ? 2 : 4>(p, unit0, slots, cells, cell_stride, sums,
                                                      peaks, scales);
    } else {
      for (int m = 0; m < tokens; ++m) {
        const StageRange r = {unit0, slots, 0, slots, cells + 2 * m * kStageColumn,
                              size_t(cell_stride), 1, mma_layout(), sums + m, tokens, peaks};
        const float scale = stage_token<kE8p, kGrouped>(p, m, r);
        if (threadIdx.x == 0) scales[m] = scale;
        __syncthreads();
      }
    }
  } else {
    if constexpr (kE8p) __syncthreads();
#pragma unroll
    for (int c = 0; c < tune::kRotatedStages - 1; ++c) copy_chunk(c);
  }

  int acc[kSets][2][kTiles][4] = {};
  float total[2][kTiles][2] = {};  // grouped: [row tile][tile][row half]
  float group_sum[kTiles] = {}, group_scale[kTiles] = {};
  const uint32_t x_lane = (kTiles == 1 ? min(g, columns - 1) : g) * kStageColumn + t * 16;
  constexpr float kStep = 1.f / scalar_step(kBits);
  const int span = kGrouped ? p.w.group / kCellColumns : 1;
  RowScales rows, ahead;  // of this scale group and the next

  // One cell: decode, then all tokens.
  auto multiply = [&](const Codes& c, uint32_t x) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      uint32_t a[2][2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kE8p && kSplit) {
          e8p_nibbles<kBits>(c.a[0], c.a[kBits == 4 ? 1 : 0], c.b, plane, i, lane_offset, a[i]);
        } else if constexpr (kE8p) {
          uint32_t w[4];
          e8p_words<kBits>(c.a[0], c.a[kBits == 4 ? 1 : 0], c.b, plane, i, lane_offset, w);
          e8p_expand<kBits>(w, plane, a[i]);
        } else {
          scalar_operands<kBits>(c, i, a[i]);
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint4 v = load_shared(x + n * 8 * kStageColumn);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int set = kSplit ? 2 * plane : plane;
          mma_16832(acc[set][i][n], a[i][0], v.x, v.y);
          mma_16832(acc[kSplit ? set + 1 : set][i][n], a[i][1], v.z, v.w);
        }
      }
    }
  };
  // 256 * high + low of set `set`, in units of the operand.
  auto combined = [&](int set, int i, int n, int h) {
    if constexpr (kSplit) {
      const int high = acc[2 * set][i][n][2 * h] + 16 * acc[2 * set + 1][i][n][2 * h];
      const int low = acc[2 * set][i][n][2 * h + 1] + 16 * acc[2 * set + 1][i][n][2 * h + 1];
      return 256.f * high + low;
    } else {
      return 256.f * acc[set][i][n][2 * h] + acc[set][i][n][2 * h + 1];
    }
  };
  auto clear = [&] {
#pragma unroll
    for (int q = 0; q < kSets * 2 * kTiles * 4; ++q) (&acc[0][0][0][0])[q] = 0;
  };
  // Grouped: the finished scale group goes into the float accumulators.
  auto flush_group = [&] {
    if constexpr (kGrouped) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float scale = rows.scale(p.w, r), shift = rows.template shift<kBits>(p.w, r);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const float sum = kStep * combined(0, r / 2, n, r % 2) + shift * group_sum[n];
          total[r / 2][n][r % 2] += sum * (scale * group_scale[n]);
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) group_sum[n] = 0.f;
      clear();
    }
  };
  // Sum over the cells [begin, begin + n) of the CTA's range of this lane's token of a tile.
  auto sum_cells = [&](int begin, int n, int token) {
    float2 v = make_float2(0.f, 0.f);
    // Wrapped places, without divisions: n is at most `slots` and `units`.
    int at = kLocal ? begin % slots + g : (unit0 + begin) % units + g;
    const int wrap_at = kLocal ? slots : units;
    for (int i = g; i < n; i += 8, at += 8) {
      if (at >= wrap_at) at -= wrap_at;
      const float2 sum = kLocal ? sums[at * tokens + token] : p.x_sums[size_t(at) * tokens + token];
      v.x += sum.x;
      v.y += sum.y;
    }
#pragma unroll
    for (int d = 4; d < 32; d *= 2) {
      v.x += __shfl_xor_sync(~0u, v.x, d);
      v.y += __shfl_xor_sync(~0u, v.y, d);
    }
    return v;
  };
  constexpr bool kEarly = kTiles == 1 && !kGrouped && kPlanes == 1;  // two planes: no registers
  float2 early = make_float2(0.f, 0.f);
  // Row groups whose sums wait in `exchange` for the end of the block's range, or for its room: a
  // barrier and a transform between them, by few warps, would stop all codes.
  constexpr int kHeld = tune::rotated_held(kCoding, kBits, kTiles);
  const int exchange_floats = tokens * kWarps * kCellRows;
  int held = 0;
  auto finish_held = [&](int last) {  // last: the row group written last
    __syncthreads();
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (kHeld > 1 && h >= held) break;
      const int of = kHeld == 1 ? last : last - held + 1 + h;
      transform_warps<kWarps>(exchange + h * exchange_floats, tokens, p.local_bits - 5,
                              partials_of(p, of, of == group0 ? slot0 : 0), blocks - of * kWarps,
                              (warp + h * (kWarps / 2)) % kWarps);
    }
    held = 0;
  };
  auto write = [&](int group, int begin, int n_cells) {
    const int block = group * kWarps + warp;
    // Rows past the last block: computed for the sake of barriers, never stored.
    const bool exists = block < blocks, exchanged = kLocal && p.local_bits > 5;
    if (!exists && !exchanged) return;
    float* out = partials_of(p, group, begin > 0 ? 0 : kLocal ? slot0 : first_slot(p, group));
    if constexpr (kLocal) {
      if (exchanged) {
        if (kHeld > 1 && held == kHeld) finish_held(group - 1);
        if (kHeld == 1 || (begin > 0 && held == 0)) __syncthreads();  // the others have read it
        out = exchange + held * exchange_floats;
        if constexpr (kHeld > 1) ++held;
      }
    }
    out += warp * kCellRows + g;
    if constexpr (!kE8p && !kGrouped) rows.load(p.w, block, 0, 1);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int m = n * 4 + t, token = min(m, tokens - 1);
      float2 sum = make_float2(0.f, 0.f);
      float x_scale = 0.f;
      if constexpr (!kGrouped) {
        x_scale = kLocal ? scales[token] : p.x_scales[token];
        if (kSplit || (!kE8p && (p.w.zeros != nullptr || kBits == 8)))
          sum = kEarly ? early : sum_cells(begin, n_cells, token);
      }
      float v[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if constexpr (kGrouped) {
          v[r] = total[r / 2][n][r % 2];
        } else if constexpr (kE8p) {
          v[r] = combined(0, r / 2, n, r % 2);
          if constexpr (kSplit) v[r] += 8.f * sum.x - 128.f * sum.y;
          if constexpr (kPlanes == 2) {
            float rest = combined(1, r / 2, n, r % 2);
            if constexpr (kSplit) rest += (kBits == 4 ? 8.f * sum.x : 0.f) - 128.f * sum.y;
            v[r] += p.w.residual * rest;
          }
          v[r] *= x_scale * (1.f / 32.f);
        } else {
          v[r] = kStep * combined(0, r / 2, n, r % 2) + rows.template shift<kBits>(p.w, r) * sum.x;
          v[r] *= x_scale * rows.scale(p.w, r);
        }
      }
      if (p.local_bits > 0) transform_rows(v, p.local_bits);
#pragma unroll
      for (int r = 0; r < 4; ++r)
        if (m < tokens) out[m * kWarps * kCellRows + r * 8] = v[r];
    }
    if constexpr (kLocal && kHeld == 1)
      if (exchanged) finish_held(group);
  };

  const uint32_t x_begin = smem_address(cells) + x_lane, x_end = x_begin + slots * cell_stride;
  uint32_t x_at = x_begin;
  if constexpr (kAhead) {
    if (looked_up) {
#pragma unroll
      for (int d = 0; d < kReady; ++d) {
        const uint4 v = load_shared(x_at);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t a[2][4];
          e8p_split(ready[d][i], a);
          mma_16832(acc[0][i][0], a[0], v.x, v.y);
          mma_16832(acc[1][i][0], a[1], v.z, v.w);
        }
        x_at += cell_stride;
      }
      if (x_at == x_end) x_at = x_begin;
    }
  }
  int begin = 0, group = group0, unit = unit0, slot = 0, chunk = 0, until_chunk = 0;
  for (;;) {  // row groups
    const int end = min(count, begin + units - unit), first_unit = unit;
    int rest = end - begin, phase = -1;
    if constexpr (kEarly)
      if (kSplit || (!kE8p && (p.w.zeros != nullptr || kBits == 8)))
        early = sum_cells(begin, rest, min(t, tokens - 1));
    if (looked_up && begin == 0) rest -= kReady;
    while (phase < 0) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        if (rest == 0) {
          phase = d;
          break;
        }
        --rest;
        if constexpr (!kLocal) {
          if (until_chunk == 0) {
            copy_wait<tune::kRotatedStages - 2>();
            __syncthreads();
            copy_chunk(chunk + tune::kRotatedStages - 1);
            ++chunk;
            until_chunk = kChunk;
          }
          --until_chunk;
        }
        if constexpr (kGrouped) {
          if (unit % span == 0 || unit == first_unit)
            advance_rows(p.w, group * kWarps + warp, unit / span, unit == first_unit, &rows,
                         &ahead);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            const int token = min(n * 4 + t, tokens - 1);
            const float2 v =
                kLocal ? sums[slot * tokens + token] : p.x_sums[size_t(unit) * tokens + token];
            group_sum[n] += v.x;
            group_scale[n] = v.y;
          }
        }
        multiply(ring[d], x_at);
        codes.fetch(ring[d]);
        x_at += cell_stride;
        if (x_at == x_end) x_at = x_begin;
        if constexpr (kGrouped) {
          ++unit;
          if (++slot == slots) slot = 0;
          if (unit % span == 0 || rest == 0) flush_group();
        }
      }
    }
    write(group, begin, end - begin);
    if (end == count) break;
    // The next row group begins with the ring's first register.
    for (int i = 0; i < phase; ++i) {
      const Codes head = ring[0];
#pragma unroll
      for (int d = 0; d + 1 < kDepth; ++d) ring[d] = ring[d + 1];
      ring[kDepth - 1] = head;
    }
    clear();
    if constexpr (kGrouped) {
#pragma unroll
      for (int q = 0; q < 4 * kTiles; ++q) (&total[0][0][0])[q] = 0.f;
    }
    begin = end;
    unit = 0;
    ++group;
  }
  if constexpr (kLocal && kHeld > 1)
    if (held > 0) finish_held(group);
}

}  // namespace aqlm
