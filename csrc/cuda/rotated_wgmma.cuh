// cuda.e8p, cuda.scalar on Hopper for 5 .. 64 tokens: as rotated_mma.cuh, with warpgroup MMAs.
//
// A warp decodes its 32 x 64 cells into A registers, kCells a step: what a step costs besides is as
// much as decoding a cell. B, the staged activations, is read from shared memory by the tensor
// cores, once for four warps. A row's last cell may be missing: its activations are zeros.
//
//   codes  32 rows a warp, through a ring of its own (cp.async, no barrier)
//   x      bulk copies into a ring that all warps read; thread 0 starts them between its own steps,
//          which leaves every register to the warps that multiply
//
// Scale groups along K: their scales and zeros come with the codes (rotated_scales.cuh), the sums
// of the activations with the cells. A group's first MMA starts from zero.
//
// Architecture sm_90a only.
#pragma once

#include "e8p_decode.cuh"
#include "rotated_codes.cuh"
#include "rotated_rings.cuh"
#include "rotated_rows.cuh"
#include "rotated_scales.cuh"
#include "rotated_stage.cuh"
#include "rotated_tune.h"
#include "wgmma_ptx.cuh"

namespace aqlm {

template <Coding kCoding, int kBits, int kTiles, bool kGrouped, int kCells>
__global__ void
__launch_bounds__(tune::rotated_wg_warps(kCoding, kBits, kTiles, kGrouped) * 32, 1)
rotated_wgmma_kernel(const __grid_constant__ RotatedMatmul p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kE8p = kCoding == Coding::kE8p;
  constexpr int kWarps = tune::rotated_wg_warps(kCoding, kBits, kTiles, kGrouped);
  constexpr int kStages = tune::rotated_wg_stages(kCoding, kBits, kTiles, kCells);
  constexpr int kPlanes = tune::rotated_planes(kCoding, kBits), kColumns = 8 * kTiles;
  constexpr int kCodes = kCellRows * kCellColumns / 8 * kBits;
  constexpr int kPlane = kColumns * kStageColumn, kX = kPlanes * kPlane;
  constexpr int kSums = tune::rotated_wg_sums(kTiles, kGrouped), kStage = kCells * (kX + kSums);
  constexpr int kDepth = tune::rotated_wg_depth(kCoding, kBits, kWarps, kCells);  // steps
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const code_space = smem + tune::rotated_tables(kCoding, kBits);
  unsigned char* const cells = code_space + kWarps * kDepth * kCells * kCodes;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, which the compiler cannot see
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const RotatedSchedule& s = p.s;
  const int units = s.units, blocks = p.w.blocks(), tokens = p.tokens;  // units: steps
  const BlockShare share(s);
  const int count = share.count, unit0 = share.unit0;
  StageRing<kStages, kCells * kX, kCells * kSums> x_ring(cells, unit0);
  // Two of [4][group_rows].
  float* const exchange = reinterpret_cast<float*>(x_ring.empty + kStages);
  if (threadIdx.x == 0) mbar::init_ring<kStages>(x_ring.full, x_ring.empty, kWarps);
  grid_dependents_start();
  __syncthreads();

  const uint32_t lane_offset = lane * 4;
  CodeRing<kBits, kWarps, kDepth, kCells, false> codes(p, share, code_space, warp, lane);
  const int span = kGrouped ? p.w.group / (kCells * kCellColumns) : 1;  // steps of a scale group
  const int chunk_units = span * kGroupChunk;
  const GroupScales scales(p.w, reinterpret_cast<unsigned char*>(exchange) +
                                    tune::rotated_wg_exchange(kTiles, kWarps) +
                                    warp * kGroupBytes);
  if constexpr (kGrouped) scales.copy(codes.block, unit0 / chunk_units, 0);
  for (int i = 0; i < kDepth - 1; ++i) codes.fetch(lane);
  if constexpr (kE8p) {
    fill_e8p_tables<kBits>(smem, kWarps * 32);
    __syncthreads();
  }
  grid_dependency_wait();
  for (int i = 0; i < kStages - 1; ++i) x_ring.fill(p, count);

  int acc[2][kTiles * 4] = {};
  float total[2][kTiles][2] = {};  // grouped: [row tile][tile][row half]
  float group_sum[kTiles] = {};
  constexpr float kStep = 1.f / scalar_step(kBits);
  RowScales rows;  // not grouped
  // Grouped: buffer of scales in use, cells since the other one's copy was started.
  int buffer = 1, since = kDepth;
  Ring<kStages> ring;
  const uint32_t no_bits = static_cast<uint32_t>(s.ctas) >> 31;  // 0
  int read = 0, released = -1;  // slot of codes; stage of x whose MMAs are under way

  // The compiler orders uses of `acc` by its values alone, not by the wait.
  auto finished = [&] {
#pragma unroll
    for (int q = 0; q < 2 * kTiles * 4; ++q)
      asm volatile("" : "+r"((&acc[0][0])[q]) :: "memory");
  };
  auto release = [&] {
    mma_groups_wait<0>();
    if (released >= 0 && lane == 0) mbar::arrive(x_ring.empty + released);
    released = -1;
  };
  auto combined = [&](int r, int n) {
    const int* v = acc[r / 2] + n * 4 + r % 2 * 2;
    return 256.f * v[0] + v[1];
  };
  auto clear = [&] {
#pragma unroll
    for (int q = 0; q < 2 * kTiles * 4; ++q) (&acc[0][0])[q] = 0;
    finished();
  };

  int begin = 0, group = share.first / units, unit = unit0;
  bool within = false;  // grouped: the accumulators hold a part of a scale group
  for (;;) {  // row groups
    const int end = min(count, begin + units - unit);
    uint32_t scale_group = unit / span;
    int next_chunk = unit, group_end = (scale_group + 1) * span;  // units
    for (int i = begin; i < end; ++i) {
      copy_wait<kDepth - 2>();
      if constexpr (kGrouped) {
        if (unit == next_chunk) {  // a chunk of scales begins, the next may come
          if (since < kDepth - 1) copy_wait<0>();
          __syncwarp();
          buffer ^= 1;
          since = 0;
          const int chunk = unit / chunk_units;
          next_chunk = (chunk + 1) * chunk_units;
          if (i + min(next_chunk, units) - unit < count) {
            if (next_chunk >= units) scales.copy((group + 1) * kWarps + warp, 0, buffer ^ 1);
            else scales.copy(group * kWarps + warp, chunk + 1, buffer ^ 1);
          }
        }
        ++since;
      }
      ScalarCodes<kBits> c[kCells];
      codes.read(read, lane, c);
      if (++read == kDepth) read = 0;
      codes.fetch(lane);
      const uint64_t x = core_matrices(cells + ring.stage * kStage, kColumns * 16, 128);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        uint32_t words[2 * kCells][4], a[2 * kCells][2][4];  // of row tile i % 2, cell i / 2
        if constexpr (kE8p) {
#pragma unroll
          for (int i = 0; i < 2 * kCells; ++i) {
            const auto& cell = c[i / 2];
            e8p_words<kBits>(cell.a[0], cell.a[kBits == 4 ? 1 : 0], cell.b, plane, i % 2,
                             lane_offset, words[i]);
          }
        }
        if (plane == 0) {
          release();
          if (i > 0) x_ring.fill(p, count);
          __syncwarp();
          mbar::wait(x_ring.full + ring.stage, ring.phase);
        } else {
          mma_groups_wait<0>();
        }
        // MMAs read their A registers until they are waited for, which the compiler does not know:
        // what writes them must depend on something that comes after the wait.
        if constexpr (kE8p) {
#pragma unroll
          for (int i = 0; i < 2 * kCells; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(words[i][j]));
            e8p_expand<kBits>(words[i], plane, a[i]);
          }
        } else {
#pragma unroll
          for (int n = 0; n < kCells; ++n) {
            after_wait(c[n], no_bits);
#pragma unroll
            for (int m = 0; m < 2; ++m) scalar_operands<kBits>(c[n], m, a[2 * n + m]);
          }
        }
        mma_fence();
#pragma unroll
        for (int i = 0; i < 2 * kCells; ++i) {
          const int at = i / 2 * kX + plane * kPlane;
          wgmma(acc[i % 2], a[i][0], x + (at >> 4), !kGrouped || i > 1 || within);
          wgmma(acc[i % 2], a[i][1], x + (at + 2 * kColumns * 16 >> 4));
        }
        mma_group_commit();
      }
      released = ring.stage;
      if constexpr (kGrouped) {
        const float2* const about =
            reinterpret_cast<const float2*>(cells + ring.stage * kStage + kCells * kX) + t;
        float group_scale[kTiles];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < kCells; ++i) group_sum[n] += about[4 * (i * kTiles + n)].x;
          group_scale[n] = about[4 * n].y;
        }
        within = true;
        __syncwarp();  // read by all lanes before lane 0 releases the stage
        if (++unit == group_end || i + 1 == end) {
          float step[4], shift[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float scale = scales.value(scale_group, 0, g + 8 * r, buffer);
            step[r] = kStep * scale;
            const float zero = scales.value(scale_group, 1, g + 8 * r, buffer);
            shift[r] = scale * (scalar_centre(kBits) - zero);
          }
          release();
          finished();
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            const float sum = group_scale[n] * group_sum[n];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const int* v = acc[r / 2] + n * 4 + r % 2 * 2;
              float& out = total[r / 2][n][r % 2];
              out = fmaf(shift[r], sum, out);
              out = fmaf(step[r] * group_scale[n], static_cast<float>(v[0] * 256 + v[1]), out);
            }
            group_sum[n] = 0.f;
          }
          within = false;
          group_end += span;
          ++scale_group;
        }
      }
      ring.advance();
    }
    release();
    finished();

    const int block = group * kWarps + warp;
    // Rows past the last block: computed for the sake of barriers, never stored.
    const bool exists = block < blocks;
    const bool exchanged = tune::rotated_exchanges(kTiles) && p.local_bits > 5;
    if (exists || exchanged) {
      float* const out = partials_of(p, group, begin == 0 ? first_slot(p, group) : 0);
      if constexpr (!kE8p && !kGrouped) rows.load(p.w, block, 0, 1);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (exchanged && n * 4 >= tokens) break;
        const int m = n * 4 + t, token = min(m, tokens - 1);
        const float x_scale = kGrouped ? 0.f : p.x_scales[token];
        float sum = 0.f;
        if constexpr (!kE8p && !kGrouped) {
          if (p.w.zeros != nullptr || kBits == 8) {
            for (int i = begin + g; i < end; i += 8)
#pragma unroll
              for (int n = 0; n < kCells; ++n)
                sum += p.x_sums[size_t((unit0 + i) % units * kCells + n) * (4 * kTiles) + token].x;
#pragma unroll
            for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
          }
        }
        float v[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if constexpr (kGrouped) {
            v[r] = total[r / 2][n][r % 2];
          } else if constexpr (kE8p) {
            v[r] = combined(r, n) * (x_scale * (1.f / 32.f));
          } else {
            v[r] = kStep * combined(r, n) + rows.template shift<kBits>(p.w, r) * sum;
            v[r] *= x_scale * rows.scale(p.w, r);
          }
        }
        if (p.local_bits > 0) transform_rows(v, p.local_bits);
        if (exchanged) {
          // Two buffers in turn: one barrier a tile.
          float* const ex = exchange + n % 2 * 4 * kWarps * kCellRows;
#pragma unroll
          for (int r = 0; r < 4; ++r) ex[(t * kWarps + warp) * kCellRows + r * 8 + g] = v[r];
          __syncthreads();
          transform_warps<kWarps>(ex, min(4, tokens - n * 4), p.local_bits - 5,
                                  out + n * 4 * s.group_rows, blocks - group * kWarps, warp);
        } else if (m < tokens) {
#pragma unroll
          for (int r = 0; r < 4; ++r)
            out[m * s.group_rows + warp * kCellRows + r * 8 + g] = v[r];
        }
      }
      if (exchanged) __syncthreads();  // the next row group begins with buffer 0
    }
    if (end == count) break;
    clear();
    if constexpr (kGrouped) {
#pragma unroll
      for (int q = 0; q < 4 * kTiles; ++q) (&total[0][0][0])[q] = 0.f;
    }
    begin = end;
    unit = 0;
    ++group;
  }
#endif
}

}  // namespace aqlm
