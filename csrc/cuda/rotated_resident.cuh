// cuda.e8p at 2 bits on Hopper for 5 .. 16 tokens: warpgroup MMAs as in rotated_wgmma.cuh, in a
// loop of little else than decoding.
//
// With 32 columns of x the MMAs are short, and instructions are what counts. So nothing travels
// through rings: the x of a block's whole range lies in shared memory, and codes come to registers.
// A warp decodes 32 x 64 cells, two a step; a row's last cell may be missing: its x is zeros.
//
//   kOwn   the block quantizes its range of x itself, a warp a token; no kernel before this one
//   else   bulk copies bring what stage_kernel has made of x, a barrier a step
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

// A warp's codes, a step of two cells at a time: of row block `block` and on to the warp's next.
struct StepStream {
  static constexpr int kCodes = kCellRows * kCellColumns / 4, kWarps = tune::kResidentWarps;
  int row_cells, missing, units;
  int wrap, left;
  const uint8_t* from;

  __device__ __forceinline__ StepStream(const RotatedMatmul& p, const BlockShare& share, int warp,
                                        int lane)
      : row_cells(p.w.units()), missing(p.s.units * 2 - row_cells), units(p.s.units) {
    const int block = share.first / units * kWarps + warp;
    wrap = units - share.unit0;
    left = steps_of_warp(p, share, kWarps, warp);
    from = p.w.packed + (size_t(block) * row_cells + share.unit0 * 2) * kCodes + lane * 16;
  }
  // Brings the next 4 KB to L2.
  __device__ __forceinline__ void prefetch(int lane) const {
    if (lane * 128 < min(left, wrap) * 2 * kCodes - missing * kCodes)
      asm volatile("prefetch.global.L2 [%0];" :: "l"(from + lane * (128 - 16)));
  }
  // Starts loading the next step.
  __device__ __forceinline__ void fetch(uint4 (&c)[2]) {
    if (left > 0) {
      c[0] = load_stream(from);
      if (missing == 0 || wrap > 1) c[1] = load_stream(from + kCodes);
    }
    --left;
    from += 2 * kCodes;
    if (--wrap == 0) {
      wrap = units;
      from += (size_t(kWarps - 1) * row_cells - missing) * kCodes;
    }
  }
};

// A token's part of a block's range of x: a warp's loads, all in flight, and its integers.
struct TokenRange {
  static constexpr int kLoads = tune::kResidentOwnCells / 4;  // of a lane: eight values of a cell
  uint4 raw[kLoads];

  // Cells [cell0, cell0 + count) of a row of `row_cells`, the last of which may lie past K.
  __device__ __forceinline__ void load(const RotatedMatmul& p, int token, int cell0, int count,
                                       int row_cells, int lane) {
    const uint16_t* const row = static_cast<const uint16_t*>(p.x) + token * p.x_stride;
    auto each = [&](auto read) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int slot = 4 * j + lane / 8, cell = cell0 + slot;
        const int k = (cell < row_cells ? cell : cell - row_cells) * kCellColumns + lane % 8 * 8;
        raw[j] = make_uint4(0, 0, 0, 0);
        if (4 * j < count) read(row + k, slot < count && k < p.w.K, &raw[j]);
      }
    };
    if (reinterpret_cast<uintptr_t>(row) % 16 == 0) {
      each([](const uint16_t* at, bool wanted, uint4* v) { load_cached_if(wanted, at, v); });
    } else {
      each([](const uint16_t* at, bool wanted, uint4* v) {
        if (wanted)
          *v = make_uint4(at[0] | at[1] << 16, at[2] | at[3] << 16, at[4] | at[5] << 16,
                          at[6] | at[7] << 16);
      });
    }
  }
  // To the token's two columns of `count` cells. Returns the scale.
  template <typename T>
  __device__ __forceinline__ float stage(uint8_t* columns, int count, int cell_bytes,
                                         const StageLayout& layout, int lane) const {
    uint32_t most = 0;  // the largest magnitude, which is in the order of its bits
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (4 * j >= count) break;
      const uint32_t w[4] = {raw[j].x, raw[j].y, raw[j].z, raw[j].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) most = __vmaxu2(most, w[i] & 0x7fff7fffu);
    }
    most = __reduce_max_sync(~0u, max(most & 0xffffu, most >> 16));
    const float peak = unpack2(most, T()).x;
    const float inverse = peak > 0.f ? __fdividef(kStageMax, peak) : 0.f;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int slot = 4 * j + lane / 8;
      float v[8];
      unpack8<T>(raw[j], v);
      int sum[2];
      if (slot < count)
        stage_eight<true>(v, inverse, columns + slot * cell_bytes, lane % 8, layout, sum);
    }
    return peak / kStageMax;
  }
};

// kGroup: cells whose MMAs are waited for together.
template <int kTiles, bool kOwn, int kGroup>
__global__ void __maxnreg__(tune::rotated_resident_registers(kGroup))
rotated_resident_kernel(const __grid_constant__ RotatedMatmul p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kWarps = tune::kResidentWarps, kDepth = 2, kPad = tune::kResidentPad;
  // Bytes of x: 16 rows of K of all columns, a cell, a step.
  constexpr int kChunk = tune::rotated_resident_chunk(kTiles, kOwn);
  constexpr int kX = tune::rotated_resident_cell(kTiles, kOwn), kStep = 2 * kX;
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const head = smem + tune::rotated_tables(Coding::kE8p, 2);
  unsigned char* const cells = head + tune::kResidentHead;
  float* const own_scales = reinterpret_cast<float*>(head);  // kOwn
  uint64_t* const full = reinterpret_cast<uint64_t*>(head);  // else
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, which the compiler cannot see
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const RotatedSchedule& s = p.s;
  const int units = s.units, blocks = p.w.blocks(), tokens = p.tokens;  // units: steps
  const BlockShare share(s);
  const int count = share.count, unit0 = share.unit0, group0 = share.first / units;
  float* const exchange = reinterpret_cast<float*>(cells + count * kStep);  // [token][warp][row]

  // Codes: a register ring, filled ahead of the activations.
  StepStream codes(p, share, warp, lane);
  uint4 ring[kDepth][2] = {};
  grid_dependents_start();
#pragma unroll
  for (int d = 0; d < kDepth; ++d) codes.fetch(ring[d]);
  if (!kOwn && threadIdx.x == 0) {
    for (int i = 0; i < count; ++i) mbar::init(full + i, 1);
    mbar::init_fence();
  }
  fill_e8p_tables<2>(smem, kWarps * 32);
  codes.prefetch(lane);  // after the tables' loads, which would wait for it
  const int slot0 = first_slot(p, group0);
  if constexpr (kOwn)
    prefetch_line(static_cast<const uint16_t*>(p.x) + min(warp, tokens - 1) * p.x_stride +
                  unit0 * 2 * kCellColumns);
  if (p.local_bits < 0) __trap();  // touches the last line of the parameters
  __syncthreads();
  grid_dependency_wait();
  if constexpr (kOwn) {
    if (warp < tokens) {
      TokenRange range;
      range.load(p, warp, unit0 * 2, count * 2, units * 2, lane);
      unsigned char* const to = cells + 2 * warp * 16;
      const StageLayout layout = {16, 4, kChunk};
      const float scale = p.x_type == DType::kFloat16
                              ? range.stage<__half>(to, count * 2, kX, layout, lane)
                              : range.stage<__nv_bfloat16>(to, count * 2, kX, layout, lane);
      if (lane == 0) own_scales[warp] = scale;
    }
    async_proxy_fence();  // MMAs read it
    __syncthreads();
  } else {
    if (lane == 0) {
      for (int i = warp; i < count; i += kWarps) {
        const int unit = unit0 + i < units ? unit0 + i : unit0 + i - units;
        mbar::expect(full + i, kStep);
        mbar::bulk_copy(cells + i * kStep, p.x_cells + size_t(unit) * kStep, kStep, full + i);
      }
    }
    __syncwarp();
  }

  int acc[2][kTiles * 4] = {};
  // The compiler orders uses of `acc` by its values alone, not by the wait.
  auto finished = [&] {
#pragma unroll
    for (int q = 0; q < 2 * kTiles * 4; ++q)
      asm volatile("" : "+r"((&acc[0][0])[q]) :: "memory");
  };
  auto combined = [&](int r, int n) {
    const int* v = acc[r / 2] + n * 4 + r % 2 * 2;
    return 256.f * v[0] + v[1];
  };

  const uint64_t x_begin = core_matrices(cells, kChunk, 128);
  const uint32_t lane_offset = lane * 4;
  auto step = [&](int i, uint4 (&c)[2]) {
#pragma unroll
    for (int cell = 0; cell < 2; cell += kGroup) {
      const uint64_t x = x_begin + (i * kStep + cell * kX >> 4);
      uint32_t words[2 * kGroup][4], a[2 * kGroup][2][4];  // of row tile i % 2, cell i / 2
      // The second cell's as a branch: else its lookups come between the first one's MMAs.
      if (cell == 0 || tokens > 0) {
#pragma unroll
        for (int i = 0; i < 2 * kGroup; ++i)
          e8p_words<2>(c[cell + i / 2], c[cell + i / 2], make_uint2(0, 0), 0, i % 2, lane_offset,
                       words[i]);
      }
      if (cell + kGroup == 2) codes.fetch(c);
      mma_groups_wait<0>();
      if (!kOwn && cell == 0) mbar::wait(full + i, 0);
      // MMAs read their A registers until they are waited for, which the compiler does not know:
      // what writes them must depend on something that comes after the wait.
#pragma unroll
      for (int i = 0; i < 2 * kGroup; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(words[i][j]));
        e8p_expand<2>(words[i], 0, a[i]);
      }
      mma_fence();
#pragma unroll
      for (int i = 0; i < 2 * kGroup; ++i) {
        const int at = i / 2 * kX;
        wgmma(acc[i % 2], a[i][0], x + (at >> 4));
        wgmma(acc[i % 2], a[i][1], x + (at + 2 * kChunk >> 4));
      }
      mma_group_commit();
    }
  };

  auto swap = [&] {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint4 head = ring[0][n];
      ring[0][n] = ring[1][n];
      ring[1][n] = head;
    }
  };

  int begin = 0, group = group0, unit = unit0;
  for (;;) {  // row groups
    const int end = min(count, begin + units - unit);
    for (int i = begin;;) {
      if (i == end) break;
      step(i++, ring[0]);
      if (i == end) {  // the next row group begins with the ring's first registers
        swap();
        break;
      }
      step(i++, ring[1]);
    }
    mma_groups_wait<0>();
    finished();

    const int block = group * kWarps + warp;
    // Rows past the last block: computed for the sake of barriers, never stored.
    const bool exists = block < blocks, exchanged = p.local_bits > 5;
    if (exists || exchanged) {
      float* const out = partials_of(p, group, begin == 0 ? slot0 : 0);
      int first = t;  // token of tile 0, and no addresses of all tokens held through the loop
      asm volatile("" : "+r"(first));
      auto tiles = [&](auto transform, float* to, int stride) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if (n * 4 >= tokens) break;
          const int m = n * 4 + first, token = min(m, tokens - 1);
          const float x_scale = kOwn ? own_scales[token] : p.x_scales[token];
          float v[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) v[r] = combined(r, n) * (x_scale * (1.f / 32.f));
          transform(v);
          if (m < tokens) {
            float* const at = to + m * stride + warp * kCellRows + g;
#pragma unroll
            for (int r = 0; r < 4; ++r) at[r * 8] = v[r];
          }
        }
      };
      if (exchanged) {
        tiles([](float (&v)[4]) { transform_all_rows(v); }, exchange, kWarps * kCellRows + kPad);
        __syncthreads();
        transform_warps<kWarps, kPad>(exchange, tokens, p.local_bits - 5, out,
                                      blocks - group * kWarps, warp);
        if (end < count) __syncthreads();  // the next row group writes there
      } else {
        tiles([&](float (&v)[4]) { if (p.local_bits > 0) transform_rows(v, p.local_bits); }, out,
              kWarps * kCellRows);
      }
    }
    if (end == count) break;
#pragma unroll
    for (int q = 0; q < 2 * kTiles * 4; ++q) (&acc[0][0])[q] = 0;
    finished();
    begin = end;
    unit = 0;
    ++group;
  }
#endif
}

}  // namespace aqlm
