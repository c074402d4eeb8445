// cuda.additive.split_wgmma: cuda.additive.split for 9 .. 64 tokens a pass on Hopper.
//
// The same classes, tables and lookups (split.cuh); the activations are the B operand of a
// warpgroup MMA in shared memory, where 16 warps share them, instead of registers that every warp
// loads: the cost of a token is that of the MMA alone. 64 tokens in int8 are 128 columns (high and
// low bytes).
//
//   image of one class and unit (fragments.cuh): [half c][column][t = 0..3] words of 4 bytes
//     = vectors 4t + 2c and 4t + 2c + 1, the dimensions of the class
//
// Both copies of the table leave 18 KB for activations: a 17th warp (of a warpgroup that gives its
// registers away) copies those of split_wg_batch units at a time into a ring of stages, and a batch
// is multiplied at once: one barrier and one wait for it. Codes go to registers, eight units ahead:
// four classes read them from L2 at 4 TB/s, which takes 4 MB in flight. A cell of the schedule is
// kSplitWgmmaCell units; units past K have zeros as activations.
// Architecture sm_90a only.
#pragma once

#include <type_traits>

#include "decode/additive.cuh"
#include "split.cuh"
#include "streamk.cuh"
#include "tune.h"
#include "wgmma_ptx.cuh"

namespace aqlm {

constexpr int kSplitWgWarps = tune::kSplitWgmmaRows / kTileRows;  // that multiply

AQLM_HD constexpr int split_wg_batch(int columns) {
  return columns <= 64 ? 2 : 1;
}
// Stages of x, of a batch each: what shared memory has room for.
AQLM_HD constexpr int split_wg_stages(int columns) {
  return columns > 16 ? 4 : 8;
}
AQLM_HD constexpr int split_wg_smem(int nbits, int columns) {
  return tune::split_table_bytes(90, 1 << nbits) +
         split_wg_stages(columns) * (split_wg_batch(columns) * columns * 32 + 16);
}

template <typename T, int kTokens, bool kInt8>
__global__ void __launch_bounds__((kSplitWgWarps + 4) * 32, 1)
split_wgmma_kernel(const __grid_constant__ MatmulParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kColumns = kInt8 ? 2 * kTokens : kTokens, kX = kColumns * 32;  // of a unit
  constexpr int kBatch = split_wg_batch(kColumns), kStage = kBatch * kX;
  constexpr int kStages = split_wg_stages(kColumns), kCell = tune::kSplitWgmmaCell;
  constexpr int kRing = kColumns <= 64 ? 8 : 4;  // units of codes in flight, in registers
  using Acc = std::conditional_t<kInt8, int, float>;
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* const stages = smem + tune::split_table_bytes(90, p.a.entries());
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + kStages * kStage);
  uint64_t* const empty = full + kStages;
  const int lane = threadIdx.x % 32, dims = own_class(p.s);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) mbar::init_ring<kStages>(full, empty, kSplitWgWarps);
  grid_dependents_start();
  __syncthreads();

  if (__shfl_sync(~0u, warp, 0) >= kSplitWgWarps) {
    registers_down<24>();
    if (threadIdx.x != kSplitWgWarps * 32) return;
    const uint8_t* image = p.x_fragments + size_t(dims) * p.s.x_steps * kX;
    Ring<kStages> ring;
    int produced = 0;
    grid_dependency_wait();
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      const int end = piece.u1 * kCell;
      for (int u = piece.u0 * kCell; u < end; u += kBatch, ++produced, ring.advance()) {
        if (produced >= kStages) mbar::wait(empty + ring.stage, ring.phase ^ 1);
        mbar::expect(full + ring.stage, kStage);
        mbar::bulk_copy(stages + ring.stage * kStage, image + size_t(u) * kX, kStage,
                        full + ring.stage);
      }
    });
  } else {
    registers_up<112>();
    const int g = lane / 4, t = lane % 4;
    const uint32_t unit_stride = p.s.tiles * kUnitBytes;
    uint32_t table = smem_address(smem);
    keep(table);
    int loaded_part = -1;
    Ring<kStages> ring;
    for_own_pieces(p.a, p.s, [&](const Piece& piece) {
      // Warps past the part's last row tile repeat it; they write nothing.
      const int tile = piece.tile + min(warp, piece.tiles - 1);
      // (units() and choice_offset(), for this storage alone: 450 instructions fewer.)
      const int last = ceil_div(p.a.in_groups, kTileVectors) - 1;
      const int begin = piece.u0 * kCell, end = piece.u1 * kCell;
      const uint8_t* codes = p.packed + size_t(tile) * kUnitBytes + lane * 16;
      const uint8_t* choices =
          p.packed + (size_t(last + 1) * p.s.tiles * 4 + tile) * (kUnitBytes / 4) + lane * 4;
      keep(codes);
      keep(choices);
      float* const out =
          warp < piece.tiles ? slot_of(p, piece, 0) + warp * kTileRows + g : nullptr;
      // Codes of the next units; past the end any, which are in the table as long as no choice is
      // made. (Not loading them: 28672 x 8192 int8 M = 16 72.8 us instead of 76.8, exact M = 16 138
      // instead of 149 and M = 64 206 instead of 218; but with 128 columns 110 instead of 104.)
      constexpr bool kCut = kColumns <= 64;
      const int stop = min(end, last + 1);
      uint4 c[kRing] = {};
      auto fetch = [&](int r, int u) {
        if constexpr (kCut)
          load_stream_if(u < stop, codes + size_t(uint32_t(u)) * unit_stride, &c[r % kRing]);
        else
          c[r % kRing] = load_stream(codes + size_t(uint32_t(min(u, last))) * unit_stride);
      };
      auto fetch_choices = [&](int u) {
        if (u >= stop) return 0u;
        return load_stream_word(choices + size_t(uint32_t(u / kChoiceUnits)) * (unit_stride / 4));
      };
#pragma unroll
      for (int r = 0; r < kRing; ++r) fetch(r, begin + r);
      uint32_t chosen = fetch_choices(begin), chosen_next = fetch_choices(begin + kChoiceUnits);
      if (piece.part != loaded_part) {
        if (loaded_part >= 0) consumers_sync<kSplitWgWarps * 32>();
        const size_t entry = size_t(piece.part * p.s.classes + dims) * p.a.entries();
        const uint8_t* const from = p.aux + kAuxHeader + entry * 2;
        split_ask_first<kSplitWgWarps * 32>(smem, from, p.a.entries());
        split_fill<kSplitWgWarps * 32>(smem, from, p.a.entries(), true);
        loaded_part = piece.part;
        consumers_sync<kSplitWgWarps * 32>();
      }
      Acc acc[kColumns / 2] = {};
      uint32_t a[kBatch][4], e[8];
      // Lookups of unit u (r = u % kCell); its place takes another's codes.
      auto lookup = [&](const int r, int u) {
        const uint32_t top = second_copies(chosen >> 2 * (r % kChoiceUnits), 0);
        const uint32_t bottom = second_copies(chosen >> 2 * (r % kChoiceUnits), 1);
        const uint4 codes_now = c[r % kRing];
        const uint32_t w[4] = {codes_now.x, codes_now.z, codes_now.y, codes_now.w};
        uint32_t at[8];
#pragma unroll
        for (int j = 0; j < 8; ++j)
          at[j] = copy_offset(w[j / 2], j / 2 % 2 ? bottom : top, j / 4 * 2 + j % 2);
        fetch(r, u + kRing);
#pragma unroll
        for (int j = 0; j < 8; ++j) e[j] = load_entry(table + at[j]);
      };
      // The lookups of the next unit are under way when a batch is multiplied; those past the piece
      // are dropped.
      lookup(0, begin);
      int multiplied = -1;  // stage
#pragma unroll 1
      for (int u = begin; u < end; u += kCell) {
#pragma unroll
        for (int r = 0; r < kCell; ++r) {
          if (r % kBatch == 0) {
            mma_groups_wait<0>();
            if (multiplied >= 0 && lane == 0) mbar::arrive(empty + multiplied);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) a[r % kBatch][j] = e[2 * j] | e[2 * j + 1] << 16;
          if ((r + 1) % kChoiceUnits == 0) {  // the lookups are of the next choices from here
            chosen = chosen_next;
            chosen_next = fetch_choices(u + r + 1 + kChoiceUnits);
          }
          lookup((r + 1) % kCell, u + r + 1);
          if (r % kBatch != kBatch - 1) continue;
          mbar::wait(full + ring.stage, ring.phase);
          const uint64_t x = core_matrices(stages + ring.stage * kStage, kColumns * 16, 128);
          mma_fence();
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            if constexpr (kInt8) wgmma(acc, a[j], x + (j * kX >> 4));
            else wgmma(acc, a[j], x + (j * kX >> 4), T());
          }
          mma_group_commit();
          multiplied = ring.stage;
          ring.advance();
        }
      }
      mma_groups_wait<0>();
      if (lane == 0) mbar::arrive(empty + multiplied);

      if (out == nullptr) return;
      auto put = [&](int token, int row, float v) {
        if (token < p.tokens) out[token * p.s.group_rows + row] = v;
      };
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto lo = acc[n * 4 + 2 * h], hi = acc[n * 4 + 2 * h + 1];
          if constexpr (kInt8) {
            put(n * 4 + t, h * 8, 256.f * lo + hi);
          } else {
            put(n * 8 + 2 * t, h * 8, lo);
            put(n * 8 + 2 * t + 1, h * 8, hi);
          }
        }
    });
  }
#endif
}

}  // namespace aqlm
