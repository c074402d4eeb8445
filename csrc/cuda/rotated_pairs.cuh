// cuda.e8p, cuda.scalar on Hopper for 33 .. 64 tokens, one scale along K: as rotated_wgmma.cuh, but
// a warp owns 16 rows, not 32, so that 16 warps have registers for 128 columns of x.
//
// A warp that decodes keeps no MMA going, and eight warps, two a scheduler, were as long with
// decoding as with MMAs: half of the time the tensor cores had nothing to do. Two warps, a pair, share
// the cells of a row block: each decodes its row tile of both.
//
//   x      a ring that all warps read, copied by thread 0 (rotated_rings.cuh)
//   codes  a ring of as many slots, a pair's own: each warp copies half of a step (cp.async), half the
//          ring ahead, and a barrier counts both. So a slot is written again only when the other has
//          read it: it has started a copy since, half the ring after that step.
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

// A pair's codes, kSlots / 2 steps ahead: two cells of one row block, in the order of the block's share.
template <int kBits, int kSlots>
struct PairRing {
  static constexpr int kCodes = kCellRows * kCellColumns / 8 * kBits;  // of a cell
  static constexpr int kStep = 2 * kCodes, kAhead = kSlots / 2, kPairs = tune::kPairWarps / 2;
  int row_cells, missing, units;
  int wrap, left;
  int skipped;              // the last step of a row has no second cell: 1; -1
  const uint8_t* from;      // the lane's
  unsigned char *to, *own;  // the lane's in slot 0, to write and to read
  uint64_t* full;

  // space: [kPairs][kSlots][kStep], barriers: [kPairs][kSlots].
  __device__ __forceinline__ PairRing(const RotatedMatmul& p, const BlockShare& share,
                                      unsigned char* space, uint64_t* barriers, int warp, int lane)
      : row_cells(p.w.units()), missing(p.s.units * 2 - row_cells), units(p.s.units) {
    const int pair = warp / 2, half = warp % 2;
    const int block = share.first / units * kPairs + pair;
    wrap = units - share.unit0;
    left = steps_of_warp(p, share, kPairs, pair);
    skipped = half == 1 && missing > 0 ? 1 : -1;
    from = p.w.packed + (size_t(block) * row_cells + share.unit0 * 2 + half) * kCodes + lane * 16;
    to = space + pair * kSlots * kStep + half * kCodes + lane * 16;
    own = space + pair * kSlots * kStep + half * 8 + lane * 16;
    full = barriers + pair * kSlots;
  }
  // Starts copying the warp's half of the next step, a cell.
  __device__ __forceinline__ void fetch(int slot) {
    if (left > 0 && wrap != skipped) {
#pragma unroll
      for (int i = 0; i < kCodes / 512; ++i) copy_async(to + slot * kStep + i * 512, from + i * 512);
    }
    mbar::arrive_copied(full + slot);
    --left;
    from += kStep;
    if (--wrap == 0) {
      wrap = units;
      from += (size_t(kPairs - 1) * row_cells - missing) * kCodes;
    }
  }
  // The lane's codes of a step, of the warp's row tile, as those of row tile 0.
  __device__ __forceinline__ void read(const Ring<kSlots>& ring, ScalarCodes<kBits> (&c)[2]) {
    mbar::wait(full + ring.stage, ring.phase);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < kCodes / 512; ++j) {
        const uint2 v =
            *reinterpret_cast<const uint2*>(own + ring.stage * kStep + n * kCodes + j * 512);
        c[n].a[j] = make_uint4(v.x, v.y, 0, 0);
      }
    }
  }
};

template <Coding kCoding, int kBits, int kTiles>
__global__ void __launch_bounds__(tune::kPairWarps * 32, 1)
rotated_pairs_kernel(const __grid_constant__ RotatedMatmul p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kE8p = kCoding == Coding::kE8p;
  constexpr int kWarps = tune::kPairWarps, kColumns = 8 * kTiles, kStages = tune::kPairStages;
  constexpr int kX = kColumns * kStageColumn;  // bytes of a cell
  using Codes = PairRing<kBits, kStages>;
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const code_space = smem + tune::rotated_tables(kCoding, kBits);
  unsigned char* const cells = code_space + kWarps / 2 * kStages * Codes::kStep;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, which the compiler cannot see
  const int lane = threadIdx.x % 32;
  const RotatedSchedule& s = p.s;
  const int units = s.units, tokens = p.tokens;  // units: steps
  const BlockShare share(s);
  const int count = share.count, unit0 = share.unit0;
  StageRing<kStages, 2 * kX, 0> x_ring(cells, unit0);
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
#pragma unroll
  for (int i = 0; i < Codes::kAhead; ++i) codes.fetch(i);
  if constexpr (kE8p) {
    fill_e8p_tables<kBits>(smem, kWarps * 32);
    __syncthreads();
  }
  grid_dependency_wait();
  for (int i = 0; i < kStages - 1; ++i) x_ring.fill(p, count);

  int acc[kTiles * 4] = {};
  constexpr float kStep = 1.f / scalar_step(kBits);
  Ring<kStages> ring;

  // The compiler orders uses of `acc` by its values alone, not by the wait.
  auto finished = [&] {
#pragma unroll
    for (int q = 0; q < kTiles * 4; ++q) asm volatile("" : "+r"(acc[q]) :: "memory");
  };

  int begin = 0, group = share.first / units, unit = unit0;
  for (;;) {  // row groups
    const int end = min(count, begin + units - unit);
    for (int i = begin; i < end; ++i) {
      ScalarCodes<kBits> c[2];
      codes.read(ring, c);
      codes.fetch(ring.after(Codes::kAhead));
      const uint64_t x = core_matrices(cells + ring.stage * 2 * kX, kColumns * 16, 128);
      uint32_t words[2][4], a[2][2][4];
      if constexpr (kE8p) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
          e8p_words<kBits>(c[n].a[0], c[n].a[0], c[n].b, 0, 0, lane_offset, words[n]);
      }
      mma_groups_wait<0>();
      if (i > 0) {
        if (lane == 0) mbar::arrive(x_ring.empty + ring.after(kStages - 1));
        x_ring.fill(p, count);
      }
      __syncwarp();
      mbar::wait(x_ring.full + ring.stage, ring.phase);
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
        wgmma(acc, a[n][0], x + (n * kX >> 4));
        wgmma(acc, a[n][1], x + (n * kX + 2 * kColumns * 16 >> 4));
      }
      mma_group_commit();
      ring.advance();
    }
    mma_groups_wait<0>();
    finished();

    const int thread = thread_again(), own = thread / 32, at = thread % 32, half = own % 2;
    const int block = group * (kWarps / 2) + own / 2, row = half * 16 + at / 4;  // of the block
    if (block * kCellRows < p.w.N) {
      float* const out = partials_of(p, group, begin == 0 ? first_slot(p, group) : 0) +
                         own / 2 * kCellRows + row;
      float* const sums = exchange + (2 * kWarps + own) * 64;  // scalar: the warp's
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
          int cell = begin == 0 ? unit0 : 0;
          asm volatile("" : "+r"(cell));  // no addresses of it held through the loop
          cell *= 2;
#pragma unroll 1
          for (int i = (end - begin) * 2; i > 0; --i) {
            const float2* const of = p.x_sums + size_t(cell) * (4 * kTiles) + at;
            all[0] += of[0].x;
            all[1] += of[32].x;
            ++cell;
          }
          __syncwarp();
          sums[at] = all[0];
          sums[at + 32] = all[1];
          __syncwarp();
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        asm volatile("" ::: "memory");  // no loads of later tiles yet: registers
        const int m = n * 4 + at % 4, token = min(m, tokens - 1);
        const float x_scale = p.x_scales[token];
        float sum = 0.f;
        if constexpr (!kE8p) {
          if (p.w.zeros != nullptr) sum = sums[token];
        }
        float v[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          v[h] = 256.f * acc[n * 4 + 2 * h] + acc[n * 4 + 2 * h + 1];
          if constexpr (kE8p) {
            v[h] *= x_scale * (1.f / 32.f);
          } else {
            v[h] = (kStep * v[h] + shift[h] * sum) * (x_scale * scale[h]);
          }
        }
        if (p.local_bits > 0) {
          transform_tile(v, p.local_bits);
          if (p.local_bits > 4) {  // rows of the pair: buffers in turn, one barrier a tile
            float* const ex = exchange + (n % 2 * kWarps + own) * 64 + at;
            float* const other = exchange + (n % 2 * kWarps + (own ^ 1)) * 64 + at;
            ex[0] = v[0];
            ex[32] = v[1];
            pair_sync(own / 2);
#pragma unroll
            for (int h = 0; h < 2; ++h)
              v[h] = half == 0 ? v[h] + other[32 * h] : other[32 * h] - v[h];
          }
        }
        if (m < tokens) {
#pragma unroll
          for (int h = 0; h < 2; ++h) out[m * s.group_rows + 8 * h] = v[h];
        }
      }
    }
    if (end == count) break;
#pragma unroll
    for (int q = 0; q < kTiles * 4; ++q) acc[q] = 0;
    finished();
    begin = end;
    unit = 0;
    ++group;
  }
#endif
}

}  // namespace aqlm
