// cuda.e8p, cuda.scalar on Hopper for 33 .. 64 tokens, one scale along K: as rotated_wgmma.cuh, but
// a warp owns 16 rows, not 32, so that 16 warps have registers for 128 columns of x.
//
// A warp that decodes keeps no MMA going, and eight warps, two a scheduler, were as long with
// decoding as with MMAs: half of the time the tensor cores had nothing to do. Two warps, a pair,
// share the cells of a row block: each decodes its row tile of all of them.
//
// A step is four cells, so that barriers and copies are paid half as often as MMAs are waited for.
//
//   x      a ring that all warps read; they start its copies in turn: one thread that did so held
//          up its warpgroup, and with it all others, in every step
//   codes  a ring of as many slots, a pair's own: each warp copies two cells (cp.async) a step
//          ahead, and a barrier counts both. So a slot is written again only when the other warp
//          has read it: it has started a copy since, that of two steps later.
//
// Architecture sm_90a only.
#pragma once

#include "e8p_decode.cuh"
#include "rotated_codes.cuh"
#include "rotated_rings.cuh"
#include "rotated_rows.cuh"
#include "rotated_stage.cuh"
#include "rotated_tune.h"
#include "wgmma_ptx.cuh"

namespace aqlm {

// A pair's codes: four cells a step, of one row block, in the order of the block's share.
template <int kBits>
struct PairRing {
  static constexpr int kCells = tune::kPairCells, kSlots = tune::kPairStages;
  static constexpr int kCodes = kCellRows * kCellColumns / 8 * kBits;  // of a cell
  static constexpr int kStep = kCells * kCodes, kPairs = tune::kPairWarps / 2;
  int wrap, left;
  int last;                 // cells of a row's last step that the warp copies
  unsigned jump;            // from a row's last step to the pair's next row
  const uint8_t* from;      // the lane's
  unsigned char *to, *own;  // the lane's in slot 0, to write and to read
  uint64_t* full;

  // space: [kPairs][kSlots][kStep], barriers: [kPairs][kSlots].
  __device__ __forceinline__ PairRing(const RotatedMatmul& p, const BlockShare& share,
                                      unsigned char* space, uint64_t* barriers, int warp,
                                      int lane) {
    const int pair = warp / 2, half = warp % 2, begin = half * kCells / 2;
    const int row_cells = p.w.units(), units = p.s.units;
    const int block = share.first / units * kPairs + pair;
    wrap = units - share.unit0;
    left = steps_of_warp(p, share, kPairs, pair);
    last = row_cells - (units - 1) * kCells - begin;
    jump = (kPairs * row_cells - (units - 1) * kCells) * kCodes;
    from = p.w.packed + (size_t(block) * row_cells + share.unit0 * kCells + begin) * kCodes +
           lane * 16;
    to = space + pair * kSlots * kStep + begin * kCodes + lane * 16;
    own = space + pair * kSlots * kStep + half * 8 + lane * 16;
    full = barriers + pair * kSlots;
  }
  // Starts copying the warp's half of the next step.
  __device__ __forceinline__ void fetch(int slot, int units) {
    if (left > 0) {
#pragma unroll
      for (int n = 0; n < kCells / 2; ++n) {
        if (wrap == 1 && n >= last) break;
#pragma unroll
        for (int i = 0; i < kCodes / 512; ++i)
          copy_async(to + slot * kStep + n * kCodes + i * 512, from + n * kCodes + i * 512);
      }
    }
    mbar::arrive_after_copies(full + slot);
    --left;
    from += --wrap == 0 ? jump : kStep;
    if (wrap == 0) wrap = units;
  }
  // The lane's codes of two cells, of the warp's row tile, as those of row tile 0.
  __device__ __forceinline__ void read(int slot, int cell, ScalarCodes<kBits> (&c)[2]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < kCodes / 512; ++j) {
        const uint2 v = *reinterpret_cast<const uint2*>(own + slot * kStep + (cell + n) * kCodes +
                                                        j * 512);
        c[n].a[j] = make_uint4(v.x, v.y, 0, 0);
      }
    }
  }
};

// Staged x: kX bytes a step, in stages that all warps read and give back.
template <int kStages, int kX>
struct TurnRing {
  unsigned char* stages;
  uint64_t *full, *empty;

  __device__ __forceinline__ explicit TurnRing(unsigned char* at)
      : stages(at), full(reinterpret_cast<uint64_t*>(at + kStages * kX)), empty(full + kStages) {}
  // Starts the copy of step `unit` of a row (one thread), or of one that follows the row's end.
  __device__ __forceinline__ void copy(const RotatedMatmul& p, int stage, int unit) {
    for (int wrapped = 0; wrapped < kStages - 1; ++wrapped)
      if (unit >= p.s.units) unit -= p.s.units;
    mbar::expect(full + stage, kX);
    mbar::bulk_copy(stages + stage * kX, p.x_cells + size_t(unit) * kX, kX, full + stage);
  }
  // That of the step kStages - 1 after `now`'s, which is step `unit` of its row.
  __device__ __forceinline__ void ahead(const RotatedMatmul& p, const Ring<kStages>& now,
                                        int unit) {
    const int stage = now.previous();
    mbar::wait(empty + stage, now.stage == 0 ? now.phase ^ 1 : now.phase);
    copy(p, stage, unit + kStages - 1);
  }
};

template <Coding kCoding, int kBits, int kTiles>
__global__ void __launch_bounds__(tune::kPairWarps * 32, 1)
rotated_pairs_kernel(const __grid_constant__ RotatedMatmul p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kE8p = kCoding == Coding::kE8p;
  constexpr int kWarps = tune::kPairWarps, kColumns = 8 * kTiles, kStages = tune::kPairStages;
  constexpr int kCells = tune::kPairCells, kX = kColumns * kStageColumn;  // bytes of a cell
  using Codes = PairRing<kBits>;
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const code_space = smem + tune::rotated_tables(kCoding, kBits);
  unsigned char* const cells = code_space + kWarps / 2 * kStages * Codes::kStep;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, which the compiler cannot see
  const int lane = threadIdx.x % 32;
  const RotatedSchedule& s = p.s;
  const int units = s.units, tokens = p.tokens;  // units: steps
  const BlockShare share(s);
  const int count = share.count, unit0 = share.unit0;
  TurnRing<kStages, kCells * kX> x_ring(cells);
  uint64_t* const code_full = x_ring.empty + kStages;
  float* const exchange = reinterpret_cast<float*>(code_full + kWarps / 2 * kStages);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWarps / 2 * kStages; ++i) mbar::init(code_full + i, 64);
    mbar::init_ring<kStages>(x_ring.full, x_ring.empty, kWarps);
  }
  grid_dependents_start();
  __syncthreads();

  const uint32_t lane_offset = lane * 4;
  Codes codes(p, share, code_space, code_full, warp, lane);
  codes.fetch(0, units);
  if constexpr (kE8p) {
    fill_e8p_tables<kBits>(smem, kWarps * 32);
    __syncthreads();
  }
  grid_dependency_wait();
  if (threadIdx.x == 0)
    for (int i = 0; i < min(count, kStages - 1); ++i) x_ring.copy(p, i, unit0 + i);

  int acc[kTiles * 4] = {};
  constexpr float kStep = 1.f / scalar_step(kBits);
  Ring<kStages> ring;

  // The compiler orders uses of `acc` by its values alone, not by the wait.
  auto finished = [&] {
#pragma unroll
    for (int q = 0; q < kTiles * 4; ++q) asm volatile("" : "+r"(acc[q]) :: "memory");
  };

  int start = -unit0, group = share.first / units;  // start: the step that a row group begins with
  for (;;) {  // row groups
    const int end = min(count, start + units);
    for (int i = max(start, 0); i < end; ++i) {
      const Ring<kStages> now = {__shfl_sync(~0u, ring.stage, 0), ring.phase};  // uniform
      const uint64_t x = core_matrices(cells + now.stage * kCells * kX, kColumns * 16, 128);
      mbar::wait(codes.full + now.stage, now.phase);
#pragma unroll
      for (int cell = 0; cell < kCells; cell += 2) {
        ScalarCodes<kBits> c[2];
        uint32_t words[2][4], a[2][2][4];
        codes.read(now.stage, cell, c);
        if (cell == 0) codes.fetch(now.next(), units);
        if constexpr (kE8p) {
#pragma unroll
          for (int n = 0; n < 2; ++n)
            e8p_words<kBits>(c[n].a[0], c[n].a[0], c[n].b, 0, 0, lane_offset, words[n]);
        }
        mma_groups_wait<0>();
        if (cell == 0) {
          if (i > 0 && lane == 0) mbar::arrive(x_ring.empty + now.previous());
          __syncwarp();
          mbar::wait(x_ring.full + now.stage, now.phase);
        }
        // MMAs read their A registers until they are waited for, which the compiler does not know:
        // what writes them must depend on something that comes after the wait.
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if constexpr (kE8p) {
#pragma unroll
            for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(words[n][j]));
            e8p_expand<kBits>(words[n], 0, a[n]);
          } else {
#pragma unroll
            for (int j = 0; j < Codes::kCodes / 512; ++j)
              asm volatile("" : "+r"(c[n].a[j].x), "+r"(c[n].a[j].y));
            scalar_operands<kBits>(c[n], 0, a[n]);
          }
        }
        mma_fence();
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int at = (cell + n) * kX;
          wgmma(acc, a[n][0], x + (at >> 4));
          wgmma(acc, a[n][1], x + (at + 2 * kColumns * 16 >> 4));
        }
        mma_group_commit();
        if (cell == 0 && (i ^ warp) % kWarps == 0 && i + kStages - 1 < count) {
          if (lane == 0) x_ring.ahead(p, now, i - start);
          __syncwarp();
        }
      }
      ring.advance();
    }
    mma_groups_wait<0>();
    finished();

    const int thread = thread_again(), own = thread / 32, at = thread % 32, half = own % 2;
    const int block = group * (kWarps / 2) + own / 2, row = half * 16 + at / 4;  // of the block
    if (block * kCellRows < p.w.N) {
      float* const out = partials_of(p, group, start <= 0 ? first_slot(p, group) : 0) +
                         own / 2 * kCellRows + row;
      float* const sums = exchange + 2 * kWarps * 128 + own * 64;  // scalar: the warp's
      float scale[2], shift[2];
      if constexpr (!kE8p) {
        RowScales rows;
        rows.load(p.w, block, 0, 1);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          scale[h] = half == 0 ? rows.scale(p.w, h) : rows.scale(p.w, 2 + h);
          shift[h] = half == 0 ? rows.template shift<kBits>(p.w, h)
                               : rows.template shift<kBits>(p.w, 2 + h);
        }
        if (p.w.zeros != nullptr) {  // sums of this row group's activations, of 64 tokens
          float all[2] = {};
          const int from = max(start, 0) - start, to = end - start;
#pragma unroll 1
          for (int cell = from * kCells; cell < to * kCells; ++cell) {
            const float2* const of = p.x_sums + size_t(cell) * (4 * kTiles) + at;
            all[0] += of[0].x;
            all[1] += of[32].x;
          }
          __syncwarp();
          sums[at] = all[0];
          sums[at + 32] = all[1];
          __syncwarp();
        }
      }
      constexpr int kBatch = 4;  // tiles: their latencies overlap
#pragma unroll
      for (int n = 0; n < kTiles; n += kBatch) {
        asm volatile("" ::: "memory");  // no loads of later tiles yet: registers
        if (n * 4 >= tokens) break;
        float v[kBatch][2];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int token = min((n + j) * 4 + at % 4, tokens - 1);
          const float x_scale = p.x_scales[token];
          float sum = 0.f;
          if constexpr (!kE8p) {
            if (p.w.zeros != nullptr) sum = sums[token];
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int* const c = acc + (n + j) * 4 + 2 * h;
            v[j][h] = 256.f * c[0] + c[1];
            if constexpr (kE8p) {
              v[j][h] *= x_scale * (1.f / 32.f);
            } else {
              v[j][h] = (kStep * v[j][h] + shift[h] * sum) * (x_scale * scale[h]);
            }
          }
        }
        if (p.local_bits > 0) {
#pragma unroll
          for (int j = 0; j < kBatch; ++j) transform_tile(v[j], p.local_bits);
        }
        if (p.local_bits > 4) {
          // The pair's 32 rows: a warp finishes two of the tiles. Buffers in turn: one barrier.
          float* const mine = exchange + (n / kBatch % 2 * kWarps + own) * 128 + at;
          const float* const other = exchange + (n / kBatch % 2 * kWarps + (own ^ 1)) * 128 + at;
#pragma unroll
          for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              mine[(2 * j + h) * 32] = half == 0 ? v[2 + j][h] : v[j][h];
          pair_sync(own / 2);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int m = (n + 2 * half + j) * 4 + at % 4;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float a = half == 0 ? v[j][h] : v[2 + j][h], b = other[(2 * j + h) * 32];
              float* const to = out + m * s.group_rows - half * 16 + 8 * h;
              if (m < tokens) {
                to[0] = a + b;
                to[16] = half == 0 ? a - b : b - a;
              }
            }
          }
        } else {
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            const int m = (n + j) * 4 + at % 4;
            if (m < tokens) {
              out[m * s.group_rows] = v[j][0];
              out[m * s.group_rows + 8] = v[j][1];
            }
          }
        }
      }
    }
    if (end == count) break;
#pragma unroll
    for (int q = 0; q < kTiles * 4; ++q) acc[q] = 0;
    finished();
    start = end;
    ++group;
  }
#endif
}

}  // namespace aqlm
